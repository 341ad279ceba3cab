package compile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
)

// Build makes the mesh of a plan and the instances of this moment. It finds warnings only, sorted
// by place.
func (p *Plan) Build(instances registry.Snapshot, trustDomain, revision string) (*ir.Mesh, []config.Finding) {
	b := &builder{
		plan:        p,
		trustDomain: trustDomain,
		instances:   map[name][]registry.Instance{},
		ports:       map[name][]port{},
		unknown:     map[portKey]unknown{},
	}
	for _, in := range instances.Instances {
		n := name{in.Namespace, in.Service}
		b.instances[n] = append(b.instances[n], in)
	}
	mesh := &ir.Mesh{Revision: revision, TrustDomain: trustDomain, NetworkPolicies: p.network}
	var names []name
	for _, s := range p.services {
		n := name{s.Namespace, s.Name}
		names = append(names, n)
		for _, sp := range s.Ports {
			b.ports[n] = append(b.ports[n], port{sp.Number, protocols[sp.Protocol]})
		}
		b.undeclaredPorts(s)
	}
	for n := range b.instances {
		if p.byName[n] == nil {
			names = append(names, n)
			b.ports[n] = b.registeredPorts(n)
		}
	}
	for _, n := range names {
		mesh.Services = append(mesh.Services, b.service(n))
	}
	b.virtualAddresses(mesh, instances.Addresses)
	b.addUnknown(mesh)
	slices.SortFunc(mesh.Services, func(x, y ir.Service) int {
		return cmp.Or(cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name))
	})
	return mesh, config.SortFindings(b.findings)
}

// virtualAddresses fills in the addresses of each service.
func (b *builder) virtualAddresses(mesh *ir.Mesh, addresses registry.Addresses) {
	if addresses == nil {
		return
	}
	var without []string
	for i := range mesh.Services {
		s := &mesh.Services[i]
		if s.VirtualAddresses = addresses.Of(s.Namespace, s.Name); len(s.VirtualAddresses) == 0 {
			without = append(without, s.Name+"."+s.Namespace)
		}
	}
	if len(without) > 0 {
		slices.Sort(without)
		b.warn(object.Pos{}, object.NoVirtualAddress, "%d services have no virtual address, since all of %s are taken: %s%s: programs without the SDK cannot call them by name; give the control plane a larger range",
			len(without), addresses.Range(), strings.Join(without[:min(5, len(without))], ", "), map[bool]string{true: ", ..."}[len(without) > 5])
	}
}

type port struct {
	number   uint16
	protocol ir.Protocol
}

// unknown is a port that a route sends calls to and that nobody serves.
type unknown struct {
	protocol ir.Protocol
	reason   string
}

type builder struct {
	plan        *Plan
	trustDomain string
	instances   map[name][]registry.Instance
	ports       map[name][]port // of the services that are known
	unknown     map[portKey]unknown
	findings    []config.Finding
}

var protocols = map[object.Protocol]ir.Protocol{object.GRPC: ir.GRPC, object.HTTP: ir.HTTP, object.HTTP2: ir.HTTP2, object.TCP: ir.TCP, object.UDP: ir.UDP}

func (b *builder) warn(p object.Pos, c object.Code, format string, args ...any) {
	b.findings = append(b.findings, object.At(p, c, format, args...))
}

// undeclaredPorts warns of what instances of a declared service registered beside it.
func (b *builder) undeclaredPorts(s *object.Service) {
	for _, in := range b.instances[name{s.Namespace, s.Name}] {
		for _, pb := range in.Ports {
			switch sp := transportOf(s, pb.Port, pb.UDP()); {
			case sp == nil && portOf(s, pb.Port) != nil:
				sp = portOf(s, pb.Port)
				b.warn(sp.Pos, object.RegisteredProtocol, "%s: instances registered port %d as %s, which it has as %s: that is not used", label(s.Meta), pb.Port, pb.Protocol, sp.Protocol)
			case sp == nil:
				b.warn(s.Pos, object.RegisteredPort, "%s: instances registered port %d, which it does not list and which gets no call: it has %s", label(s.Meta), pb.Port, portList(s))
			case string(sp.Protocol) != pb.Protocol && saysProtocol(in):
				b.warn(sp.Pos, object.RegisteredProtocol, "%s: instances registered port %d as %s: %s, as written here, is used", label(s.Meta), pb.Port, pb.Protocol, sp.Protocol)
			}
		}
	}
}

