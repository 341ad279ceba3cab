package identity_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/identity/workloadpb"
)

// api is a Workload API whose streams do what the test says.
type api struct {
	t        *testing.T
	listener *bufconn.Listener
	server   *grpc.Server
	served   sync.WaitGroup

	mu    sync.Mutex
	serve func(send func(*workloadpb.X509SVIDResponse), ctx context.Context) error
	times []time.Time // of each stream
}

func newAPI(t *testing.T) *api {
	a := &api{t: t, listener: bufconn.Listen(64 << 10), server: grpc.NewServer()}
	a.server.RegisterService(&grpc.ServiceDesc{ServiceName: "SpiffeWorkloadAPI", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{
		StreamName: "FetchX509SVID", ServerStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
			if md, _ := metadata.FromIncomingContext(s.Context()); strings.Join(md.Get("workload.spiffe.io"), ",") != "true" {
				t.Errorf("metadata %v, want workload.spiffe.io: true", md)
			}
			if err := s.RecvMsg(&workloadpb.X509SVIDRequest{}); err != nil {
				return err
			}
			a.mu.Lock()
			a.times = append(a.times, time.Now())
			serve := a.serve
			a.mu.Unlock()
			return serve(func(r *workloadpb.X509SVIDResponse) { _ = s.SendMsg(r) }, s.Context())
		},
	}}}, a)
	a.served.Go(func() { _ = a.server.Serve(a.listener) })
	return a
}

func (a *api) does(serve func(send func(*workloadpb.X509SVIDResponse), ctx context.Context) error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.serve = serve
}

func (a *api) streams() []time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]time.Time(nil), a.times...)
}

func (a *api) stop() {
	a.server.Stop()
	a.served.Wait()
}

// client runs until stop, which returns what Run returned.
func (a *api) client() (c *identity.Client, stop func() error) {
	a.t.Helper()
	c, err := identity.NewClient(identity.ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) { return a.listener.DialContext(ctx) },
		Rand: func() float64 { return 0.5 }, // no jitter
	})
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(a.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	return c, func() error { cancel(); return <-ended }
}

func encode(t *testing.T, s *identity.SVID) *workloadpb.X509SVIDResponse {
	t.Helper()
	r, err := identity.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func until(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestClientFollowsTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, api := newAuthority(t, "inlay.local"), newAPI(t)
		defer api.stop()
		first, second := ca.svid("cart", time.Hour), ca.svid("cart", time.Hour)
		more := make(chan struct{})
		api.does(func(send func(*workloadpb.X509SVIDResponse), ctx context.Context) error {
			send(encode(t, first))
			<-more
			// Unusable: reported and discarded, the stream and the SVID stay.
			broken := proto.Clone(encode(t, second)).(*workloadpb.X509SVIDResponse)
			broken.Svids[0].X509SvidKey = nil
			send(broken)
			send(encode(t, second))
			return until(ctx)
		})
		c, stop := api.client()
		if _, err := c.Current(); !errors.Is(err, identity.ErrNoIdentity) {
			t.Errorf("before the first: %v, want ErrNoIdentity", err)
		}
		got, err := c.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, first)
		updated := c.Updated()
		close(more)
		<-updated
		if got, err = c.Current(); err != nil {
			t.Fatal(err)
		}
		same(t, got, second)
		if n := len(api.streams()); n != 1 {
			t.Errorf("%d streams, want 1", n)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// The node is away: the last SVID serves until it expires, never after; the attempts back off to 5 s.
func TestClientKeepsTheLastUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, api := newAuthority(t, "inlay.local"), newAPI(t)
		defer api.stop()
		life := make(chan struct{})
		api.does(func(send func(*workloadpb.X509SVIDResponse), ctx context.Context) error {
			send(encode(t, ca.svid("cart", time.Minute)))
			<-life
			return status.Error(codes.Unavailable, "the node is stopping")
		})
		c, stop := api.client()
		if _, err := c.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		api.does(func(func(*workloadpb.X509SVIDResponse), context.Context) error {
			return status.Error(codes.Unavailable, "still initializing")
		})
		close(life)
		time.Sleep(59 * time.Second) // of the bubble: no time passes
		if _, err := c.Current(); err != nil {
			t.Errorf("after 59s of 60: %v", err)
		}
		expired := c.Updated()
		<-expired
		_, err := c.Current()
		if !errors.Is(err, identity.ErrNoIdentity) || !strings.Contains(err.Error(), "expired") || !strings.Contains(err.Error(), "still initializing") {
			t.Errorf("after its end: %v, want ErrNoIdentity with both reasons", err)
		}
		at := api.streams()
		if first := at[1].Sub(at[0]); first > 200*time.Millisecond {
			t.Errorf("first attempt after %s, want at once (100ms)", first)
		}
		for i := 2; i < len(at); i++ {
			if gap := at[i].Sub(at[i-1]); gap > 5*time.Second {
				t.Errorf("attempt %d after %s, want at most 5s", i, gap)
			}
		}
		if n := len(at); n < 15 || n > 30 {
			t.Errorf("%d streams in a minute, want about 20", n)
		}
		// And it comes back.
		fresh := ca.svid("cart", time.Hour)
		api.does(func(send func(*workloadpb.X509SVIDResponse), ctx context.Context) error {
			send(encode(t, fresh))
			return until(ctx)
		})
		got, err := c.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, fresh)
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// A process outside any registration is told the remedy, tries slowly, and keeps what it has: the
// node may just have restarted.
func TestClientThatIsDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newAPI(t)
		defer api.stop()
		api.does(func(func(*workloadpb.X509SVIDResponse), context.Context) error {
			return status.Error(codes.PermissionDenied, "process 7 is outside every registration")
		})
		c, stop := api.client()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := c.Wait(ctx)
		for _, want := range []string{"process 7", "inlay run --service NAME -- CMD"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want one that says %q", err, want)
			}
		}
		if !errors.Is(err, identity.ErrDenied) || !errors.Is(err, identity.ErrNoIdentity) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want ErrDenied, ErrNoIdentity and the deadline", err)
		}
		if n := len(api.streams()); n < 6 || n > 14 {
			t.Errorf("%d attempts in a minute, want about 10", n)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestClientStopsWhereTheSpecificationSaysSo(t *testing.T) {
	for _, code := range []codes.Code{codes.InvalidArgument, codes.Unimplemented} {
		t.Run(code.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				api := newAPI(t)
				defer api.stop()
				api.does(func(func(*workloadpb.X509SVIDResponse), context.Context) error { return status.Error(code, "no") })
				c, stop := api.client()
				time.Sleep(time.Hour) // of the bubble: no time passes
				if n := len(api.streams()); n != 1 {
					t.Errorf("%d attempts, want 1", n)
				}
				if err := stop(); status.Code(errors.Unwrap(err)) != code {
					t.Errorf("Run returned %v, want %s", err, code)
				}
				if _, err := c.Current(); !errors.Is(err, identity.ErrNoIdentity) {
					t.Errorf("Current: %v", err)
				}
			})
		})
	}
}

