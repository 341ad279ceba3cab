package workload

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/capb"
)

const (
	signTimeout = 5 * time.Second
	// Back-off between attempts to reach the control plane.
	retryBase, retryMax = 100 * time.Millisecond, 3 * time.Second
)

var errForeign = errors.New("its root is not in the trust bundle")

type issuerConfig struct {
	ctx    context.Context // of the goroutines
	wg     *sync.WaitGroup // whose owner waits for them
	ca     capb.CAClient
	td     spiffeid.TrustDomain
	clock  Clock
	random func() float64
	log    *slog.Logger
}

// issuer keeps one SVID for each service that runs here, or ran here within an SVID's life, and
// renews it at half of its life. It is safe for concurrent use.
type issuer struct {
	issuerConfig

	mu        sync.Mutex
	entries   map[service]*entry
	bundle    map[spiffeid.TrustDomain][]*x509.Certificate // nil until the control plane sent it
	bundleErr error
}

// entry is one service's SVID. Its fields are guarded by issuer.mu.
type entry struct {
	svc service
	id  spiffeid.ID

	users    int       // registrations that hold it
	uid      uint32    // of the newest
	released time.Time // when users became 0
	kick     chan struct{}

	key    crypto.Signer // with chain: what the CA signed last; nil before
	chain  [][]byte
	issued time.Time
	stale  bool           // chain is of a root that is no longer in the bundle
	svid   *identity.SVID // key and chain with the bundle; nil until both are there
	err    error          // why there is no newer one; nil when nothing failed since

	changed chan struct{} // closed when svid or err has changed
}

func newIssuer(cfg issuerConfig) *issuer {
	return &issuer{issuerConfig: cfg, entries: make(map[service]*entry)}
}

// acquire returns the entry of a service for a registration of user uid, and starts to issue when
// it is new. Each needs one release.
func (i *issuer) acquire(svc service, id spiffeid.ID, uid uint32) *entry {
	i.mu.Lock()
	defer i.mu.Unlock()
	e := i.entries[svc]
	if e == nil {
		e = &entry{svc: svc, id: id, kick: make(chan struct{}, 1), changed: make(chan struct{})}
		i.entries[svc] = e
		i.wg.Go(func() { i.keep(i.ctx, e) })
	}
	e.users++
	e.uid = uid
	select {
	case e.kick <- struct{}{}: // it may rest
	default:
	}
	return e
}

func (i *issuer) release(e *entry) {
	i.mu.Lock()
	defer i.mu.Unlock()
	e.users--
	if e.users == 0 {
		e.released = i.clock.Now().Round(0)
	}
}

// current returns what the service has now: an SVID that has not expired, or why there is none, or
// neither while the first one is under way. changed is closed when that is no longer so.
func (i *issuer) current(e *entry) (svid *identity.SVID, changed <-chan struct{}, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if e.svid != nil && i.clock.Now().Before(e.svid.NotAfter()) {
		return e.svid, e.changed, nil
	}
	switch {
	case e.err != nil:
		err = e.err
	case e.svid != nil:
		err = fmt.Errorf("the SVID of %s expired at %s", e.id, e.svid.NotAfter().Format(time.RFC3339))
	case i.bundle == nil && i.bundleErr != nil:
		err = i.bundleErr
	}
	return nil, e.changed, err
}

// keep issues and renews until ctx is done or nobody has needed the service for an SVID's life.
func (i *issuer) keep(ctx context.Context, e *entry) {
	failures := 0
	for {
		err := i.issue(ctx, e)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			i.mu.Lock()
			e.err = err
			tell(&e.changed)
			i.mu.Unlock()
			wait := backoffFor(failures, retryBase, retryMax, i.random())
			failures++
			i.log.WarnContext(ctx, "SVID not issued", "service", e.svc.String(), "err", err, "retry_in", wait)
			if !sleep(ctx, i.clock, wait, nil) {
				return
			}
			if i.forget(e) {
				return
			}
			continue
		}
		failures = 0
		if !i.rest(ctx, e) {
			return
		}
	}
}

