package differential

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
)

// split is what became of the calls that a split decided on, summed over tables: of each, whether
// its first arm took it.
type split struct{ calls, hits, mean, variance float64 }

func (s *split) add(arms []backend, took string) {
	var total float64
	for _, a := range arms {
		total += float64(a.weight)
	}
	p := float64(arms[0].weight) / total
	s.calls++
	s.mean += p
	s.variance += p * (1 - p)
	if took == arms[0].target {
		s.hits++
	}
}

// tally is what both clients did.
type tally struct {
	exact  int // calls that could go to one target only, or fail
	failed int // of these
	splits map[string]*split
	// reached are the servers that each client has called, by target.
	reached map[string]map[string]bool
}

func newTally() *tally {
	t := &tally{splits: map[string]*split{}, reached: map[string]map[string]bool{}}
	for _, c := range clients {
		t.splits[c], t.reached[c] = &split{}, map[string]bool{}
	}
	return t
}

// compare makes a call by both clients and holds them to each other and to the Gateway API.
func (y *tally) compare(t *testing.T, tb table, p probe, conns map[string]*grpc.ClientConn) {
	t.Helper()
	arms, routed := tb.arms(p)
	if !routed || len(arms) == 0 {
		arms = []backend{{"nobody", 1}} // no_route and no_cluster have the code of no_endpoint
	}
	if len(arms) == 1 {
		y.exact++
		if arms[0].target == "nobody" {
			y.failed++
		}
	}
	for _, c := range clients {
		got, err := call(t, conns[c], p)
		target := targetOf(got)
		y.reached[c][got] = true
		if !slices.ContainsFunc(arms, func(b backend) bool { return b.target == target }) {
			t.Errorf("%s: %s %v: %s of %s (%v), want one of %v\n%s", c, p.path, p.headers, got, target, err, arms, tb.yaml(endpoint{}))
		}
		if len(arms) > 1 {
			y.splits[c].add(arms, target)
		}
	}
}

// check holds the splits to their weights, within five standard deviations of the sum of the
// calls' own binomials, and the two clients to the same set of servers.
func (y *tally) check(t *testing.T) {
	t.Helper()
	for c, s := range y.splits {
		t.Logf("%s: %d calls with one answer (%d of them fail), %.0f by weight: first arm %.0f, expected %.1f", c, y.exact, y.failed, s.calls, s.hits, s.mean)
		if limit := 5 * math.Sqrt(s.variance); math.Abs(s.hits-s.mean) > limit {
			t.Errorf("%s: the first arm of splits took %.0f of %.0f calls, want %.1f within %.1f", c, s.hits, s.calls, s.mean, limit)
		}
	}
	a, b := y.reached[clients[0]], y.reached[clients[1]]
	if !maps.Equal(a, b) {
		t.Errorf("answers: %s %v, %s %v", clients[0], slices.Sorted(maps.Keys(a)), clients[1], slices.Sorted(maps.Keys(b)))
	}
	for target, servers := range targets {
		for _, s := range servers {
			if !a[s] || !b[s] {
				t.Errorf("server %s of %s: called by %s %v, by %s %v; want both", s, target, clients[0], a[s], clients[1], b[s])
			}
		}
	}
}

// TestRandomTables: 300 random route tables, 20 random calls to each. grpc-go's own client and ours
// reach the same servers and fail with the same code: exactly where one answer is possible, by
// weight where a split decides.
func TestRandomTables(t *testing.T) {
	const tables, calls = 300, 20
	r := seeded(t)
	f := newFixture(t)
	all := make([]table, tables)
	var files strings.Builder
	files.WriteString(f.files)
	for i := range all {
		all[i] = randomTable(r, fmt.Sprintf("t%03d", i))
		files.WriteString(all[i].yaml(f.root))
	}
	f.mesh.Apply(files.String())
	y := newTally()
	for _, tb := range all {
		conns := f.dial(tb.service)
		for range calls {
			y.compare(t, tb, randomProbe(r), conns)
		}
		f.hangUp(conns)
	}
	y.check(t)
}

// TestTablesReplaced: the same while one service's routes are replaced under open channels. Each
// table begins with a rule of its own by which the test sees that a client has it.
func TestTablesReplaced(t *testing.T) {
	const tables, calls = 40, 30
	r := seeded(t)
	f := newFixture(t)
	y := newTally()
	var conns map[string]*grpc.ClientConn
	for i := range tables {
		tb := randomTable(r, "moving")
		seen := probe{path: "/" + fmt.Sprintf("a.name.longer.than.any.other.v%d", i) + "/Seen"}
		mark := rule{object: "a-mark", matches: []match{{service: seen.path[1 : len(seen.path)-len("/Seen")], method: "Seen"}}, backends: []backend{{"d", 1}}}
		unseen := rule{object: "a-mark", matches: []match{{method: "Seen"}}, backends: []backend{{"a.v1", 1}}}
		if tb.http {
			mark.matches, unseen.matches = []match{{path: seen.path}}, []match{{path: "/", prefix: true}}
		}
		tb.rules = append([]rule{mark, unseen}, tb.rules...)
		if tb.http { // its prefix takes what nothing else does
			tb.rules[1] = tb.rules[0]
			tb.rules = tb.rules[1:]
		}
		f.mesh.Apply(f.files, tb.yaml(f.root))
		if conns == nil {
			conns = f.dial(tb.service)
		}
		for _, c := range clients {
			deadline := time.Now().Add(patience)
			for {
				got, err := call(t, conns[c], seen)
				if got == "d" {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s never saw table %d: %s (%v)", c, i, got, err)
				}
			}
		}
		for range calls {
			y.compare(t, tb, randomProbe(r), conns)
		}
	}
	f.hangUp(conns)
	y.check(t)
}
