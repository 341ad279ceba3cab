package xdsgen

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// generator fills Views.
type generator struct {
	*Views
	prev         *reuse
	samePolicies bool // the policies of connections are those of prev
}

func (g *generator) service(name string, s *ir.Service) {
	if s.Unknown == "" {
		g.node(name, s)
	}
	first := firstForCalls(s)
	for i := range s.Ports {
		p := &s.Ports[i]
		if p.Protocol.Plain() {
			continue // see plainPort
		}
		g.clusters(p)
		if s.Unknown != "" {
			continue // such a service has clusters without endpoints and no routes
		}
		for _, k := range Callers() {
			g.outbound(k, s, p, i == first)
		}
		g.inbound(s, p)
	}
}

// firstForCalls is the index of the port that a call to the name without a port means; -1 when the
// service takes no calls.
func firstForCalls(s *ir.Service) int {
	return slices.IndexFunc(s.Ports, func(p ir.Port) bool { return !p.Protocol.Plain() })
}

// outbound makes the names of one port and its route configuration.
func (g *generator) outbound(k Kind, s *ir.Service, p *ir.Port, first bool) {
	routes := routeName(s.Name, s.Namespace, p.Number)
	full, short := []string{routes}, []string{s.Name + routes[strings.LastIndexByte(routes, ':'):]}
	if first { // a name without a port means the first one
		full, short = append(full, s.Name+"."+s.Namespace), append(short, s.Name)
	}
	t := g.tables[k]
	var why string
	if k == GRPC {
		why = withheldFromGRPC(s, p.Number, p.Protocol)
	}
	for i, name := range append(full, short...) {
		scope := ""
		if i >= len(full) {
			scope = s.Namespace
		}
		if why != "" {
			put(t.withheld, scope, name, why)
			continue
		}
		g.listener(Key{Kind: k, Scope: scope, Type: ListenerType, Name: name}, routes, func() (message, error) {
			return outboundListener(name, routes)
		})
	}
	if why != "" {
		put(t.withheld, "", routes, why)
		return
	}
	key := Key{Kind: k, Type: RouteType, Name: routes}
	g.add(key, g.prev.routes(key, p.Routes), func() (message, error) { return routeConfiguration(k, routes, p.Routes) })
}

// inbound makes the SDK's own listener of one port.
func (g *generator) inbound(s *ir.Service, p *ir.Port) {
	name := InboundListener(s.Namespace, s.Name, p.Number)
	key := Key{Kind: SDK, Scope: s.Namespace + "/" + s.Name, Type: ListenerType, Name: name}
	from := "strict"
	if s.MTLS == ir.Permissive {
		from = "permissive"
	}
	g.listener(key, from, func() (message, error) { return inboundListener(name, p.Number, s.MTLS) })
}

// listener is add for listeners, whose content is their name and one more word.
func (g *generator) listener(key Key, from string, build func() (message, error)) {
	old := g.prev.last(key)
	if old != nil && old.from != from {
		old = nil
	}
	if r := g.add(key, old, build); r != nil {
		r.from = from
	}
}

// clusters makes the clusters of one port and their endpoints.
func (g *generator) clusters(p *ir.Port) {
	for i := range p.Clusters {
		c := withIdentity(p.Clusters[i], g.mesh.TrustDomain)
		for _, k := range Callers() {
			if why := g.closed[c.Name]; k == GRPC && why != "" {
				put(g.tables[k].withheld, "", c.Name, why)
				continue // routes that name it get an empty one, see missing
			}
			g.cluster(k, &c)
		}
	}
}

// withIdentity fills in the SPIFFE ID that follows from the names, since a cluster without one
// would accept any certificate of the trust domain.
func withIdentity(c ir.Cluster, trustDomain string) ir.Cluster {
	if c.SPIFFEID == "" {
		c.SPIFFEID = fmt.Sprintf("spiffe://%s/ns/%s/svc/%s", trustDomain, c.Namespace, c.Service)
	}
	return c
}

