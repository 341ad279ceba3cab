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
	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
)

// Plan is a configuration whose names are resolved as far as that needs no instances. It is
// immutable: Build may be called again for each change of the registry, by several at once.
type Plan struct {
	services []*object.Service // by namespace, then name
	byName   map[name]*object.Service
	policies map[target]*object.Policy
	attached map[portKey][]match // in the order in which they are tried
	network  []ir.NetworkPolicy  // by namespace, then name
}

// Names are the services that the plan declares or instances registered: who gets a virtual
// address. Declared ones come first, each part by namespace, then name.
func (p *Plan) Names(instances registry.Snapshot) []vip.Service {
	out := make([]vip.Service, 0, len(p.services))
	for _, s := range p.services {
		out = append(out, vip.Service{Namespace: s.Namespace, Name: s.Name})
	}
	for i := range instances.Instances { // by namespace and service
		in := &instances.Instances[i]
		n := vip.Service{Namespace: in.Namespace, Name: in.Service}
		if p.byName[name{n.Namespace, n.Name}] == nil && (len(out) == 0 || out[len(out)-1] != n) {
			out = append(out, n)
		}
	}
	return out
}

type name struct{ namespace, service string }

type target struct {
	name
	version string
}

type portKey struct {
	name
	port uint16
}

// match is one match of one rule, attached to a port.
type match struct {
	route       *object.Route
	rule, match int
	parentPort  uint16 // as written in the parentRef; zero: left out
}

func (m match) ruleOf() *object.Rule   { return &m.route.Rules[m.rule] }
func (m match) matchOf() *object.Match { return &m.route.Rules[m.rule].Matches[m.match] }

// Resolve checks what the objects of a set name among each other. The plan is nil when there are
// faults or the set is not whole. Findings are sorted by place.
func Resolve(set *config.Set) (*Plan, []config.Finding) {
	if set == nil {
		set = &config.Set{}
	}
	r := &resolver{
		set:     set,
		refused: map[name]bool{},
		plan: &Plan{
			byName:   map[name]*object.Service{},
			policies: map[target]*object.Policy{},
			attached: map[portKey][]match{},
		},
	}
	for _, m := range set.Refused {
		if m.Kind == "MeshService" {
			r.refused[name{m.Namespace, m.Name}] = true
		}
	}
	for i := range set.Services {
		s := &set.Services[i]
		r.plan.services = append(r.plan.services, s)
		r.plan.byName[name{s.Namespace, s.Name}] = s
	}
	for _, s := range r.plan.services {
		r.service(s)
	}
	for i := range set.Policies {
		r.policy(&set.Policies[i])
	}
	for i := range set.Routes {
		r.route(&set.Routes[i])
	}
	r.networkPolicies()
	r.order()
	findings := config.SortFindings(r.findings)
	if config.HasFaults(findings) || len(set.Refused) > 0 || set.Incomplete {
		return nil, findings
	}
	return r.plan, findings
}

type resolver struct {
	set      *config.Set
	refused  map[name]bool
	plan     *Plan
	findings []config.Finding
}

func (r *resolver) add(p object.Pos, c object.Code, format string, args ...any) {
	r.findings = append(r.findings, object.At(p, c, format, args...))
}

// lost reports whether nothing can be said of a service because it may be one that was refused.
func (r *resolver) lost(n name) bool { return r.set.Incomplete || r.refused[n] }

func label(m object.Meta) string {
	if m.Namespace != "default" {
		return fmt.Sprintf("%s %q", m.Kind, m.Namespace+"/"+m.Name)
	}
	return fmt.Sprintf("%s %q", m.Kind, m.Name)
}

func (r *resolver) service(s *object.Service) {
	var calls []object.Port // those that a call can go to
	for _, p := range s.Ports {
		if !p.Protocol.Plain() {
			calls = append(calls, p)
		}
	}
	if len(calls) > 1 {
		r.add(calls[1].Pos, object.FirstPort, "%s: has %d ports: %q without a port means the first, %d", label(s.Meta), len(calls), s.Name, calls[0].Number)
	}
	if s.Permissive || len(calls) == 0 {
		return
	}
	for _, e := range s.Endpoints {
		if !e.MeshTLS {
			r.add(e.Pos, object.Unreachable, "%s: endpoint %s of a strict service does not speak mesh TLS and gets no call: write tls: mesh if it does, or mtls: permissive", label(s.Meta), e.Address)
		}
	}
}

