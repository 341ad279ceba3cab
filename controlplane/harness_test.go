package controlplane

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

const permissive = `
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: orders}
spec:
  mtls: permissive
  ports: [{port: 8080, protocol: GRPC}]
  endpoints:
  - {address: 127.0.0.1, port: 9001}
`

// patience bounds every wait of these tests; none of them needs more than a moment of it.
const patience = 20 * time.Second

// logs collects what a control plane says.
type logs struct {
	mu    sync.Mutex
	b     bytes.Buffer
	wrote chan struct{} // closed by the next Write; nil when nobody waits
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wrote != nil {
		close(l.wrote)
		l.wrote = nil
	}
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// until waits for a text in the logs.
func (l *logs) until(t *testing.T, want string) {
	t.Helper()
	late := time.After(patience)
	for {
		l.mu.Lock()
		if strings.Contains(l.b.String(), want) {
			l.mu.Unlock()
			return
		}
		if l.wrote == nil {
			l.wrote = make(chan struct{})
		}
		wrote := l.wrote
		l.mu.Unlock()
		select {
		case <-wrote:
		case <-late:
			t.Fatalf("%q never came:\n%s", want, l)
		}
	}
}

// plane is a control plane on loopback addresses with a configuration and a data directory.
type plane struct {
	*ControlPlane
	t    *testing.T
	cfg  Config
	logs *logs
}

func launch(t *testing.T, change func(*Config)) *plane {
	t.Helper()
	p := &plane{t: t, logs: &logs{}}
	p.cfg = Config{
		ConfigDir: t.TempDir(), DataDir: t.TempDir(), RunDir: t.TempDir(),
		Plaintext: "127.0.0.1:0", MTLS: "127.0.0.1:0", Admin: "127.0.0.1:0", Version: "test",
		Log: slog.New(slog.NewTextHandler(p.logs, nil)),
	}
	if change != nil {
		change(&p.cfg)
	}
	p.start()
	return p
}

func (p *plane) start() {
	p.t.Helper()
	cp, err := New(p.cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := cp.Start(ctx); err != nil {
		p.t.Fatal(err)
	}
	p.ControlPlane = cp
	p.t.Cleanup(func() { p.stopOne(cp) })
}

func (p *plane) stopOne(cp *ControlPlane) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began := time.Now()
	if err := cp.Stop(ctx); err != nil {
		p.t.Errorf("Stop: %v", err)
	}
	if took := time.Since(began); took > 2*time.Second {
		p.t.Errorf("Stop took %v", took)
	}
	if err := cp.Err(); err != nil {
		p.t.Errorf("a part ended by itself: %v", err)
	}
	if p.t.Failed() {
		p.t.Log(p.logs)
	}
}

// write replaces a file of the configuration by renaming, as editors and people do.
func (p *plane) write(name, text string) {
	p.t.Helper()
	tmp := filepath.Join(p.t.TempDir(), "new")
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(p.cfg.ConfigDir, name)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *plane) ready() {
	p.t.Helper()
	select {
	case <-p.Ready():
	case <-time.After(patience):
		p.t.Fatalf("not ready:\n%s", p.logs)
	}
}

// until waits for a state of the running revision.
func (p *plane) until(what string, f func(*adminpb.Revision) bool) *adminpb.Revision {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := p.admin().WatchRevisions(ctx, connect.NewRequest(&adminpb.WatchRevisionsRequest{}))
	if err != nil {
		p.t.Fatal(err)
	}
	defer s.Close()
	for s.Receive() {
		if f(s.Msg()) {
			return s.Msg()
		}
	}
	p.t.Fatalf("%s never came: last %v, %v\n%s", what, s.Msg(), s.Err(), p.logs)
	return nil
}

func (p *plane) admin() adminconnect.AdminClient {
	tr := &http.Transport{}
	p.t.Cleanup(tr.CloseIdleConnections)
	return adminconnect.NewAdminClient(&http.Client{Transport: tr}, "http://"+p.Addresses()[AddressAdmin])
}

func (p *plane) dial(target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	p.t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (p *plane) plaintext() *grpc.ClientConn {
	return p.dial("passthrough:///"+p.Addresses()[AddressXDS], insecure.NewCredentials())
}

// mtls dials as a service of the mesh.
func (p *plane) mtls(service string) *grpc.ClientConn {
	p.t.Helper()
	src := identity.Static(issue(p.t, p.CA(), service))
	own := spiffeid.RequireFromString("spiffe://inlay.local/ns/inlay/svc/controlplane")
	return p.dial("passthrough:///"+p.Addresses()[AddressXDSMTLS],
		credentials.NewTLS(identity.ClientTLS(src, identity.Only(own), []string{"h2"}, nil)))
}

// issue makes an SVID as a node would.
func issue(t *testing.T, authority *ca.CA, service string) *identity.SVID {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := authority.Sign(context.Background(), ca.SignRequest{Namespace: "default", Service: service, CSR: csr})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(signed.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority.Root())
	return &identity.SVID{
		ID:          signed.ID,
		Certificate: tls.Certificate{Certificate: signed.Chain, PrivateKey: key, Leaf: leaf},
		Roots:       map[spiffeid.TrustDomain]*x509.CertPool{authority.TrustDomain(): roots},
	}
}

// xds is a delta client that accepts everything.
type xds struct {
	t *testing.T
	discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
}

func follow(t *testing.T, conn *grpc.ClientConn, typeURL, name string, features ...string) *xds {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "test", ClientFeatures: features}, TypeUrl: typeURL, ResourceNamesSubscribe: []string{name}})
	if err != nil {
		t.Fatal(err)
	}
	return &xds{t, s}
}

