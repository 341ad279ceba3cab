package xds_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

type name struct{ typ, name string }

type held struct {
	version string
	bytes   []byte
}

// controlPlane is an ADS server of this process. Its contents survive stop and start.
type controlPlane struct {
	t testing.TB

	mu       sync.Mutex
	holds    map[name]held
	changed  chan struct{} // closed and replaced on each change
	version  int
	requests []proto.Message
	noDelta  bool
	mute     bool // reads requests and answers none
	most     int  // resources in one delta response; 0 means any number
	listener *bufconn.Listener
	server   *grpc.Server
}

func newControlPlane(t testing.TB) *controlPlane {
	return &controlPlane{t: t, holds: map[name]held{}, changed: make(chan struct{})}
}

func (c *controlPlane) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.listener = bufconn.Listen(1 << 20)
	c.server = grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		switch method, _ := grpc.MethodFromServerStream(s); method {
		case "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources":
			c.mu.Lock()
			off := c.noDelta
			c.mu.Unlock()
			if off {
				return status.Error(codes.Unimplemented, "no delta here")
			}
			return serve(c, s, func() *xdspb.DeltaDiscoveryRequest { return &xdspb.DeltaDiscoveryRequest{} }, newDelta(c))
		case "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources":
			return serve(c, s, func() *xdspb.DiscoveryRequest { return &xdspb.DiscoveryRequest{} }, newSotW(c))
		default:
			return status.Error(codes.Unimplemented, method)
		}
	}))
	server, listener := c.server, c.listener
	go func() {
		if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			c.t.Errorf("control plane: %v", err)
		}
	}()
}

// stop is a kill: streams break at once.
func (c *controlPlane) stop() {
	c.mu.Lock()
	s := c.server
	c.server, c.listener = nil, nil
	c.mu.Unlock()
	if s != nil {
		s.Stop()
	}
}

func (c *controlPlane) dial(context.Context, bootstrap.Server) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///cp", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c.mu.Lock()
			l := c.listener
			c.mu.Unlock()
			if l == nil {
				return nil, errors.New("connection refused")
			}
			return l.DialContext(ctx)
		}))
}

// set stores resources under a new version each.
func (c *controlPlane) set(values ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range values {
		typ, b, err := resource.Encode(v)
		if err != nil {
			c.t.Fatal(err)
		}
		d, err := resource.Decode(typ, b)
		if err != nil {
			c.t.Fatal(err)
		}
		c.version++
		c.holds[name{typ, d.Name}] = held{fmt.Sprint("v", c.version), b}
	}
	c.change()
}

// setRaw stores bytes as they are; remove deletes.
func (c *controlPlane) setRaw(n name, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version++
	c.holds[n] = held{fmt.Sprint("v", c.version), b}
	c.change()
}

func (c *controlPlane) remove(n name) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.holds, n)
	c.change()
}

func (c *controlPlane) change() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// asked returns the requests so far.
func (c *controlPlane) asked() []proto.Message {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.requests)
}

// variant is the state of one stream.
type variant interface {
	request(m proto.Message)
	responses() []proto.Message
}

