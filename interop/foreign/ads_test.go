package foreign

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/examples/hellopb"
	"github.com/inlay-mesh/inlay/meshsdk"
)

// network is the connections of one test: what is dialled is found by address. The tests run in a
// bubble of synctest, where seconds of waiting take none.
type network map[string]*bufconn.Listener

func (n network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	l := n[addr]
	if l == nil {
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
	return l.DialContext(ctx)
}

// serve runs a gRPC server at an address until the test ends.
func (n network) serve(t *testing.T, addr string, s *grpc.Server) {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	n[addr] = l
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Errorf("server %s: %v", addr, err)
		}
	})
}

const (
	adsAddr = "192.0.2.1:18000"
	nodeID  = "web-1"
)

// greeter answers with its name.
type greeter struct {
	hellopb.UnimplementedGreeterServer
	name string
}

func (g greeter) Hello(context.Context, *hellopb.HelloRequest) (*hellopb.HelloReply, error) {
	return &hellopb.HelloReply{Text: g.name}, nil
}

// traffic is what the server saw of its clients.
type traffic struct {
	mu       sync.Mutex
	requests int
	nacks    map[string]int // by type URL
}

func (c *traffic) saw(typeURL string, rejected bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests++
	if rejected {
		c.nacks[typeURL]++
	}
}

func (c *traffic) counts(typeURL string) (all, nacks int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.requests, c.nacks[typeURL]
}

// sotwOnly is a server without the incremental variant, as they were before it existed.
type sotwOnly struct {
	discoveryv3.AggregatedDiscoveryServiceServer
}

func (sotwOnly) DeltaAggregatedResources(discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return status.Error(codes.Unimplemented, "method DeltaAggregatedResources not implemented")
}

// fixture is a control plane that go-control-plane serves, two instances of a service and the SDK
// as their caller. There is no identity, no registry and no report stream here.
type fixture struct {
	t     *testing.T
	cache cachev3.SnapshotCache
	saw   *traffic
	mesh  *meshsdk.Mesh
	conn  *grpc.ClientConn
}

func newFixture(t *testing.T, delta bool) *fixture {
	t.Helper()
	n := network{}
	for _, name := range []string{"192.0.2.11:80", "192.0.2.12:80"} {
		s := grpc.NewServer()
		hellopb.RegisterGreeterServer(s, greeter{name: name})
		n.serve(t, name, s)
	}
	f := &fixture{t: t, cache: cachev3.NewSnapshotCache(true, cachev3.IDHash{}, nil), saw: &traffic{nacks: map[string]int{}}}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var ads discoveryv3.AggregatedDiscoveryServiceServer = serverv3.NewServer(ctx, f.cache, serverv3.CallbackFuncs{
		StreamRequestFunc: func(_ int64, r *discoveryv3.DiscoveryRequest) error {
			f.saw.saw(r.GetTypeUrl(), r.GetErrorDetail() != nil)
			return nil
		},
		StreamDeltaRequestFunc: func(_ int64, r *discoveryv3.DeltaDiscoveryRequest) error {
			f.saw.saw(r.GetTypeUrl(), r.GetErrorDetail() != nil)
			return nil
		},
	})
	if !delta {
		ads = sotwOnly{ads}
	}
	s := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, ads)
	n.serve(t, adsAddr, s)

	f.publish("1", "192.0.2.11:80", nil)
	m, err := meshsdk.Open(t.Context(),
		meshsdk.WithEnvironment(func(string) string { return "" }),
		meshsdk.WithService("web"),
		meshsdk.WithStateDir(t.TempDir()),
		meshsdk.WithDialer(n.dial),
		meshsdk.WithLogger(slog.New(slog.DiscardHandler)),
		meshsdk.WithBootstrap([]byte(`{"xds_servers": [{"server_uri": "`+adsAddr+`", "channel_creds": [{"type": "insecure"}]}], "node": {"id": "`+nodeID+`"}}`)),
	)
	if err != nil {
		t.Fatal(err)
	}
	f.mesh = m
	if f.conn, err = m.NewClient("xds:///greeter"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		bounded, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := errors.Join(f.conn.Close(), m.Shutdown(bounded)); err != nil {
			t.Error(err)
		}
	})
	return f
}

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
}

