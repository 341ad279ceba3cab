package differential

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/meshsdk"
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
	early  int // calls of grpc-go in the moment after an update, made again
	// steady says that no resource ever goes: whoever hears of one that has did not hear it from us.
	steady bool
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
		// Calls of these moments fail with grpc-go. Ours may not.
		for again := time.Now().Add(patience); c == clients[0] && y.passing(err); got, err = call(t, conns[c], p) {
			y.early++
			if time.Now().After(again) {
				t.Fatalf("%s: %v", c, err)
			}
		}
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

// passing tells the moments of grpc-go that docs/xds.md has: it takes new routes before its balancer has
// the clusters that they name; and after an acknowledgement with all names it sends the requests that
// were queued before, with fewer, so that what it got in between is missing from the next response.
func (y *tally) passing(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "unknown cluster selected for RPC") ||
		y.steady && strings.Contains(err.Error(), "\"ClusterResource\" has been removed"))
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
	if y.early > 0 {
		t.Logf("%s: %d calls failed in the moment after an update and were made again", clients[0], y.early)
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
	t.Parallel()
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
	y.steady = true
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
// table begins with a call of its own by which the test sees that a client has it.
func TestTablesReplaced(t *testing.T) {
	t.Parallel()
	const tables, calls = 40, 30
	r := seeded(t)
	f := newFixture(t)
	y := newTally()
	var conns map[string]*grpc.ClientConn
	for i := range tables {
		tb := randomTable(r, "moving")
		method := fmt.Sprintf("v%d", i)
		seen := probe{path: "/mark/" + method}
		mark, other := match{service: "mark", method: method}, match{service: "mark"}
		if tb.http {
			mark, other = match{path: seen.path}, match{path: "/mark", prefix: true}
		}
		tb.rules = append([]rule{{"a-mark", []match{mark}, []backend{{"d", 1}}}, {"a-mark", []match{other}, []backend{{"a.v1", 1}}}}, tb.rules...)
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

// TestDocumentedDifferences holds what docs/xds.md says of the two clients to what they do.
func TestDocumentedDifferences(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	content := table{service: "content", rules: []rule{
		{object: "content", matches: []match{{headers: [][2]string{{"content-type", "application/grpc"}}}}, backends: []backend{{"a.v1", 1}}},
		{object: "content", backends: []backend{{"a.v2", 1}}},
	}}
	closed := strings.Replace(table{service: "closed"}.yaml(f.root), "permissive", "strict", 1)
	to := table{service: "through", rules: []rule{{object: "through", backends: []backend{{"closed", 1}}}}}
	f.mesh.Apply(f.files, content.yaml(f.root), closed, to.yaml(f.root))
	s := f.mesh.Open("closed")
	f.mesh.Serve(s, meshsdk.GRPC(8080, s.NewServer(answer("closed"))))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := f.sdk.Ready(ctx, "closed"); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ service, stock, ours string }{
		// gRFC A28 has content-type matched as "application/grpc"; grpc-go adds it after the match.
		"a route by content-type":       {"content", "a-v2", "a-v1"},
		"a backend that is strict":      {"through", "Unavailable", "closed"},
		"the name of a service, strict": {"closed", "Unavailable", "closed"},
	} {
		t.Run(name, func(t *testing.T) {
			conns := f.dial(tc.service)
			for i, want := range []string{tc.stock, tc.ours} {
				if got, err := call(t, conns[clients[i]], probe{path: "/shop.A/Get"}); got != want {
					t.Errorf("%s: %s (%v), want %s", clients[i], got, err, want)
				}
			}
			f.hangUp(conns)
		})
	}
}
