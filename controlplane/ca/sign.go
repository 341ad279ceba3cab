package ca

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/identity"
)

// ErrRequest is in the chain when a request itself is wrong: it will never be signed.
var ErrRequest = errors.New("request cannot be signed")

// maxCSR bounds a request in bytes; one with an RSA key of 8192 bits has about 2 KiB.
const maxCSR = 16 << 10

// SignRequest asks for one SVID. The name is built from Namespace and Service and from nothing else.
type SignRequest struct {
	Namespace, Service string
	// CSR is DER PKCS#10. Only its public key and signature are used.
	CSR []byte
	// UID of the user whose process the SVID is for; for the log.
	UID uint32
}

// Signed is an SVID without its key.
type Signed struct {
	ID spiffeid.ID
	// Chain is DER, the leaf first, without the root.
	Chain    [][]byte
	NotAfter time.Time
}

// Sign returns an SVID for a service. It does no I/O except to Config.Store, whose failure is
// logged and does not keep anybody from an identity.
func (c *CA) Sign(ctx context.Context, req SignRequest) (*Signed, error) {
	if req.Namespace == identity.ReservedNamespace {
		return nil, fmt.Errorf("%w: namespace %q is the mesh's own: want another one", ErrRequest, req.Namespace)
	}
	id, err := identity.ServiceID(c.td, req.Namespace, req.Service)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	pub, err := publicKey(req.CSR)
	if err != nil {
		return nil, fmt.Errorf("%w: CSR for %s: %w", ErrRequest, id, err)
	}
	signed, cert, err := c.sign(id, pub)
	if err != nil {
		return nil, fmt.Errorf("sign for %s: %w", id, err)
	}
	c.record(ctx, cert)
	c.log.InfoContext(ctx, "certificate signed", "spiffe_id", cert.SPIFFEID, "serial", cert.Serial, "not_after", cert.NotAfter, "uid", req.UID)
	return signed, nil
}

// publicKey checks that whoever made the CSR holds the key, and that the key is strong enough.
func publicKey(der []byte) (crypto.PublicKey, error) {
	if len(der) > maxCSR {
		return nil, fmt.Errorf("%d bytes: want at most %d", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	switch k := csr.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return nil, fmt.Errorf("ECDSA key on %s: want P-256", k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 8192 {
			return nil, fmt.Errorf("RSA key of %d bits: want 2048 to 8192", n)
		}
	default:
		return nil, fmt.Errorf("key of type %T: want ECDSA P-256, Ed25519 or RSA", csr.PublicKey)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("its signature is not by its own key: %w", err)
	}
	return csr.PublicKey, nil
}

// sign makes a leaf for id, whoever that is.
func (c *CA) sign(id spiffeid.ID, pub crypto.PublicKey) (*Signed, Cert, error) {
	serial, err := newSerial(c.rand)
	if err != nil {
		return nil, Cert{}, err
	}
	now := c.clock.Now()
	notAfter := now.Add(c.ttl)
	if notAfter.After(c.root.NotAfter) {
		notAfter = c.root.NotAfter // nobody verifies beyond it
	}
	if !notAfter.After(now) {
		return nil, Cert{}, fmt.Errorf("the root expired at %s", c.root.NotAfter.Format(time.RFC3339))
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"inlay"}},
		NotBefore:    now.Add(-backdate),
		NotAfter:     notAfter,
		// X509-SVID, section 4.3: "Leaf SVIDs MUST set `digitalSignature`."
		KeyUsage: x509.KeyUsageDigitalSignature,
		// Section 4.4: "fields `id-kp-serverAuth` and `id-kp-clientAuth` MUST be set."
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		// Section 4.1: "leaf certificates MUST set the `cA` field to `false`."
		BasicConstraintsValid: true,
		// Section 2: "An X.509 SVID MUST contain exactly one URI SAN".
		URIs: []*url.URL{id.URL()},
	}
	der, err := x509.CreateCertificate(c.rand, template, c.root, pub, c.key)
	if err != nil {
		return nil, Cert{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, Cert{}, err
	}
	return &Signed{ID: id, Chain: [][]byte{der}, NotAfter: leaf.NotAfter}, certOf(leaf), nil
}

// newSerial returns 128 random bits. RFC 5280, section 4.1.2.2: "The serial number MUST be a
// positive integer", of up to 20 octets.
func newSerial(r io.Reader) (*big.Int, error) {
	var b [16]byte
	for {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return nil, fmt.Errorf("random serial: %w", err)
		}
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n, nil
		}
	}
}

// rotateOwn makes a new key and SVID for the control plane itself.
func (c *CA) rotateOwn(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), c.rand)
	if err != nil {
		return err
	}
	signed, cert, err := c.sign(identity.ControlPlaneID(c.td), key.Public())
	if err != nil {
		return err
	}
	svid, err := identity.NewSVID(signed.Chain, key, map[spiffeid.TrustDomain][]*x509.Certificate{c.td: c.Bundle()})
	if err != nil {
		return err
	}
	c.record(ctx, cert)
	c.own.Set(svid)
	return nil
}

// record remembers a certificate. The log is for reading: a full disk must not end identities.
func (c *CA) record(ctx context.Context, cert Cert) {
	c.mu.Lock()
	c.issued = append(c.issued, cert)
	if len(c.issued) >= 2*c.pruned+64 { // amortized: not at every signature
		now := c.clock.Now()
		c.issued = slices.DeleteFunc(c.issued, func(old Cert) bool { return !now.Before(old.NotAfter) })
		c.pruned = len(c.issued)
	}
	c.mu.Unlock()
	if c.store == nil {
		return
	}
	if err := c.store.RecordCert(cert); err != nil {
		c.log.WarnContext(ctx, "certificate not recorded on disk", "spiffe_id", cert.SPIFFEID, "serial", cert.Serial, "err", err)
	}
}

// Issued returns the certificates that have not expired: the root first, then by SPIFFE ID and age.
func (c *CA) Issued() []Cert {
	now := c.clock.Now()
	c.mu.Lock()
	out := slices.Clone(c.issued)
	c.mu.Unlock()
	out = slices.DeleteFunc(out, func(old Cert) bool { return !now.Before(old.NotAfter) })
	slices.SortFunc(out, func(a, b Cert) int {
		if a.Authority != b.Authority {
			if a.Authority {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.SPIFFEID, b.SPIFFEID), a.NotBefore.Compare(b.NotBefore), cmp.Compare(a.Serial, b.Serial))
	})
	return out
}

func certOf(c *x509.Certificate) Cert {
	name := ""
	if len(c.URIs) == 1 {
		name = c.URIs[0].String()
	}
	return Cert{
		SPIFFEID: name, Serial: fmt.Sprintf("%032x", c.SerialNumber),
		NotBefore: c.NotBefore, NotAfter: c.NotAfter, Authority: c.IsCA,
	}
}