// publish makes a snapshot in which calls to greeter reach one endpoint; edit changes the cluster
// before.
func (f *fixture) publish(version, endpoint string, edit func(*clusterv3.Cluster)) {
	f.t.Helper()
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil || port != "80" {
		f.t.Fatalf("endpoint %s: %v", endpoint, err)
	}
	c := &clusterv3.Cluster{
		Name:                 "greeter-cluster",
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(f.t, &httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}}}}})},
	}
	if edit != nil {
		edit(c)
	}
	snapshot, err := cachev3.NewSnapshot(version, map[resourcev3.Type][]types.Resource{
		resourcev3.ListenerType: {&listenerv3.Listener{Name: "greeter", ApiListener: &listenerv3.ApiListener{ApiListener: pack(f.t, &hcmv3.HttpConnectionManager{
			RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: "greeter-routes", ConfigSource: ads()}},
			HttpFilters:    []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(f.t, &routerv3.Router{})}}},
		})}}},
		resourcev3.RouteType: {&routev3.RouteConfiguration{Name: "greeter-routes", VirtualHosts: []*routev3.VirtualHost{{
			Name: "all", Domains: []string{"*"}, Routes: []*routev3.Route{{
				Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "greeter-cluster"}}},
			}}}}}},
		resourcev3.ClusterType: {c},
		resourcev3.EndpointType: {&endpointv3.ClusterLoadAssignment{ClusterName: "greeter-cluster", Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LoadBalancingWeight: wrapperspb.UInt32(1),
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
					Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 80}}}}}}}},
		}}}},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.cache.SetSnapshot(context.Background(), nodeID, snapshot); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) call() (string, error) {
	ctx, cancel := context.WithTimeout(f.t.Context(), 20*time.Second)
	defer cancel()
	r, err := hellopb.NewGreeterClient(f.conn).Hello(ctx, &hellopb.HelloRequest{Name: "foreign"})
	return r.GetText(), err
}

// obeys waits, in the time of the bubble, until calls reach an endpoint.
func (f *fixture) obeys(endpoint string) {
	f.t.Helper()
	var got string
	var err error
	for range 100 {
		if got, err = f.call(); got == endpoint {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	f.t.Fatalf("calls reach %q (%v), want %s", got, err, endpoint)
}

// variants runs a test with a server of each kind.
func variants(t *testing.T, test func(t *testing.T, f *fixture)) {
	for name, delta := range map[string]bool{"delta": true, "state of the world only": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, newFixture(t, delta)) })
		})
	}
}

// TestForeignControlPlane: the SDK follows a server of go-control-plane that knows nothing of
// Inlay: calls go where it says, changes are obeyed, and a server at rest is left at rest.
func TestForeignControlPlane(t *testing.T) {
	variants(t, func(t *testing.T, f *fixture) {
		if got, err := f.call(); got != "192.0.2.11:80" {
			t.Fatalf("first call: %q, %v", got, err)
		}
		f.publish("2", "192.0.2.12:80", nil)
		f.obeys("192.0.2.12:80")
		// The server allows a ping in five minutes, as gRPC's do by default. The SDK asks more often
		// until it is told so, and then comes back: once.
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		before, _ := f.saw.counts("")
		time.Sleep(20 * time.Minute) // below the 30 in which an unused channel of gRPC goes idle
		if after, _ := f.saw.counts(""); after != before {
			t.Errorf("%d requests in 20 minutes in which nothing changed, want none", after-before)
		}
		if got, err := f.call(); got != "192.0.2.12:80" {
			t.Errorf("after 22 minutes: %q, %v", got, err)
		}
	})
}

// TestRejectedUpdate: an update that is NACKed changes nothing, calls go on, the status names the
// fault, and client and server do not go round in circles about it; a good update then is taken.
func TestRejectedUpdate(t *testing.T) {
	variants(t, func(t *testing.T, f *fixture) {
		f.obeys("192.0.2.11:80")
		before, _ := f.saw.counts(resourcev3.ClusterType)
		f.publish("2", "192.0.2.11:80", func(c *clusterv3.Cluster) { c.LbPolicy = clusterv3.Cluster_MAGLEV })
		began := time.Now()
		for time.Since(began) < 10*time.Second {
			if got, err := f.call(); got != "192.0.2.11:80" {
				t.Fatalf("%v after the bad update: %q, %v", time.Since(began), got, err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		all, nacks := f.saw.counts(resourcev3.ClusterType)
		t.Logf("%d requests in 10 s, %d of them NACKs of the cluster", all-before, nacks)
		if nacks == 0 {
			t.Error("the bad cluster was not rejected")
		}
		if all-before > 20 {
			t.Errorf("%d requests in 10 s, want a few: a rejected update loops", all-before)
		}
		told := false
		for _, r := range f.mesh.Status().Config.Resources {
			told = told || r.Name == "greeter-cluster" && strings.Contains(r.Error, "lb_policy")
		}
		if !told {
			t.Errorf("no resource of the status says why: %+v", f.mesh.Status().Config.Resources)
		}
		f.publish("3", "192.0.2.12:80", nil)
		f.obeys("192.0.2.12:80")
	})
}
