package telemetry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/inlay-mesh/inlay/meshsdk/internal/apply"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/meshsdk/internal/telemetry"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

const (
	caller = "spiffe://inlay.local/ns/default/svc/cart"
	callee = "spiffe://inlay.local/ns/default/svc/orders"
)

func engine(t testing.TB, o call.Observer) *call.Engine {
	e := call.New(call.Config{Observer: o})
	t.Cleanup(e.Close)
	a := apply.New(apply.Config{Publish: e.Publish})
	cluster := func(name string) *graph.Cluster {
		return &graph.Cluster{Name: name, Resource: &resource.Cluster{Name: name, MaxRequests: 1000, RetryMinPerSecond: 3}, Endpoints: &resource.Endpoints{
			Localities: []resource.Locality{{Weight: 1, Endpoints: []resource.Endpoint{
				{Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:80")}, Weight: 1, Labels: map[string]string{"version": "v1"}},
				{Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:80")}, Weight: 1, Labels: map[string]string{"version": "v1"}},
			}}},
		}}
	}
	a.Apply(&graph.Config{
		Name: "orders", Version: "7",
		Routes: &resource.RouteConfiguration{VirtualHosts: []resource.VirtualHost{{Domains: []string{"*"}, Routes: []resource.Route{{
			Match: resource.Match{Path: "/"}, Clusters: []resource.WeightedCluster{{Name: "orders.default:80", Weight: 1}},
			Origin: resource.Origin{Object: "HTTPRoute/default/orders", Rule: "0", Source: "mesh.yaml:7"},
			Retry:  &resource.Retry{Attempts: 1, On: []string{"unavailable"}, Base: 1, Max: 1},
		}}}}},
		Clusters: map[string]*graph.Cluster{"orders.default:80": cluster("orders.default:80")},
	})
	return e
}

func rpc() *call.Request {
	return &call.Request{Request: route.Request{Method: "POST", Path: "/shop.Orders/Get"}, GRPC: true, Idempotent: true}
}

func attempt(t testing.TB, c *call.Call) *call.Attempt {
	a, err := c.Next()
	if err != nil {
		t.Fatal(err)
	}
	a.Picked(c.Cluster().Set.Pick(a.Tried()))
	a.Connected(callee, true)
	return a
}

// One call over both sides: one trace, two spans, two measurements, two records, two counts.
func TestACallIsSeenOnBothSides(t *testing.T) {
	tp, mp := &tracers{sampled: true}, &meters{}
	var records []call.Record
	counters := telemetry.NewCounters(0, epoch)
	tel, err := telemetry.New(telemetry.Config{
		TracerProvider: tp, MeterProvider: mp, Propagator: propagation.TraceContext{}, Counters: counters,
		AccessLog: func(r call.Record) { records = append(records, r) },
	})
	if err != nil {
		t.Fatal(err)
	}
	e := engine(t, tel)
	ctx, root := tp.Tracer("").Start(t.Context(), "root")
	c, err := e.Begin(ctx, "orders", rpc())
	if err != nil {
		t.Fatal(err)
	}
	attempt(t, c)
	if !c.Retry(call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 14}) {
		t.Fatal("no retry")
	}
	md := headers{}
	tel.Inject(attempt(t, c), md)

	s := &call.ServerCall{Service: "orders.default", Method: "POST", Path: "/shop.Orders/Get", GRPC: true, Peer: caller, MTLS: true}
	sctx := tel.BeginServer(t.Context(), s, md)
	tel.EndServer(sctx, s, call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 5, Err: errors.New("no such order: secret")})
	if err := c.End(call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 5}); err == nil {
		t.Fatal("status 5 is no failure")
	}
	root.End()

	if len(tp.ended) != 3 {
		t.Fatalf("%d spans ended, want server, client, root", len(tp.ended))
	}
	server, client := tp.ended[0], tp.ended[1]
	if server.parent.SpanID() != client.self.SpanID() || client.parent.SpanID() != root.SpanContext().SpanID() ||
		server.self.TraceID() != root.SpanContext().TraceID() || !server.parent.IsRemote() {
		t.Error("the three spans are not one trace: root, client, server")
	}
	if client.name != "shop.Orders/Get" || client.kind != trace.SpanKindClient || server.name != "shop.Orders/Get" || server.kind != trace.SpanKindServer {
		t.Errorf("client span %q %v, server span %q %v", client.name, client.kind, server.name, server.kind)
	}
	for key, want := range map[attribute.Key]string{
		"rpc.system.name": "grpc", "rpc.method": "shop.Orders/Get", "rpc.response.status_code": "NOT_FOUND", "error.type": "NOT_FOUND",
		"inlay.service": "orders", "inlay.route": "HTTPRoute/default/orders/0", "inlay.peer": callee, "inlay.reason": "upstream_status",
		"inlay.version": "v1", "inlay.cluster": "orders.default:80", "inlay.route.source": "mesh.yaml:7", "inlay.attempts": "2",
	} {
		if got := client.attrs[key].String(); got != want {
			t.Errorf("client span: %s = %q, want %q", key, got, want)
		}
	}
	if len(client.events) != 2 || client.status != codes.Error {
		t.Errorf("client span: %d events, status %v; want two attempts and an error", len(client.events), client.status)
	}
	if server.status == codes.Error {
		t.Error("NOT_FOUND is the caller's fault, not the server's")
	}
	for _, sp := range tp.ended {
		for k, v := range sp.attrs {
			if strings.Contains(v.String(), "secret") || strings.Contains(v.String(), "10.0.0.") {
				t.Errorf("span %q: %s = %q", sp.name, k, v.String())
			}
		}
		if strings.Contains(sp.text, "secret") || sp.ends != 1 {
			t.Errorf("span %q: status %q, ended %d times", sp.name, sp.text, sp.ends)
		}
	}

	if len(mp.got) != 2 || mp.got[0].name != "rpc.server.call.duration" || mp.got[1].name != "rpc.client.call.duration" {
		t.Fatalf("measured %+v", mp.got)
	}
	for name, unit := range mp.made {
		if unit != "s" {
			t.Errorf("%s in %q, want s", name, unit)
		}
	}
	if v, _ := mp.got[1].attrs.Value("inlay.reason"); v.AsString() != "upstream_status" {
		t.Errorf("client's attributes %v", mp.got[1].attrs.Encoded(attribute.DefaultEncoder()))
	}
	if len(records) != 2 || records[0].Direction != "server" || records[0].Peer != caller || records[1].Direction != "client" ||
		records[1].Attempts != 2 || records[1].Decision() == nil || records[0].Decision() != nil {
		t.Errorf("records %+v", records)
	}
	counts := counters.Take(epoch.Add(time.Second))
	if len(counts.Calls) != 2 || counts.Window != time.Second || counts.Dropped != 0 {
		t.Fatalf("counts %+v", counts)
	}
	for _, n := range counts.Calls {
		if n.Calls != 1 || n.Failed != 1 || n.MTLS != 1 || n.Reason != "upstream_status" {
			t.Errorf("count %+v", n)
		}
	}
}

