package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ErrNoPeer says that the other end of a connection showed no certificate.
var ErrNoPeer = errors.New("peer showed no certificate")

// PeerError says that the peer proved an identity, but not one of those expected.
type PeerError struct {
	Got spiffeid.ID
	// Want are those expected; empty means that nobody is.
	Want []spiffeid.ID
}

// Error names both ends of the mistake.
func (e *PeerError) Error() string {
	switch len(e.Want) {
	case 0:
		return fmt.Sprintf("peer is %s, want nobody: no SPIFFE ID is bound to this connection", e.Got)
	case 1:
		return fmt.Sprintf("peer is %s, want %s", e.Got, e.Want[0])
	}
	names := make([]string, len(e.Want))
	for i, id := range e.Want {
		names[i] = id.String()
	}
	return fmt.Sprintf("peer is %s, want one of %s", e.Got, strings.Join(names, ", "))
}

// Peers says at each handshake which SPIFFE IDs the other end may have. None means that every
// peer is refused.
type Peers func() []spiffeid.ID

// Only is the Peers that never change.
func Only(ids ...spiffeid.ID) Peers { return func() []spiffeid.ID { return ids } }

// ClientTLS returns a configuration for connections to peers: TLS 1.3, the SVID of src at each
// handshake, and a server that proves to be one of peers. Nil peers refuses every server. alpn is
// NextProtos. now verifies expiry; nil means time.Now. Without an SVID a handshake fails with
// ErrNoIdentity; a wrong server fails it with *PeerError.
func ClientTLS(src Source, peers Peers, alpn []string, now func() time.Time) *tls.Config {
	if peers == nil {
		peers = Only()
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: slices.Clone(alpn),
		Time:       now,
		// A name of DNS says nothing in a mesh. VerifyConnection does the whole verification, and
		// unlike VerifyPeerCertificate it is called for resumed sessions too.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return verifyConnection(src, cs, x509.ExtKeyUsageServerAuth, peers, now)
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return certificate(src)
		},
		// ClientSessionCache stays nil: a resumed session would keep the old SVID of both ends.
	}
}

// ServerOptions are what a server asks of its clients.
type ServerOptions struct {
	// RequireClient refuses clients that show no SVID. False lets them in without identity; one
	// that is shown is verified all the same.
	RequireClient bool
	// ALPN is NextProtos.
	ALPN []string
	// Peers are the only clients let in; nil means everyone whose trust domain has a bundle.
	Peers Peers
	// Now verifies expiry; nil means time.Now.
	Now func() time.Time
}

// ServerTLS returns a configuration for a listener: TLS 1.3 and the SVID of src at each handshake,
// so that rotation touches no connection. Without an SVID a handshake fails with ErrNoIdentity.
func ServerTLS(src Source, o ServerOptions) *tls.Config {
	auth := tls.RequestClientCert
	if o.RequireClient {
		auth = tls.RequireAnyClientCert
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             slices.Clone(o.ALPN),
		Time:                   o.Now,
		ClientAuth:             auth,
		SessionTicketsDisabled: true, // every connection proves who is there anew
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 && !o.RequireClient {
				return nil
			}
			return verifyConnection(src, cs, x509.ExtKeyUsageClientAuth, o.Peers, o.Now)
		},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return certificate(src)
		},
	}
}

func certificate(src Source) (*tls.Certificate, error) {
	s, err := src.Current()
	if err != nil {
		return nil, err
	}
	return &s.Certificate, nil
}

// verifyConnection takes the roots and peers of this moment; nil peers means everyone.
func verifyConnection(src Source, cs tls.ConnectionState, usage x509.ExtKeyUsage, peers Peers, now func() time.Time) error {
	own, err := src.Current()
	if err != nil {
		return err
	}
	if now == nil {
		now = time.Now
	}
	id, err := VerifyChain(cs.PeerCertificates, own.Roots, usage, now())
	if err != nil {
		return err
	}
	if peers == nil {
		return nil
	}
	if want := peers(); !slices.Contains(want, id) {
		return &PeerError{Got: id, Want: want}
	}
	return nil
}

// VerifyChain returns the SPIFFE ID that chain, the leaf first, proves at now against the roots of
// its own trust domain. usage is what the leaf is used for.
func VerifyChain(chain []*x509.Certificate, roots map[spiffeid.TrustDomain]*x509.CertPool, usage x509.ExtKeyUsage, now time.Time) (spiffeid.ID, error) {
	if len(chain) == 0 {
		return spiffeid.ID{}, ErrNoPeer
	}
	id, err := checkLeaf(chain[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("peer's certificate: %w", err)
	}
	// Workload API, section 4.6: "the authenticator chooses the bundle representing the client's
	// presented trust domain for validation", "If no matching bundle is present for the SVID in
	// use, then the peer is untrusted."
	pool := roots[id.TrustDomain()]
	if pool == nil {
		return spiffeid.ID{}, fmt.Errorf("peer is %s: no bundle for its trust domain", id)
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err = chain[0].Verify(x509.VerifyOptions{
		Roots:         pool,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("peer says it is %s: %w", id, err)
	}
	return id, nil
}

// PeerID returns who is at the other end of a connection made with ClientTLS or ServerTLS, which
// verified it; ErrNoPeer when a client came without SVID.
func PeerID(cs tls.ConnectionState) (spiffeid.ID, error) {
	if !cs.HandshakeComplete {
		return spiffeid.ID{}, errors.New("handshake is not complete: the peer is not verified yet")
	}
	if len(cs.PeerCertificates) == 0 {
		return spiffeid.ID{}, ErrNoPeer
	}
	return x509svid.IDFromCert(cs.PeerCertificates[0])
}
