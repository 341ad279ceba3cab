package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// as is a listener's credentials that have attested one caller.
type as struct {
	credentials.TransportCredentials
	caller attest.Caller
}

func (a as) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, attest.Info{Caller: a.caller}, nil
}

func (a as) Clone() credentials.TransportCredentials { return a }

var (
	orders = attest.Caller{Local: true, UID: 1000, ID: spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/orders")}
	cart   = attest.Caller{Local: true, UID: 1000, ID: spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/cart")}
	node   = attest.Caller{Local: true, UID: 500}
)

// house runs a registry and dials it as any caller. All of it ends with the test's bubble.
type house struct {
	t   *testing.T
	reg *Registry
	end []func()
}

func start(t *testing.T, cfg Config) *house {
	t.Helper()
	cfg.NodeUIDs = []uint32{500}
	reg, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h := &house{t: t, reg: reg}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = reg.Run(ctx) })
	h.end = append(h.end, func() { cancel(); wg.Wait() })
	return h
}

func (h *house) stop() {
	for _, f := range slices.Backward(h.end) {
		f()
	}
	synctest.Wait()
}

func (h *house) dial(caller attest.Caller) registrypb.RegistryClient {
	h.t.Helper()
	lis := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.Creds(as{insecure.NewCredentials(), caller}))
	h.reg.Register(srv)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(lis) })
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		h.t.Fatal(err)
	}
	h.end = append(h.end, func() { _ = conn.Close(); srv.Stop(); wg.Wait() })
	return registrypb.NewRegistryClient(conn)
}

type stream struct {
	t *testing.T
	registrypb.Registry_RegisterClient
	cancel func()
}

func (h *house) open(caller attest.Caller) *stream {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := h.dial(caller).Register(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	h.end = append(h.end, cancel)
	return &stream{h.t, s, cancel}
}

func (s *stream) ask(req *registrypb.RegisterRequest) (*registrypb.RegisterResponse, error) {
	s.t.Helper()
	if err := s.Send(req); err != nil && !errors.Is(err, io.EOF) {
		s.t.Fatal(err)
	}
	return s.Recv()
}

func (s *stream) must(req *registrypb.RegisterRequest) *registrypb.RegisterResponse {
	s.t.Helper()
	resp, err := s.ask(req)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp
}

func instance(change func(*registrypb.Instance)) *registrypb.RegisterRequest {
	in := &registrypb.Instance{
		InstanceId: "i-1", Namespace: "default", Service: "orders", Version: "v1", Tls: registrypb.Tls_TLS_MESH, SdkVersion: "0.1",
		Ports: []*registrypb.Port{{Port: 8080, Protocol: registrypb.Protocol_PROTOCOL_GRPC, Addresses: []string{"127.0.0.1:9001"}}},
	}
	if change != nil {
		change(in)
	}
	return &registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: in}}
}

func program(in *registrypb.Instance) { // without the SDK, as the node registers it
	in.InstanceId, in.Tls, in.SdkVersion, in.RunId = "node-1", registrypb.Tls_TLS_NONE, "", "run-1"
}

var (
	renew = &registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Renew{Renew: &registrypb.Renew{}}}
	drain = &registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Drain{Drain: &registrypb.Drain{}}}
)

func ids(s Snapshot) string {
	var out []string
	for _, in := range s.Instances {
		id := in.ID
		if in.Draining {
			id += "(draining)"
		}
		out = append(out, id)
	}
	return strings.Join(out, " ")
}

// memory is a store in memory that can be made to fail.
type memory struct {
	mu   sync.Mutex
	m    map[string]Instance
	fail error
	n    int
}

func (m *memory) Instances() ([]Instance, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.m)), m.fail
}

func (m *memory) WriteInstances(put []Instance, del []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.n++
	if m.fail != nil {
		return m.fail
	}
	if m.m == nil {
		m.m = make(map[string]Instance)
	}
	for _, in := range put {
		m.m[in.ID] = in
	}
	for _, id := range del {
		delete(m.m, id)
	}
	return nil
}

