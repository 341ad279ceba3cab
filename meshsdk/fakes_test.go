package meshsdk_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// testCA issues SVIDs of one trust domain.
type testCA struct {
	t    testing.TB
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t testing.TB, td string) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: td}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{t, spiffeid.RequireTrustDomainFromString(td), cert, key}
}

func (ca *testCA) svid(namespace, service string) *identity.SVID {
	ca.t.Helper()
	id := spiffeid.RequireFromSegments(ca.td, "ns", namespace, "svc", service)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		ca.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{id.URL()}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	svid, err := identity.NewSVID([][]byte{der}, key, map[spiffeid.TrustDomain][]*x509.Certificate{ca.td: {ca.cert}})
	if err != nil {
		ca.t.Fatal(err)
	}
	return svid
}

// The first signal.Notify of a process starts a goroutine that never ends; Run must not be the one to
// start it inside a bubble of synctest.
func init() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGCONT)
	signal.Stop(c)
}

// memnet is a network in memory: addresses lead to listeners.
type memnet struct {
	mu        sync.Mutex
	listeners map[string]*bufconn.Listener
	next      uint16
}

func newMemnet() *memnet { return &memnet{listeners: map[string]*bufconn.Listener{}, next: 30000} }

func (n *memnet) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("connection refused")}
	}
	return l.DialContext(ctx)
}

func (n *memnet) listen(_ context.Context, network, addr string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if host == "" {
		host = "10.0.0.1"
	}
	if port == "0" {
		n.next++
		port = strconv.Itoa(int(n.next))
	}
	ap, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil {
		return nil, err
	}
	if n.listeners[ap.String()] != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Err: errors.New("address already in use")}
	}
	l := bufconn.Listen(64 << 10)
	n.listeners[ap.String()] = l
	return &memListener{Listener: l, addr: net.TCPAddrFromAddrPort(ap), net: n}, nil
}

// listenAt listens under any name, such as the path of a socket.
func (n *memnet) listenAt(name string) net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := bufconn.Listen(64 << 10)
	n.listeners[name] = l
	return l
}

type memListener struct {
	*bufconn.Listener
	addr net.Addr
	net  *memnet
	once sync.Once
}

func (l *memListener) Addr() net.Addr { return l.addr }

// Accept gives the error that a closed listener of package net has.
func (l *memListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
	}
	return c, nil
}

func (l *memListener) Close() error {
	l.once.Do(func() {
		l.net.mu.Lock()
		delete(l.net.listeners, l.addr.String())
		l.net.mu.Unlock()
		l.Listener.Close()
	})
	return nil
}

// fakePlane is a control plane: delta ADS, registry and report, real servers on a memnet.
type fakePlane struct {
	t    testing.TB
	net  *memnet
	ca   *testCA
	addr string
	// creds of the server; nil is plaintext. Set between stop and start.
	creds credentials.TransportCredentials

	mu         sync.Mutex
	srv        *grpc.Server
	serving    sync.WaitGroup
	resources  map[string]map[string]*xdspb.Resource // by type, name
	version    int
	streams    map[*adsStream]struct{}
	instances  map[string]*registrypb.Instance
	permissive map[string]bool
	lease      uint32
	events     []string // what the registry saw, in order
	reports    []*reportpb.ReportRequest
	changed    chan struct{}
	queries    []chan *reportpb.ReportResponse
	namespaces []string
	nodes      []*xdspb.Node
	holdDrain  bool // drain is never answered
}

func newPlane(t testing.TB) *fakePlane {
	p := &fakePlane{
		t: t, net: newMemnet(), ca: newCA(t, "inlay.local"), addr: "10.1.0.1:15010",
		resources: map[string]map[string]*xdspb.Resource{}, streams: map[*adsStream]struct{}{},
		instances: map[string]*registrypb.Instance{}, permissive: map[string]bool{}, lease: 30, changed: make(chan struct{}),
		namespaces: []string{"default"},
	}
	p.start()
	t.Cleanup(p.stop)
	return p
}

func (p *fakePlane) start() {
	lis, err := p.net.listen(context.Background(), "tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	var opts []grpc.ServerOption
	if p.creds != nil {
		opts = append(opts, grpc.Creds(p.creds))
	}
	srv := grpc.NewServer(opts...)
	srv.RegisterService(&grpc.ServiceDesc{
		ServiceName: "envoy.service.discovery.v3.AggregatedDiscoveryService",
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName: "DeltaAggregatedResources", ServerStreams: true, ClientStreams: true,
			Handler: func(_ any, s grpc.ServerStream) error { return p.serveADS(s) },
		}},
	}, p)
	registrypb.RegisterRegistryServer(srv, &fakeRegistry{p: p})
	reportpb.RegisterReportServer(srv, &fakeReport{p: p})
	p.mu.Lock()
	p.srv = srv
	p.mu.Unlock()
	p.serving.Go(func() { srv.Serve(lis) })
}

