package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/inlay-mesh/inlay/identity/workloadpb"
)

// NewSVID checks the parts against the X509-SVID specification and puts them together. chain is
// DER, the leaf first, without the root; authorities must hold the trust domain of the leaf. It
// does not look at the time: an expired SVID is refused by a Source, not here.
func NewSVID(chain [][]byte, key crypto.Signer, authorities map[spiffeid.TrustDomain][]*x509.Certificate) (*SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("certificate chain is empty: want the leaf first")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("leaf: %w", err)
	}
	for i, der := range chain[1:] {
		if _, err := x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i+1, err)
		}
	}
	id, err := checkLeaf(leaf)
	if err != nil {
		return nil, err
	}
	if err := checkKey(leaf, key); err != nil {
		return nil, fmt.Errorf("key of %s: %w", id, err)
	}
	if len(authorities[id.TrustDomain()]) == 0 {
		return nil, fmt.Errorf("bundle of %s is missing: want at least one root", id.TrustDomain())
	}
	s := &SVID{
		ID:          id,
		Certificate: tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf},
		Roots:       make(map[spiffeid.TrustDomain]*x509.CertPool, len(authorities)),
		Authorities: make(map[spiffeid.TrustDomain][]*x509.Certificate, len(authorities)),
	}
	for td, certs := range authorities {
		pool := x509.NewCertPool()
		for _, c := range certs {
			if !c.IsCA {
				return nil, fmt.Errorf("bundle of %s: certificate %q is not an authority", td, c.Subject)
			}
			pool.AddCert(c)
		}
		s.Roots[td], s.Authorities[td] = pool, slices.Clone(certs)
	}
	return s, nil
}

// checkLeaf holds the rules for the leaf and returns its SPIFFE ID.
func checkLeaf(leaf *x509.Certificate) (spiffeid.ID, error) {
	// X509-SVID, section 5.2: "SVIDs containing more than one URI SAN MUST be rejected."
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("leaf with %d URI names: %w: want exactly one SPIFFE ID", len(leaf.URIs), err)
	}
	switch {
	case id.Path() == "":
		// Section 3.1: "Leaf certificate SPIFFE IDs MUST have a non-root path component."
		return id, fmt.Errorf("leaf of %s: the SPIFFE ID has no path: it names a trust domain, not a workload", id)
	case leaf.IsCA:
		// Section 4.1: "leaf certificates MUST set the `cA` field to `false`."
		return id, fmt.Errorf("leaf of %s: it is an authority: want a leaf certificate", id)
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		// Section 4.3: "Leaf SVIDs MUST NOT set `keyCertSign` or `cRLSign`."
		return id, fmt.Errorf("leaf of %s: key usage allows signing of certificates or revocation lists", id)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		// Section 4.3: "Leaf SVIDs MUST set `digitalSignature`."
		return id, fmt.Errorf("leaf of %s: key usage is without digitalSignature", id)
	}
	return id, nil
}

func checkKey(leaf *x509.Certificate, key crypto.Signer) error {
	var same bool
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		same = k.PublicKey.Equal(leaf.PublicKey)
	case *rsa.PrivateKey:
		same = k.PublicKey.Equal(leaf.PublicKey)
	case ed25519.PrivateKey:
		same = k.Public().(ed25519.PublicKey).Equal(leaf.PublicKey)
	default:
		return fmt.Errorf("type %T: want ECDSA, Ed25519 or RSA", key)
	}
	if !same {
		return errors.New("it does not belong to the leaf's public key")
	}
	return nil
}

