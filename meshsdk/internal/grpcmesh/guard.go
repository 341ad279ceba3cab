package grpcmesh

import (
	"context"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// Guard is the context of an attempt, cut when the answer does not begin in time or when nothing
// moves; an Attempt's own deadline could not be taken back when the answer begins. End must be
// called. Its methods may be called from several goroutines; both skins use it.
type Guard struct {
	ctx    context.Context
	cancel context.CancelFunc
	clock  Clock

	mu     sync.Mutex // guards what follows
	moved  time.Time
	stops  [2]func() bool // of the timers of First and Idle; nil when there is none
	begun  bool           // the answer has begun
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

// Context is that of the attempt.
func (g *Guard) Context() context.Context { return g.ctx }

// First cuts the attempt after d unless the answer has begun. Zero means never.
func (g *Guard) First(d time.Duration) {
	if d <= 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.after(0, d, func() {
		if !g.begun {
			g.cut(call.ReasonPerTryTimeout)
		}
	})
}

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
	g.after(1, wait, func() {
		if left := d - g.clock.Now().Sub(g.moved); left > 0 {
			g.watch(d, left)
			return
		}
		g.cut(call.ReasonTimeout)
	})
}

// after calls f, under the lock, after d unless the attempt has ended. g.mu is held.
func (g *Guard) after(slot int, d time.Duration, f func()) {
	g.stops[slot] = g.clock.AfterFunc(d, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if !g.ended {
			f()
		}
	})
}

// cut ends the attempt; g.mu is held.
func (g *Guard) cut(reason call.Reason) {
	if g.reason == nil {
		g.reason = &reason
		g.cancel()
	}
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

// Begin notes that the answer has begun.
func (g *Guard) Begin() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.begun = true
}

// End stops the timers and gives why the attempt was cut, nil when it was not. It may be called
// again.
func (g *Guard) End() *call.Reason {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
	for i, stop := range g.stops {
		if stop != nil {
			stop()
			g.stops[i] = nil
		}
	}
	g.cancel()
	return g.reason
}
