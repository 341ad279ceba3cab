package compile

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// errnos are Linux's numbers, which nodes use wherever the control plane runs.
var errnos = map[string]uint32{
	"EPERM": 1, "EACCES": 13, "ENETUNREACH": 101, "ETIMEDOUT": 110, "ECONNREFUSED": 111, "EHOSTUNREACH": 113,
}

var entities = map[object.Entity]ir.Entity{object.Host: ir.Host, object.World: ir.World, object.Mesh: ir.MeshPeer}

var transports = map[object.Transport]ir.Transport{
	object.TransportTCP: ir.TransportTCP, object.TransportUDP: ir.TransportUDP, object.TransportICMP: ir.TransportICMP,
}

// networkPolicies resolves the policies of connections. Which services exist is decided by what is
// declared: one that only registers may come and go, and a policy that names it by a slip of the
// pen would silently allow or deny nobody.
func (r *resolver) networkPolicies() {
	namespaces := map[string]bool{}
	for _, s := range r.plan.services {
		namespaces[s.Namespace] = true
	}
	for i := range r.set.NetworkPolicies {
		p := &r.set.NetworkPolicies[i]
		r.selected(p, "spec.workloads", &p.Subject)
		for _, d := range []struct {
			name  string
			rules []object.NetworkRule
		}{{"ingress", p.Ingress}, {"egress", p.Egress}} {
			for j := range d.rules {
				for k := range d.rules[j].Peers {
					peer := &d.rules[j].Peers[k]
					if peer.Workloads == nil {
						continue
					}
					at := fmt.Sprintf("spec.%s[%d].%s[%d]", d.name, j, map[string]string{"ingress": "from", "egress": "to"}[d.name], k)
					if ns := peer.Workloads.Namespace; peer.Workloads.Service == "" && !namespaces[ns] && peer.Workloads.NamespaceWritten {
						if !r.set.Incomplete && !r.refusedIn(ns) {
							r.add(peer.Pos, object.UnknownPeer, "%s: %s: no MeshService is declared in namespace %q: the peer is whoever registers there, and until then nobody", label(p.Meta), at, ns)
						}
						continue
					}
					r.selected(p, at, peer.Workloads)
				}
			}
		}
		r.plan.network = append(r.plan.network, networkPolicy(p))
	}
	slices.SortFunc(r.plan.network, func(x, y ir.NetworkPolicy) int {
		return cmp.Or(cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name))
	})
}

// selected reports a selector of a service that is not declared.
func (r *resolver) selected(p *object.NetworkPolicy, at string, s *object.Selector) {
	n := name{s.Namespace, s.Service}
	if s.Service == "" || r.plan.byName[n] != nil || r.lost(n) {
		return
	}
	r.add(s.Pos, object.UnknownService, "%s: %s: %s (an instance that registers does not declare it)", label(p.Meta), at, r.noService(n))
}

// refusedIn reports whether a service of a namespace was refused.
func (r *resolver) refusedIn(namespace string) bool {
	for n := range r.refused {
		if n.namespace == namespace {
			return true
		}
	}
	return false
}

func networkPolicy(p *object.NetworkPolicy) ir.NetworkPolicy {
	return ir.NetworkPolicy{
		Namespace: p.Namespace, Name: p.Name, Source: ir.Source(p.Pos),
		Subject: selector(&p.Subject), Audit: p.Audit,
		Ingress: networkRules(p.Ingress), Egress: networkRules(p.Egress),
	}
}

func selector(s *object.Selector) ir.Selector {
	return ir.Selector{Namespace: s.Namespace, Service: s.Service, Labels: s.Labels}
}

func networkRules(in []object.NetworkRule) []ir.NetworkRule {
	var out []ir.NetworkRule
	for i := range in {
		r := &in[i]
		rule := ir.NetworkRule{Name: r.Name, Source: ir.Source(r.Pos), Deny: r.Deny, Errno: errnos[r.Errno]}
		if rule.Name == "" {
			rule.Name = fmt.Sprint(i)
		}
		for j := range r.Peers {
			p := &r.Peers[j]
			peer := ir.NetworkPeer{CIDR: p.CIDR, Except: p.Except, Entity: entities[p.Entity]}
			if p.Workloads != nil {
				peer.Workloads = selector(p.Workloads)
			}
			rule.Peers = append(rule.Peers, peer)
		}
		for _, p := range r.Ports {
			rule.Ports = append(rule.Ports, ir.PortRange{Protocol: transports[p.Protocol], First: p.First, Last: p.Last})
		}
		out = append(out, rule)
	}
	return out
}
