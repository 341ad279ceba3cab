package meshsdk_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// exampleMesh opens a Mesh from a snapshot, as `inlay compile` would write it, in which the service
// orders is permissive and served at addr. Programs in a mesh call meshsdk.Open(ctx) alone.
func exampleMesh(addr string, http2 bool) *meshsdk.Mesh {
	const cluster = "orders.default:8080"
	var resources []xds.RawResource
	for _, r := range []struct {
		name  string
		value any
	}{
		{"orders", &resource.Listener{Name: "orders", API: &resource.HTTP{RouteName: cluster}}},
		{cluster, &resource.RouteConfiguration{Name: cluster, VirtualHosts: []resource.VirtualHost{{
			Name: "orders", Domains: []string{"*"}, Routes: []resource.Route{{
				Match: resource.Match{Kind: resource.Prefix, Path: "/"}, Timeout: 2 * time.Second,
				Clusters: []resource.WeightedCluster{{Name: cluster, Weight: 1}},
				Origin:   resource.Origin{Object: "HTTPRoute/orders", Rule: "0", Source: "mesh.yaml:12"},
			}},
		}}}},
		{cluster, &resource.Cluster{Name: cluster, EndpointsName: cluster, ConnectTimeout: time.Second, MaxRequests: 1024, HTTP2: http2}},
		{cluster, &resource.Endpoints{Cluster: cluster, Localities: []resource.Locality{{Region: "r", Weight: 1, Endpoints: []resource.Endpoint{
			{Addresses: []netip.AddrPort{netip.MustParseAddrPort(addr)}, Weight: 1},
		}}}}},
	} {
		url, b, err := resource.Encode(r.value)
		if err != nil {
			log.Fatal(err)
		}
		resources = append(resources, xds.RawResource{Type: url, Name: r.name, Version: "1", Bytes: b})
	}
	dir, err := os.MkdirTemp("", "inlay-example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "orders.snapshot")
	if err := xds.WriteSnapshot(file, resources, xds.Meta{Revision: "1"}); err != nil {
		log.Fatal(err)
	}
	m, err := meshsdk.Open(context.Background(),
		meshsdk.WithEnvironment(func(string) string { return "" }),
		meshsdk.WithService("cart"),
		meshsdk.WithConfig(file),
		meshsdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	return m
}

// exampleHTTP is the service orders, without the SDK.
func exampleHTTP() *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s for %s", r.Method, r.URL.Path, r.Host)
	}))
}

// exampleGRPC is the same in gRPC.
func exampleGRPC() (addr string, stop func()) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	srv := grpc.NewServer()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	go srv.Serve(lis)
	return lis.Addr().String(), srv.Stop
}

// Open reads the environment that `inlay run` sets, and never waits; Ready does.
func ExampleOpen() {
	ctx := context.Background()
	m, err := meshsdk.Open(ctx, meshsdk.WithDisabled(true)) // leave the option out to be in the mesh
	if err != nil {
		fmt.Println(err) // says what is wrong and what to do
		return
	}
	defer m.Close()
	if err := m.Ready(ctx); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(m.Status().Stage)
	// Output: disabled
}

func ExampleMesh_NewClient() {
	addr, stop := exampleGRPC()
	defer stop()
	m := exampleMesh(addr, true)
	defer m.Close()

	conn, err := m.NewClient("orders")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	resp, err := healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
	fmt.Println(resp.GetStatus(), err)
	// Output: SERVING <nil>
}

func ExampleMesh_DialOptions() {
	addr, stop := exampleGRPC()
	defer stop()
	m := exampleMesh(addr, true)
	defer m.Close()

	conn, err := grpc.NewClient("xds:///orders", append(m.DialOptions(), grpc.WithUserAgent("cart/1"))...)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	resp, err := healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
	fmt.Println(resp.GetStatus(), err)
	// Output: SERVING <nil>
}

func ExampleMesh_HTTPClient() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()

	resp, err := m.HTTPClient().Get("http://orders/v1/7")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	fmt.Println(string(body), err)
	// Output: GET /v1/7 for orders <nil>
}

func ExampleMesh_Transport() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()

	own := &http.Transport{IdleConnTimeout: time.Minute} // for hosts outside, and its bounds for all
	client := &http.Client{Transport: m.Transport(own), Timeout: 5 * time.Second}
	resp, err := client.Get("http://orders/v1/8")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer resp.Body.Close()
	fmt.Println(resp.StatusCode)
	// Output: 200
}

func ExampleMesh_Explain() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()

	d, err := m.Explain(context.Background(), "GET", "http://orders/v1/7", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(d.Reason, d.Route.Object, d.Route.Source, d.Cluster, d.RequestTimeout)
	// Output: ok HTTPRoute/orders mesh.yaml:12 orders.default:8080 2s
}