// stop kills the control plane; start brings it back.
func (p *fakePlane) stop() {
	p.mu.Lock()
	srv := p.srv
	p.mu.Unlock()
	srv.Stop()
	p.serving.Wait()
}

func (p *fakePlane) bootstrap() []byte {
	return fmt.Appendf(nil, `{"xds_servers":[{"server_uri":%q,"channel_creds":[{"type":"insecure"}]}]}`, p.addr)
}

// open opens a Mesh of a service in this plane.
func (p *fakePlane) open(namespace, service string, opts ...meshsdk.Option) *meshsdk.Mesh {
	p.t.Helper()
	m, err := p.tryOpen(namespace, service, opts...)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { m.Close() })
	return m
}

func (p *fakePlane) tryOpen(namespace, service string, opts ...meshsdk.Option) (*meshsdk.Mesh, error) {
	all := []meshsdk.Option{
		meshsdk.WithEnvironment(func(string) string { return "" }),
		meshsdk.WithBootstrap(p.bootstrap()),
		meshsdk.WithIdentity(identity.Static(p.ca.svid(namespace, service))),
		meshsdk.WithDialer(p.net.dial),
		meshsdk.WithListener(p.net.listen),
		meshsdk.WithListen("10.0.0.1:0"),
		meshsdk.WithLogger(slog.New(slog.DiscardHandler)),
	}
	return meshsdk.Open(p.t.Context(), append(all, opts...)...)
}

func (p *fakePlane) touch() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// wait blocks until ok, called with the lock held, says so.
func (p *fakePlane) wait(what string, ok func() bool) {
	p.t.Helper()
	deadline := time.After(90 * time.Second)
	for {
		p.mu.Lock()
		done, changed := ok(), p.changed
		p.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			p.t.Fatalf("%s: did not happen within 90 s", what)
		}
	}
}

// set publishes resources; nil values of a name remove it.
func (p *fakePlane) set(values ...any) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.setLocked(values...)
}

func (p *fakePlane) setLocked(values ...any) {
	p.version++
	byType := map[string][]string{}
	for _, v := range values {
		url, b, err := resource.Encode(v)
		if err != nil {
			p.t.Error(err)
			return
		}
		name := ""
		switch v := v.(type) {
		case *resource.Listener:
			name = v.Name
		case *resource.RouteConfiguration:
			name = v.Name
		case *resource.Cluster:
			name = v.Name
		case *resource.Endpoints:
			name = v.Cluster
		}
		if p.resources[url] == nil {
			p.resources[url] = map[string]*xdspb.Resource{}
		}
		p.resources[url][name] = &xdspb.Resource{Name: name, Version: strconv.Itoa(p.version), Resource: &anypb.Any{TypeUrl: url, Value: b}}
		byType[url] = append(byType[url], name)
	}
	for _, url := range slices.Sorted(maps.Keys(byType)) {
		for s := range p.streams {
			s.push(url, byType[url])
		}
	}
	p.touch()
}

// service declares a service with one port: listener, route configuration, cluster, endpoints and
// inbound listener. Instances that register become its endpoints.
func (p *fakePlane) service(namespace, name string, port uint16, http2, permissive bool) {
	p.t.Helper()
	full := fmt.Sprintf("%s.%s:%d", name, namespace, port)
	id := spiffeid.RequireFromSegments(p.ca.td, "ns", namespace, "svc", name).String()
	tlsc := &resource.ClientTLS{Peers: []string{id}, ALPN: []string{"http/1.1"}}
	if http2 {
		tlsc.ALPN = []string{"h2"}
	}
	cluster := &resource.Cluster{
		Name: full, EndpointsName: full, LB: resource.RoundRobin, ConnectTimeout: 5 * time.Second, MaxRequests: 1024,
		HTTP2: http2, TLS: tlsc, SPIFFEID: id, RetryBudgetPercent: 20, RetryMinPerSecond: 3,
	}
	chains := chainsOf(permissive)
	p.mu.Lock()
	p.permissive[name+"."+namespace] = permissive
	p.mu.Unlock()
	p.set(
		&resource.Listener{Name: name, API: &resource.HTTP{RouteName: full}},
		&resource.Listener{Name: name + "." + namespace, API: &resource.HTTP{RouteName: full}},
		&resource.RouteConfiguration{Name: full, VirtualHosts: []resource.VirtualHost{{
			Name: full, Domains: []string{"*"},
			Routes: []resource.Route{{
				Name: "all", Match: resource.Match{Kind: resource.Prefix, Path: "/"}, Timeout: 10 * time.Second,
				Clusters: []resource.WeightedCluster{{Name: full, Weight: 1}},
				Origin:   resource.Origin{Object: "HTTPRoute/" + name, Rule: "0", Source: "mesh.yaml:7"},
			}},
		}}},
		cluster,
		&resource.Listener{Name: resource.InboundListener(namespace, name, port), Chains: chains},
	)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endpointsLocked(namespace, name, port)
}

