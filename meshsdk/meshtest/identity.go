package meshtest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/identity"
)

// Identity is the identity of a service, signed by the authority of this mesh and renewed at half
// of its life while the control plane runs. All instances of a service share it.
func (m *Mesh) Identity(service string) identity.Source {
	m.t.Helper()
	name, namespace, dotted := strings.Cut(service, ".")
	if !dotted {
		namespace = "default"
	}
	key := name + "." + namespace
	m.mu.Lock()
	defer m.mu.Unlock()
	if v := m.ids[key]; v != nil {
		return v
	}
	v := identity.NewVar()
	if m.cp == nil {
		m.t.Fatalf("meshtest: identity of %s while the control plane is stopped", service)
	}
	s, err := sign(m.ctx, m.cp.CA(), namespace, name)
	if err != nil {
		m.t.Fatalf("meshtest: identity of %s: %v", service, err)
	}
	v.Set(s)
	m.ids[key] = v
	m.wg.Go(func() { m.renew(v, s, namespace, name) })
	return v
}

// renew does what the node does for real programs.
func (m *Mesh) renew(v *identity.Var, s *identity.SVID, namespace, name string) {
	for {
		leaf := s.Certificate.Leaf
		wait := time.NewTimer(time.Until(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)))
		select {
		case <-m.ctx.Done():
			wait.Stop()
			v.Set(nil) // stops the timer of its expiry
			return
		case <-wait.C:
		}
		cp := m.running()
		for cp == nil { // stopped by the test: ask again, as the node does
			select {
			case <-m.ctx.Done():
				v.Set(nil)
				return
			case <-time.After(time.Second):
			}
			cp = m.running()
		}
		next, err := sign(m.ctx, cp.CA(), namespace, name)
		if err != nil {
			m.t.Errorf("meshtest: identity of %s.%s: %v", name, namespace, err)
			return
		}
		s = next
		v.Set(s)
	}
}

func sign(ctx context.Context, authority *ca.CA, namespace, name string) (*identity.SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	signed, err := authority.Sign(ctx, ca.SignRequest{Namespace: namespace, Service: name, CSR: csr})
	if err != nil {
		return nil, err
	}
	return identity.NewSVID(signed.Chain, key, map[spiffeid.TrustDomain][]*x509.Certificate{authority.TrustDomain(): authority.Bundle()})
}
