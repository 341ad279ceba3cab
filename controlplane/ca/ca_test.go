package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/capb"
)

func newCA(t testing.TB, cfg ca.Config) *ca.CA {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	c, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csrOf(t testing.TB, template *x509.CertificateRequest, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func leafOf(t testing.TB, s *ca.Signed) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(s.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// The CSR lies about everything that it can: nothing of it is in the certificate.
func TestNamesAreNeverFromTheCSR(t *testing.T) {
	c := newCA(t, ca.Config{})
	key := newKey(t)
	admin, _ := url.Parse("spiffe://inlay.local/ns/inlay/svc/controlplane")
	csr := csrOf(t, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "root", Organization: []string{"evil"}},
		URIs:     []*url.URL{admin},
		DNSNames: []string{"bank.example"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, EmailAddresses: []string{"a@b.example"},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}}, // CA: true
	}, key)
	signed, err := c.Sign(t.Context(), ca.SignRequest{Namespace: "default", Service: "cart", CSR: csr})
	if err != nil {
		t.Fatal(err)
	}
	leaf := leafOf(t, signed)
	const want = "spiffe://inlay.local/ns/default/svc/cart"
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != want || signed.ID.String() != want {
		t.Errorf("URI names %v, ID %s; want %s alone", leaf.URIs, signed.ID, want)
	}
	if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.Subject.String() != "O=inlay" || leaf.IsCA {
		t.Errorf("names of the CSR: %v %v %v %q, authority %v", leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses, leaf.Subject, leaf.IsCA)
	}
	if _, err := identity.NewSVID(signed.Chain, key, map[spiffeid.TrustDomain][]*x509.Certificate{c.TrustDomain(): c.Bundle()}); err != nil {
		t.Errorf("the specification's rules: %v", err)
	}
}

func TestLeafAndRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCA(t, ca.Config{})
		signed, err := c.Sign(t.Context(), ca.SignRequest{Namespace: "default", Service: "cart", CSR: csrOf(t, &x509.CertificateRequest{}, newKey(t))})
		if err != nil {
			t.Fatal(err)
		}
		leaf, now := leafOf(t, signed), time.Now().UTC()
		if !leaf.NotBefore.Equal(now.Add(-30*time.Second)) || !leaf.NotAfter.Equal(now.Add(time.Hour)) {
			t.Errorf("valid %s to %s at %s, want -30s to +1h", leaf.NotBefore, leaf.NotAfter, now)
		}
		root := c.Root()
		if key, ok := root.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
			t.Errorf("root key %T, want ECDSA P-256", root.PublicKey)
		}
		if len(root.URIs) != 1 || root.URIs[0].String() != "spiffe://inlay.local" || !root.NotAfter.Equal(now.Add(10*365*24*time.Hour)) {
			t.Errorf("root of %v until %s", root.URIs, root.NotAfter)
		}
		if err := leaf.CheckSignatureFrom(root); err != nil {
			t.Error(err)
		}
	})
}

func TestSerialsAre128RandomBits(t *testing.T) {
	c := newCA(t, ca.Config{})
	csr := csrOf(t, &x509.CertificateRequest{}, newKey(t))
	seen, longest := map[string]bool{}, 0
	for range 64 {
		signed, err := c.Sign(t.Context(), ca.SignRequest{Namespace: "default", Service: "cart", CSR: csr})
		if err != nil {
			t.Fatal(err)
		}
		n := leafOf(t, signed).SerialNumber
		if n.Sign() <= 0 || n.BitLen() > 128 || seen[n.String()] {
			t.Errorf("serial %s of %d bits", n, n.BitLen())
		}
		seen[n.String()], longest = true, max(longest, n.BitLen())
	}
	if longest < 120 { // 64 draws below 2^120 happen once in 2^512
		t.Errorf("the longest of 64 serials has %d bits, want 128", longest)
	}
}

