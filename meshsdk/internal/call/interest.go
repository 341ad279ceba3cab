package call

import (
	"sync"
	"sync/atomic"
)

// interest is why a name is subscribed to: watches, calls that wait, and calls of the last minute.
type interest struct {
	name string
	// used is set by calls and cleared by the sweep. Calls write it only when it is not set, so that
	// they do not take the cache line from each other.
	used atomic.Bool

	// Guarded by Engine.mu.
	holds   int // watches that hold, calls that wait
	idle    int // sweeps without use
	watches map[*watch]struct{}
	release func()
	dropped bool
}

func (in *interest) touch() {
	if !in.used.Load() {
		in.used.Store(true)
	}
}

// hold gives the interest in name, subscribed to if it is new, and keeps it until letGo; nil after
// Close.
func (e *Engine) hold(name string) *interest {
	e.mu.Lock()
	// A name that is being released is subscribed to again afterwards, never in between: the release
	// would take away what the new subscription brought.
	for ch := e.leaving[name]; ch != nil; ch = e.leaving[name] {
		e.mu.Unlock()
		<-ch
		e.mu.Lock()
	}
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	in := e.interests[name]
	if in != nil {
		in.holds++
		e.mu.Unlock()
		return in
	}
	in = &interest{name: name, holds: 1, watches: make(map[*watch]struct{})}
	e.interests[name] = in
	if e.snapshot.Services[name] != nil {
		e.rebuild()
	}
	if e.stopSweep == nil {
		e.stopSweep = e.clock.AfterFunc(sweepEvery, e.sweep)
	}
	e.mu.Unlock()
	if e.cfg.Subscribe == nil {
		return in
	}
	e.cfg.Log.Debug("name subscribed", "service", name)
	release := e.cfg.Subscribe(name)
	e.mu.Lock()
	if !in.dropped {
		in.release = release
		release = nil
	}
	e.mu.Unlock()
	if release != nil { // closed meanwhile
		release()
	}
	return in
}

func (e *Engine) letGo(in *interest) {
	e.mu.Lock()
	defer e.mu.Unlock()
	in.holds--
}

// sweep releases the names that were not used since the sweep before the last one.
func (e *Engine) sweep() {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return
	}
	var gone []*interest
	for name, in := range e.interests {
		switch {
		case in.used.Swap(false) || in.holds > 0:
			in.idle = 0
		case in.idle == 0:
			in.idle = 1
		default:
			delete(e.interests, name)
			in.dropped = true
			gone = append(gone, in)
			e.leaving[name] = make(chan struct{})
		}
	}
	if len(gone) > 0 {
		e.rebuild()
	}
	e.stopSweep = nil
	if len(e.interests) > 0 {
		e.stopSweep = e.clock.AfterFunc(sweepEvery, e.sweep)
	}
	e.mu.Unlock()
	for _, in := range gone {
		e.cfg.Log.Debug("name released", "service", in.name)
		for w := range in.watches { // only followers are left; nobody adds to a dropped interest
			w.deliver(e)
		}
		if in.release != nil {
			in.release()
		}
		e.mu.Lock()
		close(e.leaving[in.name])
		delete(e.leaving, in.name)
		e.mu.Unlock()
	}
}

// watch is one Watch or Follow.
type watch struct {
	name   string
	f      func(*Service)
	follow bool
	gone   atomic.Bool

	mu   sync.Mutex // held while f runs: f is never called twice at once
	last *Service
}

// deliver calls f with the newest service when it is another than the last time.
func (w *watch) deliver(e *Engine) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.gone.Load() {
		return
	}
	e.mu.Lock()
	svc := e.snapshot.Services[w.name]
	if e.interests[w.name] == nil {
		svc = nil
	}
	e.mu.Unlock()
	if svc == w.last || svc == nil && !w.follow {
		return
	}
	w.last = svc
	w.f(svc)
}

// Watch subscribes to name and calls f with its configuration, at once when it is known and then
// at each change, in order and never twice at once. A service with Err set is given too. f may run
// in the caller of Watch or of Publish; it must not block and may call cancel. The name stays
// subscribed until cancel; f may still be running when cancel returns.
func (e *Engine) Watch(name string, f func(*Service)) (cancel func()) {
	return e.watch(&watch{name: name, f: f})
}

// Follow is Watch without holding the name: when no Watch holds it and no call used it for 60 to
// 90 s it is released, and f is called with nil for the last time. A pool of connections follows
// what calls use.
func (e *Engine) Follow(name string, f func(*Service)) (cancel func()) {
	return e.watch(&watch{name: name, f: f, follow: true})
}

func (e *Engine) watch(w *watch) (cancel func()) {
	in := e.hold(w.name)
	if in == nil {
		return func() {}
	}
	in.touch()
	e.mu.Lock()
	in.watches[w] = struct{}{}
	e.mu.Unlock()
	if w.follow {
		e.letGo(in)
	}
	w.deliver(e)
	return func() {
		if w.gone.Swap(true) {
			return
		}
		e.mu.Lock()
		delete(in.watches, w)
		if !w.follow {
			in.holds--
		}
		e.mu.Unlock()
	}
}
