package endpoint_test

import (
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

func TestKeyIsOneForEachWayOfConnecting(t *testing.T) {
	addr := netip.MustParseAddrPort("10.0.0.1:80")
	a, b := spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/a"), spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/b")
	tls := func(alpn string, ids ...spiffeid.ID) *endpoint.TLS {
		return &endpoint.TLS{Peers: ids, ALPN: []string{alpn}}
	}
	base := endpoint.Key(addr, tls("h2", a, b))
	if got := endpoint.Key(addr, tls("h2", b, a)); got != base {
		t.Errorf("the order of peers makes another key: %q, %q", got, base)
	}
	for name, other := range map[string]string{
		"plaintext":    endpoint.Key(addr, nil),
		"fewer peers":  endpoint.Key(addr, tls("h2", a)),
		"another ALPN": endpoint.Key(addr, tls("http/1.1", a, b)),
		"another port": endpoint.Key(netip.MustParseAddrPort("10.0.0.1:81"), tls("h2", a, b)),
	} {
		if other == base {
			t.Errorf("%s has the key of another way: %q", name, other)
		}
	}
}

func TestState(t *testing.T) {
	var s endpoint.State
	s.Acquire()
	s.Acquire()
	s.Release()
	if s.InFlight() != 1 {
		t.Errorf("in flight %d, want 1", s.InFlight())
	}
}

func TestLocality(t *testing.T) {
	for want, e := range map[string]endpoint.Endpoint{"": {}, "r/z": {Region: "r", Zone: "z"}, "r//s": {Region: "r", SubZone: "s"}} {
		if got := e.Locality(); got != want {
			t.Errorf("locality %q, want %q", got, want)
		}
	}
}