func chainsOf(permissive bool) []resource.Chain {
	all := &resource.HTTP{Inline: &resource.RouteConfiguration{Name: "inbound", VirtualHosts: []resource.VirtualHost{{
		Name: "all", Domains: []string{"*"},
		Routes: []resource.Route{{Name: "all", Match: resource.Match{Kind: resource.Prefix, Path: "/"}, NonForwarding: true}},
	}}}}
	chains := []resource.Chain{{TransportProtocol: "tls", TLS: &resource.ServerTLS{RequireClientCertificate: true}, HTTP: all}}
	if permissive {
		chains = append(chains, resource.Chain{TransportProtocol: "raw_buffer", HTTP: all})
	}
	return chains
}

// mode changes how the service takes connections, at the servers.
func (p *fakePlane) mode(namespace, name string, port uint16, permissive bool) {
	chains := chainsOf(permissive)
	p.set(&resource.Listener{Name: resource.InboundListener(namespace, name, port), Chains: chains})
}

// endpointsLocked publishes the instances of a port.
func (p *fakePlane) endpointsLocked(namespace, name string, port uint16) {
	var eps []resource.Endpoint
	for _, id := range slices.Sorted(maps.Keys(p.instances)) {
		in := p.instances[id]
		if in.GetNamespace() != namespace || in.GetService() != name {
			continue
		}
		for _, b := range in.GetPorts() {
			if b.GetPort() != uint32(port) {
				continue
			}
			eps = append(eps, resource.Endpoint{
				Addresses: []netip.AddrPort{netip.MustParseAddrPort(b.GetAddresses()[0])}, Weight: 1, Health: resource.Healthy,
				InstanceID: id, Labels: in.GetLabels(),
			})
		}
	}
	out := &resource.Endpoints{Cluster: fmt.Sprintf("%s.%s:%d", name, namespace, port)}
	if len(eps) > 0 {
		out.Localities = []resource.Locality{{Region: "r", Weight: 1, Endpoints: eps}}
	}
	p.setLocked(out)
}

// adsStream is one client.
type adsStream struct {
	p      *fakePlane
	out    chan *xdspb.DeltaDiscoveryResponse
	subs   map[string]map[string]string // type -> name -> version sent; "" none
	nonce  int
	unsent map[string]bool // nonces without ACK
	dead   bool
}

func (p *fakePlane) serveADS(ss grpc.ServerStream) error {
	s := &adsStream{p: p, out: make(chan *xdspb.DeltaDiscoveryResponse, 1024), subs: map[string]map[string]string{}, unsent: map[string]bool{}}
	p.mu.Lock()
	p.streams[s] = struct{}{}
	p.touch()
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		s.dead = true
		delete(p.streams, s)
		p.touch()
		p.mu.Unlock()
	}()
	go func() {
		for {
			select {
			case m := <-s.out:
				if ss.SendMsg(m) != nil {
					return
				}
			case <-ss.Context().Done():
				return
			}
		}
	}()
	for {
		req := new(xdspb.DeltaDiscoveryRequest)
		if err := ss.RecvMsg(req); err != nil {
			return err
		}
		p.mu.Lock()
		s.request(req)
		p.touch()
		p.mu.Unlock()
	}
}

