package xdsgen

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// notForCalls is why everybody but a node agent gets nothing of the agent's types.
const notForCalls = "only the node agent is served this type: user agent inlay-node, over the unix socket, as root or as the control plane's own user"

// notForNodes is the reverse.
const notForNodes = "a node agent is served the types inlay.node.v1 only"

// nodeType reports whether a type is the node agent's own.
func nodeType(typeURL string) bool { return typeURL == NodeServiceType || typeURL == NodePoliciesType }

// WithheldType says why a whole type is not served to a view; empty when it is.
func WithheldType(v View, typeURL string) string {
	switch {
	case v.Kind != Node && nodeType(typeURL):
		return notForCalls
	case v.Kind == Node && !nodeType(typeURL):
		return notForNodes
	}
	return ""
}

// NodeName is the name of a service in the node agent's types.
func NodeName(namespace, service string) string { return namespace + "/" + service }

// policyIndex finds the policies that may select a workload of a service.
type policyIndex struct {
	all    []ir.NetworkPolicy             // those of the mesh
	of     map[string][]*ir.NetworkPolicy // those of one service, by NAMESPACE/NAME
	common map[string][]*ir.NetworkPolicy // those by labels alone, by namespace
}

func newPolicyIndex(m *ir.Mesh) *policyIndex {
	x := &policyIndex{all: m.NetworkPolicies, of: map[string][]*ir.NetworkPolicy{}, common: map[string][]*ir.NetworkPolicy{}}
	for i := range m.NetworkPolicies {
		p := &m.NetworkPolicies[i]
		if p.Subject.Service == "" {
			x.common[p.Subject.Namespace] = append(x.common[p.Subject.Namespace], p)
		} else {
			name := NodeName(p.Subject.Namespace, p.Subject.Service)
			x.of[name] = append(x.of[name], p)
		}
	}
	return x
}

