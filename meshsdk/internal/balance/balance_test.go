package balance_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"

	"github.com/inlay-mesh/inlay/meshsdk/internal/balance"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

// eps makes n endpoints of one locality with weight 1; set changes each.
func eps(n int, set func(i int, e *endpoint.Endpoint)) []*endpoint.Endpoint {
	all := make([]*endpoint.Endpoint, n)
	for i := range all {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 80)
		all[i] = &endpoint.Endpoint{
			Key: endpoint.Key(addr, nil), Addresses: []netip.AddrPort{addr}, InstanceID: fmt.Sprint(i),
			LocalityWeight: 1, Weight: 1, State: endpoint.NewState(n),
		}
		if set != nil {
			set(i, all[i])
		}
	}
	return all
}

// seeded gives a random source that a failure can be repeated with.
func seeded(t testing.TB) func() uint64 {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(seed, 0))
	return func() uint64 {
		mu.Lock()
		defer mu.Unlock()
		return rnd.Uint64()
	}
}

// shares picks draws times and gives each endpoint's part by its InstanceID.
func shares(s *balance.Set, draws int) map[string]float64 {
	got := map[string]float64{}
	for range draws {
		got[s.Pick(nil).InstanceID] += 1 / float64(draws)
	}
	return got
}

func near(t *testing.T, got map[string]float64, want map[string]float64, within float64) {
	t.Helper()
	for id, w := range want {
		if math.Abs(got[id]-w) > within {
			t.Errorf("endpoint %s got %.4f of the picks, want %.4f", id, got[id], w)
		}
	}
	for id := range got {
		if _, ok := want[id]; !ok {
			t.Errorf("endpoint %s was picked and must not be", id)
		}
	}
}

func TestShares(t *testing.T) {
	for name, tc := range map[string]struct {
		n    int
		set  func(i int, e *endpoint.Endpoint)
		want map[string]float64
	}{
		"equal endpoints get equal shares": {4, nil, map[string]float64{"0": .25, "1": .25, "2": .25, "3": .25}},
		"weights are shares": {3, func(i int, e *endpoint.Endpoint) { e.Weight = []uint32{1, 2, 7}[i] },
			map[string]float64{"0": .1, "1": .2, "2": .7}},
		"weight 0 counts as 1": {2, func(i int, e *endpoint.Endpoint) { e.Weight = 0 }, map[string]float64{"0": .5, "1": .5}},
		"localities get their weight, however many endpoints they have": {4, func(i int, e *endpoint.Endpoint) {
			if e.Zone = "a"; i == 3 {
				e.Zone, e.LocalityWeight = "b", 3
			}
		}, map[string]float64{"0": .25 / 3, "1": .25 / 3, "2": .25 / 3, "3": .75}},
		"only the lowest priority number is used": {3, func(i int, e *endpoint.Endpoint) { e.Priority = uint32(min(i, 1)) },
			map[string]float64{"0": 1}},
		"an excluded endpoint gets nothing": {3, func(i int, e *endpoint.Endpoint) {
			if i == 1 {
				e.Excluded = "draining"
			}
		}, map[string]float64{"0": .5, "2": .5}},
		"a priority all of which is excluded is passed over": {3, func(i int, e *endpoint.Endpoint) {
			if e.Priority = 1; i == 0 {
				e.Priority, e.Excluded = 0, "unhealthy"
			}
		}, map[string]float64{"1": .5, "2": .5}},
		"a locality without weight gets nothing": {2, func(i int, e *endpoint.Endpoint) {
			e.Zone = fmt.Sprint(i)
			e.LocalityWeight = uint32(i)
		}, map[string]float64{"1": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, policy := range []balance.Policy{balance.RoundRobin, balance.LeastRequest} {
				t.Run(policy.String(), func(t *testing.T) {
					s := balance.NewSet(balance.Config{Policy: policy, Rand: seeded(t)}, eps(tc.n, tc.set))
					near(t, shares(s, 60_000), tc.want, .012)
				})
			}
		})
	}
}

func TestRoundRobinTakesTurns(t *testing.T) {
	s := balance.New(balance.RoundRobin, eps(5, nil))
	first := s.Pick(nil)
	for range 4 {
		if s.Pick(nil) == first {
			t.Fatal("an endpoint came again before all others had their turn")
		}
	}
	if s.Pick(nil) != first {
		t.Error("the sixth pick is not the first endpoint again")
	}
}

func TestWeightedRoundRobinIsSmooth(t *testing.T) {
	s := balance.New(balance.RoundRobin, eps(2, func(i int, e *endpoint.Endpoint) { e.Weight = []uint32{1, 4}[i] }))
	since, worst := 0, 0
	for range 1000 {
		if s.Pick(nil).InstanceID == "0" {
			worst, since = max(worst, since), 0
		} else {
			since++
		}
	}
	if worst > 5 {
		t.Errorf("%d picks between two of the endpoint with a fifth of the weight, want about 4", worst)
	}
}

func TestRoundRobinGoesOnAfterAnUpdate(t *testing.T) {
	all := eps(4, nil)
	cursor := new(balance.Cursor)
	count := map[string]int{}
	for range 400 { // an update before every call: without the cursor each would begin anew
		s := balance.NewSet(balance.Config{Cursor: cursor}, all)
		count[s.Pick(nil).InstanceID]++
	}
	for id, n := range count {
		if n != 100 {
			t.Errorf("endpoint %s got %d of 400 picks over 400 updates, want 100", id, n)
		}
	}
	s := balance.NewSet(balance.Config{Cursor: cursor}, all)
	a, b := s.Pick(nil), s.Filter(func(*endpoint.Endpoint) bool { return true }).Pick(nil)
	if a == b {
		t.Error("a filtered set begins anew instead of going on")
	}
}

