package call

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of an Engine that Config does not change.
const (
	// configWait is how long a call waits for the first configuration of a name when its own
	// deadline is later or absent.
	configWait = 15 * time.Second
	// sweepEvery is half of how long a name must go without calls and watches to be released.
	sweepEvery = 30 * time.Second
)

// Config of an Engine.
type Config struct {
	// Subscribe asks the Mesh for a listener; it may call Publish before it returns. release is
	// called when no watch holds the name and no call used it for 60 to 90 s. Nil: what Publish
	// gives is all there is.
	Subscribe func(name string) (release func())
	// Observer hears of every call; nil means nobody does.
	Observer Observer
	// Clock measures waits and timeouts; nil means the real one. With another clock the deadlines of
	// calls come from its AfterFunc, and Deadline of a call says only what the caller's context says.
	Clock Clock
	// Rand gives uniform 64-bit values and is safe for concurrent use; nil means math/rand/v2.
	Rand func() uint64
	// Log gets the changes of subscriptions at Debug; nil discards.
	Log *slog.Logger
	// ReplayPerCall and ReplayTotal bound the bytes kept to repeat calls. Zero means 256 KiB a call
	// and 16 MiB an engine; negative means none.
	ReplayPerCall, ReplayTotal int64
	// Missing, when not nil, says why there is no configuration at all, and what to do about it; a
	// nil error means that there is some, an empty hint that nothing better is known than to ask
	// whether the control plane runs. Read only for the text of config_missing.
	Missing func() (hint string, why error)
	// Known lists names that exist beyond those of the snapshot, for hints; nil means none.
	Known func() []string
}

// Engine runs the calls of one Mesh. It is safe for concurrent use. It starts no goroutine; one
// timer releases names that nobody uses. Close ends it.
type Engine struct {
	cfg   Config
	clock Clock
	timed bool // the clock is not the real one: deadlines come from it
	view  atomic.Pointer[view]
	held  atomic.Int64 // bytes in replay buffers

	mu        sync.Mutex // guards what follows; never held while foreign code runs
	snapshot  *Snapshot
	interests map[string]*interest
	leaving   map[string]chan struct{} // names being released; closed when that is done
	changed   chan struct{}            // closed and replaced by each Publish
	stopSweep func() bool              // nil when no sweep is due
	closed    bool
}

// view is what a call reads: one map of the names that are both in use and known. It is replaced,
// never changed.
type view struct{ names map[string]bound }

type bound struct {
	service *Service
	in      *interest
}

// New returns an engine without configuration.
func New(cfg Config) *Engine {
	if cfg.Rand == nil {
		cfg.Rand = rand.Uint64
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 100}))
	}
	if cfg.ReplayPerCall == 0 {
		cfg.ReplayPerCall = 256 << 10
	}
	if cfg.ReplayTotal == 0 {
		cfg.ReplayTotal = 16 << 20
	}
	e := &Engine{
		cfg:       cfg,
		clock:     cfg.Clock,
		timed:     cfg.Clock != nil,
		snapshot:  &Snapshot{},
		interests: make(map[string]*interest),
		leaving:   make(map[string]chan struct{}),
		changed:   make(chan struct{}),
	}
	if e.clock == nil {
		e.clock = realClock{}
	}
	e.view.Store(&view{})
	return e
}

// Publish makes s the configuration of every call that begins from now on, and tells the watches
// whose service changed. One goroutine at a time calls it.
func (e *Engine) Publish(s *Snapshot) {
	e.mu.Lock()
	e.snapshot = s
	e.rebuild()
	if !e.closed {
		close(e.changed)
		e.changed = make(chan struct{})
	}
	var told []*watch
	for _, in := range e.interests {
		for w := range in.watches {
			told = append(told, w)
		}
	}
	e.mu.Unlock()
	for _, w := range told {
		w.deliver(e)
	}
}

// Snapshot is the configuration of this moment; never nil.
func (e *Engine) Snapshot() *Snapshot {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.snapshot
}