// lookup returns the policies of a service, by name. Labels are not asked: which ones a workload
// has, its node knows.
func (x *policyIndex) lookup(namespace, service string) []*ir.NetworkPolicy {
	of, common := x.of[NodeName(namespace, service)], x.common[namespace]
	if len(of) == 0 {
		return common
	}
	out := slices.Concat(of, common)
	slices.SortFunc(out, func(a, b *ir.NetworkPolicy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// same reports whether nothing differs in any policy, without looking when the list is the very one.
func (x *policyIndex) same(y *policyIndex) bool {
	return len(x.all) == len(y.all) && (len(x.all) == 0 || &x.all[0] == &y.all[0])
}

// samePolicies compares what two meshes say of one service.
func samePolicies(x, y []*ir.NetworkPolicy) bool {
	return slices.EqualFunc(x, y, func(a, b *ir.NetworkPolicy) bool { return a == b || reflect.DeepEqual(a, b) })
}

// node makes the resources of one service, NAMESPACE/NAME, for node agents.
func (g *generator) node(name string, s *ir.Service) {
	key := Key{Kind: Node, Type: NodeServiceType, Name: name}
	if old := g.prev.nodeService(key, s); old != nil {
		g.tables[Node].set(key, old)
	} else {
		m, healthy := nodeService(s)
		if r := g.addPlain(key, m); r != nil {
			r.Instances = healthy
		}
	}
	key.Type = NodePoliciesType
	if old := g.prev.nodePolicies(key, s, g.policies, g.samePolicies); old != nil {
		g.tables[Node].set(key, old)
		return
	}
	g.addPlain(key, nodePolicies(s.Namespace, s.Name, g.policies.lookup(s.Namespace, s.Name)))
}

// addPlain is add for messages that have no validation of their own. It returns what was made.
func (g *generator) addPlain(key Key, m proto.Message) *Resource {
	r, err := encodePlain(key.Type, key.Name, m)
	if err != nil {
		g.faults = append(g.faults, keyFault{key, &Fault{Kind: key.Kind, Type: key.Type, Name: key.Name, Err: err}})
		if last := g.prev.last(key); last != nil {
			g.tables[key.Kind].set(key, last)
		}
		return nil
	}
	g.encoded++
	g.tables[key.Kind].set(key, r)
	return r
}

func encodePlain(typeURL, name string, m proto.Message) (*Resource, error) {
	a, err := packPlain(m)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(a.Value)
	return &Resource{Type: typeURL, Name: name, Version: hex.EncodeToString(sum[:8]), Any: a}, nil
}

// nodeService is a service as nodes know it, and the ids of the instances that are healthy in it.
func nodeService(s *ir.Service) (*nodepb.Service, []string) {
	out := &nodepb.Service{Namespace: s.Namespace, Name: s.Name}
	for _, a := range s.VirtualAddresses {
		out.VirtualAddresses = append(out.VirtualAddresses, a.String())
	}
	workloads := make(map[string]uint32, len(s.Workloads))
	for i := range s.Workloads {
		w := &s.Workloads[i]
		workloads[ir.LabelKey(w.Labels)] = uint32(i)
		row := &nodepb.Workload{Labels: w.Labels}
		for _, a := range w.Addresses {
			row.Addresses = append(row.Addresses, a.String())
		}
		out.Workloads = append(out.Workloads, row)
	}
	var healthy []string
	for i := range s.Ports {
		p := &s.Ports[i]
		if !nodePort(p) {
			continue
		}
		port := &nodepb.ServicePort{Port: uint32(p.Number), Udp: p.Protocol == ir.UDP}
		for _, e := range callable(p.Clusters[0].Endpoints) {
			if e.Health == ir.Healthy && e.InstanceID != "" {
				healthy = append(healthy, e.InstanceID)
			}
			w, known := workloads[ir.LabelKey(e.Labels)]
			if !known { // a mesh that compile did not make
				w = uint32(len(out.Workloads))
				workloads[ir.LabelKey(e.Labels)] = w
				out.Workloads = append(out.Workloads, &nodepb.Workload{Labels: e.Labels})
			}
			for _, a := range oneOfEach(e.Addresses) {
				port.Endpoints = append(port.Endpoints, nodeEndpoint(&e, a, w))
			}
		}
		slices.SortFunc(port.Endpoints, func(a, b *nodepb.Endpoint) int { return cmp.Compare(a.GetAddress(), b.GetAddress()) })
		out.Ports = append(out.Ports, port)
	}
	slices.Sort(healthy)
	return out, slices.Compact(healthy)
}

// nodePort leaves out ports that the service has not: some route names them.
func nodePort(p *ir.Port) bool { return len(p.Clusters) > 0 && p.Clusters[0].EmptyReason == "" }

// oneOfEach returns the most preferred address of each family: each of them counts with the
// endpoint's weight among those of its family.
func oneOfEach(in []netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, six := range []bool{false, true} {
		if i := slices.IndexFunc(in, func(a netip.AddrPort) bool { return a.Addr().Unmap().Is6() == six }); i >= 0 {
			out = append(out, in[i])
		}
	}
	return out
}

func nodeEndpoint(e *ir.Endpoint, a netip.AddrPort, workload uint32) *nodepb.Endpoint {
	health := nodepb.Health_HEALTH_HEALTHY
	switch e.Health {
	case ir.Draining:
		health = nodepb.Health_HEALTH_DRAINING
	case ir.Unhealthy:
		health = nodepb.Health_HEALTH_UNHEALTHY
	}
	return &nodepb.Endpoint{
		Address: a.String(), Weight: max(e.Weight, 1), Priority: e.Priority, Health: health, Workload: workload,
		Region: e.Locality.Region, Zone: e.Locality.Zone, SubZone: e.Locality.SubZone, LocalityWeight: e.LocalityWeight,
	}
}

// nodePolicies is all that may select a workload of a service.
func nodePolicies(namespace, service string, policies []*ir.NetworkPolicy) *nodepb.Policies {
	out := &nodepb.Policies{Namespace: namespace, Service: service}
	for _, p := range policies {
		out.Policies = append(out.Policies, &nodepb.Policy{
			Namespace: p.Namespace, Name: p.Name, Source: fileLine(p.Source), Audit: p.Audit,
			Subjects: []*nodepb.Selector{nodeSelector(&p.Subject)},
			Ingress:  nodeRules(p.Ingress), Egress: nodeRules(p.Egress),
		})
	}
	return out
}

func nodeSelector(s *ir.Selector) *nodepb.Selector {
	return &nodepb.Selector{Namespace: s.Namespace, Service: s.Service, Labels: s.Labels}
}

func nodeRules(in []ir.NetworkRule) []*nodepb.PolicyRule {
	var out []*nodepb.PolicyRule
	for i := range in {
		r := &in[i]
		rule := &nodepb.PolicyRule{Name: r.Name, Source: fileLine(r.Source), Deny: r.Deny, Errno: r.Errno}
		for j := range r.Peers {
			rule.Peers = append(rule.Peers, nodePeer(&r.Peers[j]))
		}
		for _, p := range r.Ports {
			rule.Ports = append(rule.Ports, &nodepb.PortRange{Protocol: transports[p.Protocol], First: uint32(p.First), Last: uint32(p.Last)})
		}
		out = append(out, rule)
	}
	return out
}

func nodePeer(p *ir.NetworkPeer) *nodepb.Peer {
	switch {
	case p.Workloads.Namespace != "":
		return &nodepb.Peer{Kind: &nodepb.Peer_Workloads{Workloads: nodeSelector(&p.Workloads)}}
	case p.CIDR.IsValid():
		c := &nodepb.Cidr{Cidr: p.CIDR.String()}
		for _, e := range p.Except {
			c.Except = append(c.Except, e.String())
		}
		return &nodepb.Peer{Kind: &nodepb.Peer_Cidr{Cidr: c}}
	}
	return &nodepb.Peer{Kind: &nodepb.Peer_Entity{Entity: entities[p.Entity]}}
}

var transports = map[ir.Transport]nodepb.Transport{
	ir.TransportTCP: nodepb.Transport_TRANSPORT_TCP, ir.TransportUDP: nodepb.Transport_TRANSPORT_UDP, ir.TransportICMP: nodepb.Transport_TRANSPORT_ICMP,
}

var entities = map[ir.Entity]nodepb.Entity{
	ir.Host: nodepb.Entity_ENTITY_HOST, ir.World: nodepb.Entity_ENTITY_WORLD, ir.MeshPeer: nodepb.Entity_ENTITY_MESH,
}

func fileLine(s ir.Source) string {
	if s.File == "" {
		return ""
	}
	return fmt.Sprintf("%s:%d", s.File, s.Line)
}

// unknownPolicies makes the policies of a service that neither configuration nor registry know
// yet: its first workload asks before it registers, and those by labels hold for it all the same.
func (v *Views) unknownPolicies(name string) (*Resource, string) {
	namespace, service, ok := strings.Cut(name, "/")
	if !ok {
		return nil, "want a name of the form NAMESPACE/SERVICE"
	}
	if err := identity.CheckService(namespace, service); err != nil {
		return nil, err.Error()
	}
	r, err := encodePlain(NodePoliciesType, name, nodePolicies(namespace, service, v.policies.lookup(namespace, service)))
	if err != nil {
		return nil, err.Error()
	}
	return r, ""
}

// nodeService finds the earlier resource of a service that did not change.
func (u *reuse) nodeService(key Key, s *ir.Service) *Resource {
	if u.views == nil || u.stale[key] {
		return nil
	}
	old := u.views.services[key.Name]
	if old == nil || !slices.Equal(old.VirtualAddresses, s.VirtualAddresses) ||
		!slices.EqualFunc(old.Workloads, s.Workloads, func(a, b ir.Workload) bool {
			return slices.Equal(a.Addresses, b.Addresses) && maps.Equal(a.Labels, b.Labels)
		}) ||
		!slices.EqualFunc(old.Ports, s.Ports, func(a, b ir.Port) bool {
			if a.Number != b.Number || (a.Protocol == ir.UDP) != (b.Protocol == ir.UDP) || nodePort(&a) != nodePort(&b) {
				return false
			}
			return !nodePort(&a) || sameEndpoints(a.Clusters[0].Endpoints, b.Clusters[0].Endpoints)
		}) {
		return nil
	}
	return u.last(key)
}

// nodePolicies finds the earlier resource of a service whose policies did not change.
// same is true when none of the mesh did.
func (u *reuse) nodePolicies(key Key, s *ir.Service, now *policyIndex, same bool) *Resource {
	if u.views == nil || u.stale[key] {
		return nil
	}
	if before := u.views.policies; !same && !samePolicies(before.lookup(s.Namespace, s.Name), now.lookup(s.Namespace, s.Name)) {
		return nil
	}
	return u.last(key)
}