// next acknowledges and returns the next response.
func (x *xds) next() *discoveryv3.DeltaDiscoveryResponse {
	x.t.Helper()
	resp, err := x.Recv()
	if err != nil {
		x.t.Fatal(err)
	}
	if err := x.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}); err != nil {
		x.t.Fatal(err)
	}
	return resp
}

// addresses of the endpoints in the next response, or "gone".
func (x *xds) addresses() string {
	x.t.Helper()
	resp := x.next()
	if len(resp.GetResources()) != 1 {
		return "gone"
	}
	var a endpointv3.ClusterLoadAssignment
	if err := resp.GetResources()[0].GetResource().UnmarshalTo(&a); err != nil {
		x.t.Fatal(err)
	}
	var out []string
	for _, l := range a.GetEndpoints() {
		for _, e := range l.GetLbEndpoints() {
			if e.GetHealthStatus() == corev3.HealthStatus_DRAINING {
				continue
			}
			s := e.GetEndpoint().GetAddress().GetSocketAddress()
			out = append(out, net.JoinHostPort(s.GetAddress(), strconv.Itoa(int(s.GetPortValue()))))
		}
	}
	return strings.Join(out, " ")
}

// untilAddresses reads responses until the addresses are those wanted: steps on the way there may
// come as one or as many.
func (x *xds) untilAddresses(want string) {
	x.t.Helper()
	for got := x.addresses(); got != want; got = x.addresses() {
		x.t.Logf("on the way to %q: %q", want, got)
	}
}

const endpoints = xdsgen.EndpointsType

// enrol registers an instance and returns its stream.
func enrol(t *testing.T, conn *grpc.ClientConn, in *registrypb.Instance) registrypb.Registry_RegisterClient {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	s, err := registrypb.NewRegistryClient(conn).Register(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: in}}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetRegistered().GetLeaseSeconds() == 0 {
		t.Fatalf("answer = %v", resp)
	}
	return s
}

func sdkInstance(id, service, addr string) *registrypb.Instance {
	return &registrypb.Instance{
		InstanceId: id, Namespace: "default", Service: service, Tls: registrypb.Tls_TLS_MESH, SdkVersion: "test",
		Ports: []*registrypb.Port{{Port: 8080, Protocol: registrypb.Protocol_PROTOCOL_GRPC, Addresses: []string{addr}}},
	}
}