// saysProtocol reports whether what an instance registered of its protocols is its own word. Of a
// program without the SDK it is the node's, who knows only that somebody listens.
func saysProtocol(in registry.Instance) bool { return in.MeshTLS || in.SDKVersion != "" }

// registeredPorts are the ports of a service that only its instances declare, ascending. Where
// they disagree about a protocol, that of the first instance counts which says it itself.
func (b *builder) registeredPorts(n name) []port {
	var out []port
	inOrder := slices.Clone(b.instances[n])
	slices.SortStableFunc(inOrder, func(x, y registry.Instance) int { return compareBool(saysProtocol(x), saysProtocol(y)) })
	for _, in := range inOrder {
		for _, pb := range in.Ports {
			protocol, ok := protocols[object.Protocol(pb.Protocol)]
			if !ok {
				continue // the registry admits no other
			}
			i := slices.IndexFunc(out, func(p port) bool { return p.number == pb.Port && (p.protocol == ir.UDP) == pb.UDP() })
			switch {
			case i < 0:
				out = append(out, port{pb.Port, protocol})
			case out[i].protocol != protocol && saysProtocol(in):
				b.warn(object.Pos{}, object.RegisteredProtocol, "service %q in namespace %q: instances disagree about the protocol of port %d: declare it with a MeshService", n.service, n.namespace, pb.Port)
			}
		}
	}
	slices.SortFunc(out, func(x, y port) int {
		return cmp.Or(cmp.Compare(x.number, y.number), cmp.Compare(x.protocol, y.protocol))
	})
	return out
}

func (b *builder) service(n name) ir.Service {
	out := ir.Service{Namespace: n.namespace, Name: n.service}
	declared := b.plan.byName[n]
	if declared != nil {
		out.Declared = true
		out.Source = ir.Source(declared.Pos)
		if declared.Permissive {
			out.MTLS = ir.Permissive
		}
		for _, v := range declared.Versions {
			out.Versions = append(out.Versions, ir.Version{Name: v.Name, Labels: v.Labels, Source: ir.Source(v.Pos)})
		}
	}
	for _, p := range b.ports[n] {
		ip := ir.Port{Number: p.number, Protocol: p.protocol}
		whole := b.cluster(n, p, "", out.MTLS)
		whole.Endpoints = b.endpoints(n, p, declared, out.MTLS)
		ip.Clusters = append(ip.Clusters, whole)
		for _, v := range out.Versions {
			c := b.cluster(n, p, v.Name, out.MTLS)
			for _, e := range whole.Endpoints {
				if has(e.Labels, v.Labels) {
					c.Endpoints = append(c.Endpoints, e)
				}
			}
			ip.Clusters = append(ip.Clusters, c)
		}
		if !p.protocol.Plain() {
			ip.Routes = b.routes(n, p, declared)
		}
		out.Ports = append(out.Ports, ip)
	}
	out.Workloads = b.workloads(n, declared)
	return out
}

