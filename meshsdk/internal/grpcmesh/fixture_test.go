package grpcmesh_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/balance"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/limit"
	"github.com/inlay-mesh/inlay/meshsdk/internal/retry"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// authority is a CA of one trust domain.
type authority struct {
	t    testing.TB
	td   spiffeid.TrustDomain
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("inlay.local")
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, td, key, cert}
}

func (a *authority) id(service string) spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/" + service)
}

func (a *authority) issue(service string) *identity.SVID {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	id := a.id(service)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(23 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{id.URL()},
	}, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return &identity.SVID{
		ID:          id,
		Certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf},
		Roots:       map[spiffeid.TrustDomain]*x509.CertPool{a.td: pool},
	}
}

// network is connections in memory, by address.
type network struct {
	mu     sync.Mutex
	listen map[string]*bufconn.Listener
	dialed map[string]int
	next   byte
}

func newNetwork() *network {
	return &network{listen: make(map[string]*bufconn.Listener), dialed: make(map[string]int)}
}

func (n *network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	n.dialed[addr]++
	l := n.listen[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr)), Err: syscall.ECONNREFUSED}
	}
	return l.DialContext(ctx)
}

// dials is how many connections were asked for.
func (n *network) dials(addr netip.AddrPort) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dialed[addr.String()]
}

func (n *network) address() netip.AddrPort {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.next++
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, n.next}), 9000)
}

func (n *network) listenOn(addr netip.AddrPort) net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := bufconn.Listen(1 << 16)
	n.listen[addr.String()] = l
	return l
}

func (n *network) down(addr netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.listen, addr.String())
}

// server is an instance of a service; the zero functions answer.
type server struct {
	testpb.UnimplementedTestServiceServer
	name  string
	addr  netip.AddrPort
	peers []spiffeid.ID // of its SVID; nil for plaintext
	grpc  *grpc.Server

	calls  atomic.Int64 // handlers that began
	unary  func(context.Context, *testpb.SimpleRequest) (*testpb.SimpleResponse, error)
	duplex func(testpb.TestService_FullDuplexCallServer) error
	output func(*testpb.StreamingOutputCallRequest, testpb.TestService_StreamingOutputCallServer) error
	input  func(testpb.TestService_StreamingInputCallServer) error
}

func (s *server) UnaryCall(ctx context.Context, r *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	s.calls.Add(1)
	if s.unary != nil {
		return s.unary(ctx, r)
	}
	return &testpb.SimpleResponse{Hostname: s.name}, nil
}

func (s *server) FullDuplexCall(st testpb.TestService_FullDuplexCallServer) error {
	s.calls.Add(1)
	if s.duplex != nil {
		return s.duplex(st)
	}
	return echo(st)
}

// echo answers each message with its payload.
func echo(st testpb.TestService_FullDuplexCallServer) error {
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := st.Send(&testpb.StreamingOutputCallResponse{Payload: m.GetPayload()}); err != nil {
			return err
		}
	}
}

func (s *server) StreamingOutputCall(r *testpb.StreamingOutputCallRequest, st testpb.TestService_StreamingOutputCallServer) error {
	s.calls.Add(1)
	return s.output(r, st)
}

func (s *server) StreamingInputCall(st testpb.TestService_StreamingInputCallServer) error {
	s.calls.Add(1)
	return s.input(st)
}

// start serves s with the SVID of a service; nil is plaintext.
func (s *server) start(t testing.TB, n *network, svid *identity.SVID) *server {
	t.Helper()
	if !s.addr.IsValid() {
		s.addr = n.address()
	}
	s.serve(t, n.listenOn(s.addr), svid)
	return s
}

func (s *server) serve(t testing.TB, l net.Listener, svid *identity.SVID) {
	var opts []grpc.ServerOption
	if svid != nil {
		s.peers = []spiffeid.ID{svid.ID}
		opts = append(opts, grpc.Creds(credentials.NewTLS(identity.ServerTLS(identity.Static(svid), identity.ServerOptions{RequireClient: true, ALPN: []string{"h2"}}))))
	}
	s.grpc = grpc.NewServer(opts...)
	testpb.RegisterTestServiceServer(s.grpc, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.grpc.Serve(l)
	}()
	t.Cleanup(func() {
		s.grpc.Stop()
		<-done
	})
}

func (s *server) endpoint(of ...spiffeid.ID) *endpoint.Endpoint {
	if of == nil {
		of = s.peers
	}
	return endpointAt(s.addr, of...)
}

// endpointAt is an endpoint that must prove to be one of peers; without any it is plaintext.
func endpointAt(addr netip.AddrPort, peers ...spiffeid.ID) *endpoint.Endpoint {
	ep := &endpoint.Endpoint{Addresses: []netip.AddrPort{addr}, LocalityWeight: 1, Weight: 1, State: new(endpoint.State)}
	if len(peers) > 0 {
		ep.TLS = &endpoint.TLS{Peers: peers, ALPN: []string{"h2"}}
	}
	ep.Key = endpoint.Key(addr, ep.TLS)
	return ep
}

