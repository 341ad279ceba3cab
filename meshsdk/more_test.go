package meshsdk_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

type registryInstance = registrypb.Instance

func readAll(t *testing.T, resp *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// whoami answers with the caller's identity as the handler sees it.
func whoami(w http.ResponseWriter, r *http.Request) {
	id, ok := meshsdk.PeerFromContext(r.Context())
	fmt.Fprintf(w, "%v %v %v %q", id, ok, r.Proto, r.Header.Get("X-Forwarded-Client-Cert"))
}

// ask makes one HTTP/1.1 request over conn.
func ask(conn net.Conn) (string, error) {
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: orders\r\nX-Forwarded-Client-Cert: me\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestModeOfAPort(t *testing.T) { synctest.Test(t, testModeOfAPort) }

func testModeOfAPort(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, false, false)
	server := p.open("default", "orders")
	go server.Run(t.Context(), meshsdk.HTTP(8080, http.HandlerFunc(whoami)))
	p.registered(1)
	ctx := ctxFor(t)
	addr := server.Status().Listeners[0].Address

	plain := func() (string, error) {
		c, err := p.net.dial(ctx, "tcp", addr)
		if err != nil {
			return "", err
		}
		return ask(c)
	}
	secure := func(ns, svc string, alpn ...string) (string, error) {
		c, err := p.net.dial(ctx, "tcp", addr)
		if err != nil {
			return "", err
		}
		src := identity.Static(p.ca.svid(ns, svc))
		want := spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/orders")
		return ask(tls.Client(c, identity.ClientTLS(src, identity.Only(want), alpn, nil)))
	}
	mode := func(want string) {
		t.Helper()
		synctest.Wait()
		if got := server.Status().Listeners[0]; got.Mode != want {
			t.Fatalf("mode %+v, want %s", got, want)
		}
	}

	if got, err := plain(); err == nil {
		t.Errorf("plaintext to a strict service: %q", got)
	}
	if got := server.Status().Connections; got.Refused != 1 || got.Plaintext != 0 {
		t.Errorf("counts: %+v", got)
	}
	want := `spiffe://inlay.local/ns/default/svc/cart true HTTP/1.1 ""`
	if got, err := secure("default", "cart", "http/1.1"); got != want || err != nil {
		t.Errorf("mesh TLS: %q %v", got, err)
	}
	p.mode("default", "orders", 8080, true)
	mode("permissive")
	if got, err := plain(); err != nil || got != ` false HTTP/1.1 ""` {
		t.Errorf("plaintext to a permissive service: %q %v", got, err)
	}
	if got, err := secure("default", "cart", "http/1.1"); got != want || err != nil {
		t.Errorf("mesh TLS to a permissive service: %q %v", got, err)
	}
	p.mode("default", "orders", 8080, false)
	mode("strict")
	if got, err := plain(); err == nil {
		t.Errorf("plaintext after strict again: %q", got)
	}

	// TLS without an SVID, and with that of another trust domain.
	c, err := p.net.dial(ctx, "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ask(tls.Client(c, &tls.Config{InsecureSkipVerify: true})); err == nil {
		t.Errorf("TLS without SVID: %q", got)
	}
	other := newCA(t, "other.example")
	c, err = p.net.dial(ctx, "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	cert := other.svid("default", "cart").Certificate
	if got, err := ask(tls.Client(c, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}})); err == nil {
		t.Errorf("TLS with a foreign SVID: %q", got)
	}
	synctest.Wait() // a server counts after the alert that its client has seen
	counts := server.Status().Connections
	if counts.MTLS != 2 || counts.Plaintext != 1 || counts.Refused != 2 || counts.Failed != 2 {
		t.Errorf("counts: %+v", counts)
	}
}