func (r *resolver) policy(p *object.Policy) {
	n := name{p.Namespace, p.Target.Service}
	s := r.plan.byName[n]
	switch {
	case s == nil:
		if !r.lost(n) {
			r.add(p.Target.Pos, object.UnknownTarget, "%s: spec.targetRef: %s", label(p.Meta), r.noService(n))
		}
		return
	case p.Target.Version != "" && !hasVersion(s, p.Target.Version):
		r.add(p.Target.Pos, object.UnknownVersion, "%s: spec.targetRef: %s", label(p.Meta), noVersion(s, p.Target.Version))
		return
	case s.Plain():
		r.add(p.Target.Pos, object.NoEffect, "%s: spec.targetRef: each port of MeshService %q is TCP or UDP, which carry no calls: the policy has no effect there", label(p.Meta), s.Name)
	}
	t := target{n, p.Target.Version}
	if first := r.plan.policies[t]; first != nil {
		what := "service " + n.service
		if t.version != "" {
			what = "version " + n.service + "." + t.version
		}
		r.add(p.Target.Pos, object.TwoPolicies, "%s: %s already has %s at %s: merge the two", label(p.Meta), what, label(first.Meta), first.Pos)
		return
	}
	r.plan.policies[t] = p
}

func (r *resolver) noService(n name) string {
	var here []string
	for _, s := range r.plan.services {
		if s.Namespace == n.namespace {
			here = append(here, s.Name)
		}
	}
	msg := fmt.Sprintf("no MeshService %q in namespace %q", n.service, n.namespace)
	if len(here) > 0 && len(here) <= 12 {
		msg += ": want one of " + strings.Join(here, ", ") + ", or declare it"
	} else {
		msg += ": declare it"
	}
	return msg
}

func hasVersion(s *object.Service, version string) bool {
	return slices.ContainsFunc(s.Versions, func(v object.Version) bool { return v.Name == version })
}

func noVersion(s *object.Service, version string) string {
	var have []string
	for _, v := range s.Versions {
		have = append(have, v.Name)
	}
	if len(have) == 0 {
		return fmt.Sprintf("no version %q: MeshService %q lists none; add it to its spec.versions", version, s.Name)
	}
	return fmt.Sprintf("no version %q: MeshService %q lists %s", version, s.Name, strings.Join(have, ", "))
}

func portList(s *object.Service) string {
	var have []string
	for _, p := range s.Ports {
		have = append(have, fmt.Sprint(p.Number))
	}
	return strings.Join(have, ", ")
}

// portOf returns the port of that number; of two the one that is not UDP.
func portOf(s *object.Service, number uint16) *object.Port {
	if p := transportOf(s, number, false); p != nil {
		return p
	}
	return transportOf(s, number, true)
}

func transportOf(s *object.Service, number uint16, udp bool) *object.Port {
	for i := range s.Ports {
		if p := &s.Ports[i]; p.Number == number && (p.Protocol == object.UDP) == udp {
			return p
		}
	}
	return nil
}

func (r *resolver) route(route *object.Route) {
	for _, p := range route.Parents {
		n := name{route.Namespace, p.Service}
		s := r.plan.byName[n]
		if s == nil {
			if !r.lost(n) {
				r.add(p.Pos, object.UnknownParent, "%s: spec.parentRefs: %s (an instance that registers does not declare it)", label(route.Meta), r.noService(n))
			}
			// Versions and ports of the backends can be judged without the parent.
			r.backends(route, p, nil)
			continue
		}
		ports := r.portsOf(route, p, s)
		for _, port := range ports {
			key := portKey{n, port.Number}
			for i := range route.Rules {
				for j := range route.Rules[i].Matches {
					r.plan.attached[key] = append(r.plan.attached[key], match{route, i, j, p.Port})
				}
			}
			if len(route.Rules) == 0 {
				// Remember the route all the same: it replaces the default route by nothing.
				r.plan.attached[key] = append(r.plan.attached[key], match{route, -1, -1, p.Port})
			}
			r.backends(route, p, port)
		}
	}
}

