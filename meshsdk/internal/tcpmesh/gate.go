package tcpmesh

import (
	"context"
	"sync"
	"sync/atomic"
)

// Gate counts the calls that the servers of a Mesh have in flight, and keeps new ones out once it
// is closed. It is safe for concurrent use; Enter and Leave take no lock.
type Gate struct {
	// state is twice the number of calls in flight, plus one when closed.
	state atomic.Int64
	once  sync.Once
	idle  chan struct{} // closed when closed and nothing is in flight
}

// NewGate returns an open gate.
func NewGate() *Gate { return &Gate{idle: make(chan struct{})} }

// Enter counts a call and reports whether it may run; each true needs one Leave.
func (g *Gate) Enter() bool {
	if g.state.Add(2)&1 == 0 {
		return true
	}
	g.Leave()
	return false
}

// Leave ends a call counted by Enter.
func (g *Gate) Leave() {
	if g.state.Add(-2) == 1 {
		g.once.Do(func() { close(g.idle) })
	}
}

// Closed reports whether new calls are kept out.
func (g *Gate) Closed() bool { return g.state.Load()&1 == 1 }

// InFlight is how many calls run now.
func (g *Gate) InFlight() int64 { return g.state.Load() >> 1 }

// Close keeps new calls out. It may be called twice.
func (g *Gate) Close() {
	if g.state.Or(1)&^1 == 0 {
		g.once.Do(func() { close(g.idle) })
	}
}

// Wait blocks until the gate is closed and nothing is in flight, or ctx is done.
func (g *Gate) Wait(ctx context.Context) error {
	select {
	case <-g.idle:
		return nil
	default:
	}
	select {
	case <-g.idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
