package grpcmesh_test

import (
	"context"
	"fmt"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestTwoMeshesTwoIdentities(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.unary = func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
		p, _ := peer.FromContext(ctx)
		return &testpb.SimpleResponse{Username: peerOf(t, p)}, nil
	}
	s.start(t, n, ca.issue("orders"))
	var clients []testpb.TestServiceClient
	names := []string{"cart", "billing"}
	for _, name := range names {
		m := newMesh(t, n, ca.issue(name))
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint())))
		clients = append(clients, m.test("orders"))
	}
	for range 3 {
		for i, c := range clients {
			r, err := c.UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
			if err != nil || r.GetUsername() != ca.id(names[i]).String() {
				t.Fatalf("%s was seen as %q, %v", names[i], r.GetUsername(), err)
			}
		}
	}
}

func TestSplitByWeight(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	v1 := (&server{name: "v1"}).start(t, n, ca.issue("orders"))
	v2 := (&server{name: "v2"}).start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	// A generator of this test, so that a failure can be looked at again.
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m.engine = call.New(call.Config{Rand: splitmix(seed)})
	t.Cleanup(m.engine.Close)
	m.client = grpcmesh.New(grpcmesh.Config{Engine: m.engine, Identity: m.identity, Dial: n.dial, InMesh: inDefault})
	m.publish(serviceOf("orders", []resource.Route{{Clusters: []resource.WeightedCluster{{Name: "a", Weight: 90}, {Name: "b", Weight: 10}}}},
		clusterOf("a", v1.endpoint()), clusterOf("b", v2.endpoint())))
	client := m.test("orders")
	const calls = 2000
	for range calls {
		if _, err := client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if v1.calls.Load()+v2.calls.Load() != calls {
		t.Fatalf("%d + %d calls, want %d", v1.calls.Load(), v2.calls.Load(), calls)
	}
	share := float64(v2.calls.Load()) / calls
	if sigma := math.Sqrt(0.1 * 0.9 / calls); math.Abs(share-0.1) > 5*sigma {
		t.Errorf("share of v2 is %v, want 0.1 within %v", share, 5*sigma)
	}
}

func TestUpdatesKeepConnections(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	a := (&server{name: "a"}).start(t, n, ca.issue("orders"))
	b := (&server{name: "b"}).start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	epA, epB := a.endpoint(), b.endpoint()
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", epA)))
	client := m.test("orders")
	names := func(calls int) map[string]int {
		seen := make(map[string]int)
		for range calls {
			r, err := client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
			if err != nil {
				t.Fatal(err)
			}
			seen[r.GetHostname()]++
		}
		return seen
	}
	names(1)
	for i := range 5 { // other clusters, other routes, the same endpoint
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", epA), clusterOf(fmt.Sprintf("x%d", i), epA)))
		names(3)
	}
	if n.dials(a.addr) != 1 {
		t.Errorf("%d connections to an endpoint that did not change, want 1", n.dials(a.addr))
	}
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", epA, epB)))
	for names(1)["b"] == 0 {
	}
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", epB)))
	for names(1)["a"] != 0 {
	}
	if seen := names(20); seen["a"] != 0 {
		t.Errorf("a removed endpoint was called: %v", seen)
	}
}

// A call that began with the configuration before must not fail because its cluster has gone.
func TestUpdatesLoseNoCall(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	ep := s.endpoint()
	publish := func(i int) {
		m.publish(serviceOf("orders", nil, clusterOf(fmt.Sprintf("orders.default:8080|v%d", i), ep)))
	}
	publish(0)
	client := m.test("orders")
	stop := make(chan struct{})
	failed := make(chan error, 4)
	for range 4 {
		go func() {
			for {
				select {
				case <-stop:
					failed <- nil
					return
				default:
				}
				if _, err := client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	for i := range 200 {
		before := s.calls.Load()
		publish(i)
		for s.calls.Load() == before {
		}
	}
	close(stop)
	for range 4 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
}

func TestRemovedEndpointFinishesItsStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, n := newAuthority(t), newNetwork()
		a, b := (&server{name: "a"}).start(t, n, ca.issue("orders")), (&server{name: "b"}).start(t, n, ca.issue("orders"))
		m := newMesh(t, n, ca.issue("cart"))
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", a.endpoint())))
		client := m.test("orders")
		st, err := client.FullDuplexCall(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", b.endpoint())))
		time.Sleep(time.Minute) // of the bubble: long after the connection stopped to linger
		if err := st.Send(payload(1)); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		_, _ = st.Recv()
		if r, err := client.UnaryCall(context.Background(), &testpb.SimpleRequest{}); err != nil || r.GetHostname() != "b" {
			t.Errorf("%v, %v", r, err)
		}
	})
}

func TestServerThatComesBackIsReachedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, n := newAuthority(t), newNetwork()
		s := &server{addr: n.address()}
		m := newMesh(t, n, ca.issue("cart"))
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", endpointAt(s.addr, ca.id("orders")))))
		client := m.test("orders")
		_, err := client.UnaryCall(context.Background(), &testpb.SimpleRequest{})
		wantCode(t, err, codes.Unavailable, call.ReasonConnectFailed)
		time.Sleep(time.Hour)
		s.start(t, n, ca.issue("orders"))
		start := time.Now()
		if _, err := client.UnaryCall(context.Background(), &testpb.SimpleRequest{}, grpc.WaitForReady(true)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("took %v, want at most 5 s", took)
		}
	})
}

