package serve_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

const (
	lds = xdsgen.ListenerType
	rds = xdsgen.RouteType
	cds = xdsgen.ClusterType
	eds = xdsgen.EndpointsType
)

// as makes every connection of a listener come from one caller.
type as struct {
	credentials.TransportCredentials
	caller attest.Caller
}

func (a as) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, attest.Info{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, Caller: a.caller,
	}, nil
}

func (a as) Clone() credentials.TransportCredentials { return a }

func svid(path string) attest.Caller {
	return attest.Caller{Local: true, ID: spiffeid.RequireFromString("spiffe://inlay.local" + path)}
}

// dial serves s to one caller over memory and returns a client of it; all of it ends with the test.
func dial(t testing.TB, s *serve.Server, caller attest.Caller) discoveryv3.AggregatedDiscoveryServiceClient {
	t.Helper()
	lis := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.Creds(as{insecure.NewCredentials(), caller}))
	s.Register(srv)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(lis) })
	conn, err := grpc.NewClient("passthrough:memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		s.Stop()
		srv.Stop()
		wg.Wait()
	})
	return discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
}

func sdkNode() *corev3.Node {
	return &corev3.Node{
		Id: "n1", UserAgentName: "inlay-go", ClientFeatures: []string{"inlay.sdk"},
		UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "0.1.0"},
	}
}

func grpcNode() *corev3.Node { return &corev3.Node{Id: "g1", UserAgentName: "gRPC Go"} }

// delta is one delta stream; what arrives is read by got.
type delta struct {
	t      testing.TB
	rpc    discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	node   *corev3.Node
	mu     sync.Mutex
	inbox  []*discoveryv3.DeltaDiscoveryResponse
	err    error
	cancel context.CancelFunc
}

func openDelta(t testing.TB, c discoveryv3.AggregatedDiscoveryServiceClient, node *corev3.Node) *delta {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	rpc, err := c.DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	d := &delta{t: t, rpc: rpc, node: node, cancel: cancel}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			r, err := rpc.Recv()
			d.mu.Lock()
			if err != nil {
				d.err = err
				d.mu.Unlock()
				return
			}
			d.inbox = append(d.inbox, r)
			d.mu.Unlock()
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return d
}

// request sends one; the first carries the node.
func (d *delta) request(r *discoveryv3.DeltaDiscoveryRequest) {
	d.t.Helper()
	r.Node, d.node = d.node, nil
	if err := d.rpc.Send(r); err != nil {
		d.t.Fatal(err)
	}
}

func (d *delta) subscribe(typeURL string, names ...string) {
	d.t.Helper()
	d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

func (d *delta) unsubscribe(typeURL string, names ...string) {
	d.t.Helper()
	d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesUnsubscribe: names})
}

// take returns what has arrived once everything is at rest.
func (d *delta) take() []*discoveryv3.DeltaDiscoveryResponse {
	synctest.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	out := d.inbox
	d.inbox = nil
	return out
}

// got writes what has arrived as one line a response: TYPE +name -name.
func (d *delta) got() ([]*discoveryv3.DeltaDiscoveryResponse, string) {
	in := d.take()
	var lines []string
	for _, r := range in {
		line := short(r.TypeUrl)
		for _, x := range r.Resources {
			line += " +" + x.Name
		}
		for _, name := range r.RemovedResources {
			line += " -" + name
		}
		lines = append(lines, line)
	}
	return in, strings.Join(lines, "\n")
}

// want checks what has arrived and leaves it unanswered.
func (d *delta) want(lines ...string) []*discoveryv3.DeltaDiscoveryResponse {
	d.t.Helper()
	in, got := d.got()
	if want := strings.Join(lines, "\n"); got != want {
		d.t.Errorf("received\n%s\nwant\n%s", got, want)
	}
	return in
}

// ack checks and acknowledges.
func (d *delta) ack(lines ...string) {
	d.t.Helper()
	for _, r := range d.want(lines...) {
		d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
	}
	synctest.Wait()
}

