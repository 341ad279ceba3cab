package route_test

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/xds/resource"
)

type headers map[string]string

func (h headers) Get(name string) (string, bool) { v, ok := h[name]; return v, ok }

func TestMatch(t *testing.T) {
	table := route.New(&resource.VirtualHost{Routes: []resource.Route{
		{Name: "exact with header", Match: resource.Match{Kind: resource.Exact, Path: "/a", Headers: []resource.HeaderMatch{{Name: "X-Env", Exact: "test"}}}},
		{Name: "wide, and early", Match: resource.Match{Kind: resource.Prefix, Path: "/wide"}},
		{Name: "exact, too late", Match: resource.Match{Kind: resource.Exact, Path: "/wide/exact"}},
		{Name: "exact", Match: resource.Match{Kind: resource.Exact, Path: "/a"}},
		{Name: "delete only", Match: resource.Match{Kind: resource.PathSeparatedPrefix, Path: "/a", Headers: []resource.HeaderMatch{{Name: ":method", Exact: "DELETE"}}}},
		{Name: "segments", Match: resource.Match{Kind: resource.PathSeparatedPrefix, Path: "/seg/"}},
		{Name: "not honoured", Invalid: "safe_regex", Match: resource.Match{Kind: resource.Prefix, Path: "/bad"}},
		{Name: "behind it", Match: resource.Match{Kind: resource.Prefix, Path: "/bad/ok"}},
		{Name: "service", Match: resource.Match{Kind: resource.Prefix, Path: "/shop.Orders/"}},
	}})
	for name, tc := range map[string]struct {
		method, path string
		header       headers
		want         string
	}{
		"the first that matches wins":                     {"GET", "/a", headers{"x-env": "test"}, "exact with header"},
		"a header that differs passes on":                 {"GET", "/a", headers{"x-env": "prod"}, "exact"},
		"a header that is absent passes on":               {"GET", "/a", nil, "exact"},
		"order is the meaning, not length":                {"GET", "/wide/exact", nil, "wide, and early"},
		"a prefix is bytewise":                            {"GET", "/wider", nil, "wide, and early"},
		"the method matches as a header":                  {"DELETE", "/a/b", nil, "delete only"},
		"another method does not":                         {"GET", "/a/b", nil, ""},
		"a segment prefix matches itself":                 {"GET", "/seg", nil, "segments"},
		"and below":                                       {"GET", "/seg/x", nil, "segments"},
		"but not beside":                                  {"GET", "/segment", nil, ""},
		"an invalid route is not passed over":             {"GET", "/bad/ok", nil, "not honoured"},
		"a gRPC service":                                  {"POST", "/shop.Orders/Get", nil, "service"},
		"another service with the same start is not it":   {"POST", "/shop.OrdersAdmin/Get", nil, ""},
		"nothing matches":                                 {"GET", "/", nil, ""},
		"repeated values come joined and differ from one": {"GET", "/a", headers{"x-env": "test,test"}, "exact"},
	} {
		t.Run(name, func(t *testing.T) {
			req := route.Request{Method: tc.method, Path: tc.path}
			if tc.header != nil {
				req.Header = tc.header
			}
			var got string
			if r := table.Match(req); r != nil {
				got = r.Name
			}
			if got != tc.want {
				t.Errorf("Match(%s %s) = %q, want %q", tc.method, tc.path, got, tc.want)
			}
			explained, skipped := table.Explain(req)
			if (explained == nil) != (got == "") || explained != nil && explained.Name != got {
				t.Errorf("Explain says %v, Match %q", explained, got)
			}
			for _, s := range skipped {
				if s.Why == "" {
					t.Errorf("route %q is skipped without a reason", s.Route.Name)
				}
			}
		})
	}
}

