package call_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestOneCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(2, nil))
		c := begin(t, m, t.Context(), rpc("/shop.Orders/Get"))
		a, ep := try(t, c)
		if call.FromContext(a) != a || call.FromContext(context.WithValue(a, m, 1)) != a {
			t.Error("the attempt is not found in its own context")
		}
		if call.FromContext(c) != nil || call.FromContext(t.Context()) != nil {
			t.Error("an attempt is found where none is")
		}
		if ep.State.InFlight() != 1 || c.Cluster().Limiter.InFlight() != 1 {
			t.Errorf("while it runs: endpoint %d, cluster %d in flight, want 1 and 1", ep.State.InFlight(), c.Cluster().Limiter.InFlight())
		}
		a.Connected("spiffe://inlay.local/ns/default/svc/orders", true)
		time.Sleep(30 * time.Millisecond)
		if err := c.End(call.Result{}); err != nil {
			t.Fatalf("End of a success: %v", err)
		}
		if ep.State.InFlight() != 0 || c.Cluster().Limiter.InFlight() != 0 {
			t.Errorf("afterwards: endpoint %d, cluster %d in flight, want 0 and 0", ep.State.InFlight(), c.Cluster().Limiter.InFlight())
		}
		if err := c.End(call.Result{Reason: call.ReasonReset}); err != nil {
			t.Errorf("a second End says %v", err)
		}
		rec := m.last(t)
		if len(m.records) != 1 || rec.Direction != "client" || rec.Service != "orders" || rec.Route != "HTTPRoute/default/orders/0" ||
			rec.Peer != "spiffe://inlay.local/ns/default/svc/orders" || !rec.MTLS || rec.Version != "v1" || rec.Reason != call.ReasonOK ||
			rec.Attempts != 1 || rec.Duration != 30*time.Millisecond || rec.Path != "/shop.Orders/Get" {
			t.Errorf("%d records, the last %+v", len(m.records), rec)
		}
	})
}

// Each way a call can fail before its first attempt.
func TestBeginFailures(t *testing.T) {
	one := func(set func(*graph.Config)) []*graph.Config { return []*graph.Config{orders(1, set)} }
	for name, tc := range map[string]struct {
		configs []*graph.Config
		service string
		path    string
		want    call.Reason
		text    string
	}{
		"a name that does not exist": {append(one(nil), &graph.Config{Name: "oders", Err: graph.ErrNotExist}), "oders", "/", call.ReasonNoRoute,
			`mesh: no route for "oders": no service of that name exists; did you mean "orders"?`},
		"a configuration that was never valid": {[]*graph.Config{{Name: "orders", Err: errors.New("route 2: regex")}}, "orders", "/", call.ReasonConfigMissing, "never valid"},
		"no route matches":                     {one(func(c *graph.Config) { c.Routes.VirtualHosts[0].Routes[0].Match.Path = "/v1" }), "orders", "/v2", call.ReasonNoRoute, "nothing matches GET /v2"},
		"no virtual host":                      {one(func(c *graph.Config) { c.Routes.VirtualHosts[0].Domains = []string{"pay"} }), "orders", "/", call.ReasonNoRoute, "nothing matches"},
		"an invalid route":                     {one(func(c *graph.Config) { c.Routes.VirtualHosts[0].Routes[0].Invalid = "match.safe_regex" }), "orders", "/", call.ReasonNoRoute, "match.safe_regex"},
		"a split of weight 0": {one(func(c *graph.Config) { c.Routes.VirtualHosts[0].Routes[0].Clusters[0].Weight = 0 }), "orders", "/", call.ReasonNoCluster,
			"sum to 0"},
		"a cluster that is not there": {one(func(c *graph.Config) { c.Routes.VirtualHosts[0].Routes[0].Clusters[0].Name = "x" }), "orders", "/", call.ReasonNoCluster, `cluster "x"`},
		"a cluster in error": {one(func(c *graph.Config) {
			c.Clusters["orders.default:80"] = &graph.Cluster{Err: graph.ErrNotExist}
		}), "orders", "/", call.ReasonNoCluster, "does not exist"},
		"a service that nobody knows": {one(func(c *graph.Config) {
			c.Clusters["orders.default:80"].Endpoints.Localities = nil
			c.Clusters["orders.default:80"].Resource.EmptyReason = `service "orders" is neither declared nor registered`
		}), "orders", "/", call.ReasonNoEndpoint, "neither declared nor registered"},
		"no endpoints": {[]*graph.Config{orders(0, nil)}, "orders", "/", call.ReasonNoEndpoint, "has no endpoints"},
		"only draining endpoints": {one(func(c *graph.Config) {
			c.Clusters["orders.default:80"].Endpoints.Localities[0].Endpoints[0].Health = resource.Draining
		}), "orders", "/", call.ReasonNoEndpoint, "none of the 1 endpoints of cluster \"orders.default:80\" can be picked: draining"},
		"a limit of 0":           {one(func(c *graph.Config) { c.Clusters["orders.default:80"].Resource.MaxRequests = 0 }), "orders", "/", call.ReasonCircuitOpen, "limit of 0"},
		"a path of two readings": {one(nil), "orders", "/a/../b", call.ReasonNoRoute, "no single meaning"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMesh(t, call.Config{}, tc.configs...)
				start := time.Now()
				c, err := m.Begin(t.Context(), tc.service, get(tc.path))
				if c != nil {
					t.Fatal("a call began")
				}
				var own *call.Error
				if !errors.As(err, &own) || own.Reason != tc.want || own.Service != tc.service || own.Attempts != 0 {
					t.Fatalf("error %#v, want reason %s", err, tc.want)
				}
				if !strings.Contains(err.Error(), tc.text) {
					t.Errorf("error %q does not say %q", err, tc.text)
				}
				if strings.Contains(err.Error(), "10.0.0.") {
					t.Errorf("error %q names an address", err)
				}
				if time.Since(start) != 0 {
					t.Errorf("it took %v to say so", time.Since(start))
				}
				if rec := m.last(t); rec.Reason != tc.want || rec.Failed() != true || len(m.records) != 1 {
					t.Errorf("recorded %+v", rec)
				}
				if d := own.Decision(); d == nil || d.Reason != tc.want || d.Detail == "" {
					t.Errorf("decision %+v", d)
				}
				if cl := m.Snapshot().Services["orders"].Clusters["orders.default:80"]; cl != nil && cl.Limiter.InFlight() != 0 {
					t.Error("a call that did not begin holds a place")
				}
			})
		})
	}
}

