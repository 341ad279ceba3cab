// Package registry knows the live instances of every service: programs announce themselves over
// one gRPC stream each, a lease keeps them, a drain takes them out without losing a call. compile
// reads its snapshots, the pipeline waits on Changed, and store remembers the instances over a
// restart.
//
// It never compiles and never speaks xDS; that a drained instance has left every client it is told
// by whoever serves them.
package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// Clock tells the time and calls back later.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// Leases remembers instances over a restart. Both methods may block on a disk; an error is logged
// and the registry goes on from memory.
type Leases interface {
	// Instances returns what was written; Expires is not read.
	Instances() ([]Instance, error)
	// WriteInstances puts and deletes by id, all or none.
	WriteInstances(put []Instance, del []string) error
}

// Config is what New needs.
type Config struct {
	Store Leases // nil remembers nothing
	// TrustDomain that callers must belong to. Empty accepts any that the listener verified.
	TrustDomain string
	// LeaseTTL is how long an instance lives without renewal. Zero means 15 s.
	LeaseTTL time.Duration
	// DrainWait bounds how long a drain waits for the clients. Zero means 5 s.
	DrainWait time.Duration
	// MaxInstances bounds the registry. Zero means 200 000.
	MaxInstances int
	// NodeUIDs are the users whose processes may register programs without the SDK, for any
	// service, over the unix socket. Nil means this process's own user and root.
	NodeUIDs []uint32
	// WaitDrained blocks until no client uses the instance any more, and reports whether that is
	// so; ctx bounds it. Nil means that nobody is asked and the answer is true.
	WaitDrained func(ctx context.Context, instanceID string) bool
	// MTLSMode is the mode of a service; one that nobody declared is strict. Nil means strict.
	MTLSMode func(namespace, service string) ir.MTLS
	// Plain says that a port of a service is declared as TCP or UDP, which no mode applies to. Nil
	// means that what an instance registers is so.
	Plain func(namespace, service string, port PortBinding) bool
	Clock Clock        // nil means the real one
	Log   *slog.Logger // nil discards
}

// Registry holds the instances. It is safe for concurrent use.
type Registry struct {
	cfg  Config
	done chan struct{} // closed when Run ends: the streams end too
	wake chan struct{} // capacity 1: the first entry appeared
	due  time.Time     // when Run looks next, zero for never; of its goroutine alone

	mu      sync.Mutex
	entries map[string]*entry              // by instance id
	byRun   map[string]map[string]struct{} // instance ids by run id
	dirty   map[string]struct{}            // instance ids that the store has not got yet
	changed chan struct{}

	storeMu  sync.Mutex // held while writing to the store; never taken under mu
	storeErr error      // of the last write; guarded by storeMu
}

// entry is an instance with who keeps it.
type entry struct {
	inst Instance
	// owner is the stream that keeps the entry; nil for one loaded from the store and for one
	// whose stream broke.
	owner *owner
}

// owner is one stream's hold on an entry. Why is set before lost is closed.
type owner struct {
	lost chan struct{}
	why  loss
}

// loss says why a stream no longer keeps its instance.
type loss int

const (
	lostToReplacement  loss = iota + 1 // the SDK of the program registered
	lostToReconnection                 // the same instance came back on another stream
	lostToExpiry                       // the stream stopped renewing
)

