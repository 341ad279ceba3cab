package grpcmesh

import (
	"context"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// Guard is a context that is cut when nothing moves on an attempt. End must be called. Its methods
// may be called from several goroutines; both skins use it. A nil Guard cuts nothing: Move and End
// do nothing.
type Guard struct {
	ctx    context.Context
	cancel context.CancelFunc
	clock  Clock

	mu     sync.Mutex // guards what follows
	moved  time.Time
	stop   func() bool // of the timer of Idle; nil when there is none
	ended  bool
	reason *call.Reason // why it was cut
}

// NewGuard returns a guard that cuts nothing yet. Nil clock is the real one.
func NewGuard(clock Clock, parent context.Context) *Guard {
	if clock == nil {
		clock = realClock{}
	}
	g := &Guard{clock: clock}
	g.ctx, g.cancel = context.WithCancel(parent)
	return g
}

// Context is what Idle cuts.
func (g *Guard) Context() context.Context { return g.ctx }

// Idle cuts the attempt when nothing has moved for d. Zero means never.
func (g *Guard) Idle(d time.Duration) {
	if d <= 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.moved = g.clock.Now()
	g.watch(d, d)
}

// watch looks again after wait: a message does not move the timer, which finds out how long ago
// the last one was. g.mu is held.
func (g *Guard) watch(d, wait time.Duration) {
	g.stop = g.clock.AfterFunc(wait, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.ended {
			return
		}
		if left := d - g.clock.Now().Sub(g.moved); left > 0 {
			g.watch(d, left)
			return
		}
		reason := call.ReasonTimeout
		g.reason = &reason
		g.cancel()
	})
}

// Move notes that something was sent or received.
func (g *Guard) Move() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.moved = g.clock.Now()
}

// End stops the timer and gives why the attempt was cut, nil when it was not. It may be called
// again.
func (g *Guard) End() *call.Reason {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
	if g.stop != nil {
		g.stop()
		g.stop = nil
	}
	g.cancel()
	return g.reason
}
