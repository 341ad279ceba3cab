// Package balance picks the endpoint of an attempt.
//
// apply makes a Set for each cluster, the skins narrow it to the endpoints that are connected and
// pick from it. A Set is immutable: picking takes no lock, allocates nothing and reads no clock.
// It never connects and never waits.
package balance

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

// Policy is how an endpoint is chosen within a locality.
type Policy int

// Policies of load balancing.
const (
	// RoundRobin takes one endpoint after the other, as often as its weight says.
	RoundRobin Policy = iota
	// LeastRequest draws two endpoints by weight and takes the one with fewer attempts in flight for
	// its weight ("power of two choices").
	LeastRequest
)

// String is the policy's name in configuration.
func (p Policy) String() string {
	if p == LeastRequest {
		return "LeastRequest"
	}
	return "RoundRobin"
}

// Cursor is where round robin stands in each locality of a cluster. It is kept outside the
// immutable sets, so that an update goes on where the last set was and does not send every first
// call to the same endpoint. The zero value is ready; it is safe for concurrent use.
type Cursor struct {
	mu    sync.Mutex // guards marks; taken when a set is built, not when it is picked from
	marks map[place]*atomic.Uint64
}

type place struct {
	priority              uint32
	region, zone, subZone string
}

func (c *Cursor) mark(p place, start uint64) *atomic.Uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.marks[p]
	if m == nil {
		if c.marks == nil {
			c.marks = make(map[place]*atomic.Uint64)
		}
		m = new(atomic.Uint64)
		// A random start, so that a thousand new clients do not begin at one endpoint.
		m.Store(start)
		c.marks[p] = m
	}
	return m
}

// Config of a Set. The zero value is round robin with its own cursor.
type Config struct {
	Policy Policy
	// Cursor is kept for the cluster over its sets; nil makes one for this set and its filters.
	Cursor *Cursor
	// Rand gives uniform 64-bit values and is safe for concurrent use; nil means math/rand/v2.
	Rand func() uint64
}

// Set is a choice of endpoints with a policy.
type Set struct {
	cfg    Config
	all    []*endpoint.Endpoint // those that can be picked
	levels []level              // rising priority number
}

// level is one priority.
type level struct {
	localities []locality
	draw       chooser // over localities
}

// locality is one locality at one priority.
type locality struct {
	slots []slot
	draw  chooser // by weight
	mark  *atomic.Uint64
	wheel *wheel // nil when all weights are equal
}

// slot has beside the endpoint what a pick reads, so that it follows one pointer fewer.
type slot struct {
	state  *endpoint.State
	ep     *endpoint.Endpoint
	weight int64
}

// New is NewSet with nothing but a policy.
func New(policy Policy, eps []*endpoint.Endpoint) *Set {
	return NewSet(Config{Policy: policy}, eps)
}

// NewSet returns a choice among eps; those with Excluded set are left out, and so are those of a
// locality with weight 0 when others of their priority have a weight (gRFC A27: "If the
// load_balancing_weight field is unset, the endpoints entry is skipped").
func NewSet(cfg Config, eps []*endpoint.Endpoint) *Set {
	if cfg.Rand == nil {
		cfg.Rand = rand.Uint64
	}
	if cfg.Cursor == nil {
		cfg.Cursor = new(Cursor)
	}
	s := &Set{cfg: cfg}
	weighted := make(map[uint32]bool) // priorities in which some locality has a weight
	for _, ep := range eps {
		if ep.Excluded == "" && ep.LocalityWeight > 0 {
			weighted[ep.Priority] = true
		}
	}
	groups := make(map[place][]*endpoint.Endpoint)
	var order []place
	for _, ep := range eps {
		if ep.Excluded != "" || ep.LocalityWeight == 0 && weighted[ep.Priority] {
			continue
		}
		s.all = append(s.all, ep)
		p := place{ep.Priority, ep.Region, ep.Zone, ep.SubZone}
		if groups[p] == nil {
			order = append(order, p)
		}
		groups[p] = append(groups[p], ep)
	}
	slices.SortStableFunc(order, func(a, b place) int { return cmp.Compare(a.priority, b.priority) })
	for len(order) > 0 {
		n := 1
		for n < len(order) && order[n].priority == order[0].priority {
			n++
		}
		s.levels = append(s.levels, newLevel(&s.cfg, order[:n], groups))
		order = order[n:]
	}
	return s
}

func newLevel(cfg *Config, places []place, groups map[place][]*endpoint.Endpoint) level {
	var l level
	var weights []uint64
	for _, p := range places {
		eps := groups[p]
		loc := locality{mark: cfg.Cursor.mark(p, cfg.Rand()>>32)}
		each := make([]uint64, 0, len(eps))
		for _, ep := range eps {
			w := int64(max(ep.Weight, 1))
			loc.slots = append(loc.slots, slot{state: ep.State, ep: ep, weight: w})
			each = append(each, uint64(w))
		}
		loc.draw = newChooser(each)
		if cfg.Policy == RoundRobin && !loc.draw.even() {
			loc.wheel = newWheel(each)
		}
		l.localities = append(l.localities, loc)
		// Envoy, LocalityLbEndpoints.load_balancing_weight: it "is divided by the sum of the weights
		// of all localities at the same priority level to produce the effective percentage of traffic
		// for the locality".
		weights = append(weights, uint64(max(eps[0].LocalityWeight, 1)))
	}
	l.draw = newChooser(weights)
	return l
}

// Filter is the same choice narrowed to the endpoints that usable accepts. Cursors are shared.
func (s *Set) Filter(usable func(*endpoint.Endpoint) bool) *Set {
	kept := make([]*endpoint.Endpoint, 0, len(s.all))
	for _, ep := range s.all {
		if usable(ep) {
			kept = append(kept, ep)
		}
	}
	return NewSet(s.cfg, kept)
}

// Endpoints are those that can be picked; read only.
func (s *Set) Endpoints() []*endpoint.Endpoint { return s.all }

// Len is the number of Endpoints; 0 for a nil set.
func (s *Set) Len() int {
	if s == nil {
		return 0
	}
	return len(s.all)
}

// Policy of the set.
func (s *Set) Policy() Policy { return s.cfg.Policy }