func TestSignRefuses(t *testing.T) {
	c := newCA(t, ca.Config{})
	good := csrOf(t, &x509.CertificateRequest{}, newKey(t))
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	forged := append([]byte(nil), good...)
	forged[len(forged)-1] ^= 1
	for name, tc := range map[string]struct {
		namespace, service string
		csr                []byte
		want               string
	}{
		"the mesh's own namespace": {"inlay", "controlplane", good, "the mesh's own"},
		"no service":               {"default", "", good, `service "": empty`},
		"a path in the name":       {"default", "a/../../inlay/svc/controlplane", good, `service "a/../../inlay/svc/controlplane"`},
		"capitals":                 {"Default", "cart", good, `namespace "Default"`},
		"a dot":                    {"default", "cart.shop", good, "'.' at character 5"},
		"a long name":              {"default", strings.Repeat("a", 64), good, "at most 63"},
		"no CSR":                   {"default", "cart", nil, "CSR for"},
		"broken bytes":             {"default", "cart", []byte{0x30, 1, 2}, "CSR for"},
		"a huge CSR":               {"default", "cart", make([]byte, 17<<10), "at most 16384"},
		"a forged signature":       {"default", "cart", forged, "not by its own key"},
		"another curve":            {"default", "cart", csrOf(t, &x509.CertificateRequest{}, p384), "want P-256"},
		"a short RSA key":          {"default", "cart", csrOf(t, &x509.CertificateRequest{}, small), "1024 bits: want 2048"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Sign(t.Context(), ca.SignRequest{Namespace: tc.namespace, Service: tc.service, CSR: tc.csr})
			if !errors.Is(err, ca.ErrRequest) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want ErrRequest that says %q", err, tc.want)
			}
		})
	}
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	strong, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{ed, strong} {
		if _, err := c.Sign(t.Context(), ca.SignRequest{Namespace: "default", Service: "cart", CSR: csrOf(t, &x509.CertificateRequest{}, key)}); err != nil {
			t.Errorf("%T: %v", key, err)
		}
	}
}

// The control plane's own SVID is there from the start, is rotated at half of its life, and serves
// mTLS with an SVID that was signed for a workload.
func TestOwnIdentityRotates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCA(t, ca.Config{SVIDTTL: 10 * time.Minute})
		first, err := c.Source().Current()
		if err != nil {
			t.Fatal(err)
		}
		if first.ID.String() != "spiffe://inlay.local/ns/inlay/svc/controlplane" {
			t.Errorf("own ID %s", first.ID)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Run(ctx) })
		began, updated := time.Now(), c.Source().Updated()
		<-updated
		if after := time.Since(began); after != 5*time.Minute {
			t.Errorf("rotated after %s, want half of 10m", after)
		}
		second, err := c.Source().Current()
		if err != nil || second.Certificate.Leaf.Equal(first.Certificate.Leaf) {
			t.Errorf("after rotation: %v, %v", second, err)
		}
		cancel()
		wg.Wait()
	})
}

func TestOwnIdentityServesMTLS(t *testing.T) {
	c := newCA(t, ca.Config{})
	key := newKey(t)
	signed, err := c.Sign(t.Context(), ca.SignRequest{Namespace: "default", Service: "cart", CSR: csrOf(t, &x509.CertificateRequest{}, key)})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := identity.NewSVID(signed.Chain, key, map[spiffeid.TrustDomain][]*x509.Certificate{c.TrustDomain(): c.Bundle()})
	if err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(64 << 10)
	defer l.Close()
	server := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			server <- err
			return
		}
		defer conn.Close()
		s := tls.Server(conn, identity.ServerTLS(c.Source(), identity.ServerOptions{RequireClient: true}))
		err = s.Handshake()
		if id, _ := identity.PeerID(s.ConnectionState()); err == nil && id != signed.ID {
			err = errors.New("peer is " + id.String())
		}
		server <- err
	}()
	conn, err := l.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := tls.Client(conn, identity.ClientTLS(identity.Static(svid), identity.Only(identity.ControlPlaneID(c.TrustDomain())), nil, nil))
	if err := client.Handshake(); err != nil {
		t.Error(err)
	}
	if err := <-server; err != nil {
		t.Error(err)
	}
}

// memoryLog is a Log that can be made to fail.
type memoryLog struct {
	certs []ca.Cert
	fail  error
}

func (m *memoryLog) RecordCert(c ca.Cert) error {
	if m.fail == nil {
		m.certs = append(m.certs, c)
	}
	return m.fail
}

func (m *memoryLog) Certs() ([]ca.Cert, error) { return m.certs, nil }