func TestHTTP2OverTheListener(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	server := p.open("default", "orders")
	go server.Run(t.Context(), meshsdk.HTTP(8080, http.HandlerFunc(whoami)))
	p.registered(1)
	addr := server.Status().Listeners[0].Address
	cart := p.open("default", "cart")
	tr := &http.Transport{
		ForceAttemptHTTP2: true,
		DialContext:       func(ctx context.Context, network, _ string) (net.Conn, error) { return p.net.dial(ctx, network, addr) },
		TLSClientConfig:   cart.TLSConfig(spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/orders")),
	}
	defer tr.CloseIdleConnections()
	get := func() (string, error) {
		req, _ := http.NewRequestWithContext(ctxFor(t), "GET", "https://orders/", nil)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		return readAll(t, resp), nil
	}
	if got, err := get(); err != nil || got != `spiffe://inlay.local/ns/default/svc/cart true HTTP/2.0 ""` {
		t.Errorf("%q %v", got, err)
	}
	tr.CloseIdleConnections()
	tr.TLSClientConfig = cart.TLSConfig(spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/billing"))
	tr2 := tr.Clone()
	defer tr2.CloseIdleConnections()
	req, _ := http.NewRequestWithContext(ctxFor(t), "GET", "https://orders/", nil)
	_, err := tr2.RoundTrip(req)
	var peer *identity.PeerError
	if !errors.As(err, &peer) || !strings.Contains(err.Error(), "svc/orders") || !strings.Contains(err.Error(), "svc/billing") {
		t.Errorf("server of the wrong identity: %v", err)
	}
}

func TestNoIdentityOverAPlainListener(t *testing.T) {
	p := newPlane(t)
	m := p.open("default", "orders")
	srv := httptest.NewServer(m.Middleware(http.HandlerFunc(whoami)))
	defer srv.Close()
	req, _ := http.NewRequest("GET", srv.URL, nil)
	req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://inlay.local/ns/default/svc/admin")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got := readAll(t, resp); got != ` false HTTP/1.1 ""` {
		t.Errorf("http: %q", got)
	}

	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := &orders{}
	s := m.NewServer()
	healthpb.RegisterHealthServer(s, o)
	go s.Serve(lis)
	cc, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if err := check(ctxFor(t), cc); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(o.peers); got != "[ false]" {
		t.Errorf("grpc: %s", got)
	}
}

func TestUnknownModeIsStrict(t *testing.T) {
	p := newPlane(t) // knows no service
	server := p.open("default", "orders")
	lis, err := server.Listen(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	go http.Serve(lis, http.HandlerFunc(whoami))
	p.registered(1)
	c, err := p.net.dial(t.Context(), "tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ask(c); err == nil {
		t.Errorf("plaintext while the mode is unknown: %q", got)
	}
}

func TestListenErrorsTeach(t *testing.T) {
	p := newPlane(t)
	m := p.open("default", "orders", meshsdk.WithListen("10.0.0.1:9000"))
	if _, err := m.Listen(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "INLAY_LISTEN") {
		t.Errorf("port 0: %v", err)
	}
	l, err := m.Listen(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Listen(t.Context(), 8081); err == nil || !strings.Contains(err.Error(), "10.0.0.1:9000") {
		t.Errorf("taken: %v", err)
	}
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	m.Close()
	if _, err := m.Listen(t.Context(), 8082); err == nil || !strings.Contains(err.Error(), "shut down") {
		t.Errorf("after Close: %v", err)
	}
	if err := m.Run(t.Context()); err == nil {
		t.Error("Run without servers: no error")
	}

	own, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	real, err := meshsdk.Open(t.Context(), meshsdk.WithEnvironment(func(string) string { return "" }), meshsdk.WithBootstrap(p.bootstrap()),
		meshsdk.WithIdentity(identity.Static(p.ca.svid("default", "orders"))), meshsdk.WithDialer(p.net.dial),
		meshsdk.WithListen(own.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	defer real.Close()
	if _, err := real.Listen(t.Context(), 8080); err == nil || !strings.Contains(err.Error(), "use port 0 in INLAY_LISTEN") {
		t.Errorf("port taken by another program: %v", err)
	}
}

// Everything below runs on fake time; a goroutine that outlives its Mesh makes synctest fail.

func TestLeaseIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.service("default", "orders", 8080, true, false)
		m := p.open("default", "orders")
		run := serveGRPC(t, p, m, &orders{}, 8080)
		p.registered(1)
		start := time.Now()
		p.wait("three renewals", func() bool {
			n := 0
			for _, e := range p.events {
				if e == "renew orders" {
					n++
				}
			}
			return n == 3
		})
		// registry.proto: "sent at a third of its length"; the lease is 30 s.
		if got := time.Since(start); got < 30*time.Second || got > 31*time.Second {
			t.Errorf("three renewals took %v", got)
		}
		if err := run(); err != nil {
			t.Error(err)
		}
	})
}

func TestDrainWaitsFiveSecondsForASilentRegistry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.holdDrain = true
		p.service("default", "orders", 8080, true, false)
		m := p.open("default", "orders")
		run := serveGRPC(t, p, m, &orders{}, 8080)
		p.registered(1)
		start := time.Now()
		if err := run(); err != nil {
			t.Error(err)
		}
		if got := time.Since(start); got < 5*time.Second || got > 7*time.Second {
			t.Errorf("drained after %v, want 5 s", got)
		}
	})
}

func TestCloseCutsAShutdownShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.holdDrain = true
		m := p.open("default", "orders")
		lis, err := m.Listen(t.Context(), 8080)
		if err != nil {
			t.Fatal(err)
		}
		s := m.NewServer()
		healthpb.RegisterHealthServer(s, &orders{})
		go s.Serve(lis)
		p.registered(1)
		ended := make(chan error)
		start := time.Now()
		go func() { ended <- m.Shutdown(context.Background()) }()
		synctest.Wait()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err == nil || time.Since(start) != 0 {
			t.Errorf("Shutdown: %v after %v, want an error at once", err, time.Since(start))
		}
	})
}

func TestShutdownCutsWhatDoesNotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.service("default", "orders", 8080, true, false)
		m := p.open("default", "orders")
		o := &orders{block: make(chan struct{}), inside: make(chan struct{}, 1)}
		srv := m.NewServer()
		healthpb.RegisterHealthServer(srv, o)
		lis, err := m.Listen(t.Context(), 8080)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(lis) }()
		p.registered(1)
		client := p.open("default", "cart")
		cc, err := client.NewClient("orders")
		if err != nil {
			t.Fatal(err)
		}
		called := make(chan error, 1)
		go func() { called <- check(t.Context(), cc) }()
		<-o.inside
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := m.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-called; err == nil {
			t.Error("the call that did not end succeeded")
		}
		<-served
		close(o.block)
		cc.Close()
		client.Close()
	})
}

func TestRollingRestartLosesNoCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.service("default", "orders", 8080, true, false)
		ctx := t.Context()
		start := func() func() error {
			m := p.open("default", "orders")
			return serveGRPC(t, p, m, &orders{}, 8080)
		}
		servers := []func() error{start(), start(), start()}
		p.registered(3)
		client := p.open("default", "cart")
		if err := client.Ready(ctx, "orders"); err != nil {
			t.Fatal(err)
		}
		cc, err := client.NewClient("orders")
		if err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		calls, failed := 0, []error(nil)
		for range 4 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(time.Millisecond):
					}
					err := check(ctx, cc)
					mu.Lock()
					calls++
					if err != nil {
						failed = append(failed, err)
					}
					mu.Unlock()
				}
			})
		}
		for i := range servers {
			next := start()
			p.registered(4)
			if err := servers[i](); err != nil {
				t.Error(err)
			}
			p.registered(3)
			servers[i] = next
			time.Sleep(100 * time.Millisecond) // fake time: let calls flow
		}
		close(stop)
		wg.Wait()
		if len(failed) > 0 || calls < 100 {
			t.Errorf("%d of %d calls failed, first: %v", len(failed), calls, slices.Compact(failed)[:min(1, len(failed))])
		}
		cc.Close()
		client.Close()
		for _, s := range servers {
			s()
		}
	})
}

func TestWithoutIdentityNothingIsOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.service("default", "orders", 8080, true, false)
		src := identity.NewVar()
		src.Fail(errors.New("the node is away"))
		m := p.open("default", "cart", meshsdk.WithIdentity(src), meshsdk.WithService("cart"))
		cc, err := m.NewClient("orders")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := check(ctx, cc); err == nil {
			t.Error("a call without identity succeeded")
		}
		short, cancel2 := context.WithTimeout(t.Context(), time.Second)
		defer cancel2()
		if err := m.Ready(short); err == nil || !strings.Contains(err.Error(), "the node is away") {
			t.Errorf("Ready: %v", err)
		}
		src.Set(p.ca.svid("default", "billing"))
		// The identity that came is not that of the service.
		if err := waitFor(t, func() error { return m.Ready(t.Context()) }); !strings.Contains(err.Error(), "inlay run --service cart") {
			t.Errorf("Ready with the wrong identity: %v", err)
		}
		cc.Close()
		m.Close()
	})
}

