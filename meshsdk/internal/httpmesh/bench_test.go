package httpmesh_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/httpmesh"
)

// loopback is a server on a socket, and two ways to get its page: through the mesh, and by net/http
// with the same TLS.
func loopback(t testing.TB) (inMesh, plain func()) {
	t.Helper()
	ca := newAuthority(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	own, svid := ca.issue("orders"), ca.issue("cart")
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(tls.NewListener(l, identity.ServerTLS(identity.Static(own), identity.ServerOptions{RequireClient: true, ALPN: []string{"http/1.1"}})))
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	engine := call.New(call.Config{}) // nobody observes: that is telemetry's budget
	t.Cleanup(engine.Close)
	m := newMesh(t, newNetwork(), svid, func(c *httpmesh.Config) { c.Dial, c.Engine = nil, engine })
	engine.Publish(snapshotOf(serviceOf("orders", nil, clusterOf(orders, endpointAt(netip.MustParseAddrPort(l.Addr().String()), own.ID)))))
	base := &http.Transport{TLSClientConfig: identity.ClientTLS(identity.Static(svid), identity.Only(own.ID), []string{"http/1.1"}, nil)}
	t.Cleanup(base.CloseIdleConnections)
	get := func(rt http.RoundTripper, url string) func() {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		return func() {
			resp, err := rt.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
	}
	return get(m.client, "http://orders/"), get(base, "https://"+l.Addr().String()+"/")
}

// The mesh adds a bounded number of allocations to a request of net/http itself. The figures are of
// the whole process, server included, so only their difference says something.
func TestAllocationsOfARequest(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	inMesh, plain := loopback(t)
	inMesh()
	plain()
	own, alone := testing.AllocsPerRun(500, inMesh), testing.AllocsPerRun(500, plain)
	t.Logf("%v allocations a request, net/http alone %v", own, alone)
	if own-alone > 5 {
		t.Errorf("the mesh adds %v allocations to the %v of net/http, want at most 5", own-alone, alone)
	}
}

func BenchmarkGet(b *testing.B) {
	inMesh, plain := loopback(b)
	for name, one := range map[string]func(){"mesh": inMesh, "plain": plain} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				one()
			}
		})
	}
}