func TestSplitIsDrawnOnceACall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(1, func(c *graph.Config) {
			retries(nil)(c)
			r := &c.Routes.VirtualHosts[0].Routes[0]
			r.Clusters = nil
			for _, arm := range []struct {
				name   string
				weight uint32
			}{{"orders.default:80|v1", 90}, {"orders.default:80|v2", 10}} {
				r.Clusters = append(r.Clusters, resource.WeightedCluster{Name: arm.name, Weight: arm.weight})
				copied := *c.Clusters["orders.default:80"]
				c.Clusters[arm.name] = &copied
			}
		}))
		count := map[string]int{}
		const calls = 20_000
		for range calls {
			c := begin(t, m, t.Context(), get("/"))
			name := c.Cluster().Name
			count[name]++
			try(t, c)
			if c.Retry(call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: 503}) {
				try(t, c)
			}
			if c.Cluster().Name != name {
				t.Fatal("a retry went to the other arm of the split")
			}
			succeed(t, c)
		}
		if share := float64(count["orders.default:80|v1"]) / calls; share < 0.88 || share > 0.92 {
			t.Errorf("v1 got %.3f of the calls, want 0.90", share)
		}
	})
}

func TestRequestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(1, func(c *graph.Config) { c.Routes.VirtualHosts[0].Routes[0].Timeout = 2 * time.Second }))
		c := begin(t, m, t.Context(), rpc("/a/B"))
		if end, ok := c.Deadline(); !ok || time.Until(end) != 2*time.Second {
			t.Errorf("deadline in %v, %v; want 2 s", time.Until(end), ok)
		}
		a, _ := try(t, c)
		<-a.Done()
		if c.Retry(call.Result{Reason: call.ReasonCancelled, GRPCCode: 4}) {
			t.Error("a call is retried after its deadline")
		}
		err := c.End(call.Result{Reason: call.ReasonCancelled, GRPCCode: 4, Err: c.Err()})
		if rec := m.last(t); rec.Reason != call.ReasonTimeout || rec.Duration != 2*time.Second || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v: %+v", err, rec)
		}
		// A caller that waits less is not made to wait longer.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		c = begin(t, m, ctx, get("/"))
		if end, _ := c.Deadline(); time.Until(end) != time.Second {
			t.Errorf("deadline in %v, want the caller's 1 s", time.Until(end))
		}
		cancel()
		_, _ = c.Next()
		if err := c.End(call.Result{Reason: call.ReasonReset}); m.last(t).Reason != call.ReasonCancelled {
			t.Errorf("the caller gave up: %v", err)
		}
	})
}