func has(labels, want map[string]string) bool {
	for k, v := range want {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// clusterName is SERVICE.NAMESPACE:PORT, with |VERSION for a version.
func clusterName(n name, port uint16, version string) string {
	s := fmt.Sprintf("%s.%s:%d", n.service, n.namespace, port)
	if version != "" {
		s += "|" + version
	}
	return s
}

func (b *builder) cluster(n name, p port, version string, mtls ir.MTLS) ir.Cluster {
	m := merge(b.policiesOf(n, version)...)
	id := clusterName(n, p.number, version)
	if p.protocol == ir.UDP {
		id += "/udp" // beside the one over TCP; no client asks for it by name
	}
	return ir.Cluster{
		Name:      id,
		Namespace: n.namespace,
		Service:   n.service,
		Port:      p.number,
		Version:   version,
		Protocol:  p.protocol,
		MTLS:      mtls,
		SPIFFEID:  fmt.Sprintf("spiffe://%s/ns/%s/svc/%s", b.trustDomain, n.namespace, n.service),
		Policy:    m.cluster(),
	}
}

// policiesOf are the policies for a version of a service, or the service, the strongest first.
func (b *builder) policiesOf(n name, version string) []*object.Policy {
	var out []*object.Policy
	if version != "" {
		out = append(out, b.plan.policies[target{n, version}])
	}
	return append(out, b.plan.policies[target{name: n}])
}

// routes are those of calls to one port of a service: what is attached to it, else the service
// itself.
func (b *builder) routes(n name, p port, declared *object.Service) []ir.Route {
	ms := b.plan.attached[portKey{n, p.number}]
	if len(ms) == 0 {
		r := ir.Route{
			Object:   "MeshService/" + n.namespace + "/" + n.service,
			Rule:     "default",
			Backends: []ir.Backend{{Cluster: clusterName(n, p.number, ""), Weight: 1}},
		}
		if declared != nil {
			r.Source = ir.Source(declared.Pos)
			r.Backends[0].Source = r.Source
		}
		m := merge(b.policiesOf(n, "")...)
		m.into(&r, nil)
		return []ir.Route{r}
	}
	var out []ir.Route
	for _, m := range ms {
		if m.rule >= 0 {
			out = append(out, b.route(n, p, m))
		}
	}
	return out
}

func (b *builder) route(n name, p port, m match) ir.Route {
	rule := m.ruleOf()
	id := rule.Name
	if id == "" {
		id = fmt.Sprint(m.rule)
	}
	r := ir.Route{
		Object: m.route.String(),
		Rule:   fmt.Sprintf("%s.%d", id, m.match),
		Source: ir.Source(m.matchOf().Pos),
		Match:  conditions(m.route, m.matchOf()),
	}
	var only *object.Backend // the arm that takes every call, when one version does
	targets := map[target]bool{}
	for i := range rule.Backends {
		be := &rule.Backends[i]
		arm := b.backend(p, m, i)
		if at := slices.IndexFunc(r.Backends, func(x ir.Backend) bool { return x.Cluster == arm.Cluster }); at >= 0 {
			r.Backends[at].Weight += arm.Weight // one arm a cluster: some clients keep only the last of equal names
		} else {
			r.Backends = append(r.Backends, arm)
		}
		if be.Weight > 0 {
			targets[target{name{be.Namespace, be.Service}, be.Version}] = true
			only = be
		}
	}
	policies := b.policiesOf(n, "")
	switch {
	case len(targets) == 1 && only.Version != "":
		// Version beats service: the calls of this rule all go to one version.
		policies = append([]*object.Policy{b.plan.policies[target{name{only.Namespace, only.Service}, only.Version}]}, policies...)
	case len(targets) > 1:
		b.splitPolicies(m, rule)
	}
	merged := merge(policies...)
	merged.into(&r, rule)
	return r
}

// splitPolicies warns of policies of versions that cannot be used: which arm a call takes is
// drawn after its timeouts and retries are known.
func (b *builder) splitPolicies(m match, rule *object.Rule) {
	for i, be := range rule.Backends {
		if be.Version == "" || be.Weight == 0 {
			continue
		}
		if p := b.plan.policies[target{name{be.Namespace, be.Service}, be.Version}]; perCall(p) {
			b.warn(be.Pos, object.SplitPolicy, "%s: spec.rules[%d].backendRefs[%d]: timeouts and retries of %s are not used, since the rule splits over several backends: put them into the rule or into the policy of the service",
				label(m.route.Meta), m.rule, i, label(p.Meta))
		}
	}
}

// into sets timeouts and retries of a route: the rule's own win over the policies'.
func (m *merged) into(r *ir.Route, rule *object.Rule) {
	r.Timeout = value(m.request, 0)
	r.PerTry = value(m.perTry, 0)
	r.Idle = value(m.idle, 0)
	r.Retry = m.retry()
	if rule == nil {
		return
	}
	r.Timeout = value(rule.Request, r.Timeout)
	r.PerTry = value(rule.PerTry, r.PerTry)
	if rule.Retry != nil {
		r.Retry = m.routeRetry(rule.Retry)
	}
}

func conditions(route *object.Route, m *object.Match) ir.Match {
	out := ir.Match{Method: m.Method}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, ir.HeaderMatch(h))
	}
	switch {
	case route.GRPC():
		// The path of a gRPC call is /SERVICE/METHOD.
		switch {
		case m.GRPCService != "" && m.GRPCMethod != "":
			out.PathKind, out.Path = ir.PathExact, "/"+m.GRPCService+"/"+m.GRPCMethod
		case m.GRPCService != "":
			out.PathKind, out.Path = ir.PathPrefix, "/"+m.GRPCService
		case m.GRPCMethod != "":
			out.PathKind, out.Path = ir.PathSuffix, "/"+m.GRPCMethod
		}
	case m.Exact:
		out.PathKind, out.Path = ir.PathExact, m.Path
	case m.Path != "/":
		out.PathKind, out.Path = ir.PathPrefix, m.Path
	}
	return out
}