// New checks cfg, and loads the stored instances with a fresh full lease each: after a restart of
// the control plane they live until they come back or the lease ends. A store that cannot be read
// is an error; nothing runs until Run.
func New(cfg Config) (*Registry, error) {
	if cfg.LeaseTTL == 0 {
		cfg.LeaseTTL = 15 * time.Second
	}
	if cfg.LeaseTTL < time.Second {
		return nil, fmt.Errorf("registry: lease of %v: want at least 1s, since clients count it in seconds", cfg.LeaseTTL)
	}
	cfg.DrainWait = cmp.Or(cfg.DrainWait, 5*time.Second)
	cfg.MaxInstances = cmp.Or(cfg.MaxInstances, 200_000)
	if cfg.NodeUIDs == nil {
		cfg.NodeUIDs = []uint32{0, uint32(os.Geteuid())}
	}
	if cfg.WaitDrained == nil {
		cfg.WaitDrained = func(context.Context, string) bool { return true }
	}
	if cfg.MTLSMode == nil {
		cfg.MTLSMode = func(string, string) ir.MTLS { return ir.Strict }
	}
	if cfg.Plain == nil {
		cfg.Plain = func(_, _ string, p PortBinding) bool { return p.Protocol == "TCP" || p.UDP() }
	}
	if cfg.Clock == nil {
		cfg.Clock = systemClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Registry{
		cfg:     cfg,
		done:    make(chan struct{}),
		wake:    make(chan struct{}, 1),
		entries: make(map[string]*entry),
		byRun:   make(map[string]map[string]struct{}),
		dirty:   make(map[string]struct{}),
		changed: make(chan struct{}),
	}
	if cfg.Store != nil {
		stored, err := cfg.Store.Instances()
		if err != nil {
			return nil, fmt.Errorf("registry: load instances: %w", err)
		}
		until := cfg.Clock.Now().Add(cfg.LeaseTTL)
		for _, in := range stored {
			in.Expires = until
			r.set(&entry{inst: in})
		}
	}
	return r, nil
}

// Run drops instances whose lease has ended, until ctx is done; then it ends every stream with
// Unavailable and keeps what the store holds for the next start. It must be called once.
func (r *Registry) Run(ctx context.Context) error {
	defer close(r.done)
	for {
		next, some := r.expire()
		var due chan struct{}
		stop := func() bool { return false }
		if some {
			fired := make(chan struct{})
			due = fired
			stop = r.cfg.Clock.AfterFunc(max(0, next.Sub(r.cfg.Clock.Now())), func() { close(fired) })
		}
		select {
		case <-ctx.Done():
			stop()
			return nil
		case <-due:
		case <-r.wake:
			stop()
		}
	}
}

// Snapshot returns every instance of this moment, by namespace, service and instance id.
func (r *Registry) Snapshot() Snapshot {
	r.mu.Lock()
	out := make([]Instance, 0, len(r.entries))
	for _, e := range r.entries {
		out = append(out, e.inst)
	}
	r.mu.Unlock()
	slices.SortFunc(out, func(a, b Instance) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Service, b.Service), cmp.Compare(a.ID, b.ID))
	})
	return Snapshot{Instances: out}
}

// Changed returns a channel that is closed when an instance came, went or changed after this
// call. A renewal is no change.
func (r *Registry) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// StoreErr is why the last write to the store failed; nil when it did not.
func (r *Registry) StoreErr() error {
	r.storeMu.Lock()
	defer r.storeMu.Unlock()
	return r.storeErr
}

// note marks an instance as changed. r.mu is held.
func (r *Registry) note(id string) {
	r.dirty[id] = struct{}{}
	close(r.changed)
	r.changed = make(chan struct{})
}

// set adds an entry under a free id. r.mu is held, but in New.
func (r *Registry) set(e *entry) {
	r.entries[e.inst.ID] = e
	if run := e.inst.RunID; run != "" {
		if r.byRun[run] == nil {
			r.byRun[run] = make(map[string]struct{}, 1)
		}
		r.byRun[run][e.inst.ID] = struct{}{}
	}
}

// unset removes an entry and notes it. r.mu is held.
func (r *Registry) unset(id string) {
	e := r.entries[id]
	delete(r.entries, id)
	if run := e.inst.RunID; run != "" {
		delete(r.byRun[run], id)
		if len(r.byRun[run]) == 0 {
			delete(r.byRun, run)
		}
	}
	r.note(id)
}

// expire drops what is due and returns when the next lease ends.
func (r *Registry) expire() (next time.Time, some bool) {
	now := r.cfg.Clock.Now()
	var gone []Instance
	r.mu.Lock()
	// Nobody could renew while this process itself stood still (stopped, a frozen machine). As after
	// a restart, everybody gets a fresh lease: that all would be dropped at once is no fault of theirs.
	if late := now.Sub(r.due); !r.due.IsZero() && late > r.cfg.LeaseTTL/3 {
		for _, e := range r.entries {
			e.inst.Expires = now.Add(r.cfg.LeaseTTL)
		}
		r.cfg.Log.Warn("every lease begins anew: the control plane stood still", "for", late)
	}
	for id, e := range r.entries {
		if !e.inst.Expires.After(now) {
			r.unset(id)
			e.lose(lostToExpiry)
			gone = append(gone, e.inst)
			continue
		}
		if !some || e.inst.Expires.Before(next) {
			next, some = e.inst.Expires, true
		}
	}
	r.due = next
	r.mu.Unlock()
	for _, in := range gone {
		r.cfg.Log.Warn("instance dropped: its lease ended", "namespace", in.Namespace, "service", in.Service, "instance", in.ID)
	}
	if len(gone) > 0 {
		r.flush()
	}
	return next, some
}

// lose takes the entry from its stream. The registry's mu is held.
func (e *entry) lose(why loss) {
	if e.owner != nil {
		e.owner.why = why
		close(e.owner.lost)
		e.owner = nil
	}
}

// errFull is returned by put when the registry holds as many instances as it may.
var errFull = errors.New("registry is full")

// errTaken is returned by put when the id belongs to somebody else.
var errTaken = errors.New("instance id is taken")

// errReplaced is returned by put for a program without SDK whose SDK has registered already.
var errReplaced = errors.New("replaced")