func TestTablesKeepWhatRoutesSay(t *testing.T) {
	table := route.New(&resource.VirtualHost{Name: "orders", Routes: []resource.Route{{
		Name: "raw", Timeout: 2 * time.Second, IdleTimeout: time.Minute,
		Origin:   resource.Origin{Object: "HTTPRoute/default/orders", Rule: "0.0", Source: "mesh.yaml:4"},
		Clusters: []resource.WeightedCluster{{Name: "v1", Weight: 90}, {Name: "v2", Weight: 10}},
		Retry:    &resource.Retry{On: []string{"503"}, Attempts: 2},
	}, {NonForwarding: true}}})
	r := table.Routes()[0]
	if r.Name != "HTTPRoute/default/orders/0.0" || r.Source != "mesh.yaml:4" || r.Total != 100 ||
		r.Timeout != 2*time.Second || r.Idle != time.Minute || r.Retry == nil || r.Retry.Attempts != 2 {
		t.Errorf("route = %+v", r)
	}
	if other := table.Routes()[1]; other.Name != "route-1" || other.Invalid == "" {
		t.Errorf("a route that does not forward = %+v, want it invalid and named by its place", other)
	}
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 1))
	count := map[string]int{}
	const draws = 100_000
	for range draws {
		count[r.Cluster(rnd.Uint64())]++
	}
	if share := float64(count["v1"]) / draws; share < 0.89 || share > 0.91 {
		t.Errorf("seed %d: v1 got %.3f of the draws, want 0.90", seed, share)
	}
	if got := (&route.Route{Clusters: []route.Weighted{{Cluster: "v1"}}}).Cluster(7); got != "" {
		t.Errorf("weights of 0 lead to %q, want nowhere", got)
	}
}

// reference is the meaning of a route configuration, said as plainly as possible.
func reference(routes []resource.Route, req route.Request) int {
	for i, r := range routes {
		var path bool
		switch r.Match.Kind {
		case resource.Exact:
			path = req.Path == r.Match.Path
		case resource.Prefix:
			path = strings.HasPrefix(req.Path, r.Match.Path)
		case resource.Regex:
			path = regexp.MustCompile("^(?:" + r.Match.Path + ")$").MatchString(req.Path)
		case resource.PathSeparatedPrefix:
			want := strings.TrimRight(r.Match.Path, "/")
			path = req.Path == want || strings.HasPrefix(req.Path, want+"/")
		}
		for _, h := range r.Match.Headers {
			got, ok := req.Method, true
			if h.Name != ":method" {
				got, ok = req.Header.Get(h.Name)
			}
			path = path && ok && got == h.Exact
		}
		if path {
			return i
		}
	}
	return -1
}

// Random tables over a small alphabet, so that prefixes share, split and shadow each other.
func FuzzMatchAgainstReference(f *testing.F) {
	for seed := range uint64(50) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		rnd := rand.New(rand.NewPCG(seed, seed))
		path := func() string {
			var b strings.Builder
			b.WriteByte('/')
			for range rnd.IntN(6) {
				b.WriteByte("ab/"[rnd.IntN(3)])
			}
			return b.String()
		}
		routes := make([]resource.Route, rnd.IntN(40))
		for i := range routes {
			m := &routes[i].Match
			m.Kind, m.Path = resource.PathKind(rnd.IntN(4)), path()
			routes[i].Name = fmt.Sprint(i)
			if m.Kind == resource.Prefix && rnd.IntN(8) == 0 {
				m.Path = ""
			}
			if m.Kind == resource.Regex {
				m.Path = strings.ReplaceAll(m.Path, "b", "[^/]+")
			}
			for range rnd.IntN(3) {
				m.Headers = append(m.Headers, resource.HeaderMatch{Name: []string{":method", "x", "y"}[rnd.IntN(3)], Exact: fmt.Sprint(rnd.IntN(2))})
			}
		}
		table := route.New(&resource.VirtualHost{Routes: routes})
		for range 50 {
			h := headers{}
			for _, n := range []string{"x", "y"} {
				if rnd.IntN(2) == 0 {
					h[n] = fmt.Sprint(rnd.IntN(2))
				}
			}
			req := route.Request{Method: fmt.Sprint(rnd.IntN(2)), Path: path(), Header: h}
			got, want := -1, reference(routes, req)
			if r := table.Match(req); r != nil {
				if _, err := fmt.Sscan(r.Name, &got); err != nil {
					t.Fatal(err)
				}
			}
			if got != want {
				t.Fatalf("seed %d: Match(%+v) = route %d, want %d of %+v", seed, req, got, want, routes)
			}
			if r, skipped := table.Explain(req); (r == nil) != (want < 0) || r != nil && (r.Name != fmt.Sprint(want) || len(skipped) != want) {
				t.Fatalf("seed %d: Explain(%+v) = %v after %d, want route %d", seed, req, r, len(skipped), want)
			}
		}
	})
}

