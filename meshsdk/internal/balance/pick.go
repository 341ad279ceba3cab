package balance

import (
	"math/bits"
	"slices"

	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

// Pick gives the endpoint for an attempt, nil when the set is empty: from the lowest priority
// number that has endpoints, a locality by weight, in it an endpoint by the policy. Endpoints in
// avoid (those a call has tried) are passed over while the set has any other, at a higher priority
// number if need be; when all were tried, one of the lowest number is given again.
//
// Pick does not count the attempt: whoever uses the endpoint acquires its State. It is safe for
// concurrent use, allocates nothing and never blocks.
func (s *Set) Pick(avoid []*endpoint.Endpoint) *endpoint.Endpoint {
	if s == nil || len(s.levels) == 0 {
		return nil
	}
	ep := s.draw(&s.levels[0])
	if len(avoid) == 0 || !tried(avoid, ep) {
		return ep
	}
	// A second attempt. A few draws find another endpoint in any but a small set ...
	for range 4 {
		if other := s.draw(&s.levels[0]); !tried(avoid, other) {
			return other
		}
	}
	// ... in which looking at all is cheap, and where luck must not decide.
	for i := range s.levels {
		if other := s.untried(&s.levels[i], avoid); other != nil {
			return other
		}
	}
	return ep
}

// tried compares by Key: a snapshot that came between two attempts has new values for the same
// endpoints.
func tried(avoid []*endpoint.Endpoint, ep *endpoint.Endpoint) bool {
	return slices.ContainsFunc(avoid, func(a *endpoint.Endpoint) bool { return a == ep || a.Key == ep.Key })
}

func (s *Set) draw(l *level) *endpoint.Endpoint {
	loc := &l.localities[0]
	if len(l.localities) > 1 {
		loc = &l.localities[l.draw.choose(s.cfg.Rand())]
	}
	if len(loc.slots) == 1 {
		return loc.slots[0].ep
	}
	if s.cfg.Policy == RoundRobin {
		if loc.wheel != nil {
			return loc.slots[loc.wheel.next(loc.mark)].ep
		}
		return loc.slots[(loc.mark.Add(1)-1)%uint64(len(loc.slots))].ep
	}
	r := s.cfg.Rand()
	i := loc.draw.choose(r)
	j := loc.draw.choose(bits.RotateLeft64(r*0x9e3779b97f4a7c15, 32))
	if i == j {
		// The same one twice is no choice: take its neighbour, so that two endpoints are compared.
		if j++; j == len(loc.slots) {
			j = 0
		}
	}
	a, b := &loc.slots[i], &loc.slots[j]
	// Fewer attempts in flight for its weight: a/wa <= b/wb without division.
	if a.state.InFlight()*b.weight <= b.state.InFlight()*a.weight {
		return a.ep
	}
	return b.ep
}

// untried draws by weight among the endpoints of l that are not in avoid.
func (s *Set) untried(l *level, avoid []*endpoint.Endpoint) *endpoint.Endpoint {
	var chosen *endpoint.Endpoint
	var total uint64
	for i := range l.localities {
		for j := range l.localities[i].slots {
			sl := &l.localities[i].slots[j]
			if tried(avoid, sl.ep) {
				continue
			}
			total += uint64(sl.weight)
			if s.cfg.Rand()%total < uint64(sl.weight) { // reservoir of one
				chosen = sl.ep
			}
		}
	}
	return chosen
}