func TestLeaseIsKeptByRenewalAndEndsWithoutIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := &memory{}
		h := start(t, Config{Store: mem})
		defer h.stop()
		changed := h.reg.Changed()
		s := h.open(orders)
		if got := s.must(instance(nil)).GetRegistered().GetLeaseSeconds(); got != 15 {
			t.Errorf("lease = %d s, want 15", got)
		}
		select {
		case <-changed:
		default:
			t.Error("Changed did not fire")
		}
		in := h.reg.Snapshot().Instances[0]
		if in.Identity != orders.ID.String() || in.Labels["version"] != "v1" || !in.MeshTLS || in.Weight != 1 || in.Ports[0].Addresses[0].String() != "127.0.0.1:9001" {
			t.Errorf("instance = %+v", in)
		}
		writes := mem.n
		for range 12 { // a minute of renewals
			time.Sleep(5 * time.Second) // the bubble's clock
			s.must(renew)
		}
		if mem.n != writes {
			t.Errorf("%d renewals wrote %d times", 12, mem.n-writes)
		}
		s.cancel() // the stream breaks: kill -9
		time.Sleep(14 * time.Second)
		if got := ids(h.reg.Snapshot()); got != "i-1" {
			t.Fatalf("within the lease: %q, want i-1", got)
		}
		changed = h.reg.Changed()
		<-changed
		if got := ids(h.reg.Snapshot()); got != "" {
			t.Errorf("after the lease: %q", got)
		}
		synctest.Wait()
		if len(mem.m) != 0 {
			t.Errorf("the store still has %v", mem.m)
		}
	})
}

func TestAStreamThatStopsRenewingIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{})
		defer h.stop()
		s := h.open(orders)
		s.must(instance(nil))
		if _, err := s.Recv(); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("err = %v, want DeadlineExceeded", err)
		}
	})
}

func TestRestartKeepsInstancesForAFullLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := &memory{}
		h := start(t, Config{Store: mem})
		h.open(orders).must(instance(nil))
		other := h.open(orders)
		other.must(instance(func(in *registrypb.Instance) { in.InstanceId = "i-2" }))
		time.Sleep(10 * time.Second)
		h.stop()
		if _, err := other.Recv(); err == nil {
			t.Error("the stream outlived the registry")
		}

		time.Sleep(time.Hour) // away
		h = start(t, Config{Store: mem})
		defer h.stop()
		if got := ids(h.reg.Snapshot()); got != "i-1 i-2" {
			t.Fatalf("after the restart: %q", got)
		}
		time.Sleep(14 * time.Second)
		h.open(orders).must(instance(nil)) // i-1 came back
		time.Sleep(2 * time.Second)
		if got := ids(h.reg.Snapshot()); got != "i-1" {
			t.Errorf("after the lease: %q, want i-1", got)
		}
	})
}

func TestDrain(t *testing.T) {
	for name, tc := range map[string]struct {
		clients time.Duration // how long they take to let go
		want    bool
	}{
		"every client has let go": {2 * time.Second, true},
		"the wait ends first":     {time.Minute, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var h *house
				h = start(t, Config{WaitDrained: func(ctx context.Context, id string) bool {
					if got := ids(h.reg.Snapshot()); got != "i-1(draining)" {
						t.Errorf("while waiting: %q", got)
					}
					select {
					case <-time.After(tc.clients):
						return true
					case <-ctx.Done():
						return false
					}
				}})
				defer h.stop()
				s := h.open(orders)
				s.must(instance(nil))
				began := time.Now()
				if got := s.must(drain).GetDrained(); got == nil || got.GetAll() != tc.want {
					t.Errorf("drained = %v, want all=%v", got, tc.want)
				}
				if took := time.Since(began); took != min(tc.clients, 5*time.Second) {
					t.Errorf("took %v", took)
				}
				if got := ids(h.reg.Snapshot()); got != "" {
					t.Errorf("after the drain: %q", got)
				}
				s.must(instance(nil)) // and it may come back on the same stream
			})
		})
	}
}

func TestSDKReplacesTheProgramOfTheSameRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{})
		defer h.stop()
		n := h.open(node)
		if got := n.must(instance(program)).GetRegistered().GetUnreachable(); !strings.Contains(got, "service orders.default is strict") {
			t.Errorf("unreachable = %q", got)
		}
		// Another service below the same run takes nothing away.
		h.open(cart).must(instance(func(in *registrypb.Instance) { in.Service, in.InstanceId, in.RunId = "cart", "c-1", "run-1" }))
		if got := ids(h.reg.Snapshot()); got != "c-1 node-1" {
			t.Fatalf("instances = %q", got)
		}
		h.open(orders).must(instance(func(in *registrypb.Instance) { in.RunId = "run-1" }))
		resp, err := n.Recv()
		if err != nil || resp.GetRegistered().GetUnreachable() != Replaced {
			t.Fatalf("the node was told %v, %v", resp, err)
		}
		if _, err := n.Recv(); status.Code(err) != codes.AlreadyExists || status.Convert(err).Message() != Replaced {
			t.Errorf("the node's stream ended with %v", err)
		}
		if got := ids(h.reg.Snapshot()); got != "c-1 i-1" {
			t.Errorf("instances = %q", got)
		}
		n = h.open(node) // it comes late
		if resp, err := n.ask(instance(program)); err != nil || resp.GetRegistered().GetUnreachable() != Replaced {
			t.Errorf("a late node was told %v, %v", resp, err)
		}
	})
}