func TestConnectTimeoutIsTheClusters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, n := newAuthority(t), newNetwork()
		m := newMesh(t, n, ca.issue("cart"), func(c *grpcmesh.Config) {
			c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
		})
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", endpointAt(n.address(), ca.id("orders")))))
		start := time.Now()
		_, err := m.test("orders").UnaryCall(context.Background(), &testpb.SimpleRequest{})
		wantCode(t, err, codes.Unavailable, call.ReasonConnectFailed)
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("took %v, want 5 s", took)
		}
	})
}

func TestAuthority(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.unary = func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		return &testpb.SimpleResponse{Hostname: header(md, ":authority")}, nil
	}
	s.start(t, n, ca.issue("payments"))
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(
		serviceOf("payments", nil, clusterOf("payments.default:8080|v1", s.endpoint())),
		serviceOf("orders", nil, clusterOf("payments.default:8080", s.endpoint())),
	)
	for target, want := range map[string]string{
		"payments": "payments",         // its own service: as the caller says
		"orders":   "payments.default", // routed to another service: as that is called
	} {
		r, err := m.test(target).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		if err != nil || r.GetHostname() != want {
			t.Errorf("calls to %s came with authority %q, %v, want %q", target, r.GetHostname(), err, want)
		}
	}
	for authority, ok := range map[string]bool{
		"payments": true, "payments.default:8080": true, "Payments.default.mesh": true, "billing.default": false, "payments.shop": false,
	} {
		before := s.calls.Load()
		r, err := m.test("payments").UnaryCall(ctxFor(t), &testpb.SimpleRequest{}, grpc.CallAuthority(authority))
		if ok && (err != nil || r.GetHostname() != authority) {
			t.Errorf("CallAuthority(%q): %q, %v", authority, r.GetHostname(), err)
		}
		if !ok && (err == nil || s.calls.Load() != before || !strings.Contains(err.Error(), "want one of payments.default")) {
			t.Errorf("CallAuthority(%q) passed or does not say why: %v", authority, err)
		}
	}
}

