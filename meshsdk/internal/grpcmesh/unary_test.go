package grpcmesh_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestCallOverMutualTLS(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{name: "one"}
	s.unary = func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
		p, _ := peer.FromContext(ctx)
		md, _ := metadata.FromIncomingContext(ctx)
		return &testpb.SimpleResponse{Username: peerOf(t, p), Hostname: header(md, ":authority")}, nil
	}
	s.start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint())))

	var p peer.Peer
	r, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{}, grpc.Peer(&p))
	if err != nil {
		t.Fatal(err)
	}
	if r.GetUsername() != ca.id("cart").String() || r.GetHostname() != "orders" {
		t.Errorf("server saw %q calling %q, want %q and %q", r.GetUsername(), r.GetHostname(), ca.id("cart"), "orders")
	}
	info, ok := p.AuthInfo.(grpcmesh.AuthInfo)
	if !ok || info.Peer != ca.id("orders") {
		t.Errorf("client saw %+v, want %v", p.AuthInfo, ca.id("orders"))
	}
	rec := m.rec.last(t)
	if rec.Reason != call.ReasonOK || rec.Peer != ca.id("orders").String() || !rec.MTLS || rec.Attempts != 1 {
		t.Errorf("record %+v", rec)
	}
}

func TestServerOfWrongIdentityIsRefused(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("billing"))
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint(ca.id("orders")))))

	_, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
	wantCode(t, err, codes.Unavailable, call.ReasonConnectFailed)
	for _, id := range []string{ca.id("billing").String(), ca.id("orders").String()} {
		if !strings.Contains(err.Error(), id) {
			t.Errorf("error %q does not name %s", err, id)
		}
	}
	if strings.Contains(err.Error(), s.addr.Addr().String()) {
		t.Errorf("error %q has an address", err)
	}
	var wrong *identity.PeerError
	if !errors.As(err, &wrong) {
		t.Errorf("no *identity.PeerError in %v", err)
	}
	if s.calls.Load() != 0 {
		t.Errorf("the wrong server was called %d times", s.calls.Load())
	}
}

func TestEndpointDecidesAboutTLS(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	plain := (&server{name: "plain"}).start(t, n, nil)
	secure := (&server{name: "secure"}).start(t, n, ca.issue("orders"))

	t.Run("a plaintext endpoint is called in plaintext", func(t *testing.T) {
		m := newMesh(t, n, nil)
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", plain.endpoint())))
		if _, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
		if rec := m.rec.last(t); rec.Peer != "plaintext" || rec.MTLS {
			t.Errorf("record %+v", rec)
		}
	})
	t.Run("without identity mesh TLS fails closed", func(t *testing.T) {
		m := newMesh(t, n, nil)
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", secure.endpoint())))
		_, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		wantCode(t, err, codes.Unavailable, call.ReasonConnectFailed)
		if !strings.Contains(err.Error(), "no identity") || !errors.Is(err, identity.ErrNoIdentity) {
			t.Errorf("error %q", err)
		}
	})
	t.Run("credentials of the user do not weaken it, before or after", func(t *testing.T) {
		m := newMesh(t, n, ca.issue("cart"))
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", secure.endpoint())))
		weak := grpc.WithTransportCredentials(insecure.NewCredentials())
		if _, err := m.test("orders", weak).UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Error(err)
		}
		cc, err := grpc.NewClient("orders", append(m.client.DialOptions(), weak)...)
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		if _, err := testpb.NewTestServiceClient(cc).UnaryCall(ctxFor(t), &testpb.SimpleRequest{}); err != nil {
			t.Error(err)
		}
	})
	t.Run("call credentials that want TLS go with it and not without", func(t *testing.T) {
		m := newMesh(t, n, ca.issue("cart"))
		m.publish(
			serviceOf("orders", nil, clusterOf("orders.default:8080", secure.endpoint())),
			serviceOf("legacy", nil, clusterOf("legacy.default:8080", plain.endpoint())),
		)
		weak := grpc.WithTransportCredentials(insecure.NewCredentials())
		secure.unary = func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			return &testpb.SimpleResponse{Username: header(md, "authorization")}, nil
		}
		r, err := m.test("orders", weak, grpc.WithPerRPCCredentials(token("t0"))).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		if err != nil || r.GetUsername() != "t0" {
			t.Errorf("%v, %v", r, err)
		}
		before := plain.calls.Load()
		_, err = m.test("legacy", grpc.WithPerRPCCredentials(token("t0"))).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		wantCode(t, err, codes.Unavailable, call.ReasonConnectFailed)
		if plain.calls.Load() != before {
			t.Error("the token left in plaintext")
		}
	})
}