// rest waits until the SVID is to be renewed and reports true, or false when that is never.
func (i *issuer) rest(ctx context.Context, e *entry) bool {
	for {
		due, renew := i.due(e)
		if !identity.WaitUntil(ctx, i.clock, due, e.kick) {
			if ctx.Err() != nil {
				return false
			}
			continue // kicked: somebody needs it again
		}
		if renew {
			return true
		}
		if i.forget(e) {
			return false
		}
	}
}

// due says when to look at e again, and whether to renew it then. An SVID is renewed at half of its
// life, a tenth of that earlier at random, so that a fleet does not renew at once. One whose service
// has not run for its whole life rests until it expires.
func (i *issuer) due(e *entry) (at time.Time, renew bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if e.stale {
		return i.clock.Now(), true
	}
	notAfter := leafOf(e).NotAfter
	life := notAfter.Sub(e.issued)
	half := e.issued.Add(life/2 - time.Duration(float64(life/20)*i.random()))
	if e.users > 0 || half.Before(e.released.Add(life)) {
		return half, true
	}
	return notAfter, false
}

// forget removes e when nobody uses it and it has no SVID that serves; true says that it is gone.
func (i *issuer) forget(e *entry) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if e.users > 0 || e.chain != nil && i.clock.Now().Before(leafOf(e).NotAfter) {
		return false
	}
	delete(i.entries, e.svc)
	return true
}

func leafOf(e *entry) *x509.Certificate {
	leaf, _ := x509.ParseCertificate(e.chain[0]) // issue has parsed it
	return leaf
}

