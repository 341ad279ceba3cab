package meshsdk_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// orders is a service whose Check answers SERVING and notes who called.
type orders struct {
	healthpb.UnimplementedHealthServer
	mu     sync.Mutex
	peers  []string
	meta   metadata.MD
	block  chan struct{} // when not nil, a call waits for it
	inside chan struct{} // gets one for each call that waits
}

func (o *orders) Check(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	id, ok := meshsdk.PeerFromContext(ctx)
	md, _ := metadata.FromIncomingContext(ctx)
	o.mu.Lock()
	o.peers = append(o.peers, fmt.Sprintf("%v %v", id, ok))
	o.meta = md
	block := o.block
	o.mu.Unlock()
	if block != nil {
		o.inside <- struct{}{}
		<-block
	}
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
}

// serve runs a gRPC service of p until the test ends or the Mesh does; run waits for Run.
func serveGRPC(t *testing.T, p *fakePlane, m *meshsdk.Mesh, o *orders, port uint16) (run func() error) {
	t.Helper()
	srv := m.NewServer()
	healthpb.RegisterHealthServer(srv, o)
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- m.Run(ctx, meshsdk.GRPC(port, srv)) }()
	t.Cleanup(func() {
		cancel()
		m.Close()
	})
	return func() error { cancel(); return <-done }
}