// backend resolves arm i of a rule for calls to port p.
func (b *builder) backend(p port, m match, i int) ir.Backend {
	be := &m.ruleOf().Backends[i]
	out := ir.Backend{Weight: be.Weight, Source: ir.Source(be.Pos)}
	n := name{be.Namespace, be.Service}
	if s := b.plan.byName[n]; s != nil {
		out.Cluster = clusterName(n, declaredPort(be, m.parentPort, s), be.Version)
		return out
	}
	// Not declared: what is registered decides, and when nothing is, the port of the call.
	ports := b.ports[n]
	number := cmp.Or(be.Port, m.parentPort)
	if number == 0 {
		number = p.number
		if len(ports) == 1 {
			number = ports[0].number
		}
	}
	out.Cluster = clusterName(n, number, "")
	if slices.ContainsFunc(ports, func(x port) bool { return x.number == number && !x.protocol.Plain() }) {
		return out
	}
	plain := slices.ContainsFunc(ports, func(x port) bool { return x.number == number })
	if plain {
		out.Invalid = fmt.Sprintf("port %d of service %q in namespace %q is plain TCP or UDP, which carries no calls", number, n.service, n.namespace)
	} else if len(b.instances[n]) == 0 {
		out.Invalid = fmt.Sprintf("neither configuration nor registry knows a service %q in namespace %q", n.service, n.namespace)
	} else {
		var have []string
		for _, x := range ports {
			have = append(have, fmt.Sprint(x.number))
		}
		out.Invalid = fmt.Sprintf("service %q in namespace %q has no port %d: its instances registered %s", n.service, n.namespace, number, cmp.Or(strings.Join(have, ", "), "none"))
	}
	if !plain { // that one has a cluster, which no client of calls is served
		b.unknown[portKey{n, number}] = unknown{p.protocol, out.Invalid}
	}
	b.warn(be.Pos, object.UnknownBackend, "%s: spec.rules[%d].backendRefs[%d]: %s: its share of the calls fails until one is declared or registers", label(m.route.Meta), m.rule, i, out.Invalid)
	return out
}

// addUnknown gives every unknown port a cluster without endpoints: a route to a cluster that does
// not exist would stall some clients, one without endpoints fails at once.
func (b *builder) addUnknown(mesh *ir.Mesh) {
	keys := make([]portKey, 0, len(b.unknown))
	for k := range b.unknown {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(x, y portKey) int {
		return cmp.Or(cmp.Compare(x.namespace, y.namespace), cmp.Compare(x.service, y.service), cmp.Compare(x.port, y.port))
	})
	for _, k := range keys {
		u := b.unknown[k]
		p := port{k.port, u.protocol}
		c := b.cluster(k.name, p, "", ir.Strict)
		c.EmptyReason = u.reason
		ip := ir.Port{Number: k.port, Protocol: u.protocol, Clusters: []ir.Cluster{c}}
		i := slices.IndexFunc(mesh.Services, func(s ir.Service) bool { return s.Namespace == k.namespace && s.Name == k.service })
		if i < 0 {
			mesh.Services = append(mesh.Services, ir.Service{Namespace: k.namespace, Name: k.service, Unknown: u.reason})
			i = len(mesh.Services) - 1
		}
		mesh.Services[i].Ports = append(mesh.Services[i].Ports, ip)
	}
}