func TestOutside(t *testing.T) {
	n := newNetwork()
	s := &server{name: "outside"}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.serve(t, l, nil)
	real := func(c *grpcmesh.Config) { c.Dial = nil }
	plain := grpc.WithTransportCredentials(insecure.NewCredentials())
	target := l.Addr().String()

	t.Run("goes by gRPC's own way and is counted", func(t *testing.T) {
		m := newMesh(t, n, nil, real)
		if _, err := m.test(target, plain).UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
		if rec := m.rec.last(t); rec.Peer != "external" || rec.Reason != call.ReasonOK || rec.Service != target {
			t.Errorf("record %+v", rec)
		}
		st, err := m.test("passthrough:///"+target, plain).FullDuplexCall(ctxFor(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err == nil {
			t.Error("no end")
		}
		if m.rec.count() != 2 {
			t.Errorf("%d records, want 2", m.rec.count())
		}
	})
	t.Run("with the options for any target too", func(t *testing.T) {
		m := newMesh(t, n, nil, real)
		cc, err := grpc.NewClient(target, append(m.client.DialOptions(), plain)...)
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		if _, err := testpb.NewTestServiceClient(cc).UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("is refused where the policy says so", func(t *testing.T) {
		m := newMesh(t, n, nil, real, func(c *grpcmesh.Config) { c.External = grpcmesh.Deny })
		before := s.calls.Load()
		client := m.test(target, plain)
		_, err := client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		wantCode(t, err, codes.PermissionDenied, call.ReasonDenied)
		_, err = client.FullDuplexCall(ctxFor(t))
		wantCode(t, err, codes.PermissionDenied, call.ReasonDenied)
		if s.calls.Load() != before || m.rec.count() != 2 {
			t.Errorf("%d calls, %d records", s.calls.Load()-before, m.rec.count())
		}
	})
	t.Run("a name of the mesh never goes there", func(t *testing.T) {
		m := newMesh(t, n, nil, real)
		m.publish(&call.Service{Name: "ghost", Err: context.Canceled, NotExist: true})
		_, err := m.test("dns:///ghost", plain).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		wantCode(t, err, codes.Unavailable, call.ReasonNoRoute)
	})
}

func TestServiceConfigCannotBeSwitchedOff(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint())))
	_, err := m.test("orders", grpc.WithDisableServiceConfig()).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
	if err == nil || !strings.Contains(err.Error(), "WithDisableServiceConfig") {
		t.Errorf("error %v", err)
	}
}

func TestLargeClusterIsASubset(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"))
	var eps []*endpoint.Endpoint
	for i := range 1000 {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 9000)
		n.mu.Lock()
		n.listen[addr.String()] = n.listen[s.addr.String()]
		n.mu.Unlock()
		eps = append(eps, endpointAt(addr, ca.id("orders")))
	}
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", eps...)))
	conn := m.conn("orders")
	client := testpb.NewTestServiceClient(conn)
	connected := func() int {
		n.mu.Lock()
		defer n.mu.Unlock()
		return len(n.dialed)
	}
	for connected() < 100 {
		if _, err := client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	// An endpoint that goes changes at most one member.
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", eps[1:]...)))
	for range 100 {
		if _, err := client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if got := connected(); got > 101 {
		t.Errorf("%d endpoints were connected to, want 100 and one that came for one that went", got)
	}
	if conn.GetState() != connectivity.Ready {
		t.Errorf("state %v", conn.GetState())
	}
}

// Three servers restart one after the other, under load and without a word to the configuration:
// no call fails, with no retry policy at all.
func TestRollingRestart(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	svid := ca.issue("orders")
	var servers []*server
	var eps []*endpoint.Endpoint
	for range 3 {
		s := (&server{}).start(t, n, svid)
		servers = append(servers, s)
		eps = append(eps, s.endpoint())
	}
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", eps...)))
	client := m.test("orders")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	reached := func(s *server) {
		for s.calls.Load() < 10 && !t.Failed() {
			_, _ = client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		}
	}
	for _, s := range servers {
		reached(s)
		n.down(s.addr)
		s.grpc.GracefulStop()
		reached((&server{addr: s.addr}).start(t, n, svid))
	}
	close(stop)
	wg.Wait()
}

// A bundle of the user cannot be beside transport credentials: its call credentials apply, its TLS
// does not.
func TestBundleOfTheUser(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.unary = func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		p, _ := peer.FromContext(ctx)
		return &testpb.SimpleResponse{Username: peerOf(t, p), Hostname: header(md, "authorization")}, nil
	}
	s.start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint())))
	r, err := m.test("orders", grpc.WithCredentialsBundle(userBundle{})).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
	if err != nil || r.GetUsername() != ca.id("cart").String() || r.GetHostname() != "t0" {
		t.Errorf("%v, %v", r, err)
	}
}

type userBundle struct{}

func (userBundle) TransportCredentials() credentials.TransportCredentials {
	return insecure.NewCredentials()
}
func (userBundle) PerRPCCredentials() credentials.PerRPCCredentials { return token("t0") }
func (b userBundle) NewWithMode(string) (credentials.Bundle, error) { return b, nil }