func check(ctx context.Context, cc grpc.ClientConnInterface) error {
	_, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

func ctxFor(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestCallOverTheMesh(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	o := &orders{}
	server := p.open("default", "orders", meshsdk.WithLabels(map[string]string{"version": "v1"}))
	serveGRPC(t, p, server, o, 8080)
	p.registered(1)

	var mu sync.Mutex
	var records []meshsdk.AccessRecord
	client := p.open("default", "cart", meshsdk.WithAccessLog(func(r meshsdk.AccessRecord) {
		mu.Lock()
		defer mu.Unlock()
		records = append(records, r)
	}))
	ctx := ctxFor(t)
	if err := client.Ready(ctx, "orders"); err != nil {
		t.Fatal(err)
	}
	cc, err := client.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	var decision *meshsdk.Decision
	traced := meshsdk.WithCallTrace(ctx, &meshsdk.CallTrace{Done: func(d *meshsdk.Decision) { decision = d }})
	traced = metadata.AppendToOutgoingContext(traced, "x-forwarded-client-cert", "URI=spiffe://inlay.local/ns/default/svc/admin", "x-kept", "1")
	if err := check(traced, cc); err != nil {
		t.Fatal(err)
	}

	o.mu.Lock()
	defer o.mu.Unlock()
	if got, want := fmt.Sprint(o.peers), "[spiffe://inlay.local/ns/default/svc/cart true]"; got != want {
		t.Errorf("peer in the handler: %s, want %s", got, want)
	}
	if got := o.meta.Get("x-forwarded-client-cert"); len(got) != 0 {
		t.Errorf("identity header reached the handler: %q", got)
	}
	if got := o.meta.Get("x-kept"); len(got) != 1 {
		t.Errorf("another header did not: %q", got)
	}
	if decision == nil || decision.Route == nil || decision.Route.Source != "mesh.yaml:7" || decision.Reason != meshsdk.ReasonOK {
		t.Errorf("decision: %+v", decision)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(records) != 1 || !records[0].MTLS || records[0].Peer != "spiffe://inlay.local/ns/default/svc/orders" || records[0].Version != "v1" {
		t.Errorf("records: %+v", records)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.nodes {
		if n.GetUserAgentName() != "inlay-go" || len(n.GetClientFeatures()) == 0 || n.GetClientFeatures()[0] != "inlay.sdk" {
			t.Errorf("node: %v", n)
		}
		if got := n.GetMetadata().GetFields()["INLAY_NAMESPACE"].GetStringValue(); got != "default" {
			t.Errorf("INLAY_NAMESPACE %q", got)
		}
	}
}

func TestExplainMatchesTheCall(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	server := p.open("default", "orders")
	serveGRPC(t, p, server, &orders{}, 8080)
	p.registered(1)
	client := p.open("default", "cart")
	ctx := ctxFor(t)
	if err := client.Ready(ctx, "orders"); err != nil {
		t.Fatal(err)
	}
	for _, url := range []string{"http://orders/v1/7?q=1", "orders/v1/7", "xds:///orders/v1/7", "https://orders.default/v1/7"} {
		d, err := client.Explain(ctx, "GET", url, nil)
		if err != nil {
			t.Fatalf("%s: %v", url, err)
		}
		if d.Reason != meshsdk.ReasonOK || d.Cluster != "orders.default:8080" || d.Route.Object != "HTTPRoute/orders" || len(d.Endpoints) != 1 {
			t.Errorf("%s: %+v", url, d)
		}
	}
	if _, err := client.Explain(ctx, "GET", "http://user@orders/", nil); err == nil || !strings.Contains(err.Error(), "want http://SERVICE/PATH") {
		t.Errorf("user information: %v", err)
	}
	d, err := client.Explain(ctx, "GET", "http://api.example.com/", nil)
	if err != nil || !strings.Contains(d.Detail, "not a name of the mesh") {
		t.Errorf("outside: %+v, %v", d, err)
	}
	var me *meshsdk.Error
	if _, err := client.Explain(ctx, "GET", "http://nobody/", nil); !errors.As(err, &me) || me.Reason != meshsdk.ReasonNoRoute {
		t.Errorf("unknown service: %v", err)
	}
}

func TestDrainKeepsItsOrderAndLosesNoCall(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	o := &orders{block: make(chan struct{}), inside: make(chan struct{}, 1)}
	server := p.open("default", "orders")
	run := serveGRPC(t, p, server, o, 8080)
	p.registered(1)
	client := p.open("default", "cart")
	ctx := ctxFor(t)
	cc, err := client.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()

	inFlight := make(chan error, 1)
	go func() { inFlight <- check(ctx, cc) }()
	<-o.inside
	ready := httptest.NewServer(server.Handler())
	defer ready.Close()
	stopped := make(chan error, 1)
	go func() { stopped <- run() }()
	p.wait("the registry's drained", func() bool { return len(p.events) > 0 && p.events[len(p.events)-1] == "drained orders" })
	// Drained, and the call in flight is still there: readiness is off, the process is alive.
	if resp, err := http.Get(ready.URL + "/readyz"); err != nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("readyz while draining: %v %v", resp, err)
	}
	if resp, err := http.Get(ready.URL + "/livez"); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("livez while draining: %v %v", resp, err)
	}
	select {
	case err := <-stopped:
		t.Fatalf("Run ended with a call in flight: %v", err)
	default:
	}
	close(o.block)
	if err := <-inFlight; err != nil {
		t.Errorf("call in flight: %v", err)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
	if got := server.Status().Stage; got != "closed" {
		t.Errorf("stage %q", got)
	}
	if err := server.Shutdown(ctx); err != nil {
		t.Errorf("second Shutdown: %v", err)
	}
	if err := server.Close(); err != nil {
		t.Errorf("Close after it: %v", err)
	}
	err = check(ctx, cc)
	if status.Code(err) != codes.Unavailable {
		t.Errorf("call without endpoints: %v", err)
	}
}

func TestRegistersAgainAfterTheControlPlaneWasAway(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	server := p.open("default", "orders")
	serveGRPC(t, p, server, &orders{}, 8080)
	p.registered(1)
	client := p.open("default", "cart")
	ctx := ctxFor(t)
	cc, err := client.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if err := check(ctx, cc); err != nil {
		t.Fatal(err)
	}
	p.stop()
	for range 20 {
		if err := check(ctx, cc); err != nil {
			t.Fatalf("call without control plane: %v", err)
		}
	}
	p.mu.Lock()
	p.instances = nil
	p.instances = map[string]*registryInstance{}
	p.events = nil
	p.mu.Unlock()
	p.start()
	p.registered(1)
	if err := check(ctx, cc); err != nil {
		t.Fatal(err)
	}
}

func TestColdStartFromTheCache(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	server := p.open("default", "orders")
	serveGRPC(t, p, server, &orders{}, 8080)
	p.registered(1)
	dir := t.TempDir()
	ctx := ctxFor(t)
	first := p.open("default", "cart", meshsdk.WithStateDir(dir))
	if err := first.Ready(ctx, "orders"); err != nil {
		t.Fatal(err)
	}
	first.Close() // writes the cache
	p.stop()

	second := p.open("default", "cart", meshsdk.WithStateDir(dir))
	cc, err := second.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if err := check(ctx, cc); err != nil {
		t.Fatalf("call from the cache: %v", err)
	}
	if st := second.Status(); st.Config.LoadedFrom != "cache" || !st.Ready || st.Config.File != filepath.Join(dir, "xds.cache") {
		t.Errorf("status: %+v", st)
	}

	// Another identity: the cache is refused with the remedy, the start goes on cold.
	other := p.open("default", "web", meshsdk.WithStateDir(dir))
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := other.Ready(short); err == nil {
		t.Error("ready without configuration")
	}
	if st := other.Status(); !strings.Contains(st.Config.Error, "remove the file") {
		t.Errorf("refusal: %q", st.Config.Error)
	}
}

func TestReportsAndAnswersQuestions(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	server := p.open("default", "orders")
	serveGRPC(t, p, server, &orders{}, 8080)
	p.registered(1)
	client := p.open("default", "cart")
	ctx := ctxFor(t)
	cc, err := client.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	for range 3 {
		if err := check(ctx, cc); err != nil {
			t.Fatal(err)
		}
	}
	count := func(direction string) (n, mtls uint64) {
		for _, r := range p.reports {
			for _, c := range r.GetCounters().GetCalls() {
				if c.GetDirection() == direction {
					n, mtls = n+c.GetCalls(), mtls+c.GetMtls()
				}
			}
		}
		return n, mtls
	}
	p.wait("counters of both sides", func() bool {
		a, am := count("client")
		b, bm := count("server")
		return a == 3 && am == 3 && b == 3 && bm == 3
	})
	p.wait("hello and status of both", func() bool {
		seen := map[string]bool{}
		for _, r := range p.reports {
			if h := r.GetHello(); h != nil {
				seen["hello "+h.GetService()] = h.GetPid() != 0 && h.GetNodeId() != "" && h.GetInstanceId() != ""
			}
			if s := r.GetStatus(); s != nil && len(s.GetResources()) > 0 {
				seen[s.GetLoadedFrom()+" "+s.GetIdentity()] = true
			}
		}
		return seen["hello cart"] && seen["hello orders"] && seen["control-plane spiffe://inlay.local/ns/default/svc/cart"]
	})
	p.mu.Lock()
	for _, q := range p.queries {
		q <- &reportpb.ReportResponse{Kind: &reportpb.ReportResponse_Explain{Explain: &reportpb.ExplainQuery{Id: 7, Method: "GET", Url: "http://orders/v1"}}}
		q <- &reportpb.ReportResponse{Kind: &reportpb.ReportResponse_Explain{Explain: &reportpb.ExplainQuery{Id: 8, Method: "GET", Url: "http://:bad"}}}
	}
	p.mu.Unlock()
	p.wait("answers", func() bool {
		good, bad := 0, 0
		for _, r := range p.reports {
			switch e := r.GetExplanation(); {
			case e == nil:
			case e.GetId() == 7 && e.GetDecision().GetCluster() == "orders.default:8080" && e.GetDecision().GetRoute().GetSource() == "mesh.yaml:7":
				good++
			case e.GetId() == 8 && e.GetError() != "":
				bad++
			}
		}
		return good == 2 && bad == 2
	})
}

func TestHandlerAnswersThisMachineOnly(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	m := p.open("default", "cart")
	if err := m.Ready(ctxFor(t)); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(m.Handler())
	defer srv.Close()
	get := func(path string, change func(*http.Request)) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(req)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b strings.Builder
		if _, err := fmt.Fprint(&b, readAll(t, resp)); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, b.String()
	}
	for _, path := range []string{"/livez", "/readyz"} {
		if code, body := get(path, func(r *http.Request) { r.Host = "probe.example" }); code != 200 || body != "ok\n" {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	code, body := get("/status", nil)
	var st meshsdk.Status
	if err := json.Unmarshal([]byte(body), &st); err != nil || code != 200 || st.Service != "cart" || !st.ControlPlane.Connected {
		t.Errorf("status: %d %v %s", code, err, body)
	}
	code, body = get("/explain?method=GET&url=http://orders/&header=a:b", nil)
	if code != 200 || !strings.Contains(body, `"cluster": "orders.default:8080"`) {
		t.Errorf("explain: %d %s", code, body)
	}
	if code, body = get("/config", nil); code != 200 || !strings.Contains(body, `"orders.default:8080"`) {
		t.Errorf("config: %d %s", code, body)
	}
	if code, body = get("/explain", nil); code != 400 || !strings.Contains(body, "want /explain?") {
		t.Errorf("explain without url: %d %s", code, body)
	}
	for name, change := range map[string]func(*http.Request){
		"host of the outside": func(r *http.Request) { r.Host = "evil.example" },
		"foreign origin":      func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") },
		"cross-site fetch":    func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") },
	} {
		if code, _ := get("/status", change); code != 403 {
			t.Errorf("%s: %d", name, code)
		}
	}
	rec := httptest.NewRecorder()
	req := httptest.NewRequest("GET", "http://localhost/status", nil)
	req.RemoteAddr = "192.0.2.1:1234"
	m.Handler().ServeHTTP(rec, req)
	if rec.Code != 403 {
		t.Errorf("another machine: %d", rec.Code)
	}
	if resp, err := http.Post(srv.URL+"/status", "text/plain", nil); err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %v %v", resp, err)
	}
}

func TestOpenRefusesWrongInput(t *testing.T) {
	p := newPlane(t)
	none := meshsdk.WithEnvironment(func(string) string { return "" })
	env := func(kv ...string) meshsdk.Option {
		return meshsdk.WithEnvironment(func(k string) string {
			for i := 0; i < len(kv); i += 2 {
				if kv[i] == k {
					return kv[i+1]
				}
			}
			return ""
		})
	}
	svid := identity.Static(p.ca.svid("default", "cart"))
	for name, tc := range map[string]struct {
		opts []meshsdk.Option
		want string
	}{
		"nothing says where the control plane is": {[]meshsdk.Option{none}, "no control plane is known"},
		"a bootstrap that is no JSON":             {[]meshsdk.Option{none, meshsdk.WithBootstrap([]byte("{"))}, "WithBootstrap"},
		"a bootstrap file that is not there":      {[]meshsdk.Option{env("GRPC_XDS_BOOTSTRAP", "/nowhere")}, "inlay bootstrap"},
		"an address without port":                 {[]meshsdk.Option{none, meshsdk.WithControlPlane("host")}, "WithControlPlane"},
		"a service name with a capital":           {[]meshsdk.Option{none, meshsdk.WithService("Cart")}, "WithService"},
		"a service in the environment":            {[]meshsdk.Option{env("INLAY_SERVICE", "a_b")}, "INLAY_SERVICE"},
		"a listen address without port":           {[]meshsdk.Option{none, meshsdk.WithListen("127.0.0.1")}, "WithListen"},
		"a workload socket of no scheme":          {[]meshsdk.Option{none, meshsdk.WithWorkloadSocket("x")}, "WithWorkloadSocket"},
		"a snapshot that is not there":            {[]meshsdk.Option{none, meshsdk.WithConfig("/nowhere")}, "inlay compile"},
		"the SVID of another service": {[]meshsdk.Option{none, meshsdk.WithBootstrap(p.bootstrap()), meshsdk.WithIdentity(svid), meshsdk.WithService("orders")},
			`this process says it is "orders", its SVID is spiffe://inlay.local/ns/default/svc/cart`},
		"nobody says which service": {[]meshsdk.Option{none, meshsdk.WithBootstrap(p.bootstrap())}, "inlay run --service NAME"},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := meshsdk.Open(t.Context(), tc.opts...)
			if err == nil {
				m.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q, want %q in it", err, tc.want)
			}
		})
	}
}