func TestLeastRequestPrefersTheIdle(t *testing.T) {
	all := eps(3, nil)
	for range 10 {
		all[0].State.Acquire()
	}
	got := shares(balance.NewSet(balance.Config{Policy: balance.LeastRequest, Rand: seeded(t)}, all), 30_000)
	if got["0"] != 0 {
		t.Errorf("the loaded one of three got %.3f of the picks, want none: two different ones are compared", got["0"])
	}
	weighted := eps(2, func(i int, e *endpoint.Endpoint) { e.Weight = []uint32{1, 10}[i] })
	weighted[0].State.Acquire()
	for range 5 {
		weighted[1].State.Acquire()
	}
	s := balance.New(balance.LeastRequest, weighted)
	for range 100 {
		if ep := s.Pick(nil); ep.InstanceID != "1" {
			t.Fatal("5 in flight for weight 10 is less than 1 for weight 1, and was not picked")
		}
	}
}

// Calls that take long pile up at slow endpoints under random choice; two choices keep the fullest
// close to the mean.
func TestLeastRequestKeepsLoadsEven(t *testing.T) {
	all := eps(50, nil)
	s := balance.NewSet(balance.Config{Policy: balance.LeastRequest, Rand: seeded(t)}, all)
	for range 50 * 20 {
		s.Pick(nil).State.Acquire()
	}
	for _, e := range all {
		if n := e.State.InFlight(); n > 24 || n < 15 {
			t.Errorf("endpoint %s has %d in flight, want about 20", e.InstanceID, n)
		}
	}
}

func TestAvoid(t *testing.T) {
	for _, policy := range []balance.Policy{balance.RoundRobin, balance.LeastRequest} {
		t.Run(policy.String(), func(t *testing.T) {
			all := eps(4, func(i int, e *endpoint.Endpoint) {
				if i == 3 {
					e.Priority = 1
				}
			})
			s := balance.NewSet(balance.Config{Policy: policy, Rand: seeded(t)}, all)
			for range 200 {
				var tried []*endpoint.Endpoint
				for range 3 {
					ep := s.Pick(tried)
					for _, before := range tried {
						if before == ep {
							t.Fatalf("%s picked again while another was left", ep.InstanceID)
						}
					}
					if ep.Priority != 0 {
						t.Fatal("priority 1 picked while 0 had one left")
					}
					tried = append(tried, ep)
				}
				if ep := s.Pick(tried); ep.InstanceID != "3" {
					t.Fatalf("all of priority 0 tried: picked %s, want the one of priority 1", ep.InstanceID)
				}
				if ep := s.Pick(all); ep == nil || ep.Priority != 0 {
					t.Fatalf("all tried: picked %v, want any of priority 0", ep)
				}
			}
		})
	}
	// After an update the same endpoint is another value with the same key.
	old, now := eps(2, nil), eps(2, nil)
	s := balance.New(balance.LeastRequest, now)
	for range 50 {
		if s.Pick(old[:1]) == now[0] {
			t.Fatal("an endpoint tried before the update was picked again")
		}
	}
}

func TestEmptySets(t *testing.T) {
	var none *balance.Set
	if none.Pick(nil) != nil || none.Len() != 0 {
		t.Error("a nil set picks something")
	}
	s := balance.New(balance.LeastRequest, eps(1, func(_ int, e *endpoint.Endpoint) { e.Excluded = "draining" }))
	if s.Pick(nil) != nil || s.Len() != 0 || len(s.Endpoints()) != 0 {
		t.Error("a set of excluded endpoints picks one")
	}
}

func TestFilter(t *testing.T) {
	s := balance.New(balance.LeastRequest, eps(10, nil)).Filter(func(e *endpoint.Endpoint) bool { return e.InstanceID == "7" })
	if s.Len() != 1 || s.Pick(nil).InstanceID != "7" || s.Policy() != balance.LeastRequest {
		t.Errorf("filtered to %d endpoints, policy %v", s.Len(), s.Policy())
	}
}

func TestConcurrentPicks(t *testing.T) {
	for _, policy := range []balance.Policy{balance.RoundRobin, balance.LeastRequest} {
		all := eps(4, nil)
		s := balance.New(policy, all)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 2000 {
					ep := s.Pick(nil)
					ep.State.Acquire()
					ep.State.Release()
				}
			})
		}
		wg.Wait()
		for _, e := range all {
			if e.State.InFlight() != 0 {
				t.Errorf("%v: %d left in flight", policy, e.State.InFlight())
			}
		}
	}
}

func TestPickAllocatesNothing(t *testing.T) {
	for _, policy := range []balance.Policy{balance.RoundRobin, balance.LeastRequest} {
		all := eps(100, func(i int, e *endpoint.Endpoint) { e.Weight, e.Zone = uint32(i%3+1), fmt.Sprint(i%2) })
		s := balance.New(policy, all)
		avoid := all[:2]
		if n := testing.AllocsPerRun(500, func() { s.Pick(nil); s.Pick(avoid) }); n != 0 {
			t.Errorf("%v: %v allocations, want 0", policy, n)
		}
	}
}

// 10 000 endpoints may cost half as much again as 10: what a pick touches must stay in the cache.
func BenchmarkPick(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("P2C/endpoints=%d", n), func(b *testing.B) {
			s := balance.New(balance.LeastRequest, eps(n, nil))
			b.ReportAllocs()
			for b.Loop() {
				ep := s.Pick(nil)
				ep.State.Acquire()
				ep.State.Release()
			}
		})
	}
	b.Run("RoundRobin/endpoints=10", func(b *testing.B) {
		s := balance.New(balance.RoundRobin, eps(10, nil))
		b.ReportAllocs()
		for b.Loop() {
			s.Pick(nil)
		}
	})
}