// tableOf has n routes for methods of gRPC services, a header on every tenth, and a default.
func tableOf(n int) *route.Table {
	vh := &resource.VirtualHost{}
	for i := range n - 1 {
		r := resource.Route{Match: resource.Match{Kind: resource.Exact, Path: fmt.Sprintf("/shop.Service%d/Method%d", i/10, i%10)}}
		if i%3 == 0 {
			r.Match = resource.Match{Kind: resource.Prefix, Path: fmt.Sprintf("/shop.Other%d/", i)}
		}
		if i%10 == 0 {
			r.Match.Headers = []resource.HeaderMatch{{Name: "x-env", Exact: "test"}}
		}
		vh.Routes = append(vh.Routes, r)
	}
	vh.Routes = append(vh.Routes, resource.Route{Match: resource.Match{Kind: resource.Prefix, Path: "/"}})
	return route.New(vh)
}

func TestMatchAllocatesNothing(t *testing.T) {
	var h route.Headers = headers{"x-env": "prod"}
	for _, n := range []int{1, 1000} {
		table := tableOf(n)
		for _, path := range []string{"/shop.Service5/Method5", "/shop.Other30/X", "/else"} {
			req := route.Request{Method: "POST", Path: path, Header: h}
			if table.Match(req) == nil {
				t.Fatalf("%s matches nothing", path)
			}
			if allocs := testing.AllocsPerRun(100, func() { table.Match(req) }); allocs != 0 {
				t.Errorf("%d routes: Match(%s) allocates %v times, want 0", n, path, allocs)
			}
		}
	}
}

// Routes of one path that differ in a header are not looked at one after the other.
func BenchmarkMatchByHeader(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("routes=%d", n), func(b *testing.B) {
			vh := &resource.VirtualHost{}
			for i := range n {
				vh.Routes = append(vh.Routes, resource.Route{Match: resource.Match{Path: "/", Headers: []resource.HeaderMatch{{Name: "x-tenant", Exact: fmt.Sprint(i)}}}})
			}
			table := route.New(vh)
			req := route.Request{Method: "GET", Path: "/", Header: headers{"x-tenant": fmt.Sprint(n - 1)}}
			b.ReportAllocs()
			for b.Loop() {
				if table.Match(req) == nil {
					b.Fatal("no match")
				}
			}
		})
	}
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("routes=%d", n), func(b *testing.B) {
			table := tableOf(n)
			req := route.Request{Method: "POST", Path: "/shop.Service5/Method5", Header: headers{}}
			b.ReportAllocs()
			for b.Loop() {
				table.Match(req)
			}
		})
	}
}

func TestExplainKeepsSecrets(t *testing.T) {
	for name, want := range map[string]string{
		"x-env":         `x-env is "value", want "beta"`,
		"authorization": "header authorization is absent or has another value",
		"Cookie":        "header cookie is absent or has another value",
	} {
		table := route.New(&resource.VirtualHost{Routes: []resource.Route{{
			Match: resource.Match{Kind: resource.Prefix, Headers: []resource.HeaderMatch{{Name: name, Exact: "beta"}}},
		}}})
		_, skipped := table.Explain(route.Request{Path: "/", Header: headers{strings.ToLower(name): "value"}})
		if len(skipped) != 1 || skipped[0].Why != want {
			t.Errorf("%+v, want %q", skipped, want)
		}
		label := table.Routes()[0].Label()
		if shown := strings.Contains(label, "beta"); shown != (name == "x-env") {
			t.Errorf("label %q", label)
		}
	}
}