func (s *adsStream) request(req *xdspb.DeltaDiscoveryRequest) {
	if req.GetNode() != nil {
		s.p.nodes = append(s.p.nodes, req.GetNode())
	}
	delete(s.unsent, req.GetResponseNonce())
	url := req.GetTypeUrl()
	if s.subs[url] == nil {
		s.subs[url] = map[string]string{}
	}
	for _, n := range req.GetResourceNamesUnsubscribe() {
		delete(s.subs[url], n)
	}
	for _, n := range req.GetResourceNamesSubscribe() {
		s.subs[url][n] = req.GetInitialResourceVersions()[n]
	}
	if names := req.GetResourceNamesSubscribe(); len(names) > 0 {
		s.push(url, names)
	}
}

// push sends those of names that the client asked for and has in another version.
func (s *adsStream) push(url string, names []string) {
	resp := &xdspb.DeltaDiscoveryResponse{TypeUrl: url}
	for _, n := range names {
		have, subscribed := s.subs[url][n]
		if !subscribed {
			continue
		}
		r := s.p.resources[url][n]
		switch {
		case r == nil:
			resp.RemovedResources = append(resp.RemovedResources, n)
		case r.GetVersion() != have:
			s.subs[url][n] = r.GetVersion()
			resp.Resources = append(resp.Resources, r)
		}
	}
	if len(resp.Resources)+len(resp.RemovedResources) == 0 {
		return
	}
	s.nonce++
	resp.Nonce = strconv.Itoa(s.nonce)
	s.unsent[resp.Nonce] = true
	s.out <- resp
}

type fakeRegistry struct {
	registrypb.UnimplementedRegistryServer
	p *fakePlane
}

func (r *fakeRegistry) Register(stream registrypb.Registry_RegisterServer) error {
	p := r.p
	var in *registrypb.Instance
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil // the lease goes on
		}
		p.mu.Lock()
		switch kind := req.GetKind().(type) {
		case *registrypb.RegisterRequest_Instance:
			in = kind.Instance
			p.instances[in.GetInstanceId()] = in
			p.events = append(p.events, "instance "+in.GetService())
			for _, b := range in.GetPorts() {
				p.endpointsLocked(in.GetNamespace(), in.GetService(), uint16(b.GetPort()))
			}
		case *registrypb.RegisterRequest_Renew:
			p.events = append(p.events, "renew "+in.GetService())
		case *registrypb.RegisterRequest_Drain:
			p.events = append(p.events, "drain "+in.GetService())
			delete(p.instances, in.GetInstanceId())
			for _, b := range in.GetPorts() {
				p.endpointsLocked(in.GetNamespace(), in.GetService(), uint16(b.GetPort()))
			}
		}
		hold, lease := p.holdDrain, p.lease
		p.touch()
		p.mu.Unlock()
		if _, ok := req.GetKind().(*registrypb.RegisterRequest_Drain); ok {
			if hold {
				<-stream.Context().Done()
				return nil
			}
			p.acked(stream.Context())
			p.mu.Lock()
			p.events = append(p.events, "drained "+in.GetService())
			p.touch()
			p.mu.Unlock()
			if err := stream.Send(&registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Drained{Drained: &registrypb.Drained{All: true}}}); err != nil {
				return err
			}
			continue
		}
		if err := stream.Send(&registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Registered{Registered: &registrypb.Registered{LeaseSeconds: lease}}}); err != nil {
			return err
		}
	}
}

// acked waits until every client has acknowledged all it was sent.
func (p *fakePlane) acked(ctx context.Context) {
	for {
		p.mu.Lock()
		all, changed := true, p.changed
		for s := range p.streams {
			all = all && len(s.unsent) == 0
		}
		p.mu.Unlock()
		if all {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

type fakeReport struct {
	reportpb.UnimplementedReportServer
	p *fakePlane
}

func (r *fakeReport) Report(stream reportpb.Report_ReportServer) error {
	p := r.p
	out := make(chan *reportpb.ReportResponse, 16)
	p.mu.Lock()
	p.queries = append(p.queries, out)
	out <- &reportpb.ReportResponse{Kind: &reportpb.ReportResponse_Announcement{Announcement: &reportpb.Announcement{Namespaces: p.namespaces}}}
	p.touch()
	p.mu.Unlock()
	go func() {
		for {
			select {
			case m := <-out:
				if stream.Send(m) != nil {
					return
				}
			case <-stream.Context().Done():
				return
			}
		}
	}()
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil
		}
		p.mu.Lock()
		p.reports = append(p.reports, req)
		p.touch()
		p.mu.Unlock()
	}
}

// registered waits for so many instances.
func (p *fakePlane) registered(n int) {
	p.t.Helper()
	p.wait(fmt.Sprintf("%d registered instances", n), func() bool { return len(p.instances) == n })
}