// rebuild makes the view of snapshot and interests; e.mu is held.
func (e *Engine) rebuild() {
	v := &view{names: make(map[string]bound, len(e.interests))}
	for name, in := range e.interests {
		if svc := e.snapshot.Services[name]; svc != nil {
			v.names[name] = bound{service: svc, in: in}
		}
	}
	e.view.Store(v)
}

// Service gives the configuration of a name. It subscribes to it, and waits until it is known, ctx
// is done or 15 s have passed. Errors are *Error.
func (e *Engine) Service(ctx context.Context, name string) (*Service, error) {
	svc, err := e.service(ctx, name)
	if err != nil {
		return nil, err
	}
	return svc, nil
}

// service is Service with the error as it is. The path of nearly every call: one atomic load, one
// look into a map.
func (e *Engine) service(ctx context.Context, name string) (*Service, *Error) {
	b, ok := e.view.Load().names[name]
	if !ok {
		return e.await(ctx, name)
	}
	b.in.touch()
	if b.service.Err != nil {
		return nil, e.unusable(b.service)
	}
	return b.service, nil
}

// await is service for a name that is not known or not in use.
func (e *Engine) await(ctx context.Context, name string) (*Service, *Error) {
	in := e.hold(name)
	if in == nil {
		return nil, shut(name)
	}
	defer e.letGo(in)
	in.touch()
	var late chan struct{}
	for {
		e.mu.Lock()
		svc, changed, closed := e.snapshot.Services[name], e.changed, e.closed
		e.mu.Unlock()
		if closed {
			return nil, shut(name)
		}
		if svc != nil {
			if svc.Err != nil {
				return nil, e.unusable(svc)
			}
			return svc, nil
		}
		if late == nil {
			ch := make(chan struct{})
			late = ch
			defer e.clock.AfterFunc(configWait, func() { close(ch) })()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil, &Error{Service: name, Reason: ReasonCancelled, Detail: "while waiting for its configuration", Err: context.Cause(ctx)}
			}
			return nil, e.missing(name, context.Cause(ctx))
		case <-late:
			return nil, e.missing(name, nil)
		}
	}
}

func shut(name string) *Error {
	return &Error{Service: name, Reason: ReasonDraining, Detail: "the mesh of this process is closed"}
}

func (e *Engine) missing(name string, cause error) *Error {
	err := &Error{
		Service: name, Reason: ReasonConfigMissing, Err: cause,
		Detail: "the control plane did not answer in time",
		Hint:   "`inlay status` says whether the control plane runs and this client is connected",
	}
	if e.cfg.Missing != nil {
		if hint, why := e.cfg.Missing(); why != nil {
			err.Detail, err.Err = "this process has no configuration at all", why
			if hint != "" {
				err.Hint = hint
			}
		}
	}
	return err
}

func (e *Engine) unusable(s *Service) *Error {
	if !s.NotExist {
		return &Error{
			Service: s.Name, Reason: ReasonConfigMissing, Err: s.Err,
			Detail: "its configuration was never valid",
			Hint:   "`inlay get clients` shows what was rejected and why",
		}
	}
	return &Error{
		Service: s.Name, Reason: ReasonNoRoute, Err: s.Err,
		Detail: "no service of that name exists",
		Hint:   e.nearest(s.Name),
	}
}

// Close releases every name and stops what would run later. Calls in flight end as they would; those
// that wait for configuration and new ones fail with draining. It may be called twice.
func (e *Engine) Close() {
	e.mu.Lock()
	if !e.closed {
		e.closed = true
		close(e.changed) // and never replaced: whoever waits looks again
	}
	if e.stopSweep != nil {
		e.stopSweep()
		e.stopSweep = nil
	}
	var all []func()
	for name, in := range e.interests {
		delete(e.interests, name)
		in.dropped = true
		if in.release != nil {
			all = append(all, in.release)
			in.release = nil
		}
	}
	e.view.Store(&view{})
	e.mu.Unlock()
	for _, release := range all {
		release()
	}
}

func (e *Engine) now() time.Time { return e.clock.Now() }