type token string

func (c token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": string(c)}, nil
}

func (c token) RequireTransportSecurity() bool { return true }

// retrying is a route with a policy.
func retrying(cluster string, p *resource.Retry) []resource.Route {
	return []resource.Route{{Name: "all", Clusters: []resource.WeightedCluster{{Name: cluster, Weight: 1}}, Retry: p}}
}

func TestRetriesAreCounted(t *testing.T) {
	for name, tc := range map[string]struct {
		policy           *resource.Retry
		code             codes.Code
		failures         int64 // of each server
		wantCalls        int64
		wantOK           bool
		wantCode         codes.Code
		wantReason       call.Reason
		wantServersTried int
	}{
		"none without a policy":          {nil, codes.Unavailable, 9, 1, false, codes.Unavailable, call.ReasonUpstreamStatus, 1},
		"up to the attempts":             {&resource.Retry{On: []string{"unavailable"}, Attempts: 2}, codes.Unavailable, 9, 3, false, codes.Unavailable, call.ReasonRetryExhausted, 3},
		"until one succeeds":             {&resource.Retry{On: []string{"unavailable"}, Attempts: 5}, codes.Unavailable, 1, 4, true, 0, "", 3},
		"only the codes that are named":  {&resource.Retry{On: []string{"unavailable"}, Attempts: 2}, codes.Internal, 9, 1, false, codes.Internal, call.ReasonUpstreamStatus, 1},
		"a code that is not unavailable": {&resource.Retry{On: []string{"resource-exhausted"}, Attempts: 1}, codes.ResourceExhausted, 9, 2, false, codes.ResourceExhausted, call.ReasonRetryExhausted, 2},
	} {
		t.Run(name, func(t *testing.T) {
			ca, n := newAuthority(t), newNetwork()
			var servers []*server
			cl := clusterOf("orders.default:8080")
			for range 3 {
				s := &server{}
				s.unary = func(context.Context, *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
					if s.calls.Load() <= tc.failures {
						return nil, status.Error(tc.code, "not now")
					}
					return &testpb.SimpleResponse{}, nil
				}
				s.start(t, n, ca.issue("orders"))
				servers = append(servers, s)
				cl.All = append(cl.All, s.endpoint())
			}
			cl = clusterOf(cl.Name, cl.All...)
			m := newMesh(t, n, ca.issue("cart"))
			m.publish(serviceOf("orders", retrying(cl.Name, tc.policy), cl))
			conn := m.conn("orders")
			allReady(t, m, n, conn, servers)

			_, err := testpb.NewTestServiceClient(conn).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
			var calls int64
			tried := 0
			for _, s := range servers {
				calls += s.calls.Load()
				if s.calls.Load() > 0 {
					tried++
				}
			}
			if calls != tc.wantCalls || tried != tc.wantServersTried {
				t.Errorf("%d calls to %d servers, want %d to %d", calls, tried, tc.wantCalls, tc.wantServersTried)
			}
			if tc.wantOK {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantCode(t, err, tc.wantCode, tc.wantReason)
			if rec := m.rec.last(t); rec.Attempts != int(tc.wantCalls) {
				t.Errorf("record of %d attempts, want %d", rec.Attempts, tc.wantCalls)
			}
		})
	}
}

// allReady connects and waits until calls reach each server by turns; the counters are set to 0.
func allReady(t *testing.T, m *mesh, n *network, cc *grpc.ClientConn, servers []*server) {
	t.Helper()
	kept := make([]func(context.Context, *testpb.SimpleRequest) (*testpb.SimpleResponse, error), len(servers))
	for i, s := range servers {
		kept[i], s.unary = s.unary, nil
	}
	client := testpb.NewTestServiceClient(cc)
	ctx := ctxFor(t)
	for {
		reached := 0
		for _, s := range servers {
			if s.calls.Load() > 0 {
				reached++
			}
		}
		if reached == len(servers) {
			break
		}
		if _, err := client.UnaryCall(ctx, &testpb.SimpleRequest{}, grpc.WaitForReady(true)); err != nil {
			t.Fatal(err)
		}
	}
	for i, s := range servers {
		s.unary = kept[i]
		s.calls.Store(0)
	}
}

func TestStatusOfTheServerPassesUnchanged(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.unary = func(context.Context, *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
		st, err := status.New(codes.FailedPrecondition, "cart is empty").WithDetails(&errdetails.ErrorInfo{Reason: "EMPTY", Domain: "cart"})
		if err != nil {
			return nil, err
		}
		return nil, st.Err()
	}
	s.start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint())))
	_, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
	wantCode(t, err, codes.FailedPrecondition, call.ReasonUpstreamStatus)
	st := status.Convert(err)
	if st.Message() != "cart is empty" || len(st.Details()) != 1 {
		t.Fatalf("status %v with details %v", st, st.Details())
	}
	if info, ok := st.Details()[0].(*errdetails.ErrorInfo); !ok || info.GetReason() != "EMPTY" {
		t.Errorf("details %v", st.Details())
	}
	if want := st.Err().Error(); err.Error() != want {
		t.Errorf("text %q, want %q", err, want)
	}
}