// nack checks and rejects everything that arrived.
func (d *delta) nack(text string, lines ...string) {
	d.t.Helper()
	for _, r := range d.want(lines...) {
		d.request(&discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, ErrorDetail: &rpcstatus.Status{Code: 3, Message: text},
		})
	}
	synctest.Wait()
}

func (d *delta) failed() error {
	synctest.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// sotw is one state-of-the-world stream.
type sotw struct {
	t     testing.TB
	rpc   discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	node  *corev3.Node
	mu    sync.Mutex
	inbox []*discoveryv3.DiscoveryResponse
	last  map[string]*discoveryv3.DiscoveryResponse
}

func openSotW(t testing.TB, c discoveryv3.AggregatedDiscoveryServiceClient, node *corev3.Node) *sotw {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	rpc, err := c.StreamAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s := &sotw{t: t, rpc: rpc, node: node, last: map[string]*discoveryv3.DiscoveryResponse{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			r, err := rpc.Recv()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.inbox = append(s.inbox, r)
			s.last[r.TypeUrl] = r
			s.mu.Unlock()
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return s
}

// names asks for exactly these, with the newest nonce: an ACK too.
func (s *sotw) names(typeURL string, names ...string) {
	s.t.Helper()
	s.send(typeURL, "", names)
}

func (s *sotw) send(typeURL, nack string, names []string) {
	s.t.Helper()
	r := &discoveryv3.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: names}
	r.Node, s.node = s.node, nil
	s.mu.Lock()
	if last := s.last[typeURL]; last != nil {
		r.ResponseNonce, r.VersionInfo = last.Nonce, last.VersionInfo
	}
	s.mu.Unlock()
	if nack != "" {
		r.ErrorDetail = &rpcstatus.Status{Code: 3, Message: nack}
	}
	if err := s.rpc.Send(r); err != nil {
		s.t.Fatal(err)
	}
	synctest.Wait()
}

// want checks what has arrived: TYPE name name.
func (s *sotw) want(lines ...string) {
	s.t.Helper()
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var got []string
	for _, r := range s.inbox {
		line := short(r.TypeUrl)
		for _, a := range r.Resources {
			line += " " + nameOf(s.t, a)
		}
		got = append(got, line)
	}
	s.inbox = nil
	if !slices.Equal(got, lines) {
		s.t.Errorf("received\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(lines, "\n"))
	}
}

func short(typeURL string) string {
	return map[string]string{lds: "LDS", rds: "RDS", cds: "CDS", eds: "EDS", services: "Service", policies: "Policies"}[typeURL]
}

// shop is a mesh of permissive services in namespace default, each with one port 80 and the
// instances NAME-0 and NAME-1.
func shop(revision string, services ...string) *ir.Mesh {
	m := &ir.Mesh{Revision: revision, TrustDomain: "inlay.local"}
	for i, name := range services {
		c := ir.Cluster{
			Name: name + ".default:80", Namespace: "default", Service: name, Port: 80, Protocol: ir.GRPC, MTLS: ir.Permissive,
			SPIFFEID: "spiffe://inlay.local/ns/default/svc/" + name,
		}
		for e := range 2 {
			c.Endpoints = append(c.Endpoints, ir.Endpoint{
				InstanceID: fmt.Sprintf("%s-%d", name, e), Weight: 1, MeshTLS: true,
				Addresses: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), byte(e)}), 80)},
			})
		}
		m.Services = append(m.Services, ir.Service{Namespace: "default", Name: name, MTLS: ir.Permissive, Ports: []ir.Port{{
			Number: 80, Protocol: ir.GRPC, Clusters: []ir.Cluster{c},
			Routes: []ir.Route{{Object: "MeshService/default/" + name, Rule: "0", Backends: []ir.Backend{{Cluster: c.Name, Weight: 1}}}},
		}}})
	}
	return m
}

func publish(t testing.TB, s *serve.Server, m *ir.Mesh) {
	t.Helper()
	if err := s.Publish(m); err != nil {
		t.Fatal(err)
	}
}

func addrPort(a [4]byte) netip.AddrPort { return netip.AddrPortFrom(netip.AddrFrom4(a), 80) }