// fakeClock drives an engine by hand.
type fakeClock struct {
	mu     sync.Mutex
	now    time.Time
	timers map[*fakeTimer]struct{}
}

type fakeTimer struct {
	at time.Time
	f  func()
}

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) AfterFunc(d time.Duration, f func()) func() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	timer := &fakeTimer{c.now.Add(d), f}
	c.timers[timer] = struct{}{}
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		_, ok := c.timers[timer]
		delete(c.timers, timer)
		return ok
	}
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	var due []func()
	for timer := range c.timers {
		if !timer.at.After(c.now) {
			due = append(due, timer.f)
			delete(c.timers, timer)
		}
	}
	c.mu.Unlock()
	for _, f := range due {
		f()
	}
}

func TestTimeoutsFollowTheClockThatWasGiven(t *testing.T) {
	clock := &fakeClock{now: time.Unix(1e9, 0), timers: map[*fakeTimer]struct{}{}}
	m := newMesh(t, call.Config{Clock: clock}, orders(1, func(c *graph.Config) {
		retries(func(r *resource.Retry) { r.PerTry = time.Second })(c)
		c.Routes.VirtualHosts[0].Routes[0].Timeout = 3 * time.Second
	}))
	c := begin(t, m, t.Context(), get("/"))
	a, _ := try(t, c)
	clock.advance(time.Second)
	<-a.Done()
	if !errors.Is(a.Err(), context.DeadlineExceeded) || c.Err() != nil {
		t.Fatalf("after the attempt's time: attempt %v, call %v", a.Err(), c.Err())
	}
	if !c.Retry(call.Result{Reason: call.ReasonCancelled}) {
		t.Fatal("a per-try timeout is not retried")
	}
	clock.advance(2 * time.Second)
	<-c.Done()
	if !errors.Is(c.Err(), context.DeadlineExceeded) {
		t.Fatalf("after the call's time: %v", c.Err())
	}
	_, err := c.Next()
	if err == nil {
		t.Fatal("an attempt begins after the deadline")
	}
	err = c.End(call.Result{Err: err})
	if rec := m.last(t); rec.Reason != call.ReasonTimeout || rec.Duration != 3*time.Second || rec.Attempts != 1 {
		t.Errorf("%v: %+v", err, rec)
	}
	clock.mu.Lock()
	defer clock.mu.Unlock()
	if len(clock.timers) != 1 { // the sweep
		t.Errorf("%d timers are left after the call, want 1", len(clock.timers))
	}
}

func TestLimit(t *testing.T) {
	m := newMesh(t, call.Config{}, orders(1, func(c *graph.Config) { c.Clusters["orders.default:80"].Resource.MaxRequests = 1 }))
	first := begin(t, m, t.Context(), get("/"))
	_, err := m.Begin(t.Context(), "orders", get("/"))
	var own *call.Error
	if !errors.As(err, &own) || own.Reason != call.ReasonCircuitOpen {
		t.Fatalf("a second call at once: %v, want circuit_open", err)
	}
	if d := own.Decision(); len(d.Limits) != 1 || d.Cluster != "orders.default:80" || d.Route == nil {
		t.Errorf("decision %+v", d)
	}
	// The limit outlives an update of the cluster.
	m.apply.Apply(orders(2, func(c *graph.Config) { c.Clusters["orders.default:80"].Resource.MaxRequests = 1 }))
	if _, err := m.Begin(t.Context(), "orders", get("/")); err == nil {
		t.Error("an update of the endpoints forgot the call in flight")
	}
	succeed(t, first)
	succeed(t, begin(t, m, t.Context(), get("/")))
}

func TestWaitForReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(0, nil))
		req := get("/")
		req.WaitForReady = true
		var got *call.Call
		var err error
		done := make(chan struct{})
		go func() { defer close(done); got, err = m.Begin(t.Context(), "orders", req) }()
		time.Sleep(time.Minute)
		select {
		case <-done:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
		m.apply.Apply(orders(1, nil))
		<-done
		if err != nil {
			t.Fatal(err)
		}
		succeed(t, got)
		m.apply.Apply(orders(0, nil))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = m.Begin(ctx, "orders", req)
		var own *call.Error
		if !errors.As(err, &own) || own.Reason != call.ReasonTimeout {
			t.Errorf("without an endpoint until the deadline: %v, want timeout", err)
		}
	})
}