func TestIssuedSurvivesARestartAndForgetsTheExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, dir := &memoryLog{}, t.TempDir()
		c := newCA(t, ca.Config{Dir: dir, Store: store})
		sign := func(c *ca.CA, service string) {
			t.Helper()
			if _, err := c.Sign(t.Context(), ca.SignRequest{Namespace: "default", Service: service, CSR: csrOf(t, &x509.CertificateRequest{}, newKey(t))}); err != nil {
				t.Fatal(err)
			}
		}
		sign(c, "orders")
		sign(c, "cart")
		c = newCA(t, ca.Config{Dir: dir, Store: store})
		var names []string
		for _, cert := range c.Issued() {
			names = append(names, strings.TrimPrefix(cert.SPIFFEID, "spiffe://inlay.local"))
		}
		want := " /ns/default/svc/cart /ns/default/svc/orders /ns/inlay/svc/controlplane /ns/inlay/svc/controlplane"
		if got := strings.Join(names, " "); got != want {
			t.Errorf("issued %q, want %q", got, want)
		}
		if !c.Issued()[0].Authority {
			t.Error("the root is not first")
		}
		time.Sleep(2 * time.Hour) // of the bubble: no time passes
		if got := c.Issued(); len(got) != 1 {
			t.Errorf("after two hours: %v, want the root alone", got)
		}
		// A full disk ends no identity.
		store.fail = errors.New("no space left on device")
		sign(c, "cart")
		if got := c.Issued(); len(got) != 2 {
			t.Errorf("with a full disk: %v, want the new one too", got)
		}
	})
}

// fakeCreds lets a test be any caller.
type fakeCreds struct {
	credentials.TransportCredentials
	caller attest.Caller
}

func (f fakeCreds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, attest.Info{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, Caller: f.caller}, nil
}

func dial(t *testing.T, c *ca.CA, caller attest.Caller) capb.CAClient {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	s := grpc.NewServer(grpc.Creds(fakeCreds{insecure.NewCredentials(), caller}))
	c.Register(s)
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { s.Stop(); wg.Wait() })
	cc, err := grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return capb.NewCAClient(cc)
}

func TestOnlyNodesMayAsk(t *testing.T) {
	own := uint32(os.Geteuid())
	cart := spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/cart")
	for name, tc := range map[string]struct {
		caller attest.Caller
		uids   []uint32
		want   codes.Code
	}{
		"the own user":                    {attest.Caller{Local: true, UID: own}, nil, codes.OK},
		"root":                            {attest.Caller{Local: true, UID: 0}, nil, codes.OK},
		"a listed user":                   {attest.Caller{Local: true, UID: 77}, []uint32{77}, codes.OK},
		"another user":                    {attest.Caller{Local: true, UID: own + 1}, nil, codes.PermissionDenied},
		"root, who is not listed":         {attest.Caller{Local: true, UID: 0}, []uint32{77}, codes.PermissionDenied},
		"a workload of the own user":      {attest.Caller{Local: true, UID: own, ID: cart}, nil, codes.PermissionDenied},
		"whom nobody knows at present":    {attest.Caller{Local: true, UID: own, Err: errors.New("the node is away")}, nil, codes.PermissionDenied},
		"a workload over the network":     {attest.Caller{ID: cart}, nil, codes.PermissionDenied},
		"somebody unknown over plaintext": {attest.Caller{}, nil, codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCA(t, ca.Config{NodeUIDs: tc.uids})
			client := dial(t, c, tc.caller)
			resp, err := client.Sign(t.Context(), &capb.SignRequest{Namespace: "default", Service: "cart", Csr: csrOf(t, &x509.CertificateRequest{}, newKey(t))})
			if status.Code(err) != tc.want {
				t.Errorf("Sign: %v, want %s", err, tc.want)
			}
			if err == nil && resp.GetSpiffeId() != cart.String() {
				t.Errorf("Sign: %s", resp.GetSpiffeId())
			}
			stream, err := client.WatchBundle(t.Context(), &capb.WatchBundleRequest{})
			if err != nil {
				t.Fatal(err)
			}
			b, err := stream.Recv()
			if status.Code(err) != tc.want {
				t.Errorf("WatchBundle: %v, want %s", err, tc.want)
			}
			if err == nil && (b.GetTrustDomain() != "inlay.local" || len(b.GetRoots()) != 1 || string(b.GetRoots()[0]) != string(c.Root().Raw)) {
				t.Errorf("bundle of %q with %d roots", b.GetTrustDomain(), len(b.GetRoots()))
			}
		})
	}
}

