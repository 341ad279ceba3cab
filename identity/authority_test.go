package identity_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/identity"
)

// authority signs for tests whatever it is told to, wrong certificates too.
type authority struct {
	t    testing.TB
	td   spiffeid.TrustDomain
	key  crypto.Signer
	cert *x509.Certificate
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{t: t, td: spiffeid.RequireTrustDomainFromString(td), key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(240 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{a.td.ID().URL()},
	}
	a.cert = a.sign(template, template, a.key.Public())
	return a
}

func (a *authority) sign(template, parent *x509.Certificate, pub any) *x509.Certificate {
	a.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

func (a *authority) bundle() map[spiffeid.TrustDomain][]*x509.Certificate {
	return map[spiffeid.TrustDomain][]*x509.Certificate{a.td: {a.cert}}
}

// leaf returns a certificate for path, changed by change, which may be nil.
func (a *authority) leaf(path string, key crypto.Signer, life time.Duration, change func(*x509.Certificate)) *x509.Certificate {
	a.t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: a.td.Name(), Path: path}},
	}
	if change != nil {
		change(template)
	}
	return a.sign(template, a.cert, key.Public())
}

// svid returns a good SVID of service name that lives for life.
func (a *authority) svid(name string, life time.Duration) *identity.SVID {
	a.t.Helper()
	key := newKey(a.t)
	s, err := identity.NewSVID([][]byte{a.leaf("/ns/default/svc/"+name, key, life, nil).Raw}, key, a.bundle())
	if err != nil {
		a.t.Fatal(err)
	}
	return s
}

func (a *authority) id(name string) spiffeid.ID {
	id, err := identity.ServiceID(a.td, "default", name)
	if err != nil {
		a.t.Fatal(err)
	}
	return id
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newRSAKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newEdKey(t testing.TB) crypto.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
