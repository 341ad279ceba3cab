// Package identity holds a workload's X.509-SVID and trust bundle, rotates them, and makes TLS
// configurations that verify the peer's SPIFFE ID in VerifyConnection.
//
// It is used by meshsdk, by xds (mTLS to the control plane) and by the control plane for its own
// listeners. It never reads key files and never prints a key.
package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is one identity with its key and the roots that peers are verified against. Immutable.
type SVID struct {
	ID spiffeid.ID
	// Certificate holds the chain, leaf first, the private key and the parsed leaf.
	Certificate tls.Certificate
	// Roots are the trust bundles by trust domain; the own one is always there.
	Roots map[spiffeid.TrustDomain]*x509.CertPool
}

// NotAfter is when the leaf expires.
func (s *SVID) NotAfter() time.Time { return s.Certificate.Leaf.NotAfter }

// Source hands out the current SVID. Implementations are safe for concurrent use: the Workload
// API client of this package, a static one, and the in-memory CA of meshtest.
type Source interface {
	// Current returns the SVID of this moment without blocking, or the reason why there is none.
	// An expired SVID is never returned: no identity fails closed.
	Current() (*SVID, error)
	// Wait blocks until there is an SVID or ctx is done.
	Wait(ctx context.Context) (*SVID, error)
	// Updated returns a channel that is closed when Current has changed after this call.
	Updated() <-chan struct{}
}