// issue makes a new key, has the CA sign for it and puts the SVID in place. The key never leaves
// this process but to attested workloads.
func (i *issuer) issue(ctx context.Context, e *entry) error {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	// The request says nothing but the key: the CA builds the name.
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	i.mu.Lock()
	uid := e.uid
	i.mu.Unlock()
	began := i.clock.Now().Round(0) // by the wall, like what is signed
	resp, err := i.ca.Sign(ctx, &capb.SignRequest{Namespace: e.svc.namespace, Service: e.svc.name, Csr: csr, Uid: uid})
	if err != nil {
		return fmt.Errorf("control plane does not sign for %s: %s", e.id, status.Convert(err).Message())
	}
	if len(resp.GetChain()) == 0 {
		return fmt.Errorf("control plane signed for %s without a certificate", e.id)
	}
	leaf, err := x509.ParseCertificate(resp.GetChain()[0])
	if err != nil {
		return fmt.Errorf("control plane signed for %s: %w", e.id, err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != e.id.String() {
		return fmt.Errorf("control plane signed for %v, want %s: do both have the same --trust-domain?", leaf.URIs, e.id)
	}
	if !leaf.NotAfter.After(i.clock.Now()) {
		return fmt.Errorf("control plane signed for %s until %s, which has passed: compare the clocks", e.id, leaf.NotAfter.Format(time.RFC3339))
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	svid, err := i.compose(key, resp.GetChain())
	if err != nil && !errors.Is(err, errForeign) {
		return fmt.Errorf("control plane signed for %s: %w", e.id, err)
	}
	// Signed by a root that the bundle has not brought yet: it serves once that is here.
	e.key, e.chain, e.issued, e.err, e.stale = key, resp.GetChain(), began, err, false
	if svid != nil {
		e.svid = svid
	}
	tell(&e.changed)
	i.log.InfoContext(ctx, "SVID issued", "spiffe_id", e.id.String(), "not_after", leaf.NotAfter)
	return nil
}

// compose puts chain and key together with the bundle; nil while that is not there. errForeign
// says that the bundle does not hold the root that signed. The caller holds i.mu.
func (i *issuer) compose(key crypto.Signer, chain [][]byte) (*identity.SVID, error) {
	if i.bundle == nil {
		return nil, nil
	}
	svid, err := identity.NewSVID(chain, key, i.bundle)
	if err != nil {
		return nil, err
	}
	certs := []*x509.Certificate{svid.Certificate.Leaf}
	for _, der := range chain[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if _, err := identity.VerifyChain(certs, svid.Roots, x509.ExtKeyUsageServerAuth, i.clock.Now()); err != nil {
		return nil, fmt.Errorf("%w: %w", errForeign, err)
	}
	return svid, nil
}

// followBundle keeps the trust bundle current until ctx is done.
func (i *issuer) followBundle(ctx context.Context) {
	failures := 0
	for {
		received, err := i.receiveBundles(ctx)
		if ctx.Err() != nil {
			return
		}
		if received {
			failures = 0
		}
		wait := backoffFor(failures, retryBase, retryMax, i.random())
		failures++
		i.log.WarnContext(ctx, "trust bundle not received", "err", err, "retry_in", wait)
		i.mu.Lock()
		i.bundleErr = err
		for _, e := range i.entries {
			if e.svid == nil {
				tell(&e.changed)
			}
		}
		i.mu.Unlock()
		if !sleep(ctx, i.clock, wait, nil) {
			return
		}
	}
}

func (i *issuer) receiveBundles(ctx context.Context) (received bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := i.ca.WatchBundle(ctx, &capb.WatchBundleRequest{})
	if err != nil {
		return false, bundleError(err)
	}
	for {
		b, err := stream.Recv()
		if err != nil {
			return received, bundleError(err)
		}
		roots, err := i.readBundle(b)
		if err != nil {
			return received, err
		}
		received = true
		i.setBundle(ctx, map[spiffeid.TrustDomain][]*x509.Certificate{i.td: roots})
	}
}

func bundleError(err error) error {
	return fmt.Errorf("control plane does not send the trust bundle: %s", status.Convert(err).Message())
}

func (i *issuer) readBundle(b *capb.Bundle) ([]*x509.Certificate, error) {
	if b.GetTrustDomain() != i.td.Name() {
		return nil, fmt.Errorf("control plane is of trust domain %q, this node of %q: start both with the same --trust-domain", b.GetTrustDomain(), i.td.Name())
	}
	if len(b.GetRoots()) == 0 {
		return nil, errors.New("control plane sent a trust bundle without roots")
	}
	roots := make([]*x509.Certificate, len(b.GetRoots()))
	for n, der := range b.GetRoots() {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("trust bundle of the control plane: root %d: %w", n, err)
		}
		if !root.IsCA {
			return nil, fmt.Errorf("trust bundle of the control plane: root %d is not an authority", n)
		}
		roots[n] = root
	}
	return roots, nil
}

// setBundle replaces the bundle and, with it, what every workload is sent.
func (i *issuer) setBundle(ctx context.Context, bundle map[spiffeid.TrustDomain][]*x509.Certificate) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.bundleErr = nil
	if sameBundle(i.bundle, bundle) {
		return // a reconnect: nothing to push
	}
	i.bundle = bundle
	for _, e := range i.entries {
		if e.chain == nil {
			continue
		}
		svid, err := i.compose(e.key, e.chain)
		if err != nil {
			// The root that signed it is gone. What the workloads have serves on until the CA has
			// signed anew, which is at once.
			e.stale = true
			select {
			case e.kick <- struct{}{}:
			default:
			}
			continue
		}
		e.svid, e.err = svid, nil
		tell(&e.changed)
	}
	i.log.InfoContext(ctx, "trust bundle received", "trust_domain", i.td.Name(), "roots", len(bundle[i.td]))
}

func sameBundle(a, b map[spiffeid.TrustDomain][]*x509.Certificate) bool {
	if len(a) != len(b) {
		return false
	}
	for td, certs := range a {
		if len(certs) != len(b[td]) {
			return false
		}
		for n, c := range certs {
			if !c.Equal(b[td][n]) {
				return false
			}
		}
	}
	return true
}

// tell wakes whoever waits on *c. The caller holds the mutex that guards it.
func tell(c *chan struct{}) {
	close(*c)
	*c = make(chan struct{})
}
