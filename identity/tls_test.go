package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/identity"
)

// handshake connects both ends in memory and returns them with the faults of each handshake.
func handshake(t *testing.T, client, server *tls.Config) (c, s *tls.Conn, clientErr, serverErr error) {
	t.Helper()
	// Buffered: both ends may write at once, as over a socket.
	l := bufconn.Listen(64 << 10)
	t.Cleanup(func() { l.Close() })
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, _ := l.Accept()
		accepted <- conn
	}()
	cp, err := l.Dial()
	if err != nil {
		t.Fatal(err)
	}
	sp := <-accepted
	t.Cleanup(func() { cp.Close(); sp.Close() })
	c, s = tls.Client(cp, client), tls.Server(sp, server)
	done := make(chan error, 1)
	go func() {
		err := s.Handshake()
		if err != nil {
			sp.Close()
		}
		done <- err
	}()
	clientErr = c.Handshake()
	if clientErr == nil {
		// In TLS 1.3 the server judges the client's certificate after the client has finished: only
		// reading tells the client.
		go func() {
			if err := <-done; err == nil {
				_, err = s.Write([]byte("hi"))
				done <- err
			} else {
				done <- err
			}
		}()
		_, clientErr = io.ReadFull(c, make([]byte, 2))
	} else {
		cp.Close()
	}
	return c, s, clientErr, <-done
}

func TestBothEndsProveWhoTheyAre(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	orders, cart := a.svid("orders", time.Hour), a.svid("cart", time.Hour)
	client := identity.ClientTLS(identity.Static(cart), identity.Only(orders.ID), []string{"h2"}, nil)
	server := identity.ServerTLS(identity.Static(orders), identity.ServerOptions{RequireClient: true, ALPN: []string{"h2", "http/1.1"}, Peers: identity.Only(cart.ID)})
	c, s, cerr, serr := handshake(t, client, server)
	if cerr != nil || serr != nil {
		t.Fatalf("client %v, server %v", cerr, serr)
	}
	if id, err := identity.PeerID(c.ConnectionState()); err != nil || id != orders.ID {
		t.Errorf("client sees %s, %v", id, err)
	}
	if id, err := identity.PeerID(s.ConnectionState()); err != nil || id != cart.ID {
		t.Errorf("server sees %s, %v", id, err)
	}
	if st := c.ConnectionState(); st.Version != tls.VersionTLS13 || st.NegotiatedProtocol != "h2" {
		t.Errorf("version %x, protocol %q; want TLS 1.3, h2", st.Version, st.NegotiatedProtocol)
	}
}

func TestWrongServerIsRefusedByName(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	wrong, right := a.svid("a", time.Hour), a.id("b")
	client := identity.ClientTLS(identity.Static(a.svid("cart", time.Hour)), identity.Only(right), nil, nil)
	_, _, err, _ := handshake(t, client, identity.ServerTLS(identity.Static(wrong), identity.ServerOptions{}))
	check(t, err, "peer is spiffe://inlay.local/ns/default/svc/a, want spiffe://inlay.local/ns/default/svc/b")
	var pe *identity.PeerError
	if !errors.As(err, &pe) || pe.Got != wrong.ID || len(pe.Want) != 1 || pe.Want[0] != right {
		t.Errorf("error %#v, want a PeerError of both IDs", err)
	}
}

func TestPeerErrorTexts(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	check(t, &identity.PeerError{Got: a.id("a")}, "want nobody")
	check(t, &identity.PeerError{Got: a.id("a"), Want: []spiffeid.ID{a.id("b"), a.id("c")}}, "want one of spiffe://inlay.local/ns/default/svc/b, spiffe://inlay.local/ns/default/svc/c")
}

func TestServerRefuses(t *testing.T) {
	a, other := newAuthority(t, "inlay.local"), newAuthority(t, "inlay.local")
	foreign := newAuthority(t, "other.test")
	orders := a.svid("orders", time.Hour)
	with := func(change func(*x509.Certificate)) *tls.Config {
		key := newKey(t)
		leaf := a.leaf("/ns/default/svc/cart", key, time.Hour, change)
		cert := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
		return &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }}
	}
	mesh := func(s *identity.SVID) *tls.Config {
		return identity.ClientTLS(identity.Static(s), identity.Only(orders.ID), nil, nil)
	}
	// A foreign client trusts this domain, so that only the server's verdict is seen.
	crossKey := newKey(t)
	crossBundle := a.bundle()
	crossBundle[foreign.td] = []*x509.Certificate{foreign.cert}
	cross, err := identity.NewSVID([][]byte{foreign.leaf("/ns/default/svc/cart", crossKey, time.Hour, nil).Raw}, crossKey, crossBundle)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		client *tls.Config
		want   string
	}{
		"a client without SVID":        {&tls.Config{InsecureSkipVerify: true}, "didn't provide a certificate"},
		"TLS 1.2":                      {&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, "unsupported versions"},
		"a service that is not listed": {mesh(a.svid("pay", time.Hour)), "peer is spiffe://inlay.local/ns/default/svc/pay, want spiffe://inlay.local/ns/default/svc/cart"},
		"a root of the same name":      {with(func(c *x509.Certificate) {}), ""},
		"another trust domain":         {mesh(cross), "no bundle for its trust domain"},
		"two names": {with(func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "inlay.local", Path: "/x"})
		}), "exactly one SPIFFE ID"},
		"an authority as a leaf":          {with(func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }), "it is an authority"},
		"an expired SVID":                 {with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "expired"},
		"an SVID that is not valid yet":   {with(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), "not yet valid"},
		"a certificate for servers alone": {with(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "incompatible key usage"},
	} {
		t.Run(name, func(t *testing.T) {
			server := identity.ServerTLS(identity.Static(orders), identity.ServerOptions{RequireClient: true, Peers: identity.Only(a.id("cart"))})
			if name == "a root of the same name" {
				key := newKey(t)
				leaf := other.leaf("/ns/default/svc/cart", key, time.Hour, nil)
				tc.client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}, nil
				}
				tc.want = "unknown authority"
			}
			_, _, cerr, serr := handshake(t, tc.client, server)
			check(t, serr, tc.want)
			if cerr == nil {
				t.Error("the client was served")
			}
		})
	}
}