// portsOf returns the ports of s that a parentRef attaches to.
func (r *resolver) portsOf(route *object.Route, p object.Parent, s *object.Service) []*object.Port {
	if p.Port != 0 {
		port := portOf(s, p.Port)
		switch {
		case port == nil:
			r.add(p.Pos, object.UnknownPort, "%s: spec.parentRefs: MeshService %q has no port %d: it has %s", label(route.Meta), s.Name, p.Port, portList(s))
			return nil
		case port.Protocol.Plain():
			r.add(p.Pos, object.WrongProtocol, "%s: spec.parentRefs: port %d of MeshService %q is %s, whose connections are not routed: want a port of GRPC, HTTP or HTTP2", label(route.Meta), p.Port, s.Name, port.Protocol)
			return nil
		case route.GRPC() && port.Protocol == object.HTTP:
			r.add(p.Pos, object.WrongProtocol, "%s: spec.parentRefs: port %d of MeshService %q speaks HTTP (HTTP/1.1): a GRPCRoute wants GRPC or HTTP2", label(route.Meta), p.Port, s.Name)
			return nil
		}
		return []*object.Port{port}
	}
	// GEP-1294: "If `port` is not set, the implementation MUST associate the route with all ports
	// defined in the Service"; those that cannot carry what is routed at all are left out.
	var out []*object.Port
	for i := range s.Ports {
		if p := s.Ports[i].Protocol; !p.Plain() && (!route.GRPC() || p != object.HTTP) {
			out = append(out, &s.Ports[i])
		}
	}
	switch {
	case len(out) > 0:
	case s.Plain():
		r.add(p.Pos, object.WrongProtocol, "%s: spec.parentRefs: each port of MeshService %q is TCP or UDP, whose connections are not routed: want a service with a port of GRPC, HTTP or HTTP2", label(route.Meta), s.Name)
	default:
		r.add(p.Pos, object.WrongProtocol, "%s: spec.parentRefs: MeshService %q speaks HTTP (HTTP/1.1) on each port: a GRPCRoute wants GRPC or HTTP2", label(route.Meta), s.Name)
	}
	return out
}

// backends checks the backends of a route for calls to port, which is nil when the parent is not
// known.
func (r *resolver) backends(route *object.Route, p object.Parent, port *object.Port) {
	for i := range route.Rules {
		for j := range route.Rules[i].Backends {
			b := &route.Rules[i].Backends[j]
			at := fmt.Sprintf("%s: spec.rules[%d].backendRefs[%d]", label(route.Meta), i, j)
			n := name{b.Namespace, b.Service}
			s := r.plan.byName[n]
			if s == nil {
				if b.Version != "" && !r.lost(n) {
					r.add(b.Pos, object.UnknownVersion, "%s: version %q of %q: %s", at, b.Version, b.Service, r.noService(n))
				}
				continue // an unknown service is a warning of Build: it may register
			}
			if b.Version != "" && !hasVersion(s, b.Version) {
				r.add(b.Pos, object.UnknownVersion, "%s: %s", at, noVersion(s, b.Version))
			}
			number := declaredPort(b, p.Port, s)
			if number == 0 {
				r.add(b.Pos, object.AmbiguousPort, "%s: no port, and MeshService %q has several: write port: one of %s", at, s.Name, portList(s))
				continue
			}
			to := portOf(s, number)
			switch {
			case to == nil && b.Port == 0:
				r.add(b.Pos, object.UnknownPort, "%s: MeshService %q has no port %d, which comes from the parentRef: write port: one of %s", at, s.Name, number, portList(s))
			case to == nil:
				r.add(b.Pos, object.UnknownPort, "%s: MeshService %q has no port %d: it has %s", at, s.Name, number, portList(s))
			case to.Protocol.Plain():
				r.add(b.Pos, object.WrongProtocol, "%s: port %d of MeshService %q is %s, which carries no calls: want a port of GRPC, HTTP or HTTP2", at, number, s.Name, to.Protocol)
			case to.Protocol == object.HTTP && (route.GRPC() || port != nil && port.Protocol == object.GRPC):
				r.add(b.Pos, object.WrongProtocol, "%s: port %d of MeshService %q speaks HTTP (HTTP/1.1): gRPC wants GRPC or HTTP2", at, number, s.Name)
			}
		}
	}
}