// put registers or replaces an instance for the stream o. It blocks until the store has it.
func (r *Registry) put(in Instance, o *owner) error {
	in.Expires = r.cfg.Clock.Now().Add(r.cfg.LeaseTTL)
	if err := r.insert(in, o); err != nil {
		return err
	}
	r.flush()
	return nil
}

func (r *Registry) insert(in Instance, o *owner) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	old, exists := r.entries[in.ID]
	switch {
	case exists && (old.inst.Namespace != in.Namespace || old.inst.Service != in.Service || old.inst.Identity != in.Identity):
		return fmt.Errorf("%w by an instance of %s.%s", errTaken, old.inst.Service, old.inst.Namespace)
	case !exists && len(r.entries) >= r.cfg.MaxInstances:
		return errFull
	}
	if in.RunID != "" {
		for id := range r.byRun[in.RunID] {
			e := r.entries[id]
			if id == in.ID || e.inst.Namespace != in.Namespace || e.inst.Service != in.Service {
				continue
			}
			if len(in.Ports) == 0 || len(e.inst.Ports) == 0 {
				continue // a workload that serves nobody is no endpoint beside another
			}
			// One program is one endpoint: what its SDK says of itself is worth more than what
			// `inlay run --port` saw from outside.
			switch {
			case in.Identity != "" && e.inst.Identity == "":
				r.unset(id)
				e.lose(lostToReplacement)
			case in.Identity == "" && e.inst.Identity != "":
				return errReplaced
			}
		}
	}
	if exists && old.owner != o {
		old.lose(lostToReconnection)
	}
	if exists {
		r.unset(in.ID) // its run id may be another
	}
	r.set(&entry{inst: in, owner: o})
	r.note(in.ID)
	if len(r.entries) == 1 { // else Run waits for an earlier one
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
	return nil
}

// renew extends the lease that o holds; it reports false when o holds it no more.
func (r *Registry) renew(id string, o *owner) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.entries[id]
	if !ok || e.owner != o {
		return false
	}
	e.inst.Expires = r.cfg.Clock.Now().Add(r.cfg.LeaseTTL)
	return true
}

// release leaves the entry to its lease: the stream broke without a drain.
func (r *Registry) release(id string, o *owner) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.entries[id]; ok && e.owner == o {
		e.owner = nil
	}
}

// drain marks the instance, waits for the clients, and removes it. It reports whether every client
// had let go of it; false when the wait or the registry ended first.
func (r *Registry) drain(ctx context.Context, id string, o *owner) bool {
	r.mu.Lock()
	e, ok := r.entries[id]
	switch {
	case ok && e.owner != o:
		r.mu.Unlock()
		return false // another stream has it
	case ok:
		e.inst.Draining = true
		// The lease may not end under the wait.
		e.inst.Expires = r.cfg.Clock.Now().Add(r.cfg.LeaseTTL + r.cfg.DrainWait)
		r.note(id)
	}
	// One that was drained before is gone from here, not from every client.
	r.mu.Unlock()
	r.flush()

	// A stream that breaks now does not shorten the wait: callers still hold the endpoint.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := r.cfg.Clock.AfterFunc(r.cfg.DrainWait, cancel)
	defer stop()
	waited := make(chan struct{})
	var over sync.WaitGroup
	over.Go(func() {
		select {
		case <-r.done:
			cancel()
		case <-waited:
		}
	})
	all := r.cfg.WaitDrained(ctx, id)
	close(waited)
	over.Wait()

	r.mu.Lock()
	// A newer stream may have taken the instance back meanwhile.
	if e, ok := r.entries[id]; ok && e.owner == o {
		r.unset(id)
	}
	r.mu.Unlock()
	r.flush()
	return all
}

// flush writes what changed since the last flush. Callers that come while one is writing wait and
// find their change written by the next in one transaction with everybody else's. The state is
// read when it is written, so that the last write of an instance is always its newest state.
func (r *Registry) flush() {
	if r.cfg.Store == nil {
		return
	}
	r.storeMu.Lock()
	defer r.storeMu.Unlock()
	r.mu.Lock()
	dirty := r.dirty
	r.dirty = make(map[string]struct{})
	var put []Instance
	var del []string
	for id := range dirty {
		if e, ok := r.entries[id]; ok {
			put = append(put, e.inst)
		} else {
			del = append(del, id)
		}
	}
	r.mu.Unlock()
	if len(dirty) == 0 {
		return
	}
	err := r.cfg.Store.WriteInstances(put, del)
	if err != nil {
		r.mu.Lock()
		for id := range dirty {
			r.dirty[id] = struct{}{} // the next flush tries again
		}
		r.mu.Unlock()
		if r.storeErr == nil {
			r.cfg.Log.Warn("instances are not remembered over a restart", "err", err)
		}
	} else if r.storeErr != nil {
		r.cfg.Log.Info("instances are remembered again")
	}
	r.storeErr = err
}