// serve runs a stream: requests change what is sent, changes of the contents too.
func serve[M proto.Message](c *controlPlane, s grpc.ServerStream, empty func() M, v variant) error {
	in, end := make(chan proto.Message), make(chan error, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for {
			m := empty()
			if err := s.RecvMsg(m); err != nil {
				end <- err
				return
			}
			select {
			case in <- m:
			case <-s.Context().Done():
				end <- s.Context().Err()
				return
			}
		}
	})
	for {
		c.mu.Lock()
		changed := c.changed
		var out []proto.Message
		if !c.mute {
			out = v.responses()
		}
		c.mu.Unlock()
		for _, m := range out {
			if err := s.SendMsg(m); err != nil {
				return err
			}
		}
		select {
		case m := <-in:
			c.mu.Lock()
			c.requests = append(c.requests, m)
			v.request(m)
			c.mu.Unlock()
		case <-changed:
		case err := <-end:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

type delta struct {
	c    *controlPlane
	sent map[name]string // version at the client; "" nothing yet, "-" told that there is none
	all  map[string]bool // types that a wildcard is for; true until it has been answered
	n    int
}

func newDelta(c *controlPlane) *delta {
	return &delta{c: c, sent: map[name]string{}, all: map[string]bool{}}
}

func (d *delta) request(m proto.Message) {
	r := m.(*xdspb.DeltaDiscoveryRequest)
	for _, n := range r.GetResourceNamesSubscribe() {
		if n == "*" {
			d.all[r.GetTypeUrl()] = true
			continue
		}
		d.sent[name{r.GetTypeUrl(), n}] = ""
	}
	for n, v := range r.GetInitialResourceVersions() {
		d.sent[name{r.GetTypeUrl(), n}] = v
	}
	for _, n := range r.GetResourceNamesUnsubscribe() {
		delete(d.sent, name{r.GetTypeUrl(), n})
	}
}

func (d *delta) responses() []proto.Message {
	var parts []proto.Message // of types that were split
	byType := map[string]*xdspb.DeltaDiscoveryResponse{}
	response := func(typ string) *xdspb.DeltaDiscoveryResponse {
		r := byType[typ]
		if r != nil && d.c.most > 0 && len(r.Resources) == d.c.most {
			parts, r = append(parts, r), nil
		}
		if r == nil {
			d.n++
			r = &xdspb.DeltaDiscoveryResponse{TypeUrl: typ, Nonce: fmt.Sprint(d.n)}
			byType[typ] = r
		}
		return r
	}
	for typ, due := range d.all {
		if due {
			response(typ) // also when there is nothing
			d.all[typ] = false
		}
	}
	for n := range d.c.holds {
		if _, ok := d.all[n.typ]; ok && d.sent[n] == "" {
			d.sent[n] = "new"
		}
	}
	for n, at := range d.sent {
		now, ok := d.c.holds[n]
		if _, all := d.all[n.typ]; ok && now.version == at || !ok && (at == "" && !all || at == "-") {
			continue
		}
		r := response(n.typ)
		if !ok {
			r.RemovedResources = append(r.RemovedResources, n.name)
			d.sent[n] = "-"
			continue
		}
		r.Resources = append(r.Resources, &xdspb.Resource{Name: n.name, Version: now.version, Resource: &anypb.Any{TypeUrl: n.typ, Value: now.bytes}})
		d.sent[n] = now.version
	}
	return append(parts, inOrder(byType)...)
}

func inOrder[M proto.Message](byType map[string]M) []proto.Message {
	var out []proto.Message
	for _, t := range []string{resource.ClusterType, resource.EndpointsType, resource.ListenerType, resource.RouteType} {
		if r, ok := byType[t]; ok {
			out = append(out, r)
		}
	}
	return out
}

type sotw struct {
	c     *controlPlane
	names map[string][]string
	last  map[string]string // what was sent of a type, as text
	n     int
}

func newSotW(c *controlPlane) *sotw {
	return &sotw{c: c, names: map[string][]string{}, last: map[string]string{}}
}

func (s *sotw) request(m proto.Message) {
	r := m.(*xdspb.DiscoveryRequest)
	s.names[r.GetTypeUrl()] = r.GetResourceNames()
}

func (s *sotw) responses() []proto.Message {
	byType := map[string]*xdspb.DiscoveryResponse{}
	for typ, names := range s.names {
		s.n++
		r := &xdspb.DiscoveryResponse{TypeUrl: typ, Nonce: fmt.Sprint(s.n), VersionInfo: fmt.Sprint(s.c.version)}
		text := ""
		for _, n := range names {
			if h, ok := s.c.holds[name{typ, n}]; ok {
				r.Resources = append(r.Resources, &anypb.Any{TypeUrl: typ, Value: h.bytes})
				text += n + "@" + h.version + " "
			}
		}
		if text != s.last[typ] {
			s.last[typ] = text
			byType[typ] = r
		}
	}
	return inOrder(byType)
}

// recorder is a watcher that keeps what it is told.
type recorder struct {
	mu   sync.Mutex
	news []xds.Resource
}

func (r *recorder) Changed(x xds.Resource) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.news = append(r.news, x)
}

func (r *recorder) all() []xds.Resource {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.news)
}

func (r *recorder) last(t testing.TB) xds.Resource {
	t.Helper()
	all := r.all()
	if len(all) == 0 {
		t.Fatal("the watcher was told nothing")
	}
	return all[len(all)-1]
}
