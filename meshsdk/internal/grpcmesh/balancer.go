package grpcmesh

import (
	"errors"
	"hash/maphash"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"

	"github.com/inlay-mesh/inlay/meshsdk/internal/balance"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

const (
	balancerName = "inlay"
	// maxConnections bounds the endpoints of one priority of one cluster that a channel connects to.
	// Up to it all are connected at once, so that no call waits for a handshake. Beyond it a channel
	// takes a subset that is random to it and stays the same while the endpoints do: a thousand
	// clients of a thousand endpoints then hold a hundred connections each, evenly spread.
	maxConnections = 100
	// linger is how long a connection stays that no cluster asks for any more, for calls that began
	// with the configuration before and are about to pick.
	linger = 5 * time.Second
)

func init() { balancer.Register(lbBuilder{}) }

type lbBuilder struct{}

func (lbBuilder) Name() string { return balancerName }

func (lbBuilder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	b := &lb{cc: cc, seed: maphash.MakeSeed(), authority: bareHost(opts.Authority), subs: make(map[string]*sub)}
	if opts.CredsBundle != nil {
		b.perRPC = opts.CredsBundle.PerRPCCredentials()
	}
	return b
}

// lb owns the connections of one channel: one SubConn for each way of connecting to an endpoint, in
// whatever clusters it is, kept over updates. It chooses no endpoint; the pickers that it makes do,
// with the balance.Set of the cluster that the call has drawn.
type lb struct {
	cc        balancer.ClientConn
	perRPC    credentials.PerRPCCredentials
	seed      maphash.Seed
	authority string // host of the channel

	mu      sync.Mutex // guards what follows, and gives pickers their order
	client  *Client
	service *call.Service
	subs    map[string]*sub  // by endpoint.Key
	views   map[string]*view // by cluster
	closed  bool
}

// sub is one SubConn.
type sub struct {
	link  *link
	conn  balancer.SubConn
	state connectivity.State
	// failed is set by TRANSIENT_FAILURE and cleared by READY only, so that an endpoint that is
	// dead does not make calls wait each time it is tried again.
	failed bool
	err    error // of the last failed connect
	// leave stops the end of a SubConn that no cluster asks for; nil while one does.
	leave func() bool
}

// view is one cluster as calls see it; immutable.
type view struct {
	cluster *call.Cluster
	// chosen are the endpoints that are connected to, ready those of them that calls can go to now.
	chosen, ready *balance.Set
	subs          map[*endpoint.Endpoint]*sub // of ready
	// connecting: a chosen endpoint may yet become ready without having failed before.
	connecting bool
	err        error       // why the others of chosen are not ready
	authority  metadata.MD // nil when the channel's own is right
}

// UpdateClientConnState takes a configuration from the resolver.
func (b *lb) UpdateClientConnState(s balancer.ClientConnState) error {
	st, ok := s.ResolverState.Attributes.Value(stateKey{}).(*state)
	if !ok {
		err := errors.New(`the balancer "inlay" serves channels of a mesh only: make them with Mesh.NewClient or Mesh.DialOptions`)
		b.ResolverError(err)
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.client, b.service = st.client, st.service
	old := b.views
	b.views = make(map[string]*view, len(st.service.Clusters))
	want := make(map[string]*endpoint.Endpoint)
	timeout := make(map[string]time.Duration)
	hosts := make(map[string][]string)
	for name, cl := range st.service.Clusters {
		v := old[name]
		if v == nil || v.cluster != cl {
			v = &view{cluster: cl, chosen: b.choose(cl), authority: b.rewrite(cl)}
		}
		b.views[name] = v
		ns, svc, named := clusterHost(name)
		for _, ep := range v.chosen.Endpoints() {
			want[ep.Key] = ep
			timeout[ep.Key] = max(timeout[ep.Key], cl.ConnectTimeout)
			if named && ep.TLS == nil {
				hosts[ep.Key] = append(hosts[ep.Key], hostsOf(ns, svc, st.client.namespace())...)
			}
		}
	}
	for key, ep := range want {
		sb := b.subs[key]
		if sb == nil {
			sb = b.connect(ep)
			if sb == nil {
				continue
			}
			b.subs[key] = sb
		} else if sb.leave != nil {
			sb.leave()
			sb.leave = nil
		}
		sb.link.timeout.Store(int64(timeout[key]))
		h := hosts[key]
		sb.link.hosts.Store(&h)
		if sb.state == connectivity.Idle {
			sb.conn.Connect()
		}
	}
	for key, sb := range b.subs {
		if want[key] == nil && sb.leave == nil {
			sb.leave = st.client.cfg.Clock.AfterFunc(linger, func() { b.drop(key, sb) })
		}
	}
	b.publish("")
	return nil
}

// choose narrows a cluster to the endpoints that are connected to; empty for a cluster with Err.
func (b *lb) choose(cl *call.Cluster) *balance.Set {
	if cl.Set == nil {
		return balance.New(balance.RoundRobin, nil)
	}
	if cl.Set.Len() <= maxConnections {
		return cl.Set
	}
	byPriority := make(map[uint32][]*endpoint.Endpoint)
	for _, ep := range cl.Set.Endpoints() {
		byPriority[ep.Priority] = append(byPriority[ep.Priority], ep)
	}
	chosen := make(map[*endpoint.Endpoint]bool)
	for _, eps := range byPriority {
		if len(eps) > maxConnections {
			// Rendezvous hashing: an endpoint that comes or goes changes one member.
			slices.SortFunc(eps, func(x, y *endpoint.Endpoint) int {
				hx, hy := maphash.String(b.seed, x.Key), maphash.String(b.seed, y.Key)
				switch {
				case hx < hy:
					return -1
				case hx > hy:
					return 1
				}
				return 0
			})
			eps = eps[:maxConnections]
		}
		for _, ep := range eps {
			chosen[ep] = true
		}
	}
	return cl.Set.Filter(func(ep *endpoint.Endpoint) bool { return chosen[ep] })
}

// rewrite gives the authority of calls to a cluster of another service than the channel names; nil
// keeps the channel's. The server then sees the host that its SPIFFE ID is bound to (gRFC A81).
func (b *lb) rewrite(cl *call.Cluster) metadata.MD {
	ns, svc, ok := clusterHost(cl.Name)
	if !ok || slices.Contains(hostsOf(ns, svc, ""), b.authority) {
		return nil
	}
	return metadata.MD{":authority": {svc + "." + ns}}
}

func (b *lb) connect(ep *endpoint.Endpoint) *sub {
	sb := &sub{link: &link{client: b.client, tls: ep.TLS}}
	var addrs []resolver.Address
	for _, a := range ep.Addresses {
		addrs = append(addrs, resolver.Address{Addr: a.String(), Attributes: sb.link.attributes()})
	}
	//nolint:staticcheck // an endpoint may have several addresses, and credentials that win over a user's own
	conn, err := b.cc.NewSubConn(addrs, balancer.NewSubConnOptions{
		CredsBundle:   &bundle{link: sb.link, own: b.perRPC},
		StateListener: func(s balancer.SubConnState) { b.changed(ep.Key, sb, s) },
	})
	if err != nil { // the channel is being closed
		return nil
	}
	sb.conn, sb.state = conn, connectivity.Idle
	return sb
}

// changed hears of a SubConn from gRPC.
func (b *lb) changed(key string, sb *sub, s balancer.SubConnState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.subs[key] != sb {
		return
	}
	log := b.client.cfg.Log
	sb.state = s.ConnectivityState
	switch s.ConnectivityState {
	case connectivity.Ready:
		if sb.failed {
			log.Info("endpoint can be reached again", "service", b.service.Name, "endpoint", key)
		}
		sb.failed, sb.err = false, nil
	case connectivity.TransientFailure:
		if !sb.failed && sb.leave == nil {
			log.Warn("cannot connect to endpoint", "service", b.service.Name, "endpoint", key, "err", s.ConnectionError)
		}
		sb.failed, sb.err = true, s.ConnectionError
	case connectivity.Idle:
		// Lost, or the back-off is over. One that is leaving is not worth another connection.
		if sb.leave == nil {
			sb.conn.Connect()
		}
	}
	b.publish(key)
}

// drop ends a SubConn that has lingered. Streams on it finish first: gRPC closes gracefully.
func (b *lb) drop(key string, sb *sub) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.subs[key] != sb || sb.leave == nil {
		return
	}
	delete(b.subs, key)
	sb.conn.Shutdown()
	b.publish(key)
}

// publish gives the channel a picker of this moment. key names the SubConn that changed; empty
// means that anything did. b.mu is held.
func (b *lb) publish(key string) {
	views := make(map[string]*view, len(b.views))
	for name, v := range b.views {
		if v.ready == nil || key == "" || slices.ContainsFunc(v.chosen.Endpoints(), func(ep *endpoint.Endpoint) bool { return ep.Key == key }) {
			v = b.look(v)
		}
		views[name] = v
	}
	b.views = views
	ready := make(map[string]*sub)
	state := connectivity.TransientFailure
	for key, sb := range b.subs {
		switch {
		case sb.state == connectivity.Ready:
			ready[key] = sb
			state = connectivity.Ready
		case !sb.failed && state != connectivity.Ready:
			state = connectivity.Connecting
		}
	}
	b.cc.UpdateState(balancer.State{ConnectivityState: state, Picker: &picker{client: b.client, service: b.service, views: views, ready: ready, authority: b.rewrite}})
}

// look makes the view of a cluster anew.
func (b *lb) look(old *view) *view {
	v := &view{cluster: old.cluster, chosen: old.chosen, authority: old.authority, subs: make(map[*endpoint.Endpoint]*sub)}
	v.ready = v.chosen.Filter(func(ep *endpoint.Endpoint) bool {
		sb := b.subs[ep.Key]
		switch {
		case sb == nil:
		case sb.state == connectivity.Ready:
			v.subs[ep] = sb
			return true
		case !sb.failed:
			v.connecting = true
		default:
			v.err = sb.err
		}
		return false
	})
	return v
}

// ResolverError is not called by our resolver; it keeps what there is.
func (b *lb) ResolverError(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.service == nil && !b.closed {
		b.cc.UpdateState(balancer.State{ConnectivityState: connectivity.TransientFailure, Picker: errorPicker{err}})
	}
}

type errorPicker struct{ err error }

func (p errorPicker) Pick(balancer.PickInfo) (balancer.PickResult, error) {
	return balancer.PickResult{}, p.err
}

// UpdateSubConnState is not called: each SubConn has its own listener.
func (b *lb) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}

// ExitIdle connects what is not connected.
func (b *lb) ExitIdle() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, sb := range b.subs {
		if sb.state == connectivity.Idle && sb.leave == nil {
			sb.conn.Connect()
		}
	}
}

// Close ends every SubConn.
func (b *lb) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, sb := range slices.Collect(maps.Values(b.subs)) {
		if sb.leave != nil {
			sb.leave()
		}
		sb.conn.Shutdown()
	}
	b.subs = nil
}
