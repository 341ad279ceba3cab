package meshsdk_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/identity/workloadpb"
	"github.com/inlay-mesh/inlay/meshsdk"
)

func TestHTTPOverTheMesh(t *testing.T) {
	for name, tc := range map[string]struct {
		http2 bool
		want  string
	}{
		"HTTP/1.1": {false, `spiffe://inlay.local/ns/default/svc/cart true HTTP/1.1 ""`},
		"HTTP/2":   {true, `spiffe://inlay.local/ns/default/svc/cart true HTTP/2.0 ""`},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlane(t)
			p.service("default", "orders", 8080, tc.http2, false)
			server := p.open("default", "orders")
			run := make(chan error, 1)
			ctx, cancel := context.WithCancel(t.Context())
			go func() { run <- server.Run(ctx, meshsdk.HTTP(8080, http.HandlerFunc(whoami))) }()
			p.registered(1)
			client := p.open("default", "cart")
			for _, url := range []string{"http://orders/v1", "https://orders/v1", "http://orders.default/v1"} {
				req, err := http.NewRequestWithContext(ctxFor(t), "GET", url, nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://inlay.local/ns/default/svc/admin")
				resp, err := client.HTTPClient().Do(req)
				if err != nil {
					t.Fatal(err)
				}
				if got := readAll(t, resp); got != tc.want {
					t.Errorf("%s: %q, want %q", url, got, tc.want)
				}
				resp.Body.Close()
			}
			cancel()
			if err := <-run; err != nil {
				t.Errorf("Run: %v", err)
			}
			req, _ := http.NewRequestWithContext(ctxFor(t), "GET", "http://orders/v1", nil)
			_, err := client.HTTPClient().Do(req)
			var me *meshsdk.Error
			// The client acknowledges an update as soon as it is decoded; a call that begins before the
			// engine has it finds the listener closed, and nothing of it was sent.
			if !errors.As(err, &me) || me.Reason != meshsdk.ReasonNoEndpoint && me.Reason != meshsdk.ReasonConnectFailed || me.Service != "orders" {
				t.Errorf("call after the drain: %v", err)
			}
		})
	}
}

func TestOutside(t *testing.T) {
	out := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "outside") }))
	defer out.Close()
	p := newPlane(t)
	dial := meshsdk.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		if c, err := p.net.dial(ctx, network, addr); err == nil {
			return c, nil
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	})
	m := p.open("default", "cart", dial)
	resp, err := m.HTTPClient().Get(out.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got := readAll(t, resp); got != "outside" {
		t.Errorf("%q", got)
	}
	closed := p.open("default", "cart", dial, meshsdk.WithFallback(meshsdk.Deny))
	_, err = closed.HTTPClient().Get(out.URL)
	var me *meshsdk.Error
	if !errors.As(err, &me) || me.Reason != meshsdk.ReasonDenied {
		t.Errorf("denied outside: %v", err)
	}
}

// TestIdentityFromTheNode takes the SVID from a Workload API and reaches the control plane by
// mutual TLS.
func TestIdentityFromTheNode(t *testing.T) {
	p := newPlane(t)
	p.stop()
	plane := identity.Static(p.ca.svid("inlay", "controlplane"))
	p.creds = credentials.NewTLS(identity.ServerTLS(plane, identity.ServerOptions{RequireClient: true, ALPN: []string{"h2"}}))
	p.start()
	p.service("default", "orders", 8080, true, false)

	socket := func(service string) meshsdk.Option {
		path := "/run/" + service + ".sock"
		lis := p.net.listenAt(path)
		srv := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			if m, _ := grpc.MethodFromServerStream(ss); m != identity.MethodFetchX509SVID {
				return fmt.Errorf("method %s", m)
			}
			if err := ss.RecvMsg(&workloadpb.X509SVIDRequest{}); err != nil {
				return err
			}
			m, err := identity.Encode(p.ca.svid("default", service))
			if err != nil {
				return err
			}
			if err := ss.SendMsg(proto.Message(m)); err != nil {
				return err
			}
			<-ss.Context().Done()
			return nil
		}))
		go srv.Serve(lis)
		t.Cleanup(srv.Stop)
		return meshsdk.WithWorkloadSocket("unix://" + path)
	}
	boot := meshsdk.WithBootstrap(fmt.Appendf(nil, `{"xds_servers":[{"server_uri":%q,"channel_creds":[{"type":"inlay_svid"}]}]}`, p.addr))
	open := func(service string, opts ...meshsdk.Option) *meshsdk.Mesh {
		return p.open("default", service, append(opts, boot, socket(service), meshsdk.WithIdentity(nil))...)
	}
	server := open("orders")
	serveGRPC(t, p, server, &orders{}, 8080)
	p.registered(1)
	client := open("cart", meshsdk.WithService("cart"))
	ctx := ctxFor(t)
	if err := client.Ready(ctx, "orders"); err != nil {
		t.Fatal(err)
	}
	cc, err := client.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if err := check(ctx, cc); err != nil {
		t.Error(err)
	}
	if st := client.Status(); st.Identity.SPIFFEID != "spiffe://inlay.local/ns/default/svc/cart" || st.Service != "cart" {
		t.Errorf("status %+v", st)
	}

	// A control plane that is not one is told so, with both names.
	p.stop()
	p.creds = credentials.NewTLS(identity.ServerTLS(identity.Static(p.ca.svid("default", "evil")), identity.ServerOptions{RequireClient: true, ALPN: []string{"h2"}}))
	p.start()
	late := open("web")
	for late.Status().ControlPlane.Error == "" && ctx.Err() == nil {
		p.acked(ctx)
	}
	if got := late.Status().ControlPlane.Error; !strings.Contains(got, "svc/evil") || !strings.Contains(got, "ns/inlay/svc/controlplane") {
		t.Errorf("control plane of the wrong identity: %q", got)
	}
}

