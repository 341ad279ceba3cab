package bench

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/meshtest"
)

// A GET of HTTP/1.1 over net/http: the SDK at both ends beside plain net/http at both ends, which
// has the same certificates, deadline and bound of idle connections.
func TestHTTP(t *testing.T) {
	mesh := meshtest.New(t, meshtest.Loopback())
	mesh.Apply(service("pages", "HTTP"))
	server, client := mesh.Open("pages"), mesh.Open("web")
	lis, err := server.Listen(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	serveHTTP(t, &http.Server{Handler: server.Middleware(page())}, lis)
	if err := client.Ready(t.Context(), "pages"); err != nil {
		t.Fatal(err)
	}
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.MaxIdleConnsPerHost = 100
	over := variant{"sdk", get(&http.Client{Transport: client.Transport(base)}, "http://pages/items/7")}
	compare(t, over, plainHTTP(t, mesh), 1.25, 1, 16, 64)
}

// page answers with 100 bytes.
func page() http.Handler {
	text := strings.Repeat("x", 100)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })
}

// plainHTTP is net/http with the same certificates.
func plainHTTP(t *testing.T, mesh *meshtest.Mesh) variant {
	t.Helper()
	serverID, clientID := mesh.Identity("pages"), mesh.Identity("web")
	svid, err := serverID.Wait(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	alpn := []string{"http/1.1"}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveHTTP(t, &http.Server{Handler: page()}, tls.NewListener(lis, identity.ServerTLS(serverID, identity.ServerOptions{RequireClient: true, ALPN: alpn})))
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.MaxIdleConnsPerHost = 100
	base.TLSClientConfig = identity.ClientTLS(clientID, identity.Only(svid.ID), alpn, nil)
	base.ForceAttemptHTTP2 = false
	t.Cleanup(base.CloseIdleConnections)
	call := get(&http.Client{Transport: base}, "https://"+lis.Addr().String()+"/items/7")
	return variant{"net/http", call}
}

// get reads one page. The context bounds it for plain clients and those of the mesh alike.
func get(c *http.Client, url string) func() error {
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		n, err := io.Copy(io.Discard, resp.Body)
		if err == nil && n != 100 {
			err = fmt.Errorf("read %d bytes, want 100", n)
		}
		return err
	}
}

func serveHTTP(t *testing.T, s *http.Server, lis net.Listener) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(lis) // Close ends it
	}()
	t.Cleanup(func() { _ = s.Close(); <-done })
}