func TestNobodyListens(t *testing.T) {
	c, err := identity.NewClient(identity.ClientConfig{Socket: "unix:///nowhere/workload.sock"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	for { // until the first attempt has failed
		if _, err := c.Current(); strings.Contains(err.Error(), "/nowhere/workload.sock") {
			break
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestParseSocket(t *testing.T) {
	for in, want := range map[string]string{
		"unix:///run/inlay/workload.sock": "unix /run/inlay/workload.sock",
		"unix:/run/inlay/workload.sock":   "unix /run/inlay/workload.sock",
		"/run/inlay/workload.sock":        "unix /run/inlay/workload.sock",
		"tcp://127.0.0.1:8000":            "tcp 127.0.0.1:8000",
		"tcp://[::1]:8000":                "tcp [::1]:8000",
	} {
		network, address, err := identity.ParseSocket(in)
		if got := network + " " + address; err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"":                       "SPIFFE_ENDPOINT_SOCKET is not set",
		"run/workload.sock":      "want unix:///PATH or tcp",
		"unix://run/workload":    "without host",
		"unix:///":               "absolute path",
		"unix:///x?y=1":          "no user, query or fragment",
		"tcp://localhost:8000":   "want tcp://IP:PORT",
		"tcp://127.0.0.1:8000/x": "without path",
		"tcp://127.0.0.1:0":      "want tcp://IP:PORT",
		"http://127.0.0.1":       `scheme "http"`,
		"unix://\x7f":            "invalid control character",
	} {
		_, _, err := identity.ParseSocket(in)
		check(t, err, want)
	}
	_, err := identity.NewClient(identity.ClientConfig{})
	check(t, err, "inlay run --service NAME -- CMD")
}

func TestNames(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	id, err := identity.ServiceID(a.td, "shop", "orders")
	if err != nil || id.String() != "spiffe://inlay.local/ns/shop/svc/orders" {
		t.Errorf("%s, %v", id, err)
	}
	if ns, svc, ok := identity.ParseServiceID(id); !ok || ns != "shop" || svc != "orders" {
		t.Errorf("%q %q %v", ns, svc, ok)
	}
	if _, _, ok := identity.ParseServiceID(identity.ControlPlaneID(a.td)); !ok {
		t.Error("the control plane's ID is of the same form")
	}
	for _, bad := range []string{"", "Orders", "a.b", "-a", "a-", "a/b", "ä", strings.Repeat("a", 64)} {
		if _, err := identity.ServiceID(a.td, "default", bad); err == nil {
			t.Errorf("service %q was accepted", bad)
		}
	}
}

func TestCheckService(t *testing.T) {
	for _, tc := range []struct{ namespace, service, want string }{
		{"default", "orders", ""},
		{"inlay", "controlplane", "the mesh's own"},
		{"mesh", "orders", "NAME.mesh"},
		{"localhost", "orders", "NAME.localhost"},
		{"default", "localhost", "the machine itself"},
		{"Shop", "a.b", "service \"a.b\""},
		{"Shop", "a.b", "namespace \"Shop\""},
	} {
		err := identity.CheckService(tc.namespace, tc.service)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s in %s: %v, want %q", tc.service, tc.namespace, err, tc.want)
		}
	}
	if err := identity.CheckService("default", strings.Repeat("x", 1<<20)); err == nil || len(err.Error()) > 300 {
		t.Errorf("a name of a megabyte: want a short error")
	}
}

// A reader that waits on Updated before it asks misses no change.
func TestVarTellsOfEachChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority(t, "inlay.local")
		v := identity.NewVar()
		updated := v.Updated()
		v.Set(ca.svid("cart", time.Hour))
		<-updated
		updated = v.Updated()
		v.Set(nil)
		<-updated
		if _, err := v.Current(); !errors.Is(err, identity.ErrNoIdentity) {
			t.Errorf("after Set(nil): %v", err)
		}
		cause := errors.New("went home")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		if _, err := v.Wait(ctx); !errors.Is(err, cause) || !errors.Is(err, identity.ErrNoIdentity) {
			t.Errorf("Wait: %v, want both reasons", err)
		}
	})
}