func TestHTTPCalls(t *testing.T) {
	tp, mp := &tracers{sampled: true}, &meters{}
	tel, err := telemetry.New(telemetry.Config{TracerProvider: tp, MeterProvider: mp, Propagator: propagation.TraceContext{}})
	if err != nil {
		t.Fatal(err)
	}
	header := http.Header{}
	ctx, _ := tp.Tracer("").Start(t.Context(), "root")
	tel.Inject(ctx, propagation.HeaderCarrier(header))
	if header.Get("Traceparent") == "" {
		t.Fatal("nothing injected into HTTP headers")
	}
	for _, tc := range []struct {
		method string
		result call.Result
		name   string
		failed bool
		attrs  map[attribute.Key]string
	}{
		{"GET", call.Result{HTTPStatus: 200}, "GET", false, map[attribute.Key]string{"http.request.method": "GET", "http.response.status_code": "200", "url.path": "/v1/7", "error.type": ""}},
		{"GET", call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: 503}, "GET", true, map[attribute.Key]string{"error.type": "503"}},
		{"GET", call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: 404}, "GET", false, map[attribute.Key]string{"error.type": "404"}},
		{"BREW", call.Result{Reason: call.ReasonUnauthenticated, HTTPStatus: 401}, "HTTP", false, map[attribute.Key]string{"http.request.method": "_OTHER", "error.type": "unauthenticated"}},
	} {
		s := &call.ServerCall{Service: "orders.default", Method: tc.method, Path: "/v1/7", Peer: "plaintext"}
		tel.EndServer(tel.BeginServer(t.Context(), s, propagation.HeaderCarrier(header)), s, tc.result)
		got := tp.ended[len(tp.ended)-1]
		if got.name != tc.name || (got.status == codes.Error) != tc.failed || !got.parent.IsRemote() {
			t.Errorf("%s %+v: span %q, status %v", tc.method, tc.result, got.name, got.status)
		}
		for k, want := range tc.attrs {
			if got := got.attrs[k]; got.String() != want && (want != "" || got.Type() != attribute.EMPTY) {
				t.Errorf("%s %+v: %s = %q, want %q", tc.method, tc.result, k, got.String(), want)
			}
		}
	}
	for _, m := range mp.got {
		if m.attrs.HasValue("url.path") {
			t.Error("a path is on a metric: its values have no bound")
		}
	}
}

