// Package limit bounds how many calls a cluster has in flight.
//
// call takes a place before the first attempt and gives it back at the end; apply keeps one Limiter
// a cluster over updates. It never queues and never blocks.
package limit

import "sync/atomic"

// Limiter counts the calls in flight to one cluster. It is safe for concurrent use.
type Limiter struct {
	inFlight atomic.Int64
	max      atomic.Uint32
}

// New returns a limiter that admits max calls at once; zero admits none.
func New(max uint32) *Limiter {
	l := new(Limiter)
	l.max.Store(max)
	return l
}

// SetMax changes the bound; calls in flight above a lower one finish.
func (l *Limiter) SetMax(max uint32) { l.max.Store(max) }

// Max is the bound.
func (l *Limiter) Max() uint32 { return l.max.Load() }

// InFlight is how many places are taken.
func (l *Limiter) InFlight() int64 { return l.inFlight.Load() }

// Acquire reserves one call in flight to the cluster and reports whether it may start; each true
// needs one Release. The limit counts calls, not connections (gRFC A32: max_requests "limits the
// maximum number of requests that can be outstanding to all hosts in a cluster at any given time");
// zero admits none. Acquire never blocks.
func (l *Limiter) Acquire() bool {
	// Add first, look afterwards: two calls can never both take the last place. Under contention at
	// the bound one that would just have fitted may be refused, never one too many admitted.
	if l.inFlight.Add(1) > int64(l.max.Load()) {
		l.inFlight.Add(-1)
		return false
	}
	return true
}

// Release gives back what Acquire took.
func (l *Limiter) Release() { l.inFlight.Add(-1) }