func TestReplayBufferIsBounded(t *testing.T) {
	m := newMesh(t, call.Config{ReplayPerCall: 100, ReplayTotal: 150}, orders(1, nil))
	a, b := begin(t, m, t.Context(), get("/")), begin(t, m, t.Context(), get("/"))
	if !a.Reserve(100) || a.Reserve(1) {
		t.Error("a call's bound of 100 bytes is not kept")
	}
	if !b.Reserve(50) || b.Reserve(1) {
		t.Error("the total bound of 150 bytes is not kept")
	}
	a.Unreserve()
	if !b.Reserve(50) {
		t.Error("what was given back cannot be reserved")
	}
	succeed(t, b)
	if !a.Reserve(100) {
		t.Error("End does not give back")
	}
	succeed(t, a)
	// The body of a request may be read on for a moment after the call has ended.
	if a.Reserve(1) {
		t.Error("a call that has ended can reserve")
	}
	c, d := begin(t, m, t.Context(), get("/")), begin(t, m, t.Context(), get("/"))
	if !c.Reserve(100) || !d.Reserve(50) {
		t.Error("bytes are lost to a call that has ended")
	}
	succeed(t, c)
	succeed(t, d)
}

func TestCallTrace(t *testing.T) {
	m := newMesh(t, call.Config{}, orders(2, retries(nil)))
	var got *call.Decision
	ctx := call.WithTrace(t.Context(), &call.Trace{Done: func(d *call.Decision) { got = d }})
	c := begin(t, m, ctx, get("/v1/7"))
	_, first := try(t, c)
	if !c.Retry(call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: 503}) {
		t.Fatal("503 is not retried")
	}
	a, second := try(t, c)
	a.Connected("plaintext", false)
	if first == second {
		t.Error("the second attempt went to the same endpoint")
	}
	_ = c.End(call.Result{HTTPStatus: 200})
	if got == nil || got.Reason != call.ReasonOK || got.Route.Source != "mesh.yaml:7" || got.Revision != "7" || len(got.Endpoints) != 2 ||
		len(got.Attempts) != 2 || got.Attempts[0].Endpoint != first.Addresses[0].String() || got.Attempts[0].Outcome != "upstream_status" ||
		got.Attempts[1].Outcome != "ok" || got.Attempts[1].Peer != "plaintext" || got.MaxRetries != 2 {
		t.Errorf("decision %+v", got)
	}
	if s := c.Summary(); len(s.Endpoints) != 0 || len(s.Skipped) != 0 || s.Cluster != got.Cluster || len(s.Attempts) != 2 {
		t.Errorf("summary %+v", s)
	}
}

func TestExternalCallsAreCounted(t *testing.T) {
	m := newMesh(t, call.Config{})
	c := m.BeginExternal(t.Context(), "api.example.org", get("/x"))
	if _, err := c.Next(); err != nil {
		t.Fatal(err)
	}
	if c.Retry(call.Result{Reason: call.ReasonConnectFailed}) {
		t.Error("a call outside the mesh is retried")
	}
	_ = c.End(call.Result{HTTPStatus: 200})
	if rec := m.last(t); rec.Peer != "external" || rec.Service != "api.example.org" || rec.Reason != call.ReasonOK {
		t.Errorf("recorded %+v", rec)
	}
}

func TestExplain(t *testing.T) {
	m := newMesh(t, call.Config{}, orders(2, func(c *graph.Config) {
		vh := &c.Routes.VirtualHosts[0]
		vh.Routes[0].Clusters = append(vh.Routes[0].Clusters, resource.WeightedCluster{Name: "gone", Weight: 1})
		vh.Routes[0].Clusters[0].Weight = 9
		vh.Routes = append([]resource.Route{{Name: "first", Match: resource.Match{Kind: resource.Exact, Path: "/admin"}}}, vh.Routes...)
		c.Clusters["orders.default:80"].Endpoints.Localities[0].Endpoints[1].Health = resource.Draining
	}))
	d, err := m.Explain(t.Context(), "orders", *get("/a/../v1"))
	if err != nil {
		t.Fatal(err)
	}
	if d.Reason != call.ReasonOK || d.Cluster != "orders.default:80" || len(d.Skipped) != 1 || !strings.Contains(d.Skipped[0].Why, `"/v1"`) ||
		len(d.Candidates) != 2 || d.Candidates[1].Invalid == "" || len(d.Endpoints) != 2 || d.Endpoints[1].Excluded != "draining" {
		t.Errorf("%+v", d)
	}
	if len(m.records) != 0 {
		t.Error("an explanation was recorded as a call")
	}
	if d, err := m.Explain(t.Context(), "orders", *get("/%2f")); err != nil || d.Reason != call.ReasonNoRoute {
		t.Errorf("a path of two readings: %+v, %v", d, err)
	}
	if d, err := m.Explain(t.Context(), "orders", *get("/admin")); err != nil || d.Reason != call.ReasonNoCluster || d.Detail == "" {
		t.Errorf("a route without clusters: %+v, %v", d, err)
	}
}

