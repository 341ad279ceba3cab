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

func BenchmarkGet(b *testing.B) {
	ca := newAuthority(b)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	own, svid := ca.issue("orders"), ca.issue("cart")
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(tls.NewListener(l, identity.ServerTLS(identity.Static(own), identity.ServerOptions{RequireClient: true, ALPN: []string{"http/1.1"}})))
	}()
	defer func() {
		_ = srv.Close()
		<-done
	}()
	engine := call.New(call.Config{})
	defer engine.Close()
	m := newMesh(b, newNetwork(), svid, func(c *httpmesh.Config) { c.Dial, c.Engine = nil, engine })
	engine.Publish(snapshotOf(serviceOf("orders", nil, clusterOf(orders, endpointAt(netip.MustParseAddrPort(l.Addr().String()), own.ID)))))
	plain := &http.Transport{TLSClientConfig: identity.ClientTLS(identity.Static(svid), identity.Only(own.ID), []string{"http/1.1"}, nil)}
	defer plain.CloseIdleConnections()
	for name, tc := range map[string]struct {
		rt  http.RoundTripper
		url string
	}{"mesh": {m.client, "http://orders/"}, "plain": {plain, "https://" + l.Addr().String() + "/"}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, tc.url, nil)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				resp, err := tc.rt.RoundTrip(req)
				if err != nil {
					b.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
			}
		})
	}
}