func clusterOf(name string, eps ...*endpoint.Endpoint) *call.Cluster {
	return &call.Cluster{
		Name: name, Host: name, Set: balance.New(balance.RoundRobin, eps), All: eps, HTTP2: true,
		ConnectTimeout: 5 * time.Second, Limiter: limit.New(1024),
		Budget: retry.NewBudget(retry.BudgetConfig{Percent: 100, MinPerSecond: 1000}, time.Now()),
	}
}

// serviceOf is a service whose routes are as given; without any all goes to the first cluster.
func serviceOf(name string, routes []resource.Route, clusters ...*call.Cluster) *call.Service {
	if routes == nil {
		routes = []resource.Route{{Name: "all", Clusters: []resource.WeightedCluster{{Name: clusters[0].Name, Weight: 1}}}}
	}
	s := &call.Service{
		Name: name, Version: "1", Clusters: make(map[string]*call.Cluster),
		Routes: route.New(&resource.VirtualHost{Name: name, Domains: []string{"*"}, Routes: routes}),
	}
	for _, c := range clusters {
		s.Clusters[c.Name] = c
	}
	return s
}

func snapshotOf(services ...*call.Service) *call.Snapshot {
	s := &call.Snapshot{Services: make(map[string]*call.Service)}
	for _, svc := range services {
		s.Services[svc.Name] = svc
	}
	return s
}

// records keeps what an engine observes.
type records struct {
	mu  sync.Mutex
	all []call.Record
}

func (r *records) BeginClient(ctx context.Context, _ *call.Call) context.Context { return ctx }

func (r *records) EndClient(_ *call.Call, rec *call.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	kept := *rec
	r.all = append(r.all, kept)
}

func (r *records) last(t testing.TB) call.Record {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) == 0 {
		t.Fatal("no call was recorded")
	}
	return r.all[len(r.all)-1]
}

func (r *records) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// mesh is one client with its engine.
type mesh struct {
	t      testing.TB
	engine *call.Engine
	client *grpcmesh.Client
	rec    *records
	// identity is nil without SVID.
	identity identity.Source
}

func inDefault(_ context.Context, target string) (string, bool, error) {
	listener, ok := grpcmesh.Parse(target, nil, "default")
	return listener, ok, nil
}

// splitmix is a generator that is safe for concurrent use (Steele, Lea and Flood, 2014).
func splitmix(seed uint64) func() uint64 {
	var state atomic.Uint64
	state.Store(seed)
	return func() uint64 {
		z := state.Add(0x9e3779b97f4a7c15)
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		return z ^ z>>31
	}
}

func newMesh(t testing.TB, n *network, svid *identity.SVID, change ...func(*grpcmesh.Config)) *mesh {
	t.Helper()
	m := &mesh{t: t, rec: new(records)}
	m.engine = call.New(call.Config{Observer: m.rec})
	t.Cleanup(m.engine.Close)
	cfg := grpcmesh.Config{
		Engine: m.engine,
		Dial:   n.dial,
		InMesh: inDefault,
	}
	if svid != nil {
		m.identity = identity.Static(svid)
		cfg.Identity = m.identity
	}
	for _, f := range change {
		f(&cfg)
	}
	m.client = grpcmesh.New(cfg)
	return m
}

func (m *mesh) publish(services ...*call.Service) { m.engine.Publish(snapshotOf(services...)) }

func (m *mesh) conn(target string, opts ...grpc.DialOption) *grpc.ClientConn {
	m.t.Helper()
	cc, err := m.client.NewClient(target, opts...)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func (m *mesh) test(target string, opts ...grpc.DialOption) testpb.TestServiceClient {
	m.t.Helper()
	return testpb.NewTestServiceClient(m.conn(target, opts...))
}

// reasonOf is the Reason in the chain of err.
func reasonOf(t testing.TB, err error) call.Reason {
	t.Helper()
	var e *call.Error
	if !errors.As(err, &e) {
		t.Fatalf("no *call.Error in %v (%T)", err, err)
	}
	return e.Reason
}

func wantCode(t testing.TB, err error, code codes.Code, reason call.Reason) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %v", code)
	}
	if got := status.Code(err); got != code || reasonOf(t, err) != reason {
		t.Fatalf("error %v: code %v, reason %v, want %v, %v", err, got, reasonOf(t, err), code, reason)
	}
}

func ctxFor(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func header(md metadata.MD, key string) string {
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

func payload(i int) *testpb.StreamingOutputCallRequest {
	return &testpb.StreamingOutputCallRequest{Payload: &testpb.Payload{Body: []byte(fmt.Sprint(i))}}
}
