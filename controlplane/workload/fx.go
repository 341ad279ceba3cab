package workload

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"go.uber.org/dig"
	"go.uber.org/fx"
	"go.uber.org/fx/fxevent"
)

// stopTimeout bounds the end of the node. Its longest wait is a drain of leaveTimeout, which a
// stop cuts short.
const stopTimeout = 10 * time.Second

// Module provides a *Node made of cfg, which runs from the application's start to its stop. The
// start ends when both sockets accept connections; a node that ends by itself shuts the
// application down with exit code 1. Where cfg has no Cgroups, those that the application provides
// are taken.
func Module(cfg Config) fx.Option {
	return fx.Module("node",
		fx.Provide(func(in provided) (*Node, error) {
			if cfg.Cgroups == nil {
				cfg.Cgroups = in.Cgroups
			}
			return New(cfg)
		}),
		fx.Provide(newRunner),
		fx.Invoke(func(lc fx.Lifecycle, r *runner) {
			lc.Append(fx.Hook{OnStart: r.start, OnStop: r.stop})
		}),
	)
}

type provided struct {
	fx.In
	Cgroups Cgroups `optional:"true"`
}

// runner owns the goroutine of Node.Run.
type runner struct {
	node     *Node
	shutdown fx.Shutdowner
	cancel   context.CancelFunc
	done     chan struct{}
	err      error // written before done is closed
}

func newRunner(n *Node, s fx.Shutdowner) *runner {
	return &runner{node: n, shutdown: s, done: make(chan struct{})}
}

func (r *runner) start(ctx context.Context) error {
	// The context of a start hook ends with the start.
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r.cancel = cancel
	go func() {
		defer close(r.done)
		if r.err = r.node.Run(run); r.err != nil {
			_ = r.shutdown.Shutdown(fx.ExitCode(1)) // fails only when it is under way already
		}
	}()
	select {
	case <-r.node.Ready():
		return nil
	case <-r.done:
		if r.err != nil {
			return r.err
		}
		return errors.New("node ended before it was ready")
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), r.stop(context.WithoutCancel(ctx)))
	}
}

func (r *runner) stop(ctx context.Context) error {
	r.cancel()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Run runs a node as an fx application until ctx is done, then stops it. ready is called once both
// sockets accept connections; its error ends the node. Nil means that nobody waits. The error is
// that of the node itself. Options are parts that start before the node and stop after it; the node
// agent is one.
func Run(ctx context.Context, cfg Config, ready func(*Node) error, options ...fx.Option) error {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var r *runner
	app := fx.New(
		fx.Options(options...),
		Module(cfg),
		fx.Populate(&r),
		fx.StopTimeout(stopTimeout),
		fx.WithLogger(func() fxevent.Logger {
			l := &fxevent.SlogLogger{Logger: log}
			l.UseLogLevel(slog.LevelDebug)
			l.UseErrorLevel(slog.LevelDebug) // the caller reports what Run returns
			return l
		}),
	)
	if err := app.Err(); err != nil {
		return dig.RootCause(err)
	}
	if err := app.Start(ctx); err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Cause(ctx)) {
			return nil // told to end before it was ready
		}
		return err
	}
	var err error
	if ready != nil {
		err = ready(r.node)
	}
	if err == nil {
		select {
		case <-ctx.Done():
		case <-app.Wait():
		}
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return errors.Join(err, app.Stop(stop))
}
