package admin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

// house is a State that a test sets.
type house struct {
	mu      sync.Mutex
	rev     *adminpb.Revision
	changed chan struct{}
	mesh    *ir.Mesh
	ready   error
}

func (h *house) Status() *adminpb.StatusResponse {
	return &adminpb.StatusResponse{TrustDomain: "inlay.local"}
}

func (h *house) Revision() *adminpb.Revision {
	h.mu.Lock()
	defer h.mu.Unlock()
	return proto.CloneOf(h.rev)
}

func (h *house) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

func (h *house) set(rev *adminpb.Revision) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rev = rev
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *house) Mesh() *ir.Mesh { return h.mesh }

func (h *house) Instances() registry.Snapshot {
	return registry.Snapshot{Instances: []registry.Instance{{ID: "i-1", Expires: time.Unix(1000, 0)}}}
}

func (h *house) RouteClients(*ir.Service, *ir.Port, *ir.Route) map[string]string {
	return map[string]string{"sdk": "honoured"}
}

func (h *house) Clients(bool) []*adminpb.Client {
	return []*adminpb.Client{{NodeId: "n-1", Identity: orders.ID.String()}}
}

func (h *house) Certs() ([]*adminpb.Cert, error) { return []*adminpb.Cert{{Serial: "0a"}}, nil }

func (h *house) Ready() error { return h.ready }

