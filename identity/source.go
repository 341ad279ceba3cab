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
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrNoIdentity is in the chain of every error that says there is no SVID to use at this moment.
var ErrNoIdentity = errors.New("no identity")

// SVID is one identity with its key and the roots that peers are verified against. Immutable.
// Make it with NewSVID or Decode, which check it.
type SVID struct {
	ID spiffeid.ID
	// Certificate holds the chain, leaf first, the private key and the parsed leaf.
	Certificate tls.Certificate
	// Roots are the trust bundles by trust domain; the own one is always there.
	Roots map[spiffeid.TrustDomain]*x509.CertPool
	// Authorities are the certificates that Roots was made of, for encoding: a pool cannot be
	// enumerated.
	Authorities map[spiffeid.TrustDomain][]*x509.Certificate
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

// Clock tells time. A nil Clock anywhere in this package is the real one, which is also right
// under testing/synctest.
type Clock interface {
	Now() time.Time
	// AfterFunc runs f in its own goroutine once d has passed, unless stop was called before.
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}
