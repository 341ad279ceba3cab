package identity_test

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/x509"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/identity/workloadpb"
)

func TestNewSVIDHoldsTheRules(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	const path = "/ns/default/svc/cart"
	for name, tc := range map[string]struct {
		path   string
		change func(*x509.Certificate)
		want   string // in the error; empty for none
	}{
		"a good leaf is accepted": {path, nil, ""},
		"two URI names are refused": {path, func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "inlay.local", Path: "/ns/default/svc/pay"})
		}, "exactly one SPIFFE ID"},
		"no URI name is refused":              {path, func(c *x509.Certificate) { c.URIs = nil }, "exactly one SPIFFE ID"},
		"a URI of another scheme is refused":  {path, func(c *x509.Certificate) { c.URIs[0].Scheme = "https" }, "exactly one SPIFFE ID"},
		"a SPIFFE ID without path is refused": {"", nil, "no path"},
		"an authority is refused": {path, func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign
		}, "it is an authority"},
		"a leaf that may sign is refused":               {path, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, "allows signing"},
		"a leaf without digitalSignature is refused":    {path, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }, "without digitalSignature"},
		"a leaf without the key usage field is refused": {path, func(c *x509.Certificate) { c.KeyUsage = 0 }, "without digitalSignature"},
	} {
		t.Run(name, func(t *testing.T) {
			key := newKey(t)
			s, err := identity.NewSVID([][]byte{a.leaf(tc.path, key, time.Hour, tc.change).Raw}, key, a.bundle())
			check(t, err, tc.want)
			if err == nil && s.ID.String() != "spiffe://inlay.local"+path {
				t.Errorf("ID = %s", s.ID)
			}
		})
	}
}

func TestNewSVIDWantsTheLeafsKey(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	key := newKey(t)
	chain := [][]byte{a.leaf("/ns/default/svc/cart", key, time.Hour, nil).Raw}
	_, err := identity.NewSVID(chain, newKey(t), a.bundle())
	check(t, err, "does not belong")
	_, err = identity.NewSVID(chain, key, map[spiffeid.TrustDomain][]*x509.Certificate{})
	check(t, err, "bundle of inlay.local is missing")
	_, err = identity.NewSVID(nil, key, a.bundle())
	check(t, err, "chain is empty")
	leaf, _ := x509.ParseCertificate(chain[0])
	_, err = identity.NewSVID(chain, key, map[spiffeid.TrustDomain][]*x509.Certificate{a.td: {leaf}})
	check(t, err, "is not an authority")
}

func TestEncodeAndDecodeAreReverse(t *testing.T) {
	a, b := newAuthority(t, "inlay.local"), newAuthority(t, "other.test")
	for name, key := range map[string]crypto.Signer{"ecdsa": newKey(t), "ed25519": newEdKey(t), "rsa": newRSAKey(t)} {
		t.Run(name, func(t *testing.T) {
			authorities := a.bundle()
			authorities[b.td] = []*x509.Certificate{b.cert}
			want, err := identity.NewSVID([][]byte{a.leaf("/ns/default/svc/cart", key, time.Hour, nil).Raw}, key, authorities)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := identity.Encode(want)
			if err != nil {
				t.Fatal(err)
			}
			got, err := identity.Decode(resp)
			if err != nil {
				t.Fatal(err)
			}
			same(t, got, want)
			if resp.FederatedBundles["spiffe://other.test"] == nil || len(resp.FederatedBundles) != 1 {
				t.Errorf("federated bundles %v, want spiffe://other.test alone", resp.FederatedBundles)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	a := newAuthority(t, "inlay.local")
	ecdhKey, _ := ecdh.P256().GenerateKey(rand.Reader)
	ecdhDER, err := x509.MarshalPKCS8PrivateKey(ecdhKey)
	if err != nil {
		t.Fatal(err)
	}
	x25519, _ := ecdh.X25519().GenerateKey(rand.Reader)
	x25519DER, err := x509.MarshalPKCS8PrivateKey(x25519)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*workloadpb.X509SVIDResponse)
		want   string
	}{
		"no SVID":                   {func(r *workloadpb.X509SVIDResponse) { r.Svids = nil }, "holds no SVID"},
		"a nil SVID":                {func(r *workloadpb.X509SVIDResponse) { r.Svids[0] = nil }, "holds no SVID"},
		"a broken SPIFFE ID":        {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].SpiffeId = "inlay" }, "spiffe_id"},
		"an ID other than the leaf": {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].SpiffeId += "x" }, "want the same"},
		"a broken chain":            {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].X509Svid = []byte{1, 2} }, "x509_svid of"},
		"an empty chain":            {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].X509Svid = nil }, "chain is empty"},
		"a broken key":              {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].X509SvidKey = []byte("secret") }, "not an unencrypted PKCS#8 key"},
		"a key of another leaf":     {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].X509SvidKey = ecdhDER }, "does not belong"},
		"a key that cannot sign":    {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].X509SvidKey = x25519DER }, "want ECDSA, Ed25519 or RSA"},
		"an empty bundle":           {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].Bundle = nil }, "want at least one root"},
		"a bundle of leaves":        {func(r *workloadpb.X509SVIDResponse) { r.Svids[0].Bundle = r.Svids[0].X509Svid }, "not an authority"},
		"a broken federated name":   {func(r *workloadpb.X509SVIDResponse) { r.FederatedBundles = map[string][]byte{"A b": nil} }, "trust domain"},
		"an empty federated bundle": {func(r *workloadpb.X509SVIDResponse) { r.FederatedBundles = map[string][]byte{"b.test": nil} }, "b.test"},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := identity.Encode(a.svid("cart", time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			tc.change(resp)
			_, err = identity.Decode(resp)
			check(t, err, tc.want)
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error holds the key's bytes: %v", err)
			}
		})
	}
}