// waitFor asks f until it fails; fake time passes.
func waitFor(t *testing.T, f func() error) error {
	for range 100 {
		if err := f(); err != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("no error came")
	return nil
}

func TestDisabled(t *testing.T) {
	o := &orders{}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m, err := meshsdk.Open(t.Context(), meshsdk.WithEnvironment(func(k string) string {
		return map[string]string{"INLAY_DISABLED": "1", "INLAY_ADDR_ORDERS": lis.Addr().String(), "INLAY_LISTEN": "127.0.0.1:0", "INLAY_ADDR_BAD": "x"}[k]
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s := m.NewServer()
	healthpb.RegisterHealthServer(s, o)
	go s.Serve(lis)
	for _, target := range []string{"orders", "orders.shop", "orders:8080", "xds:///orders", "orders.mesh"} {
		cc, err := m.NewClient(target)
		if err != nil {
			t.Fatal(err)
		}
		if err := check(ctxFor(t), cc); err != nil {
			t.Errorf("NewClient(%q): %v", target, err)
		}
		cc.Close()
	}
	cc, err := grpc.NewClient("orders", m.DialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if err := check(ctxFor(t), cc); err != nil {
		t.Errorf("DialOptions: %v", err)
	}
	if _, err := m.NewClient("bad"); err == nil || !strings.Contains(err.Error(), "INLAY_ADDR_BAD") {
		t.Errorf("bad variable: %v", err)
	}

	web, err := m.Listen(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: m.Middleware(http.HandlerFunc(whoami))}
	go srv.Serve(web)
	defer srv.Close()
	m2, err := meshsdk.Open(t.Context(), meshsdk.WithDisabled(true), meshsdk.WithEnvironment(func(k string) string {
		return map[string]string{"INLAY_ADDR_WEB": web.Addr().String()}[k]
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer m2.Close()
	resp, err := m2.HTTPClient().Get("http://web/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("status %d", resp.StatusCode)
	}
	if st := m.Status(); st.Stage != "disabled" || !st.Ready {
		t.Errorf("status %+v", st)
	}
	if err := m.Ready(t.Context(), "orders"); err != nil {
		t.Error(err)
	}
	if err := m.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDisabledSharesConnectionsAndDials(t *testing.T) {
	mem := newMemnet()
	var dials atomic.Int64
	m, err := meshsdk.Open(t.Context(), meshsdk.WithDisabled(true), meshsdk.WithListener(mem.listen),
		meshsdk.WithEnvironment(func(k string) string {
			return map[string]string{"INLAY_ADDR_WEB": "10.0.0.1:8080", "INLAY_ADDR_ORDERS": "10.0.0.1:8081"}[k]
		}),
		meshsdk.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials.Add(1)
			return mem.dial(ctx, network, addr)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	web, err := m.Listen(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(whoami)}
	defer srv.Close()
	go srv.Serve(web)
	for range 5 {
		resp, err := m.HTTPClient().Get("http://web/")
		if err != nil {
			t.Fatal(err)
		}
		readAll(t, resp)
		resp.Body.Close()
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections for 5 clients one after the other, want 1", n)
	}
	lis, err := m.Listen(t.Context(), 8081)
	if err != nil {
		t.Fatal(err)
	}
	s := m.NewServer()
	healthpb.RegisterHealthServer(s, &orders{})
	go s.Serve(lis)
	cc, err := m.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if err := check(ctxFor(t), cc); err != nil {
		t.Error(err)
	}
	if n := dials.Load(); n != 2 {
		t.Errorf("%d connections, want gRPC's by WithDialer too", n)
	}
}

func TestSnapshotNeedsNoControlPlane(t *testing.T) {
	p := newPlane(t)
	p.service("default", "orders", 8080, true, false)
	server := p.open("default", "orders")
	serveGRPC(t, p, server, &orders{}, 8080)
	p.registered(1)
	dir := t.TempDir()
	first := p.open("default", "cart", meshsdk.WithStateDir(dir))
	if err := first.Ready(ctxFor(t), "orders"); err != nil {
		t.Fatal(err)
	}
	first.Close()
	file := filepath.Join(dir, "xds.cache") // the format of a snapshot
	p.stop()

	m, err := meshsdk.Open(t.Context(), meshsdk.WithEnvironment(func(string) string { return "" }), meshsdk.WithConfig(file),
		meshsdk.WithIdentity(identity.Static(p.ca.svid("default", "cart"))), meshsdk.WithDialer(p.net.dial))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	cc, err := m.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if err := check(ctxFor(t), cc); err != nil {
		t.Error(err)
	}
	if st := m.Status(); st.Config.LoadedFrom != "file" || !st.Ready || st.Service != "cart" {
		t.Errorf("status %+v", st)
	}
	_, err = meshsdk.Open(t.Context(), meshsdk.WithEnvironment(func(string) string { return "" }), meshsdk.WithConfig(file),
		meshsdk.WithIdentity(identity.Static(p.ca.svid("default", "web"))))
	if err == nil || !strings.Contains(err.Error(), "svc/cart") || !strings.Contains(err.Error(), "svc/web") || !strings.Contains(err.Error(), "inlay compile") {
		t.Errorf("snapshot of another service: %v", err)
	}
	if err := xds.WriteSnapshot(file, nil, xds.Meta{}); err != nil {
		t.Fatal(err)
	}
	anon, err := meshsdk.Open(t.Context(), meshsdk.WithEnvironment(func(string) string { return "" }), meshsdk.WithConfig(file))
	if err != nil {
		t.Fatalf("snapshot for anybody, without identity: %v", err)
	}
	defer anon.Close()
	cc2, err := anon.NewClient("orders")
	if err != nil {
		t.Fatal(err)
	}
	defer cc2.Close()
	var me *meshsdk.Error
	if err := check(ctxFor(t), cc2); !errors.As(err, &me) || me.Reason != meshsdk.ReasonNoRoute {
		t.Errorf("a name that the snapshot does not hold: %v", err)
	}
}