func TestWithoutAPropagatorW3CIsUsed(t *testing.T) {
	tel, err := telemetry.New(telemetry.Config{TracerProvider: &tracers{sampled: true}})
	if err != nil {
		t.Fatal(err)
	}
	md := headers{}
	ctx := tel.BeginServer(t.Context(), &call.ServerCall{GRPC: true, Path: "/a/B"}, nil)
	tel.Inject(ctx, md)
	if md.Get("Traceparent") == "" || len(md["traceparent"]) != 1 || len(md.Keys()) == 0 {
		t.Errorf("metadata %v has no traceparent", md)
	}
}

// A process without tracing passes on the trace it was given.
func TestTracesPassThroughWithoutTracing(t *testing.T) {
	tel, err := telemetry.New(telemetry.Config{TracerProvider: tracenoop.NewTracerProvider(), MeterProvider: metricnoop.NewMeterProvider(), Propagator: propagation.TraceContext{}})
	if err != nil {
		t.Fatal(err)
	}
	const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	s := &call.ServerCall{GRPC: true, Path: "/a/B"}
	ctx := tel.BeginServer(t.Context(), s, headers{"traceparent": {parent}})
	c, err := engine(t, tel).Begin(ctx, "orders", rpc())
	if err != nil {
		t.Fatal(err)
	}
	out := headers{}
	tel.Inject(attempt(t, c), out)
	succeed(t, c)
	tel.EndServer(ctx, s, call.Result{})
	if got := out.Get("traceparent"); got != parent {
		t.Errorf("traceparent %q, want %q", got, parent)
	}
}

func TestFailuresBeforeTheFirstAttemptAreRecorded(t *testing.T) {
	var got []call.Record
	tel, _ := telemetry.New(telemetry.Config{AccessLog: func(r call.Record) { got = append(got, r) }})
	e := engine(t, tel)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Begin(ctx, "pay", rpc()); err == nil {
		t.Fatal("a name without configuration begins")
	}
	if len(got) != 1 || got[0].Reason != call.ReasonCancelled || got[0].Service != "pay" || got[0].Err == nil {
		t.Errorf("records %+v", got)
	}
}

func TestAccessLines(t *testing.T) {
	var out bytes.Buffer
	for level, want := range map[slog.Level]bool{slog.LevelInfo: false, slog.LevelDebug: true} {
		out.Reset()
		tel, _ := telemetry.New(telemetry.Config{Logger: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level}))})
		c, err := engine(t, tel).Begin(t.Context(), "orders", rpc())
		if err != nil {
			t.Fatal(err)
		}
		attempt(t, c)
		_ = c.End(call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 13})
		line := out.String()
		if (line != "") != want {
			t.Errorf("at %v logged %q", level, line)
		}
		if want && (!strings.Contains(line, "reason=upstream_status") || !strings.Contains(line, "code=INTERNAL") || !strings.Contains(line, "route=HTTPRoute/default/orders/0")) {
			t.Errorf("line %q", line)
		}
	}
}

// More series than there is room for share one, and calls go on being measured.
func TestMetricSeriesAreBounded(t *testing.T) {
	mp := &meters{}
	tel, _ := telemetry.New(telemetry.Config{MeterProvider: mp, TracerProvider: tracenoop.NewTracerProvider()})
	const calls = 2500
	for i := range calls {
		s := &call.ServerCall{Service: "orders", Path: fmt.Sprintf("/a.B/Method%d", i), GRPC: true, Peer: caller}
		tel.EndServer(tel.BeginServer(t.Context(), s, nil), s, call.Result{})
	}
	sets := map[attribute.Distinct]int{}
	var over int
	for _, m := range mp.got {
		sets[m.attrs.Equivalent()]++
		if v, ok := m.attrs.Value("otel.metric.overflow"); ok && v.AsBool() {
			over++
		}
	}
	if len(mp.got) != calls || len(sets) != 2001 || over != calls-2000 {
		t.Errorf("%d measurements in %d series, %d in the overflow; want %d, 2001, %d", len(mp.got), len(sets), over, calls, calls-2000)
	}
}