func newHouse() *house {
	ep := ir.Endpoint{InstanceID: "i-1", Addresses: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9001")}, Weight: 1, MeshTLS: true, Locality: ir.Locality{Region: "r", Zone: "z"}}
	static := ir.Endpoint{Addresses: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9002")}, Weight: 1, Static: true, Unreachable: "strict and no mesh TLS"}
	return &house{changed: make(chan struct{}), rev: &adminpb.Revision{Id: "r1"}, mesh: &ir.Mesh{Services: []ir.Service{
		{Namespace: "default", Name: "ghost", Unknown: "nobody knows it"},
		{
			Namespace: "default", Name: "orders", Declared: true, Source: ir.Source{File: "mesh.yaml", Line: 3, Col: 1},
			Versions: []ir.Version{{Name: "v1"}},
			Ports: []ir.Port{
				{
					Number: 8080, Protocol: ir.GRPC,
					Clusters: []ir.Cluster{{Name: "orders.default:8080", Endpoints: []ir.Endpoint{ep, static}}},
					Routes: []ir.Route{{
						Object: "HTTPRoute/default/orders", Rule: "0.0", Timeout: 2 * time.Second, Retry: &ir.Retry{Attempts: 2},
						Match:    ir.Match{Path: "/v1", PathKind: ir.PathPrefix, Method: "GET", Headers: []ir.HeaderMatch{{Name: "x-user", Value: "beta"}}},
						Backends: []ir.Backend{{Cluster: "orders.default:8080", Weight: 90}},
					}},
				},
				{Number: 8081, Clusters: []ir.Cluster{{Name: "orders.default:8081", Endpoints: []ir.Endpoint{ep}}}},
			},
		},
	}}}
}

// serve runs a Server on a loopback address and returns a client of it. (The in-memory listener of
// gRPC has no deadlines as net/http needs them.)
func serve(t *testing.T, cfg Config) adminconnect.AdminClient {
	t.Helper()
	if cfg.Reports == nil {
		cfg.Reports = NewReports(ReportsConfig{})
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(ctx, lis); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	tr := &http.Transport{}
	t.Cleanup(func() { cancel(); wg.Wait(); tr.CloseIdleConnections() })
	return adminconnect.NewAdminClient(&http.Client{Transport: tr}, "http://"+lis.Addr().String(), connect.WithHTTPGet())
}

func TestReadsTheMesh(t *testing.T) {
	h := newHouse()
	c := serve(t, Config{State: h})
	ctx := t.Context()

	st, err := c.GetStatus(ctx, connect.NewRequest(&adminpb.GetStatusRequest{}))
	if err != nil || st.Msg.GetServices() != 1 || st.Msg.GetEndpoints() != 2 || st.Msg.GetClients() != 1 || st.Msg.GetRevision().GetId() != "r1" {
		t.Errorf("status = %v, %v", st, err)
	}
	svcs, err := c.ListServices(ctx, connect.NewRequest(&adminpb.ListServicesRequest{}))
	if err != nil || len(svcs.Msg.GetServices()) != 1 {
		t.Fatalf("services = %v, %v", svcs, err)
	}
	if s := svcs.Msg.GetServices()[0]; s.GetSource() != "mesh.yaml:3:1" || s.GetEndpoints() != 2 || s.GetReady() != 1 || s.GetMtls() != "strict" || s.GetPorts()[0].GetProtocol() != "GRPC" {
		t.Errorf("service = %v", s)
	}
	routes, err := c.ListRoutes(ctx, connect.NewRequest(&adminpb.ListRoutesRequest{Service: "orders"}))
	if err != nil || len(routes.Msg.GetRoutes()) != 1 {
		t.Fatalf("routes = %v, %v", routes, err)
	}
	if r := routes.Msg.GetRoutes()[0]; r.GetMatch() != `prefix /v1, method GET, header x-user="beta"` || r.GetRetries() != 2 || r.GetRequestTimeout().AsDuration() != 2*time.Second || r.GetClients()["sdk"] != "honoured" {
		t.Errorf("route = %v", r)
	}
	eps, err := c.ListEndpoints(ctx, connect.NewRequest(&adminpb.ListEndpointsRequest{}))
	if err != nil || len(eps.Msg.GetEndpoints()) != 3 {
		t.Fatalf("endpoints = %v, %v", eps, err)
	}
	if e := eps.Msg.GetEndpoints()[0]; e.GetTls() != "mesh" || e.GetOrigin() != "registered" || e.GetLeaseExpires().GetSeconds() != 1000 || e.GetLocality() != "r/z" {
		t.Errorf("registered = %v", e)
	}
	if e := eps.Msg.GetEndpoints()[1]; e.GetTls() != "none" || e.GetOrigin() != "static" || e.GetUnreachable() == "" || e.GetLeaseExpires() != nil {
		t.Errorf("static = %v", e)
	}
	if certs, err := c.ListCerts(ctx, connect.NewRequest(&adminpb.ListCertsRequest{})); err != nil || len(certs.Msg.GetCerts()) != 1 {
		t.Errorf("certs = %v, %v", certs, err)
	}
	_, err = c.ListRoutes(ctx, connect.NewRequest(&adminpb.ListRoutesRequest{Service: "ordres"}))
	if connect.CodeOf(err) != connect.CodeNotFound || !strings.Contains(err.Error(), "inlay get services") {
		t.Errorf("unknown service: %v", err)
	}
	_, err = c.Explain(ctx, connect.NewRequest(&adminpb.ExplainRequest{Service: "cart"}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("explain without url: %v", err)
	}
}

func TestSnapshotIsEncodedByWhoeverCanDoIt(t *testing.T) {
	h := newHouse()
	c := serve(t, Config{State: h, Encode: func(ns, svc string) ([]byte, string, error) { return []byte(ns + "/" + svc), "r1", nil }})
	got, err := c.GetSnapshot(t.Context(), connect.NewRequest(&adminpb.GetSnapshotRequest{Service: "cart"}))
	if err != nil || string(got.Msg.GetSnapshot()) != "default/cart" || got.Msg.GetRevision() != "r1" {
		t.Errorf("snapshot = %v, %v", got, err)
	}
	_, err = serve(t, Config{State: h}).GetSnapshot(t.Context(), connect.NewRequest(&adminpb.GetSnapshotRequest{Service: "cart"}))
	if connect.CodeOf(err) != connect.CodeUnimplemented {
		t.Errorf("without an encoder: %v", err)
	}
}

func TestWatchSendsNowAndEachChange(t *testing.T) {
	h := newHouse()
	c := serve(t, Config{State: h})
	s, err := c.WatchRevisions(t.Context(), connect.NewRequest(&adminpb.WatchRevisionsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i, id := range []string{"r1", "r2", "r3"} {
		if i > 0 {
			h.set(&adminpb.Revision{Id: id})
		}
		if !s.Receive() || s.Msg().GetId() != id {
			t.Fatalf("message %d = %v, %v, want %s", i, s.Msg(), s.Err(), id)
		}
	}
	h.set(&adminpb.Revision{Id: "r3"}) // the same again
	h.set(&adminpb.Revision{Id: "r3", Acked: 1})
	if !s.Receive() || s.Msg().GetAcked() != 1 {
		t.Errorf("message = %v, want the acknowledgement only", s.Msg())
	}
}

func TestGuard(t *testing.T) {
	h := newHouse()
	srv, err := New(Config{State: h, Reports: NewReports(ReportsConfig{})})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		host   string
		header http.Header
		want   int
	}{
		"curl":                          {"127.0.0.1:15080", nil, 200},
		"localhost":                     {"localhost:15080", nil, 200},
		"IPv6":                          {"[::1]:15080", nil, 200},
		"without port":                  {"127.0.0.1", nil, 200},
		"a tunnel at another port":      {"localhost:9999", nil, 200},
		"a name pointed at this host":   {"evil.example:15080", nil, 403},
		"a name that looks like one":    {"127.0.0.1.evil.example", nil, 403},
		"another machine's address":     {"10.0.0.1:15080", nil, 403},
		"no host":                       {"", nil, 403},
		"its own page":                  {"localhost:15080", http.Header{"Origin": {"http://localhost:15080"}}, 200},
		"a page of another site":        {"localhost:15080", http.Header{"Origin": {"https://evil.example"}}, 403},
		"a page of another local port":  {"localhost:15080", http.Header{"Origin": {"http://localhost:3000"}}, 403},
		"a page without origin":         {"localhost:15080", http.Header{"Origin": {"null"}}, 403},
		"two origins":                   {"localhost:15080", http.Header{"Origin": {"http://localhost:15080", "https://evil.example"}}, 403},
		"an image tag of another site":  {"localhost:15080", http.Header{"Sec-Fetch-Site": {"cross-site"}}, 403},
		"an address typed by the user":  {"localhost:15080", http.Header{"Sec-Fetch-Site": {"none"}}, 200},
		"a script of the same site":     {"localhost:15080", http.Header{"Sec-Fetch-Site": {"same-site"}}, 403},
		"a script of the served page":   {"localhost:15080", http.Header{"Sec-Fetch-Site": {"same-origin"}}, 200},
		"an origin that does not parse": {"localhost:15080", http.Header{"Origin": {"http://%zz"}}, 403},
	} {
		t.Run(name, func(t *testing.T) {
			for _, path := range []string{"/livez", adminconnect.AdminGetStatusProcedure + "?encoding=json&message=%7B%7D&connect=v1"} {
				req := httptest.NewRequest(http.MethodGet, path, nil)
				req.Host = tc.host
				for k, v := range tc.header {
					req.Header[k] = v
				}
				w := httptest.NewRecorder()
				srv.Handler().ServeHTTP(w, req)
				if w.Code != tc.want {
					t.Errorf("%s = %d %s, want %d", path, w.Code, w.Body, tc.want)
				}
			}
		})
	}
}

func TestNothingThatActsIsAGet(t *testing.T) {
	srv, err := New(Config{State: newHouse(), Reports: NewReports(ReportsConfig{})})
	if err != nil {
		t.Fatal(err)
	}
	req := httptest.NewRequest(http.MethodGet, adminconnect.AdminExplainProcedure+"?encoding=json&message=%7B%7D&connect=v1", nil)
	req.Host = "localhost"
	w := httptest.NewRecorder()
	srv.Handler().ServeHTTP(w, req)
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET Explain = %d, want 405", w.Code)
	}
}

func TestReadiness(t *testing.T) {
	h := newHouse()
	h.ready = errors.New("no configuration yet: 2 faults, the first mesh.yaml:1:1 INL1001 bad")
	srv, err := New(Config{State: h, Reports: NewReports(ReportsConfig{})})
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, string) {
		req := httptest.NewRequest(http.MethodGet, path, nil)
		req.Host = "localhost"
		w := httptest.NewRecorder()
		srv.Handler().ServeHTTP(w, req)
		b, _ := io.ReadAll(w.Body)
		return w.Code, string(b)
	}
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "mesh.yaml:1:1") {
		t.Errorf("readyz = %d %s", code, body)
	}
	if code, _ := get("/livez"); code != 200 {
		t.Errorf("livez = %d", code)
	}
	h.ready = nil
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("readyz = %d", code)
	}
}

func TestServesOnLoopbackOnly(t *testing.T) {
	lis, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, err := New(Config{State: newHouse(), Reports: NewReports(ReportsConfig{})})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Serve(t.Context(), lis); err == nil || !strings.Contains(err.Error(), "want a loopback address") {
		t.Errorf("Serve = %v", err)
	}
}