// declaredPort is the port that a backendRef means: its own, else the parentRef's, else the only
// one of its service that carries calls; zero when there are several, or none of several.
func declaredPort(b *object.Backend, parentPort uint16, s *object.Service) uint16 {
	switch {
	case b.Port != 0:
		return b.Port
	case parentPort != 0:
		return parentPort
	case len(s.Ports) == 1:
		return s.Ports[0].Number
	}
	var only uint16
	for _, p := range s.Ports {
		switch {
		case p.Protocol.Plain():
		case only != 0:
			return 0
		default:
			only = p.Number
		}
	}
	return only
}

// order sorts what is attached to each port and finds what can never be reached.
func (r *resolver) order() {
	for key, ms := range r.plan.attached {
		grpc := slices.IndexFunc(ms, func(m match) bool { return m.route.GRPC() })
		http := slices.IndexFunc(ms, func(m match) bool { return !m.route.GRPC() })
		if grpc >= 0 && http >= 0 {
			// GEP-1294: "If multiple routes with different types both bind to the same Service and
			// Port pair, only a single route type should be applied. The rejected routes should be
			// ignored": nothing is ignored here.
			h, g := ms[http].route, ms[grpc].route
			r.add(h.Pos, object.MixedRoutes, "%s: port %d of %q is also routed by %s at %s, and only one kind can take effect: use one kind, or ports in parentRefs", label(h.Meta), key.port, key.service, label(g.Meta), g.Pos)
			continue
		}
		if grpc >= 0 {
			slices.SortStableFunc(ms, compareGRPC)
		} else {
			slices.SortStableFunc(ms, compareHTTP)
		}
		seen := map[string]match{}
		kept := ms[:0]
		for _, m := range ms {
			if m.rule < 0 {
				kept = append(kept, m)
				continue
			}
			id := identity(m.matchOf())
			if first, ok := seen[id]; ok {
				pos := m.matchOf().Pos
				r.add(pos, object.Shadowed, "%s: spec.rules[%d]: match %d is never reached: %s at %s matches the same calls first",
					label(m.route.Meta), m.rule, m.match, label(first.route.Meta), first.matchOf().Pos)
			} else {
				seen[id] = m
			}
			kept = append(kept, m)
		}
		r.plan.attached[key] = kept
	}
}

func length(m *object.Match) int { return len(m.Path) }

// compareHTTP: "precedence must be given to the match having: "Exact" path match. "Prefix" path
// match with largest number of characters. Method match. Largest number of header matches." Then
// compareOrigin.
func compareHTTP(a, b match) int {
	if a.rule < 0 || b.rule < 0 {
		return compareOrigin(a, b)
	}
	x, y := a.matchOf(), b.matchOf()
	return cmp.Or(
		compareBool(x.Exact, y.Exact),
		cmp.Compare(length(y), length(x)),
		compareBool(x.Method != "", y.Method != ""),
		cmp.Compare(len(y.Headers), len(x.Headers)),
		compareOrigin(a, b),
	)
}

// compareGRPC: "Precedence MUST be given to the rule with the largest number of: ... Characters in
// a matching service. Characters in a matching method. Header matches." Then compareOrigin.
func compareGRPC(a, b match) int {
	if a.rule < 0 || b.rule < 0 {
		return compareOrigin(a, b)
	}
	x, y := a.matchOf(), b.matchOf()
	return cmp.Or(
		cmp.Compare(len(y.GRPCService), len(x.GRPCService)),
		cmp.Compare(len(y.GRPCMethod), len(x.GRPCMethod)),
		cmp.Compare(len(y.Headers), len(x.Headers)),
		compareOrigin(a, b),
	)
}

// compareOrigin: "The oldest Route based on creation timestamp" (files have none), "the Route
// appearing first in alphabetical order by "{namespace}/{name}"", then "the FIRST matching rule
// (in list order)".
func compareOrigin(a, b match) int {
	return cmp.Or(
		cmp.Compare(a.route.Namespace+"/"+a.route.Name, b.route.Namespace+"/"+b.route.Name),
		cmp.Compare(a.rule, b.rule),
		cmp.Compare(a.match, b.match),
	)
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// identity is equal for matches of the same calls.
func identity(m *object.Match) string {
	hs := slices.Clone(m.Headers)
	slices.SortFunc(hs, func(a, b object.Header) int { return cmp.Compare(a.Name, b.Name) })
	return fmt.Sprintf("%q %v %q %q %q %q", m.Path, m.Exact, m.Method, m.GRPCService, m.GRPCMethod, hs)
}