func TestFailuresOfTheMesh(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	full := clusterOf("full.default:80", s.endpoint())
	full.Limiter.SetMax(0)
	empty := clusterOf("empty.default:80")
	empty.EmptyReason = `no service "empty" is known`
	m.publish(
		serviceOf("dead", nil, clusterOf("dead.default:80", endpointAt(n.address(), ca.id("dead")))),
		serviceOf("full", nil, full),
		serviceOf("empty", nil, empty),
		serviceOf("elsewhere", []resource.Route{{Match: resource.Match{Path: "/other"}}}, clusterOf("x.default:80")),
		&call.Service{Name: "ghost", Err: errors.New("not there"), NotExist: true},
	)
	for target, want := range map[string]struct {
		code   codes.Code
		reason call.Reason
		text   string
	}{
		"dead":      {codes.Unavailable, call.ReasonConnectFailed, "connection refused"},
		"full":      {codes.Unavailable, call.ReasonCircuitOpen, "limit of 0"},
		"empty":     {codes.Unavailable, call.ReasonNoEndpoint, `no service "empty" is known`},
		"elsewhere": {codes.Unavailable, call.ReasonNoRoute, "nothing matches POST /grpc.testing.TestService/UnaryCall"},
		"ghost":     {codes.Unavailable, call.ReasonNoRoute, "no service of that name"},
	} {
		t.Run(target, func(t *testing.T) {
			_, err := m.test(target).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
			wantCode(t, err, want.code, want.reason)
			if !strings.Contains(err.Error(), want.text) || !strings.Contains(err.Error(), target) {
				t.Errorf("error %q, want %q and %q in it", err, want.text, target)
			}
			if strings.Contains(err.Error(), "10.0.0.") {
				t.Errorf("error %q has an address", err)
			}
			if rec := m.rec.last(t); rec.Reason != want.reason || rec.Attempts > 1 {
				t.Errorf("recorded as %v with %d attempts, want %v with at most 1", rec.Reason, rec.Attempts, want.reason)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(ctxFor(t))
		cancel()
		m.publish(serviceOf("orders", nil, clusterOf("orders.default:80", s.endpoint())))
		_, err := m.test("orders").UnaryCall(ctx, &testpb.SimpleRequest{})
		wantCode(t, err, codes.Canceled, call.ReasonCancelled)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%v is not context.Canceled", err)
		}
	})
	t.Run("a message that is too large keeps gRPC's code and is not repeated", func(t *testing.T) {
		m.publish(serviceOf("orders", retrying("orders.default:80", &resource.Retry{On: []string{"unavailable", "resource-exhausted"}, Attempts: 3}), clusterOf("orders.default:80", s.endpoint())))
		_, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{Payload: &testpb.Payload{Body: make([]byte, 100)}}, grpc.MaxCallSendMsgSize(10))
		wantCode(t, err, codes.ResourceExhausted, call.ReasonUpstreamStatus)
		if rec := m.rec.last(t); rec.Attempts != 1 {
			t.Errorf("%d attempts", rec.Attempts)
		}
	})
}

func TestFirstCallWaitsForConfiguration(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"))
	asked := make(chan string, 10)
	m := &mesh{t: t, rec: new(records)}
	m.engine = call.New(call.Config{Observer: m.rec, Subscribe: func(name string) func() {
		asked <- name
		return func() {}
	}})
	t.Cleanup(m.engine.Close)
	m.client = grpcmesh.New(grpcmesh.Config{
		Engine: m.engine, Identity: identity.Static(ca.issue("cart")), Dial: n.dial,
		InMesh: inDefault,
	})
	conn := m.conn("ORDERS.") // returns at once, and asks nobody
	select {
	case name := <-asked:
		t.Fatalf("NewClient subscribed to %q", name)
	default:
	}
	failed := make(chan error, 1)
	go func() {
		_, err := testpb.NewTestServiceClient(conn).UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
		failed <- err
	}()
	if name := <-asked; name != "orders" {
		t.Fatalf("subscribed to %q, want orders", name)
	}
	m.publish(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint())))
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
}