func TestClientWithoutSVIDHasNoIdentity(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	server := identity.ServerTLS(identity.Static(a.svid("orders", time.Hour)), identity.ServerOptions{})
	_, s, cerr, serr := handshake(t, &tls.Config{InsecureSkipVerify: true}, server)
	if cerr != nil || serr != nil {
		t.Fatalf("client %v, server %v", cerr, serr)
	}
	if _, err := identity.PeerID(s.ConnectionState()); !errors.Is(err, identity.ErrNoPeer) {
		t.Errorf("error %v, want ErrNoPeer", err)
	}
}

// An SVID that is shown is verified where it is not required, too.
func TestOptionalClientIsVerified(t *testing.T) {
	a, evil := newAuthority(t, "inlay.local"), newAuthority(t, "inlay.local")
	server := identity.ServerTLS(identity.Static(a.svid("orders", time.Hour)), identity.ServerOptions{})
	client := identity.ClientTLS(identity.Static(evil.svid("cart", time.Hour)), nil, nil, nil)
	client.VerifyConnection = nil
	_, _, _, serr := handshake(t, client, server)
	check(t, serr, "unknown authority")
}

func TestNoIdentityFailsClosed(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	orders := a.svid("orders", time.Hour)
	_, _, cerr, _ := handshake(t, identity.ClientTLS(identity.NewVar(), identity.Only(orders.ID), nil, nil),
		identity.ServerTLS(identity.Static(orders), identity.ServerOptions{}))
	if !errors.Is(cerr, identity.ErrNoIdentity) {
		t.Errorf("client: %v, want ErrNoIdentity", cerr)
	}
	_, _, _, serr := handshake(t, identity.ClientTLS(identity.Static(orders), identity.Only(orders.ID), nil, nil),
		identity.ServerTLS(identity.NewVar(), identity.ServerOptions{}))
	if !errors.Is(serr, identity.ErrNoIdentity) {
		t.Errorf("server: %v, want ErrNoIdentity", serr)
	}
	_, _, cerr, _ = handshake(t, identity.ClientTLS(identity.Static(orders), nil, nil, nil),
		identity.ServerTLS(identity.Static(orders), identity.ServerOptions{}))
	check(t, cerr, "want nobody")
}

// Rotation touches no open connection, and the next handshake shows the new SVID.
func TestRotationKeepsConnections(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	src := identity.NewVar()
	src.Set(a.svid("orders", time.Hour))
	client := identity.ClientTLS(identity.Static(a.svid("cart", time.Hour)), identity.Only(a.id("orders")), nil, nil)
	server := identity.ServerTLS(src, identity.ServerOptions{RequireClient: true})
	c, s, cerr, serr := handshake(t, client, server)
	if cerr != nil || serr != nil {
		t.Fatalf("client %v, server %v", cerr, serr)
	}
	first := c.ConnectionState().PeerCertificates[0]
	src.Set(a.svid("orders", time.Hour))
	go func() { _, _ = s.Write([]byte("still here")) }()
	got := make([]byte, 10)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "still here" {
		t.Errorf("after rotation: %q, %v", got, err)
	}
	c2, _, cerr, serr := handshake(t, client, server)
	if cerr != nil || serr != nil {
		t.Fatalf("client %v, server %v", cerr, serr)
	}
	if c2.ConnectionState().PeerCertificates[0].Equal(first) {
		t.Error("the second handshake shows the old SVID")
	}
}

// A client that keeps sessions gets none, so that every connection is verified anew.
func TestNoResumption(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	client := identity.ClientTLS(identity.Static(a.svid("cart", time.Hour)), identity.Only(a.id("orders")), nil, nil)
	client.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	client.ServerName = "orders"
	server := identity.ServerTLS(identity.Static(a.svid("orders", time.Hour)), identity.ServerOptions{RequireClient: true})
	for range 2 {
		c, _, cerr, serr := handshake(t, client, server)
		if cerr != nil || serr != nil {
			t.Fatalf("client %v, server %v", cerr, serr)
		}
		if c.ConnectionState().DidResume {
			t.Error("the session was resumed")
		}
	}
}

// Expiry is judged by the clock that was given, not by the machine's.
func TestExpiryByTheGivenClock(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	later := func() time.Time { return time.Now().Add(2 * time.Hour) }
	client := identity.ClientTLS(identity.Static(a.svid("cart", 3*time.Hour)), identity.Only(a.id("orders")), nil, later)
	_, _, cerr, _ := handshake(t, client, identity.ServerTLS(identity.Static(a.svid("orders", time.Hour)), identity.ServerOptions{}))
	check(t, cerr, "expired")
}

func TestExpiredSVIDIsNeverShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "inlay.local")
		src := identity.Static(a.svid("orders", time.Minute))
		updated := src.Updated()
		if _, err := src.Current(); err != nil {
			t.Fatal(err)
		}
		<-updated // expiry is a change
		if _, err := src.Current(); !errors.Is(err, identity.ErrNoIdentity) || !strings.Contains(err.Error(), "expired") {
			t.Errorf("error %v, want ErrNoIdentity that says expired", err)
		}
	})
}
