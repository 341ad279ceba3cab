package telemetry

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// Buckets is how many buckets a Count has: the upper bounds are 2^i * 100 µs for i = 0..19, the last
// bucket is open (inlay.report.v1.CallCounter.buckets).
const Buckets = 21

// Bounds of Counters.
const (
	// DefaultSeries is the number of series that Counters keep when nothing else is said.
	DefaultSeries = 2048
	// idleTakes is after how many Takes without a call a series is dropped.
	idleTakes = 60
)

// Count sums the calls of one (direction, service, route, peer, version, reason) since the Take
// before.
type Count struct {
	Direction, Service, Route, Peer, Version, Reason string
	Calls, Failed, MTLS                              uint64
	Total                                            time.Duration
	Buckets                                          [Buckets]uint64
}

// Counts is what Take gives.
type Counts struct {
	Calls []Count
	// Dropped calls are in no Count, for want of room.
	Dropped uint64
	// Window is the time since the Take before; since NewCounters for the first.
	Window time.Duration
}

// Counters sum calls in this process for the report to the control plane. Counting takes no lock
// and, once a series exists, allocates nothing. It is bounded: calls of series beyond the bound are
// only counted as dropped. It is safe for concurrent use.
type Counters struct {
	most    int
	dropped atomic.Uint64
	cells   atomic.Pointer[map[cellKey]*cell] // replaced, never changed

	mu   sync.Mutex // guards what follows and the replacement of cells
	last time.Time
	dead []*cell // taken out of cells, or counted in after that; the next Take empties them
}

type cellKey struct {
	direction, service, route, peer, version string
	reason                                   call.Reason
	mtls                                     bool
}

// cell counts one series. Calls are the sum of the buckets, failed and mtls follow from the key.
type cell struct {
	key     cellKey
	buckets [Buckets]atomic.Uint64
	total   atomic.Int64
	gone    atomic.Bool
	idle    int // guarded by Counters.mu
}

// NewCounters returns empty counters for at most series series, DefaultSeries when that is zero.
func NewCounters(series int, now time.Time) *Counters {
	if series <= 0 {
		series = DefaultSeries
	}
	c := &Counters{most: series, last: now}
	c.cells.Store(&map[cellKey]*cell{})
	return c
}

// Add counts one call.
func (c *Counters) Add(rec *call.Record) {
	c.add(c.cell(rec), rec.Duration)
}

// add counts in cl; nil is dropped.
func (c *Counters) add(cl *cell, d time.Duration) {
	if cl == nil {
		c.dropped.Add(1)
		return
	}
	cl.buckets[bucket(d)].Add(1)
	cl.total.Add(int64(d))
	if cl.gone.Load() {
		// Taken out while it was counted in: the next Take looks there again, so no call is lost.
		c.mu.Lock()
		c.dead = append(c.dead, cl)
		c.mu.Unlock()
	}
}

// bucket is the first i with d <= 2^i * 100 µs.
func bucket(d time.Duration) int {
	if d <= 0 {
		return 0
	}
	return min(bits.Len64(uint64((d-1)/(100*time.Microsecond))), Buckets-1)
}

// cell finds or makes the series of rec; nil when there is no room.
func (c *Counters) cell(rec *call.Record) *cell {
	k := cellKey{rec.Direction, rec.Service, rec.Route, rec.Peer, rec.Version, rec.Reason, rec.MTLS}
	if cl := (*c.cells.Load())[k]; cl != nil {
		return cl
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := *c.cells.Load()
	if cl := old[k]; cl != nil {
		return cl
	}
	if len(old) >= c.most {
		return nil
	}
	next := make(map[cellKey]*cell, len(old)+1)
	for k, cl := range old {
		next[k] = cl
	}
	cl := &cell{key: k}
	next[k] = cl
	c.cells.Store(&next)
	return cl
}

// Take gives what was counted since the last Take and starts anew. Series without a call are left
// out, and forgotten after 60 Takes.
func (c *Counters) Take(now time.Time) *Counts {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := &Counts{Dropped: c.dropped.Swap(0), Window: now.Sub(c.last)}
	c.last = now
	for _, cl := range c.dead {
		if n, ok := cl.take(); ok {
			out.Calls = append(out.Calls, n)
		}
	}
	c.dead = nil
	cells := *c.cells.Load()
	for _, cl := range cells {
		n, ok := cl.take()
		if ok {
			cl.idle = 0
			out.Calls = append(out.Calls, n)
			continue
		}
		if cl.idle++; cl.idle >= idleTakes {
			cl.gone.Store(true)
			c.dead = append(c.dead, cl)
		}
	}
	if len(c.dead) > 0 {
		next := make(map[cellKey]*cell, len(cells))
		for k, cl := range cells {
			if !cl.gone.Load() {
				next[k] = cl
			}
		}
		c.cells.Store(&next)
	}
	out.merge()
	return out
}

func (cl *cell) take() (Count, bool) {
	k := &cl.key
	n := Count{
		Direction: k.direction, Service: k.service, Route: k.route, Peer: k.peer, Version: k.version,
		Reason: string(k.reason),
	}
	for i := range cl.buckets {
		n.Buckets[i] = cl.buckets[i].Swap(0)
		n.Calls += n.Buckets[i]
	}
	if n.Calls == 0 {
		return n, false
	}
	n.Total = time.Duration(cl.total.Swap(0))
	if k.reason != call.ReasonOK {
		n.Failed = n.Calls
	}
	if k.mtls {
		n.MTLS = n.Calls
	}
	return n, true
}

// merge adds up the Counts that differ in mtls only, or come from a cell that was taken out.
func (c *Counts) merge() {
	type key struct{ direction, service, route, peer, version, reason string }
	at := make(map[key]int, len(c.Calls))
	kept := c.Calls[:0]
	for _, n := range c.Calls {
		k := key{n.Direction, n.Service, n.Route, n.Peer, n.Version, n.Reason}
		i, ok := at[k]
		if !ok {
			at[k] = len(kept)
			kept = append(kept, n)
			continue
		}
		sum := &kept[i]
		sum.Calls += n.Calls
		sum.Failed += n.Failed
		sum.MTLS += n.MTLS
		sum.Total += n.Total
		for b := range n.Buckets {
			sum.Buckets[b] += n.Buckets[b]
		}
	}
	c.Calls = kept
}

// Series is how many series are kept now.
func (c *Counters) Series() int { return len(*c.cells.Load()) }
