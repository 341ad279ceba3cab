package tcpmesh_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestModeOf(t *testing.T) {
	tls := func(require bool) resource.Chain {
		return resource.Chain{TransportProtocol: "tls", TLS: &resource.ServerTLS{RequireClientCertificate: require}}
	}
	raw := resource.Chain{TransportProtocol: "raw_buffer"}
	anyTLS := resource.Chain{TLS: &resource.ServerTLS{RequireClientCertificate: true}}
	chains := func(c ...resource.Chain) *graph.Config { return &graph.Config{Listener: &resource.Listener{Chains: c}} }
	for name, tc := range map[string]struct {
		cfg  *graph.Config
		want string
		mode tcpmesh.Mode
		bad  bool
	}{
		"nothing known is strict":                     {nil, "strict", tcpmesh.Mode{}, true},
		"an error is strict":                          {&graph.Config{Err: errors.New("x")}, "strict", tcpmesh.Mode{}, true},
		"a client's listener is strict":               {&graph.Config{Listener: &resource.Listener{API: &resource.HTTP{}}}, "strict", tcpmesh.Mode{}, true},
		"TLS alone is strict":                         {chains(tls(true)), "strict", tcpmesh.Mode{}, false},
		"TLS and plaintext is permissive":             {chains(tls(true), raw), "permissive", tcpmesh.Mode{Plaintext: true}, false},
		"plaintext first is permissive too":           {chains(raw, tls(true)), "permissive", tcpmesh.Mode{Plaintext: true}, false},
		"TLS without client certificates":             {chains(tls(false)), "strict", tcpmesh.Mode{Anonymous: true}, false},
		"TLS for any transport takes no plaintext":    {chains(anyTLS), "strict", tcpmesh.Mode{}, false},
		"the more specific chain wins":                {chains(anyTLS, raw), "permissive", tcpmesh.Mode{Plaintext: true}, false},
		"plaintext alone":                             {chains(raw), "plaintext", tcpmesh.Mode{Plaintext: true, NoTLS: true}, false},
		"no chain lets nobody in":                     {chains(), "closed", tcpmesh.Mode{NoTLS: true}, false},
		"TLS declared for raw_buffer takes no caller": {chains(resource.Chain{TransportProtocol: "raw_buffer", TLS: &resource.ServerTLS{}}), "closed", tcpmesh.Mode{NoTLS: true}, false},
		"the default chain serves what is left": {&graph.Config{Listener: &resource.Listener{
			Chains: []resource.Chain{tls(true)}, Default: &resource.Chain{}}}, "permissive", tcpmesh.Mode{Plaintext: true}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := tcpmesh.ModeOf(tc.cfg)
			if got != tc.mode || got.String() != tc.want || (err != nil) != tc.bad {
				t.Errorf("%+v %q %v, want %+v %q", got, got, err, tc.mode, tc.want)
			}
		})
	}
}

func TestGate(t *testing.T) {
	g := tcpmesh.NewGate()
	first, second := g.Enter(), g.Enter()
	if !first || !second || g.InFlight() != 2 {
		t.Fatal("an open gate keeps calls out")
	}
	g.Leave()
	g.Close()
	g.Close()
	if g.Enter() {
		t.Error("a closed gate lets a call in")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with a call in flight: %v", err)
	}
	g.Leave()
	if err := g.Wait(t.Context()); err != nil || g.InFlight() != 0 || !g.Closed() {
		t.Errorf("Wait: %v", err)
	}
	idle := tcpmesh.NewGate()
	idle.Close()
	if err := idle.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestGateUnderRace(t *testing.T) {
	g := tcpmesh.NewGate()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				if g.Enter() {
					g.Leave()
				}
			}
		})
	}
	wg.Go(g.Close)
	wg.Wait()
	if err := g.Wait(t.Context()); err != nil || g.InFlight() != 0 {
		t.Errorf("%v, %d in flight", err, g.InFlight())
	}
}

type mem struct{ *bufconn.Listener }

func (mem) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 8080} }

func TestASilentClientDelaysNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := mem{bufconn.Listen(1024)}
		var stats tcpmesh.Stats
		started, closed := 0, 0
		l := tcpmesh.New(tcpmesh.Config{
			Inner: inner, Identity: identity.NewVar(), Mode: func() tcpmesh.Mode { return tcpmesh.Mode{Plaintext: true} },
			Started: func() { started++ }, Closed: func() { closed++ }, Stats: &stats,
		})
		accepted := make(chan net.Conn)
		ended := make(chan error)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					ended <- err
					return
				}
				accepted <- c
			}
		}()
		silent, err := inner.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		talker, err := inner.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		go talker.Write([]byte("GET /"))
		c := <-accepted
		if d := time.Since(start); d != 0 {
			t.Errorf("a silent client delayed the next by %v", d)
		}
		buf := make([]byte, 5)
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "GET /" {
			t.Errorf("read %q %v: the first byte must be put back", buf, err)
		}
		own, ok := tcpmesh.FromConn(c)
		if !ok {
			t.Fatal("not one of ours")
		}
		if _, has := own.Peer(); has || own.Secure() {
			t.Error("a plaintext peer has an identity")
		}
		if back, ok := tcpmesh.FromAddr(c.LocalAddr()); !ok || back != own {
			t.Error("FromAddr does not find the connection")
		}
		if _, ok := tcpmesh.FromAddr(c.RemoteAddr()); ok {
			t.Error("FromAddr finds a connection behind a foreign address")
		}
		// The silent one is closed when its time is up.
		if _, err := silent.Read(buf); err == nil {
			t.Error("the silent client got bytes")
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("closed after %v, want 10 s", d)
		}
		synctest.Wait()
		if stats.Failed.Load() != 1 || stats.Plaintext.Load() != 1 {
			t.Errorf("failed %d, plaintext %d", stats.Failed.Load(), stats.Plaintext.Load())
		}

		// TLS without an identity fails closed.
		hello, err := inner.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		go hello.Write([]byte{22, 3, 1, 0, 1, 0})
		if _, err := io.ReadAll(hello); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Log(err)
		}
		pending, err := inner.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		l.Close()
		l.Close()
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after Close: %v", err)
		}
		if _, err := pending.Read(buf); err == nil {
			t.Error("a pending handshake outlived the listener")
		}
		if started != 1 || closed != 1 {
			t.Errorf("started %d, closed %d times", started, closed)
		}
		c.Close()
		talker.Close()
	})
}