func TestDecodeTakesTheOwnBundleFromTheSVIDAlone(t *testing.T) {
	a, evil := newAuthority(t, "inlay.local"), newAuthority(t, "inlay.local")
	resp, err := identity.Encode(a.svid("cart", time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	resp.FederatedBundles = map[string][]byte{"spiffe://inlay.local": evil.cert.Raw}
	s, err := identity.Decode(resp)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Authorities[a.td]; len(got) != 1 || !got[0].Equal(a.cert) {
		t.Errorf("the federated entry replaced the own bundle")
	}
}

// FuzzDecode: what is accepted survives encoding and decoding unchanged; nothing panics.
func FuzzDecode(f *testing.F) {
	a, b := newAuthority(f, "inlay.local"), newAuthority(f, "other.test")
	for _, key := range []crypto.Signer{newKey(f), newEdKey(f)} {
		authorities := a.bundle()
		authorities[b.td] = []*x509.Certificate{b.cert}
		s, err := identity.NewSVID([][]byte{a.leaf("/ns/default/svc/cart", key, time.Hour, nil).Raw}, key, authorities)
		if err != nil {
			f.Fatal(err)
		}
		resp, err := identity.Encode(s)
		if err != nil {
			f.Fatal(err)
		}
		raw, err := proto.Marshal(resp)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		resp := &workloadpb.X509SVIDResponse{}
		if proto.Unmarshal(raw, resp) != nil {
			return
		}
		s, err := identity.Decode(resp)
		if err != nil {
			return
		}
		again, err := identity.Encode(s)
		if err != nil {
			t.Fatalf("accepted, but not encoded: %v", err)
		}
		got, err := identity.Decode(again)
		if err != nil {
			t.Fatalf("encoded, but not accepted again: %v", err)
		}
		same(t, got, s)
	})
}

func same(t *testing.T, got, want *identity.SVID) {
	t.Helper()
	if got.ID != want.ID {
		t.Errorf("ID %s, want %s", got.ID, want.ID)
	}
	if !reflect.DeepEqual(got.Certificate.Certificate, want.Certificate.Certificate) {
		t.Error("the chain changed")
	}
	k, _ := x509.MarshalPKCS8PrivateKey(got.Certificate.PrivateKey)
	l, _ := x509.MarshalPKCS8PrivateKey(want.Certificate.PrivateKey)
	if k == nil || !bytes.Equal(k, l) {
		t.Error("the key changed")
	}
	if len(got.Authorities) != len(want.Authorities) || len(got.Roots) != len(want.Roots) {
		t.Errorf("%d bundles, want %d", len(got.Authorities), len(want.Authorities))
	}
	for td, certs := range want.Authorities {
		if len(got.Authorities[td]) != len(certs) || !got.Roots[td].Equal(want.Roots[td]) {
			t.Errorf("the bundle of %s changed", td)
			continue
		}
		for i := range certs {
			if !certs[i].Equal(got.Authorities[td][i]) {
				t.Errorf("the bundle of %s changed", td)
			}
		}
	}
}

// check wants an error that says so, or none for an empty text.
func check(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("error %v, want none", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("error %v, want one that says %q", err, want)
	}
}