// bothSides is one call with the telemetry of client and server.
func bothSides(t testing.TB, tel *telemetry.Telemetry) func() {
	e := engine(t, tel)
	ctx, req := context.Background(), rpc()
	md := headers{}
	return func() {
		c, err := e.Begin(ctx, "orders", req)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := c.Next()
		a.Connected(callee, true)
		clear(md)
		tel.Inject(a, md)
		s := &call.ServerCall{Service: "orders.default", Method: "POST", Path: "/shop.Orders/Get", GRPC: true, Peer: caller, MTLS: true}
		sctx := tel.BeginServer(ctx, s, md)
		tel.EndServer(sctx, s, call.Result{})
		_ = c.End(call.Result{})
	}
}

// The budget of every call, both sides: at most 6 allocations. The Call itself is one that the
// engine makes with or without telemetry.
func TestTelemetryBudget(t *testing.T) {
	for name, cfg := range map[string]telemetry.Config{
		"no-op providers":  {TracerProvider: tracenoop.NewTracerProvider(), MeterProvider: metricnoop.NewMeterProvider()},
		"counters":         {TracerProvider: tracenoop.NewTracerProvider(), Counters: telemetry.NewCounters(0, epoch)},
		"an access log":    {TracerProvider: tracenoop.NewTracerProvider(), AccessLog: func(call.Record) {}},
		"metrics that add": {TracerProvider: tracenoop.NewTracerProvider(), MeterProvider: &sums{by: map[attribute.Distinct]float64{}}, Counters: telemetry.NewCounters(0, epoch)},
	} {
		t.Run(name, func(t *testing.T) {
			tel, err := telemetry.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			one := bothSides(t, tel)
			if n := testing.AllocsPerRun(200, one) - 1; n > 6 {
				t.Errorf("%v allocations, want at most 6", n)
			} else {
				t.Logf("%v allocations", n)
			}
		})
	}
}

// A program that has set up no tracing pays nothing for spans.
func TestWithoutTracingNothingIsAllocated(t *testing.T) {
	tel, err := telemetry.New(telemetry.Config{Counters: telemetry.NewCounters(0, epoch)})
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(200, bothSides(t, tel)) - 1; n > 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// The program may set up tracing after Open; what is not ours is not ended by us.
func TestTracingThatIsSetUpLater(t *testing.T) {
	tel, err := telemetry.New(telemetry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	one := func(ctx context.Context) {
		c, err := engine(t, tel).Begin(ctx, "orders", rpc())
		if err != nil {
			t.Fatal(err)
		}
		succeed(t, c)
		s := &call.ServerCall{GRPC: true, Path: "/a/B"}
		tel.EndServer(tel.BeginServer(ctx, s, nil), s, call.Result{})
	}
	foreign := &tracers{sampled: true}
	ctx, span := foreign.Tracer("").Start(t.Context(), "the program's own")
	one(ctx)
	if got := span.(interface{ attributes() int }).attributes(); got != 0 || len(foreign.ended) != 0 {
		t.Errorf("a span of somebody else got %d attributes and %d ends", got, len(foreign.ended))
	}
	unset := otel.GetTracerProvider()
	t.Cleanup(func() { otel.SetTracerProvider(unset) })
	otel.SetTracerProvider(later)
	before := len(later.ended)
	one(ctx)
	if got := len(later.ended) - before; got != 2 || len(foreign.ended) != 0 {
		t.Errorf("%d spans ended, %d of somebody else; want 2 and 0", got, len(foreign.ended))
	}
}

// later is what a program sets up after Open. There is one in a process: OpenTelemetry passes on to
// the first provider that is set whatever was made before.
var later = &tracers{sampled: true}

func BenchmarkBothSides(b *testing.B) {
	for name, cfg := range map[string]telemetry.Config{
		"no-op":            {TracerProvider: tracenoop.NewTracerProvider(), MeterProvider: metricnoop.NewMeterProvider()},
		"metrics+counters": {TracerProvider: tracenoop.NewTracerProvider(), MeterProvider: &sums{by: map[attribute.Distinct]float64{}}, Counters: telemetry.NewCounters(0, epoch)},
	} {
		b.Run(name, func(b *testing.B) {
			tel, err := telemetry.New(cfg)
			if err != nil {
				b.Fatal(err)
			}
			one := bothSides(b, tel)
			b.ReportAllocs()
			for b.Loop() {
				one()
			}
		})
	}
}

// succeed ends a call well.
func succeed(t testing.TB, c *call.Call) {
	t.Helper()
	if err := c.End(call.Result{}); err != nil {
		t.Errorf("End of a success: %v", err)
	}
}