func TestTheNewestStreamKeepsTheInstance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{})
		defer h.stop()
		old, fresh := h.open(orders), h.open(orders)
		old.must(instance(nil))
		fresh.must(instance(nil))
		if _, err := old.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the old stream ended with %v", err)
		}
		for range 4 {
			time.Sleep(5 * time.Second)
			fresh.must(renew)
		}
	})
}

func TestRefused(t *testing.T) {
	foreign := attest.Caller{ID: spiffeid.RequireFromString("spiffe://elsewhere/ns/default/svc/orders")}
	for name, tc := range map[string]struct {
		caller attest.Caller
		req    *registrypb.RegisterRequest
		code   codes.Code
		want   string
	}{
		"another service": {cart, instance(nil), codes.PermissionDenied, "/svc/cart and may not register for orders.default"},
		"another namespace": {orders, instance(func(in *registrypb.Instance) { in.Namespace = "shop" }), codes.PermissionDenied,
			"want the SPIFFE ID path /ns/shop/svc/orders"},
		"another trust domain":                 {foreign, instance(nil), codes.PermissionDenied, "want inlay.local"},
		"nobody over the network":              {attest.Caller{}, instance(nil), codes.Unauthenticated, "needs an identity"},
		"a local process outside any run":      {attest.Caller{Local: true, UID: 1000}, instance(program), codes.Unauthenticated, "inlay run --service orders"},
		"the node may not claim mesh TLS":      {node, instance(nil), codes.Unauthenticated, "cannot speak mesh TLS"},
		"why there is no identity is said":     {attest.Caller{Local: true, UID: 1000, Err: errors.New("the node is down")}, instance(nil), codes.Unauthenticated, "the node is down"},
		"nor may one that could be a workload": {attest.Caller{Local: true, UID: 500, Err: errors.New("the node is down")}, instance(program), codes.Unauthenticated, "the node is down"},
		"renew first":                          {orders, renew, codes.FailedPrecondition, "renew before instance"},
		"drain first":                          {orders, drain, codes.FailedPrecondition, "drain before instance"},
		"an empty request":                     {orders, &registrypb.RegisterRequest{}, codes.InvalidArgument, "want instance, renew or drain"},
		"an empty instance":                    {orders, &registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{}}, codes.InvalidArgument, "instance_id"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := start(t, Config{TrustDomain: "inlay.local"})
				defer h.stop()
				_, err := h.open(tc.caller).ask(tc.req)
				if status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("err = %v, want %v with %q", err, tc.code, tc.want)
				}
				if got := ids(h.reg.Snapshot()); got != "" {
					t.Errorf("instances = %q", got)
				}
			})
		})
	}
}

func TestInstanceIDBelongsToWhoTookIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{})
		defer h.stop()
		h.open(orders).must(instance(nil))
		_, err := h.open(cart).ask(instance(func(in *registrypb.Instance) { in.Service = "cart" }))
		if status.Code(err) != codes.AlreadyExists || !strings.Contains(err.Error(), "taken by an instance of orders.default") {
			t.Errorf("err = %v", err)
		}
		s := h.open(orders)
		s.must(instance(func(in *registrypb.Instance) { in.InstanceId = "i-2" }))
		if _, err := s.ask(instance(func(in *registrypb.Instance) { in.InstanceId = "i-3" })); status.Code(err) != codes.InvalidArgument {
			t.Errorf("second id on one stream: %v", err)
		}
	})
}

func TestBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{MaxInstances: 2})
		defer h.stop()
		for i := range 2 {
			h.open(orders).must(instance(func(in *registrypb.Instance) { in.InstanceId = fmt.Sprint(i) }))
		}
		if _, err := h.open(orders).ask(instance(nil)); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("err = %v", err)
		}
		h.open(orders).must(instance(func(in *registrypb.Instance) { in.InstanceId = "1" })) // known ones come back
	})
}

func TestAFailingStoreStopsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := &memory{}
		h := start(t, Config{Store: mem})
		defer h.stop()
		mem.fail = errors.New("disk full")
		h.open(orders).must(instance(nil))
		if h.reg.StoreErr() == nil || ids(h.reg.Snapshot()) != "i-1" {
			t.Errorf("StoreErr = %v, instances = %q", h.reg.StoreErr(), ids(h.reg.Snapshot()))
		}
		mem.fail = nil
		h.open(orders).must(instance(func(in *registrypb.Instance) { in.InstanceId = "i-2" }))
		if h.reg.StoreErr() != nil || len(mem.m) != 2 {
			t.Errorf("StoreErr = %v, stored %d, want both", h.reg.StoreErr(), len(mem.m))
		}
	})
}

func TestPermissiveServiceReachesProgramsWithoutSDK(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{MTLSMode: func(ns, svc string) ir.MTLS {
			if ns == "default" && svc == "orders" {
				return ir.Permissive
			}
			return ir.Strict
		}})
		defer h.stop()
		if got := h.open(node).must(instance(program)).GetRegistered().GetUnreachable(); got != "" {
			t.Errorf("unreachable = %q", got)
		}
	})
}

// stoppedClock is the clock of a process that stood still for a while: time went on, and every
// timer is late.
type stoppedClock struct{ stood atomic.Int64 }

func (c *stoppedClock) Now() time.Time { return time.Now().Add(time.Duration(c.stood.Load())) }

func (*stoppedClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}

// A control plane that was stopped for a minute (SIGSTOP, a frozen machine) drops nobody for not
// having renewed meanwhile, and those that do not renew afterwards all the same.
func TestLeasesOutliveAStoppedControlPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := &stoppedClock{}
		h := start(t, Config{Clock: clock})
		defer h.stop()
		s := h.open(orders)
		s.must(instance(nil))
		time.Sleep(5 * time.Second)
		clock.stood.Store(int64(time.Minute))
		time.Sleep(10 * time.Second) // when the first lease would have ended
		synctest.Wait()
		if got := ids(h.reg.Snapshot()); got != "i-1" {
			t.Fatalf("instances = %q after the control plane stood still, want i-1", got)
		}
		s.must(renew)
		time.Sleep(80 * time.Second)
		synctest.Wait()
		if got := ids(h.reg.Snapshot()); got != "" {
			t.Errorf("instances = %q, want none: nobody renewed", got)
		}
	})
}

// A second drain of the same stream waits for the clients like the first: what one was not told of
// in time is not gone from it.
func TestASecondDrainTellsTheTruthToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{WaitDrained: func(ctx context.Context, _ string) bool { <-ctx.Done(); return false }})
		defer h.stop()
		s := h.open(orders)
		s.must(instance(nil))
		for n := range 2 {
			if d := s.must(drain).GetDrained(); d == nil || d.GetAll() {
				t.Errorf("drain %d: %v, want that not all let go", n+1, d)
			}
		}
	})
}

// lateStream is a stream whose last message comes at the moment of its end.
type lateStream struct {
	grpc.ServerStream
	ctx  context.Context
	late bool
}

func (s *lateStream) Context() context.Context                { return s.ctx }
func (s *lateStream) Send(*registrypb.RegisterResponse) error { return nil }
func (s *lateStream) Recv() (*registrypb.RegisterRequest, error) {
	<-s.ctx.Done()
	if s.late {
		return nil, s.ctx.Err()
	}
	s.late = true
	return instance(nil), nil
}

func TestAMessageThatComesWithTheEndDoesNotHideIt(t *testing.T) {
	for range 64 { // which of the two is seen first is chance
		synctest.Test(t, func(t *testing.T) {
			h := start(t, Config{LeaseTTL: time.Hour})
			defer h.stop()
			ctx, cancel := context.WithCancel(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: attest.Info{Caller: orders}}))
			time.AfterFunc(time.Second, cancel)
			began := time.Now()
			if err := (&server{reg: h.reg}).Register(&lateStream{ctx: ctx}); !errors.Is(err, context.Canceled) || time.Since(began) > time.Second {
				t.Errorf("ended after %v with %v, want canceled after 1s", time.Since(began), err)
			}
		})
	}
}