// cluster makes cluster c and its endpoints, which every kind that is served the cluster shares.
func (g *generator) cluster(k Kind, c *ir.Cluster) {
	key := Key{Kind: k, Type: ClusterType, Name: c.Name}
	g.add(key, g.prev.cluster(key, c), func() (message, error) { return cluster(k, c) })

	key.Type = EndpointsType
	if r := g.tables[SDK].shared[EndpointsType][c.Name]; k != SDK && r != nil && g.closed[c.Name] == "" {
		g.tables[k].set(key, r)
		return
	}
	var healthy []string
	r := g.add(key, g.prev.endpoints(key, c.Endpoints), func() (message, error) {
		a, ids := assignment(c.Name, c.Endpoints)
		healthy = ids
		return a, nil
	})
	if r != nil {
		r.Instances = healthy
	}
}

// missing makes an empty cluster for each name that a served route mentions and that is not served
// to this kind: a backend whose service is strict, one that is not in the mesh, and the cluster of
// routes without a backend. A cluster that does not exist at all stalls a stock gRPC channel until
// its resource timer of 15 s (gRFC A57).
func (g *generator) missing(k Kind) {
	need := map[string]string{}
	for i := range g.mesh.Services {
		s := &g.mesh.Services[i]
		for j := range s.Ports {
			p := &s.Ports[j]
			if s.Unknown != "" || p.Protocol.Plain() || k == GRPC && withheldFromGRPC(s, p.Number, p.Protocol) != "" {
				continue
			}
			for n := range p.Routes {
				g.missingOf(k, &p.Routes[n], need)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(need)) {
		g.cluster(k, &ir.Cluster{
			Name: name, Protocol: ir.HTTP2, EmptyReason: need[name],
			// Nobody holds this identity: the cluster has no endpoints and never will.
			SPIFFEID: fmt.Sprintf("spiffe://%s/inlay/no-backend", g.mesh.TrustDomain),
		})
	}
}

// missingOf adds the clusters that a route needs and the kind has not, with the reason.
func (g *generator) missingOf(k Kind, r *ir.Route, need map[string]string) {
	var total uint64
	for i := range r.Backends {
		b := &r.Backends[i]
		total += uint64(b.Weight)
		if g.tables[k].shared[ClusterType][b.Cluster] != nil {
			continue
		}
		why := fmt.Sprintf("cluster %s is not in the mesh", b.Cluster)
		if b.Invalid != "" {
			why = b.Invalid
		}
		if closed := g.closed[b.Cluster]; k == GRPC && closed != "" {
			why = closed
		}
		need[b.Cluster] = why
	}
	if total == 0 {
		need[NoBackendCluster] = "no backend of the route has a weight above 0"
	}
}

// add puts the resource of a key into its table: old when that is not nil, else what build gives,
// else the last good one beside a fault. It returns what was newly made, nil otherwise.
func (g *generator) add(key Key, old *Resource, build func() (message, error)) *Resource {
	t := g.tables[key.Kind]
	if old != nil {
		t.set(key, old)
		return nil
	}
	m, err := build()
	var r *Resource
	if err == nil {
		r, err = encode(key.Type, key.Name, m)
	}
	if err != nil {
		g.faults = append(g.faults, keyFault{key, &Fault{Kind: key.Kind, Type: key.Type, Name: key.Name, Err: err}})
		if last := g.prev.last(key); last != nil {
			t.set(key, last)
		}
		return nil
	}
	g.encoded++
	t.set(key, r)
	return r
}

func (t *table) set(key Key, r *Resource) {
	if key.Type == ListenerType {
		put(t.listeners, key.Scope, key.Name, r)
		return
	}
	t.shared[key.Type][key.Name] = r
}

func put[V any](m map[string]map[string]V, scope, name string, v V) {
	if m[scope] == nil {
		m[scope] = map[string]V{}
	}
	m[scope][name] = v
}