func TestReasonsHaveASentence(t *testing.T) {
	for _, r := range append(call.Reasons(), "new_one") {
		text := (&call.Error{Service: "orders", Reason: r}).Error()
		if !strings.Contains(text, `"orders"`) || strings.Contains(text, "%!") {
			t.Errorf("%s says %q", r, text)
		}
	}
	if n := len(call.Reasons()); n != 20 {
		t.Errorf("%d reasons, want the 20 of the documentation", n)
	}
}

// A call with its first attempt is one allocation; the route, the pick and the end add none.
func TestAllocations(t *testing.T) {
	// Silent: an observer is not counted here.
	m := newMesh(t, call.Config{Observer: silent{}}, orders(10, retries(nil)))
	req := rpc("/shop.Orders/Get")
	req.Header = route.Headers(nil)
	ctx := t.Context()
	one := func() {
		c, err := m.Begin(ctx, "orders", req)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := c.Next()
		a.Picked(c.Cluster().Set.Pick(a.Tried()))
		a.Connected("spiffe://inlay.local/ns/default/svc/orders", true)
		_ = c.End(call.Result{})
	}
	if n := testing.AllocsPerRun(200, one); n > 1 {
		t.Errorf("%v allocations a call, want 1", n)
	}
	// 512 is a size that the allocator has; one byte more would cost 576. The race detector makes a
	// sync.Pool forget now and then, which is why it is not exactly that.
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 1000 {
		one()
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) / 1000; n >= 576 {
		t.Errorf("%d bytes a call, want 512", n)
	}
}

type silent struct{}

func (silent) BeginClient(ctx context.Context, _ *call.Call) context.Context { return ctx }
func (silent) EndClient(*call.Call, *call.Record)                            {}

// A call through 1000 routes may cost at most 1.03 of one through a single route.
func BenchmarkCallByRoutes(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("routes=%d", n), func(b *testing.B) {
			m := newMesh(b, call.Config{Observer: silent{}}, orders(10, func(c *graph.Config) {
				vh := &c.Routes.VirtualHosts[0]
				last := vh.Routes[0]
				vh.Routes = nil
				for i := range n - 1 {
					r := last
					r.Match = resource.Match{Kind: resource.Exact, Path: fmt.Sprintf("/shop.Service%d/Method%d", i/10, i%10)}
					vh.Routes = append(vh.Routes, r)
				}
				vh.Routes = append(vh.Routes, last)
			}))
			req, ctx := rpc("/shop.Orders/Get"), b.Context()
			for b.Loop() {
				c, err := m.Begin(ctx, "orders", req)
				if err != nil {
					b.Fatal(err)
				}
				a, _ := c.Next()
				a.Picked(c.Cluster().Set.Pick(a.Tried()))
				_ = c.End(call.Result{})
			}
		})
	}
}

func BenchmarkCall(b *testing.B) {
	for name, set := range map[string]func(*graph.Config){
		"plain":   nil,
		"timeout": func(c *graph.Config) { c.Routes.VirtualHosts[0].Routes[0].Timeout = time.Second },
	} {
		b.Run(name, func(b *testing.B) {
			m := newMesh(b, call.Config{Observer: silent{}}, orders(10, set))
			req, ctx := rpc("/shop.Orders/Get"), b.Context()
			b.ReportAllocs()
			for b.Loop() {
				c, err := m.Begin(ctx, "orders", req)
				if err != nil {
					b.Fatal(err)
				}
				a, _ := c.Next()
				a.Picked(c.Cluster().Set.Pick(a.Tried()))
				_ = c.End(call.Result{})
			}
		})
	}
}
