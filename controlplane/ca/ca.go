// Package ca is the embedded certificate authority: it keeps one root on disk, signs X.509-SVIDs
// for the services that nodes ask for, and hands out the trust bundle.
//
// The control plane makes one, registers its gRPC service and uses Source for its own listeners.
// It never sees a workload's key, never reads a name from a CSR and never prints its own key.
package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/identity"
)

// DefaultSVIDTTL is how long an SVID lives unless Config says otherwise.
const DefaultSVIDTTL = time.Hour

// backdate is how far in the past an SVID begins, for verifiers whose clock is behind.
const backdate = 30 * time.Second

// Clock tells time. nil is the real one.
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

// Config says where the authority lives and for whom it signs.
type Config struct {
	// Dir holds the root and its key in the file ca.pem; it is created (0700) when missing. It is
	// required.
	Dir string
	// TrustDomain of every name; empty means inlay.local. A directory made for another one is refused.
	TrustDomain string
	// Store remembers what was signed, for reading; nil means memory.
	Store Log
	// SVIDTTL is how long an SVID lives; zero means DefaultSVIDTTL. At least a second.
	SVIDTTL time.Duration
	// NodeUIDs are the users whose processes may ask for signatures over the unix socket; nil means
	// the control plane's own and root.
	NodeUIDs []uint32
	Clock    Clock
	Rand     io.Reader    // source of keys and serials; nil means crypto/rand
	Log      *slog.Logger // nil discards
}

// Cert is one certificate that the authority signed.
type Cert struct {
	SPIFFEID string
	// Serial is in lower-case hexadecimal.
	Serial              string
	NotBefore, NotAfter time.Time
	// Authority is true for the root itself.
	Authority bool
}

// Log remembers certificates over a restart. It is for reading only: nothing is decided by it. An
// implementation may forget those whose NotAfter has passed, and is safe for concurrent use.
type Log interface {
	RecordCert(Cert) error
	Certs() ([]Cert, error)
}

// CA signs. It is safe for concurrent use.
type CA struct {
	td    spiffeid.TrustDomain
	root  *x509.Certificate
	key   crypto.Signer
	ttl   time.Duration
	uids  []uint32
	clock Clock
	rand  io.Reader
	store Log
	log   *slog.Logger
	own   *identity.Var

	mu     sync.Mutex
	issued []Cert // not expired when last pruned
	pruned int    // len(issued) after the last pruning
}

// New opens the authority in cfg.Dir, creating its root when there is none, and issues the control
// plane's own SVID. Nothing runs until Run.
func New(cfg Config) (*CA, error) {
	if cfg.Dir == "" {
		return nil, fmt.Errorf("certificate authority: Dir is empty: want a directory, such as the data directory's ca")
	}
	if cfg.TrustDomain == "" {
		cfg.TrustDomain = "inlay.local"
	}
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("trust domain %q: %w: want a name such as inlay.local", cfg.TrustDomain, err)
	}
	if cfg.SVIDTTL == 0 {
		cfg.SVIDTTL = DefaultSVIDTTL
	}
	if cfg.SVIDTTL < time.Second {
		return nil, fmt.Errorf("lifetime of SVIDs %s: want at least 1s", cfg.SVIDTTL)
	}
	if cfg.NodeUIDs == nil {
		cfg.NodeUIDs = []uint32{uint32(os.Geteuid()), 0}
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &CA{
		td: td, ttl: cfg.SVIDTTL, uids: cfg.NodeUIDs,
		clock: cfg.Clock, rand: cfg.Rand, store: cfg.Store, log: cfg.Log,
		own: identity.NewVarClock(cfg.Clock),
	}
	st, err := openState(cfg.Dir, func() (*state, error) { return newRoot(td, c.clock.Now(), c.rand) })
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	c.root, c.key = st.root, st.key
	if err := st.check(td, c.clock.Now()); err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	if c.store != nil {
		if c.issued, err = c.store.Certs(); err != nil {
			return nil, fmt.Errorf("certificate authority: read what was issued: %w", err)
		}
	}
	rootCert := certOf(c.root)
	known := false
	for _, have := range c.issued {
		known = known || have.Serial == rootCert.Serial
	}
	if !known {
		c.record(context.Background(), rootCert)
	}
	if err := c.rotateOwn(context.Background()); err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	return c, nil
}

// TrustDomain is that of every name this authority signs.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }

// Root is the certificate that peers verify against.
func (c *CA) Root() *x509.Certificate { return c.root }

// Bundle is every root of the trust domain.
func (c *CA) Bundle() []*x509.Certificate { return []*x509.Certificate{c.root} }

// Source hands out the control plane's own SVID, spiffe://TRUST_DOMAIN/ns/inlay/svc/controlplane.
// It is there from New on; Run rotates it.
func (c *CA) Source() identity.Source { return c.own }

// Run rotates the control plane's own SVID at half of its life until ctx is done, then returns nil.
// A failure is tried again; the last SVID stays until it expires.
func (c *CA) Run(ctx context.Context) error {
	wait := c.ttl / 2
	for {
		if !identity.WaitUntil(ctx, c.clock, c.clock.Now().Add(wait), nil) {
			return nil
		}
		wait = c.ttl / 2
		if err := c.rotateOwn(ctx); err != nil {
			wait = min(wait, 5*time.Second)
			c.own.Fail(err)
			c.log.ErrorContext(ctx, "own identity not rotated", "err", err, "retry_in", wait)
		}
	}
}
