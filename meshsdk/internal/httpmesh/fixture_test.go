package httpmesh_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/balance"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/httpmesh"
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
	c, err := l.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	return &memoryConn{Conn: c}, nil
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
	return memoryListener{l}
}

func (n *network) down(addr netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.listen, addr.String())
}

type memoryListener struct{ net.Listener }

func (l memoryListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &memoryConn{Conn: c}, nil
}

// memoryConn has the read deadlines of a socket. Their error is temporary: crypto/tls goes on after such
// a one, and net/http counts on that between two requests. And one that was moved on never passes,
// whereas that of bufconn may: its timer ends a later read when it fires as it is stopped.
type memoryConn struct {
	net.Conn
	mu       sync.Mutex
	deadline time.Time
}

func (c *memoryConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	return c.Conn.SetReadDeadline(t)
}

func (c *memoryConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *memoryConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			return n, err
		}
		if c.due() {
			return n, os.ErrDeadlineExceeded
		}
	}
}

// due reports whether the deadline has passed; if not it sets it anew.
func (c *memoryConn) due() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.deadline.IsZero() && !time.Now().Before(c.deadline) {
		return true
	}
	_ = c.Conn.SetReadDeadline(c.deadline) // bufconn has no error to give
	return false
}

// server is an instance of a service.
type server struct {
	name    string
	addr    netip.AddrPort
	peers   []spiffeid.ID // of its SVID; nil for plaintext
	handler http.HandlerFunc
	http    *http.Server

	calls atomic.Int64 // requests that reached the handler
	conns atomic.Int64 // connections accepted
}

// start serves s with an SVID, nil for plaintext, by HTTP/2 or HTTP/1.1.
func (s *server) start(t testing.TB, n *network, svid *identity.SVID, h2 bool) *server {
	t.Helper()
	if !s.addr.IsValid() {
		s.addr = n.address()
	}
	l := n.listenOn(s.addr)
	s.http = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.calls.Add(1)
			if s.handler != nil {
				s.handler(w, r)
				return
			}
			_, _ = io.WriteString(w, s.name)
		}),
		Protocols: new(http.Protocols),
		ErrorLog:  log.New(io.Discard, "", 0),
		ConnState: func(_ net.Conn, st http.ConnState) {
			if st == http.StateNew {
				s.conns.Add(1)
			}
		},
	}
	s.http.Protocols.SetHTTP1(!h2)
	alpn := "http/1.1"
	if h2 {
		s.http.Protocols.SetHTTP2(true)
		s.http.Protocols.SetUnencryptedHTTP2(true)
		alpn = "h2"
	}
	if svid != nil {
		s.peers = []spiffeid.ID{svid.ID}
		l = tls.NewListener(l, identity.ServerTLS(identity.Static(svid), identity.ServerOptions{RequireClient: true, ALPN: []string{alpn}}))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.http.Serve(l)
	}()
	t.Cleanup(func() {
		_ = s.http.Close()
		<-done
	})
	return s
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
		Name: name, Host: name, Set: balance.New(balance.RoundRobin, eps), All: eps,
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
	client *httpmesh.Transport
	http   *http.Client
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

func newMesh(t testing.TB, n *network, svid *identity.SVID, change ...func(*httpmesh.Config)) *mesh {
	t.Helper()
	m := &mesh{t: t, rec: new(records)}
	m.engine = call.New(call.Config{Observer: m.rec})
	t.Cleanup(m.engine.Close)
	cfg := httpmesh.Config{
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
	m.client = httpmesh.New(cfg)
	t.Cleanup(m.client.Close)
	m.http = &http.Client{Transport: m.client}
	return m
}

func (m *mesh) publish(services ...*call.Service) { m.engine.Publish(snapshotOf(services...)) }

// reasonOf is the Reason in the chain of err.
func reasonOf(t testing.TB, err error) call.Reason {
	t.Helper()
	var e *call.Error
	if !errors.As(err, &e) {
		t.Fatalf("no *call.Error in %v (%T)", err, err)
	}
	return e.Reason
}

func wantReason(t testing.TB, err error, reason call.Reason) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %v", reason)
	}
	if got := reasonOf(t, err); got != reason {
		t.Fatalf("error %v: reason %v, want %v", err, got, reason)
	}
}

// get makes a GET and gives status and body.
func (m *mesh) get(url string) (int, string, error) {
	m.t.Helper()
	req, err := http.NewRequestWithContext(ctxFor(m.t), http.MethodGet, url, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	return m.do(req)
}

func (m *mesh) do(req *http.Request) (int, string, error) {
	m.t.Helper()
	resp, err := m.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// withRetry is a policy for the first cluster.
func withRetry(cluster string, p *resource.Retry) []resource.Route {
	return []resource.Route{{Name: "all", Clusters: []resource.WeightedCluster{{Name: cluster, Weight: 1}}, Retry: p}}
}

func ctxFor(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}