func TestNamespacesAreAskedForBeforeANameGoesOutside(t *testing.T) {
	p := newPlane(t)
	p.namespaces = []string{"default", "shop"}
	p.service("shop", "orders", 8080, false, false)
	server := p.open("shop", "orders")
	go server.Run(t.Context(), meshsdk.HTTP(8080, http.HandlerFunc(whoami)))
	p.registered(1)
	for range 5 { // the first call comes before the first announcement
		client := p.open("default", "cart", meshsdk.WithFallback(meshsdk.Deny))
		resp, err := client.HTTPClient().Get("http://orders.shop/")
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, resp); !strings.Contains(got, "svc/cart true") {
			t.Errorf("%q", got)
		}
		resp.Body.Close()
		if got := client.Status().Namespaces; len(got) != 2 {
			t.Errorf("namespaces %q", got)
		}
		client.Close()
	}
}

func TestWithoutAnnouncementANameGoesOutsideSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.stop()
		m := p.open("default", "cart", meshsdk.WithFallback(meshsdk.Deny))
		start := time.Now()
		_, err := m.HTTPClient().Get("http://example.com/")
		var me *meshsdk.Error
		if !errors.As(err, &me) || me.Reason != meshsdk.ReasonDenied {
			t.Errorf("%v", err)
		}
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("after %v, want 2 s", d)
		}
		start = time.Now()
		m.HTTPClient().Get("http://example.org/")
		m.HTTPClient().Get("http://api.example.org/")
		if d := time.Since(start); d != 0 {
			t.Errorf("the next ones waited %v", d)
		}
		m.Close()
	})
}

func TestACallDoesNotWaitForNamespacesBeyondItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.stop()
		var log []meshsdk.AccessRecord
		m := p.open("default", "cart", meshsdk.WithAccessLog(func(r meshsdk.AccessRecord) { log = append(log, r) }))
		cc, err := m.NewClient("orders.shop")
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		for name, call := range map[string]func(context.Context) error{
			"http": func(ctx context.Context) error {
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://orders.shop/", strings.NewReader("x"))
				if err != nil {
					t.Fatal(err)
				}
				_, err = m.HTTPClient().Do(req)
				return err
			},
			"unary": func(ctx context.Context) error { return check(ctx, cc) },
			"stream": func(ctx context.Context) error {
				_, err := healthpb.NewHealthClient(cc).Watch(ctx, &healthpb.HealthCheckRequest{})
				return err
			},
		} {
			for what, tc := range map[string]struct {
				end    func(context.Context) (context.Context, context.CancelFunc)
				reason meshsdk.Reason
				is     error
			}{
				"deadline": {func(ctx context.Context) (context.Context, context.CancelFunc) {
					return context.WithTimeout(ctx, 100*time.Millisecond)
				}, meshsdk.ReasonTimeout, context.DeadlineExceeded},
				"cancel": {func(ctx context.Context) (context.Context, context.CancelFunc) {
					ctx, cancel := context.WithCancel(ctx)
					time.AfterFunc(100*time.Millisecond, cancel)
					return ctx, cancel
				}, meshsdk.ReasonCancelled, context.Canceled},
			} {
				ctx, cancel := tc.end(t.Context())
				start := time.Now()
				err := call(ctx)
				took := time.Since(start)
				cancel()
				var me *meshsdk.Error
				if !errors.As(err, &me) || me.Reason != tc.reason || !errors.Is(err, tc.is) {
					t.Errorf("%s, %s: %v (%T)", name, what, err, err)
				}
				if took != 100*time.Millisecond {
					t.Errorf("%s, %s: after %v, want 100 ms", name, what, took)
				}
				if got := log[len(log)-1]; got.Reason != tc.reason || got.Service != "orders.shop" || got.Peer != "" {
					t.Errorf("%s, %s: record %+v", name, what, got)
				}
			}
		}
		if len(log) != 6 {
			t.Errorf("%d records of 6 calls", len(log))
		}
		m.Close()
	})
}

func TestAPortLeavesAndComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		m := p.open("default", "orders")
		listen := func(port uint16) net.Listener {
			l, err := m.Listen(t.Context(), port)
			if err != nil {
				t.Fatal(err)
			}
			go l.Accept()
			return l
		}
		ports := func(want ...uint32) {
			t.Helper()
			p.wait(fmt.Sprint("ports ", want), func() bool {
				var got []uint32
				for _, in := range p.instances {
					for _, b := range in.GetPorts() {
						got = append(got, b.GetPort())
					}
				}
				return fmt.Sprint(got) == fmt.Sprint(want)
			})
		}
		a := listen(8080)
		ports(8080)
		b := listen(8081)
		ports(8080, 8081)
		a.Close()
		ports(8081)
		b.Close()
		ports()
		c := listen(8080)
		ports(8080)
		synctest.Wait()
		if st := m.Status().Listeners; len(st) != 1 || !st[0].Registered {
			t.Errorf("listeners %+v", st)
		}
		if err := m.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		ports()
		if _, err := c.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after Shutdown: %v", err)
		}
	})
}

func TestAMiddlewareElsewhereRefusesOnceDrained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		m := p.open("default", "orders")
		h := m.Middleware(http.HandlerFunc(whoami))
		if err := m.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
		if rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Connection") != "close" {
			t.Errorf("%d %v", rec.Code, rec.Header())
		}
	})
}