// Decode reads the default identity of a Workload API response (section 5.3: the first of the
// list) and checks it. Other identities and revocation lists are not read. It never panics,
// whatever the bytes.
func Decode(resp *workloadpb.X509SVIDResponse) (*SVID, error) {
	if len(resp.GetSvids()) == 0 || resp.GetSvids()[0] == nil {
		return nil, errors.New("response holds no SVID: want one or more")
	}
	m := resp.GetSvids()[0]
	id, err := spiffeid.FromString(m.GetSpiffeId())
	if err != nil {
		return nil, fmt.Errorf("spiffe_id %q: %w", m.GetSpiffeId(), err)
	}
	chain, err := x509.ParseCertificates(m.GetX509Svid())
	if err != nil {
		return nil, fmt.Errorf("x509_svid of %s: %w", id, err)
	}
	// Never with %w or the bytes: the text of a parser must not carry a key.
	parsed, err := x509.ParsePKCS8PrivateKey(m.GetX509SvidKey())
	if err != nil {
		return nil, fmt.Errorf("x509_svid_key of %s: not an unencrypted PKCS#8 key", id)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("x509_svid_key of %s: type %T: want ECDSA, Ed25519 or RSA", id, parsed)
	}
	authorities := make(map[spiffeid.TrustDomain][]*x509.Certificate, 1+len(resp.GetFederatedBundles()))
	for name, der := range resp.GetFederatedBundles() {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("federated_bundles: trust domain %q: %w", name, err)
		}
		if authorities[td], err = parseBundle(der); err != nil {
			return nil, fmt.Errorf("federated_bundles: %s: %w", td, err)
		}
	}
	// Last: what a federated entry says of the own trust domain never counts.
	if authorities[id.TrustDomain()], err = parseBundle(m.GetBundle()); err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", id, err)
	}
	s, err := NewSVID(rawOf(chain), key, authorities)
	if err != nil {
		return nil, err
	}
	if s.ID != id {
		return nil, fmt.Errorf("spiffe_id is %s, but the leaf is of %s: want the same", id, s.ID)
	}
	return s, nil
}

// Encode is the reverse of Decode: one response with one identity and every bundle it holds.
func Encode(s *SVID) (*workloadpb.X509SVIDResponse, error) {
	own := s.Authorities[s.ID.TrustDomain()]
	if len(own) == 0 {
		return nil, fmt.Errorf("SVID of %s holds no authorities of its trust domain: make it with NewSVID", s.ID)
	}
	key, err := x509.MarshalPKCS8PrivateKey(s.Certificate.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("key of %s: type %T cannot be written as PKCS#8", s.ID, s.Certificate.PrivateKey)
	}
	resp := &workloadpb.X509SVIDResponse{Svids: []*workloadpb.X509SVID{{
		SpiffeId:    s.ID.String(),
		X509Svid:    bytes.Join(s.Certificate.Certificate, nil),
		X509SvidKey: key,
		Bundle:      joinRaw(own),
	}}}
	for td, certs := range s.Authorities {
		if td == s.ID.TrustDomain() {
			continue
		}
		if resp.FederatedBundles == nil {
			resp.FederatedBundles = make(map[string][]byte)
		}
		resp.FederatedBundles[td.IDString()] = joinRaw(certs)
	}
	return resp, nil
}

// EncodeBundles is the answer of FetchX509Bundles for the same bundles.
func EncodeBundles(authorities map[spiffeid.TrustDomain][]*x509.Certificate) *workloadpb.X509BundlesResponse {
	resp := &workloadpb.X509BundlesResponse{Bundles: make(map[string][]byte, len(authorities))}
	for td, certs := range authorities {
		resp.Bundles[td.IDString()] = joinRaw(certs)
	}
	return resp
}

func parseBundle(der []byte) ([]*x509.Certificate, error) {
	certs, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, err
	}
	if len(certs) == 0 {
		return nil, errors.New("empty: want at least one root")
	}
	return certs, nil
}

func rawOf(certs []*x509.Certificate) [][]byte {
	raw := make([][]byte, len(certs))
	for i, c := range certs {
		raw[i] = c.Raw
	}
	return raw
}

func joinRaw(certs []*x509.Certificate) []byte { return bytes.Join(rawOf(certs), nil) }