func TestNewClientAsksNobody(t *testing.T) {
	m := newMesh(t, newNetwork(), nil, func(c *grpcmesh.Config) {
		c.InMesh = func(_ context.Context, target string) (string, bool, error) {
			t.Errorf("asked about %q", target)
			return "", false, nil
		}
	})
	for _, target := range []string{"orders", "orders.shop:80", "xds:///orders", "api.example.com:443", "10.0.0.1:80"} {
		m.conn(target)
	}
}

func TestHeadersOfARoute(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	old := (&server{name: "old"}).start(t, n, ca.issue("orders"))
	beta := (&server{name: "beta"}).start(t, n, ca.issue("orders"))
	to := func(name string) []resource.WeightedCluster {
		return []resource.WeightedCluster{{Name: name, Weight: 1}}
	}
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", []resource.Route{
		{Name: "bin", Match: resource.Match{Headers: []resource.HeaderMatch{{Name: "x-bin", Exact: "1"}}}, Clusters: to("nowhere")},
		{Name: "beta", Match: resource.Match{Headers: []resource.HeaderMatch{{Name: "x-tester", Exact: "a,b"}, {Name: "content-type", Exact: "application/grpc"}}}, Clusters: to("orders.default:8080|beta")},
		{Name: "rest", Clusters: to("orders.default:8080|old")},
	}, clusterOf("orders.default:8080|old", old.endpoint()), clusterOf("orders.default:8080|beta", beta.endpoint())))
	client := m.test("orders")
	for want, kv := range map[string][]string{
		"old":  {"x-bin", "1"},
		"beta": {"x-tester", "a", "x-tester", "b"},
	} {
		r, err := client.UnaryCall(metadata.AppendToOutgoingContext(ctxFor(t), kv...), &testpb.SimpleRequest{})
		if err != nil || r.GetHostname() != want {
			t.Errorf("%v reached %v, %v, want %s", kv, r.GetHostname(), err, want)
		}
	}
}

func TestMethodIsSentAsItWasMatched(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", []resource.Route{{
		Match: resource.Match{Kind: resource.Exact, Path: "/grpc.testing.TestService/UnaryCall"}, Clusters: []resource.WeightedCluster{{Name: "c", Weight: 1}},
	}}, clusterOf("c", s.endpoint())))
	conn := m.conn("orders")
	for method, ok := range map[string]bool{
		"grpc.testing.TestService/UnaryCall":       true,
		"/grpc.testing.TestService/x/../UnaryCall": true,
		"//grpc.testing.TestService/UnaryCall":     false,
		"/grpc.testing.TestService%2fUnaryCall":    false,
	} {
		err := conn.Invoke(ctxFor(t), method, &testpb.SimpleRequest{}, &testpb.SimpleResponse{})
		if (err == nil) != ok {
			t.Errorf("%q: %v", method, err)
		}
		if !ok {
			wantCode(t, err, codes.Unavailable, call.ReasonNoRoute)
		}
	}
	if s.calls.Load() != 2 {
		t.Errorf("%d calls, want 2", s.calls.Load())
	}
}

func TestTraceContextIsInjectedOnce(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	var seen []string
	s.unary = func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		seen = append(seen, strings.Join(md.Get("traceparent"), "|")+" "+strings.Join(md.Get("own"), "|"))
		if len(seen) == 1 {
			return nil, status.Error(codes.Unavailable, "again")
		}
		return &testpb.SimpleResponse{}, nil
	}
	s.start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"), func(c *grpcmesh.Config) {
		c.Inject = func(_ context.Context, to call.Carrier) { to.Set("traceparent", "00-1") }
	})
	m.publish(serviceOf("orders", retrying("c", &resource.Retry{On: []string{"unavailable"}, Attempts: 1, Base: time.Millisecond}), clusterOf("c", s.endpoint())))
	ctx := metadata.AppendToOutgoingContext(ctxFor(t), "own", "x")
	if _, err := m.test("orders").UnaryCall(ctx, &testpb.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 2 || seen[0] != "00-1 x" || seen[1] != "00-1 x" {
		t.Errorf("server saw %q", seen)
	}
}