func TestBadRequestIsInvalidArgument(t *testing.T) {
	client := dial(t, newCA(t, ca.Config{}), attest.Caller{Local: true})
	_, err := client.Sign(t.Context(), &capb.SignRequest{Namespace: "inlay", Service: "controlplane", Csr: csrOf(t, &x509.CertificateRequest{}, newKey(t))})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("error %v, want InvalidArgument", err)
	}
}

func TestRestartKeepsTheRoot(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "ca")
	first := newCA(t, ca.Config{Dir: dir})
	if second := newCA(t, ca.Config{Dir: dir}); !second.Root().Equal(first.Root()) {
		t.Error("the second start made another root")
	}
	info, err := os.Stat(filepath.Join(dir, "ca.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("ca.pem: %v, %v; want 0600", info.Mode(), err)
	}
}

func TestStartsAtOnceAgreeOnOneRoot(t *testing.T) {
	dir := t.TempDir()
	roots := make([]*x509.Certificate, 8)
	var wg sync.WaitGroup
	for i := range roots {
		wg.Go(func() {
			c, err := ca.New(ca.Config{Dir: dir})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = c.Root()
		})
	}
	wg.Wait()
	for _, r := range roots {
		if r == nil || !r.Equal(roots[0]) {
			t.Fatal("two roots in one directory")
		}
	}
}

func TestNewRefuses(t *testing.T) {
	write := func(change func(path, content string)) string {
		dir := t.TempDir()
		newCA(t, ca.Config{Dir: dir})
		path := filepath.Join(dir, "ca.pem")
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		change(path, string(raw))
		return dir
	}
	rewrite := func(edit func(string) string) string {
		return write(func(path, content string) {
			if err := os.WriteFile(path, []byte(edit(content)), 0o600); err != nil {
				t.Fatal(err)
			}
		})
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cfg  ca.Config
		want string
	}{
		"no directory":           {ca.Config{}, "Dir is empty"},
		"a file as directory":    {ca.Config{Dir: file}, "want a directory that can be written"},
		"a bad trust domain":     {ca.Config{Dir: t.TempDir(), TrustDomain: "a b"}, `trust domain "a b"`},
		"a short life":           {ca.Config{Dir: t.TempDir(), SVIDTTL: time.Millisecond}, "at least 1s"},
		"another trust domain":   {ca.Config{Dir: write(func(string, string) {}), TrustDomain: "other.test"}, "want spiffe://other.test"},
		"a key others can read":  {ca.Config{Dir: write(func(p, _ string) { _ = os.Chmod(p, 0o640) })}, "run: chmod 600 "},
		"a newer version":        {ca.Config{Dir: rewrite(func(s string) string { return strings.Replace(s, "inlay-ca 1", "inlay-ca 2", 1) })}, "run a newer inlay"},
		"no version":             {ca.Config{Dir: rewrite(func(s string) string { return strings.Replace(s, "inlay-ca 1", "inlay-ca x", 1) })}, "no number from 1 on"},
		"an empty file":          {ca.Config{Dir: rewrite(func(string) string { return "" })}, "not written by inlay"},
		"a file cut short":       {ca.Config{Dir: rewrite(func(s string) string { return s[:len(s)-40] })}, "no PEM private key"},
		"a key of another root":  {ca.Config{Dir: rewrite(func(s string) string { return s[:strings.Index(s, "-----BEGIN PRIVATE")] + otherKey(t) })}, "does not belong to the certificate"},
		"a directory in its way": {ca.Config{Dir: write(func(p, _ string) { _ = os.Remove(p); _ = os.Mkdir(p, 0o700) })}, "want a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ca.New(tc.cfg)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one that says %q", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "BEGIN") {
				t.Errorf("the error holds the file: %v", err)
			}
		})
	}
}

// otherKey is the key part of a fresh authority's file.
func otherKey(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	newCA(t, ca.Config{Dir: dir})
	raw, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)[strings.Index(string(raw), "-----BEGIN PRIVATE"):]
}

func TestExpiredRootIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		newCA(t, ca.Config{Dir: dir})
		time.Sleep(10*365*24*time.Hour + time.Second) // of the bubble: no time passes
		if _, err := ca.New(ca.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "the root expired") {
			t.Errorf("error %v, want that the root expired", err)
		}
	})
}
