package ebpf

import (
	"context"
	"errors"

	"go.uber.org/fx"
)

// Module provides an *Agent made of cfg, which runs from the application's start to its stop. The
// start ends when the agent is ready; an agent that ends by itself shuts the application down with
// exit code 1. Programs and DNS proxy outlive the stop.
func Module(cfg Config) fx.Option {
	return fx.Module("ebpf",
		fx.Provide(func() (*Agent, error) { return New(cfg) }),
		fx.Provide(fx.Private, newRunner),
		fx.Invoke(func(lc fx.Lifecycle, r *runner) {
			lc.Append(fx.Hook{OnStart: r.start, OnStop: r.stop})
		}),
	)
}

// runner owns the goroutine of Agent.Run.
type runner struct {
	agent    *Agent
	shutdown fx.Shutdowner
	cancel   context.CancelFunc
	done     chan struct{}
	err      error // written before done is closed
}

func newRunner(a *Agent, s fx.Shutdowner) *runner {
	return &runner{agent: a, shutdown: s, done: make(chan struct{})}
}

func (r *runner) start(ctx context.Context) error {
	// The context of a start hook ends with the start.
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r.cancel = cancel
	go func() {
		defer close(r.done)
		if r.err = r.agent.Run(run); r.err != nil {
			_ = r.shutdown.Shutdown(fx.ExitCode(1)) // fails only when it is under way already
		}
	}()
	select {
	case <-r.agent.Ready():
		return nil
	case <-r.done:
		if r.err != nil {
			return r.err
		}
		return errors.New("node agent ended before it was ready")
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