func ExampleWithCallTrace() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()

	ctx := meshsdk.WithCallTrace(context.Background(), &meshsdk.CallTrace{Done: func(d *meshsdk.Decision) {
		fmt.Println(d.Service, d.Reason, len(d.Attempts), "attempt")
	}})
	req, err := http.NewRequestWithContext(ctx, "GET", "http://orders/", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	resp, err := m.HTTPClient().Do(req)
	if err != nil {
		fmt.Println(err)
		return
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close() // the call ends with its body
	// Output: orders ok 1 attempt
}

func ExampleMesh_Ready() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()

	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	fmt.Println(m.Ready(ctx, "orders"))
	// Output: <nil>
}

// Run serves until its context ends or SIGTERM comes, then drains.
func ExampleMesh_Run() {
	m, err := meshsdk.Open(context.Background(), meshsdk.WithDisabled(true), meshsdk.WithListen("127.0.0.1:0"), meshsdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		fmt.Println(err)
		return
	}
	srv := m.NewServer()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	web := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if id, ok := meshsdk.PeerFromContext(r.Context()); ok {
			fmt.Fprintln(w, "hello", id)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // a program would wait for SIGTERM
	fmt.Println(m.Run(ctx, meshsdk.GRPC(8080, srv), meshsdk.HTTP(8081, web)))
	// Output: <nil>
}

// With an own http.Server, Listen and Middleware do what Run does.
func ExampleMesh_Listen() {
	ctx := context.Background()
	m, err := meshsdk.Open(ctx, meshsdk.WithDisabled(true), meshsdk.WithListen("127.0.0.1:0"), meshsdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		fmt.Println(err)
		return
	}
	lis, err := m.Listen(ctx, 8080)
	if err != nil {
		fmt.Println(err)
		return
	}
	srv := &http.Server{Handler: m.Middleware(http.NotFoundHandler()), ReadHeaderTimeout: 10 * time.Second}
	go srv.Serve(lis)
	resp, err := http.Get("http://" + lis.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	fmt.Println(resp.StatusCode)
	srv.Close()
	fmt.Println(m.Shutdown(ctx))
	// Output:
	// 404
	// <nil>
}

func ExampleMesh_Handler() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()
	if err := m.Ready(context.Background()); err != nil {
		fmt.Println(err)
		return
	}

	probes := httptest.NewServer(m.Handler())
	defer probes.Close()
	resp, err := http.Get(probes.URL + "/readyz")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	fmt.Print(resp.StatusCode, " ", string(body))
	// Output: 200 ok
}

// NewServer makes a gRPC server of the mesh; a program that has its own gives it ServerOptions, last.
func ExampleMesh_NewServer() {
	ctx := context.Background()
	m, err := meshsdk.Open(ctx, meshsdk.WithDisabled(true), meshsdk.WithListen("127.0.0.1:0"), meshsdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		fmt.Println(err)
		return
	}
	lis, err := m.Listen(ctx, 8080)
	if err != nil {
		fmt.Println(err)
		return
	}
	srv := m.NewServer(grpc.MaxRecvMsgSize(1 << 20))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()

	// A server that is stopped before it serves says so; this one has answered a call.
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
	fmt.Println(err)
	fmt.Println(m.Shutdown(ctx)) // stops what NewServer made, gracefully
	fmt.Println(<-served)
	// Output:
	// <nil>
	// <nil>
	// <nil>
}

func ExampleMesh_ServerOptions() {
	m, err := meshsdk.Open(context.Background(), meshsdk.WithDisabled(true))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer m.Close()
	srv := grpc.NewServer(append([]grpc.ServerOption{grpc.MaxConcurrentStreams(100)}, m.ServerOptions()...)...)
	healthpb.RegisterHealthServer(srv, health.NewServer())
	fmt.Println(len(srv.GetServiceInfo()))
	// Output: 1
}

// A handler learns who calls from the connection, never from a header.
func ExampleMesh_Middleware() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()

	h := m.Middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, ok := meshsdk.PeerFromContext(r.Context())
		fmt.Printf("%q %v %q\n", id, ok, r.Header.Get("X-Forwarded-Client-Cert"))
	}))
	r := httptest.NewRequest(http.MethodGet, "http://cart/", nil)
	r.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://inlay.local/ns/default/svc/admin")
	h.ServeHTTP(httptest.NewRecorder(), r)
	// Output: "" false ""
}

// For connections that a program makes itself: the SVID of this workload, and a peer that must be who
// is named.
func ExampleMesh_TLSConfig() {
	m, err := meshsdk.Open(context.Background(), meshsdk.WithDisabled(true))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer m.Close()
	cfg := m.TLSConfig(spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/db"))
	fmt.Println(tls.VersionName(cfg.MinVersion))
	// Output: TLS 1.3
}

func ExampleMesh_Status() {
	orders := exampleHTTP()
	defer orders.Close()
	m := exampleMesh(orders.Listener.Addr().String(), false)
	defer m.Close()
	if err := m.Ready(context.Background(), "orders"); err != nil {
		fmt.Println(err)
		return
	}
	st := m.Status()
	fmt.Println(st.Service, st.Stage, st.Ready, st.Config.LoadedFrom)
	// Output: cart open true file
}
