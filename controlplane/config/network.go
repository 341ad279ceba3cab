package config

import (
	"net/netip"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

const (
	maxNetworkRules = 256
	maxPeers        = 256
	maxExcept       = 64
	maxPortRanges   = 64
)

// errnos are the errors of a refused connect() that a rule may name, as connect(2) knows them.
var errnos = []string{"EPERM", "EACCES", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT"}

// networkPolicy is a NetworkPolicy as written. docs/config.md explains each field.
type networkPolicy struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   check.Metadata    `json:"metadata"`
	Spec       networkPolicySpec `json:"spec"`
}

type networkPolicySpec struct {
	Workloads subjectSelector `json:"workloads"`
	Mode      *string         `json:"mode"`
	Ingress   []ingressRule   `json:"ingress"`
	Egress    []egressRule    `json:"egress"`
}

type subjectSelector struct {
	Service *string           `json:"service"`
	Labels  map[string]string `json:"labels"`
}

// networkRuleFields are what rules of both directions have.
type networkRuleFields struct {
	Name   *string        `json:"name"`
	Action *string        `json:"action"`
	Ports  []networkPorts `json:"ports"`
	Errno  *string        `json:"errno"`
}

type ingressRule struct {
	networkRuleFields
	From []networkPeer `json:"from"`
}

type egressRule struct {
	networkRuleFields
	To []networkPeer `json:"to"`
}

type networkPeer struct {
	Service   *string           `json:"service"`
	Namespace *string           `json:"namespace"`
	Labels    map[string]string `json:"labels"`
	CIDR      *string           `json:"cidr"`
	Except    []string          `json:"except"`
	Entity    *string           `json:"entity"`
}

type networkPorts struct {
	Port     *int64  `json:"port"`
	EndPort  *int64  `json:"endPort"`
	Protocol *string `json:"protocol"`
}

func parseNetworkPolicy(t *tree.Tree) (object.NetworkPolicy, []object.Finding) {
	o := check.New(t, "NetworkPolicy")
	var in networkPolicy
	o.Decode(&in)
	teach(o)
	n := networkParser{o, object.NetworkPolicy{Meta: o.Meta("NetworkPolicy", in.Metadata, false)}}
	n.noEmpty()
	n.subject(in.Spec.Workloads)
	if in.Spec.Mode != nil && o.Enum(*in.Spec.Mode, []string{"enforce", "audit"}, "spec", "mode") {
		n.out.Audit = *in.Spec.Mode == "audit"
	}
	n.out.Ingress = direction(n, "ingress", "from", in.Spec.Ingress, func(r *ingressRule) (*networkRuleFields, []networkPeer) { return &r.networkRuleFields, r.From })
	n.out.Egress = direction(n, "egress", "to", in.Spec.Egress, func(r *egressRule) (*networkRuleFields, []networkPeer) { return &r.networkRuleFields, r.To })
	if !o.Tree.Has("spec", "ingress") && !o.Tree.Has("spec", "egress") {
		o.Add(object.NoNetworkRules, []any{"spec"}, "neither ingress nor egress: the policy has no effect: want rules of a direction, such as ingress: [{from: [{service: orders}]}]")
	}
	return n.out, o.Findings
}

type networkParser struct {
	*check.Object
	out object.NetworkPolicy
}

// noEmpty reports every key without a value. Elsewhere that is a key that was not written; here a
// list whose entries were commented out would turn some peers or ports into all of them, and an
// action without a word would turn a deny into an allow.
func (n *networkParser) noEmpty() {
	n.NoEmpty("spec")
	n.NoEmpty("spec", "workloads")
	for _, d := range []struct{ name, peers string }{{"ingress", "from"}, {"egress", "to"}} {
		for i := 0; n.Tree.Get("spec", d.name, i) != nil; i++ {
			n.NoEmpty("spec", d.name, i)
			for _, list := range []string{d.peers, "ports"} {
				for j := 0; n.Tree.Get("spec", d.name, i, list, j) != nil; j++ {
					n.NoEmpty("spec", d.name, i, list, j)
				}
			}
		}
	}
}

func (n *networkParser) subject(in subjectSelector) {
	at := func(field ...any) []any { return append([]any{"spec", "workloads"}, field...) }
	if !n.Required("the workloads that it is for, such as {service: billing}", at()...) || !n.Tree.Sound(at()...) {
		return
	}
	n.out.Subject = object.Selector{Namespace: n.out.Namespace, Pos: n.Tree.At(at()...)}
	if in.Service == nil && len(in.Labels) == 0 && n.Tree.Sound(at("service")...) && n.Tree.Sound(at("labels")...) {
		n.Add(object.SelectsNothing, at(), "neither service nor labels: it selects nothing: want {service: NAME}, {labels: {KEY: VALUE}} or both")
		return
	}
	n.selector(&n.out.Subject, in.Service, in.Labels, at)
}

// selector fills in service and labels.
func (n *networkParser) selector(out *object.Selector, service *string, labels map[string]string, at func(...any) []any) {
	if service != nil && n.ServiceName(*service, at("service")...) {
		out.Service = *service
	}
	if n.Tree.Has(at("labels")...) && n.Tree.Sound(at("labels")...) {
		if len(labels) == 0 {
			n.Add(object.SelectsNothing, at("labels"), "no labels: want at least one, or the key removed")
		}
		n.NoEmpty(at("labels")...)
		n.Labels(labels, at("labels")...)
		out.Labels = labels
	}
}

// direction reads the rules of ingress or egress; peers is the name of their field.
func direction[R any](n networkParser, name, peers string, in []R, parts func(*R) (*networkRuleFields, []networkPeer)) []object.NetworkRule {
	path := []any{"spec", name}
	if !n.Tree.Has(path...) || !n.Tree.Sound(path...) {
		return nil
	}
	if len(in) == 0 {
		n.Add(object.NoNetworkRules, path, "no rules: the list has no effect: to deny everybody write [{action: deny}], to allow everybody [{}], else remove it")
		return nil
	}
	n.Count(len(in), 1, maxNetworkRules, path...)
	first := map[string]int{}
	var out []object.NetworkRule
	for i := range in {
		at := func(field ...any) []any { return append([]any{"spec", name, i}, field...) }
		if !n.Tree.Sound(at()...) {
			continue
		}
		fields, from := parts(&in[i])
		r := object.NetworkRule{Pos: n.Tree.At(at()...)}
		if fields.Name != nil && n.Subdomain(*fields.Name, at("name")...) {
			r.Name = *fields.Name
			if j, ok := first[r.Name]; ok {
				n.Add(object.Repeated, at("name"), " %q: already %s[%d]: want each once", r.Name, name, j)
			} else {
				first[r.Name] = i
			}
		}
		if fields.Action != nil && n.Enum(*fields.Action, []string{"allow", "deny"}, at("action")...) {
			r.Deny = *fields.Action == "deny"
		}
		r.Peers = n.peers(from, at, peers)
		r.Ports = n.ports(fields.Ports, at)
		if fields.Errno != nil && n.Enum(*fields.Errno, errnos, at("errno")...) {
			switch {
			case name == "ingress":
				n.Add(object.Contradiction, at("errno"), " %s in ingress: it is what a refused connect() returns, and the one who connects is elsewhere: want it in egress", *fields.Errno)
			case !r.Deny && n.Tree.Sound(at("action")...):
				n.Add(object.Contradiction, at("errno"), " %s without action deny: only a refused connect() returns an error: want action: deny, or the key removed", *fields.Errno)
			default:
				r.Errno = *fields.Errno
			}
		}
		out = append(out, r)
	}
	return out
}

func (n *networkParser) peers(in []networkPeer, rule func(...any) []any, field string) []object.Peer {
	if !n.Tree.Has(rule(field)...) || !n.Tree.Sound(rule(field)...) {
		return nil
	}
	if len(in) == 0 {
		// In other systems an empty list is everybody in one place and nobody in another.
		n.Add(object.SelectsNothing, rule(field), "no peers: want at least one, or the key removed, which means everybody")
		return nil
	}
	n.Count(len(in), 1, maxPeers, rule(field)...)
	var out []object.Peer
	for i := range in {
		at := func(f ...any) []any { return append(rule(field, i), f...) }
		if n.Tree.Sound(at()...) {
			out = append(out, n.peer(&in[i], at))
		}
	}
	return out
}

func (n *networkParser) peer(in *networkPeer, at func(...any) []any) object.Peer {
	out := object.Peer{Pos: n.Tree.At(at()...)}
	workloads := n.Tree.Has(at("service")...) || n.Tree.Has(at("namespace")...) || n.Tree.Has(at("labels")...)
	cidr := n.Tree.Has(at("cidr")...)
	entity := n.Tree.Has(at("entity")...)
	switch {
	case !workloads && !cidr && !entity && n.Tree.Has(at("except")...):
		n.Add(object.MissingField, at("cidr"), "missing: except leaves something out of a cidr: want one")
		return out
	case !workloads && !cidr && !entity:
		n.Add(object.SelectsNothing, at(), "an empty peer: want service, namespace, labels, cidr or entity")
		return out
	case workloads && (cidr || entity) || cidr && entity:
		n.Add(object.Contradiction, at(), "a peer is workloads (service, namespace, labels), a cidr or an entity: want one of the three, others as peers of their own")
		return out
	case workloads:
		n.peerWorkloads(&out, in, at)
	case cidr:
		n.peerCIDR(&out, in, at)
	case entity:
		if in.Entity != nil && n.Enum(*in.Entity, []string{"host", "world", "mesh"}, at("entity")...) {
			out.Entity = object.Entity(*in.Entity)
		}
	}
	if !cidr && n.Tree.Has(at("except")...) {
		n.AddKey(object.Contradiction, at("except"), "without a cidr there is nothing to leave out: want it beside a cidr")
	}
	return out
}

func (n *networkParser) peerWorkloads(out *object.Peer, in *networkPeer, at func(...any) []any) {
	s := &object.Selector{Namespace: n.out.Namespace, Pos: out.Pos}
	if in.Namespace != nil && n.Namespace(*in.Namespace, at("namespace")...) {
		s.Namespace, s.NamespaceWritten = *in.Namespace, true
	}
	n.selector(s, in.Service, in.Labels, at)
	out.Workloads = s
}

func (n *networkParser) peerCIDR(out *object.Peer, in *networkPeer, at func(...any) []any) {
	var whole netip.Prefix
	if in.CIDR != nil {
		if p, ok := n.prefix(*in.CIDR, at("cidr")); ok {
			whole = p
		}
	}
	out.CIDR = whole
	if !n.Tree.Has(at("except")...) || !n.Tree.Sound(at("except")...) {
		return
	}
	n.Count(len(in.Except), 1, maxExcept, at("except")...)
	first := map[netip.Prefix]int{}
	for i, s := range in.Except {
		path := at("except", i)
		if !n.Tree.Sound(path...) {
			continue
		}
		p, ok := n.prefix(s, path)
		if !ok || !whole.IsValid() {
			continue
		}
		switch j, again := first[p]; {
		case again:
			n.Add(object.Repeated, path, " %v: already except[%d]: want each once", p, j)
		case p.Addr().BitLen() != whole.Addr().BitLen():
			n.Add(object.Contradiction, path, " %v is of another family than cidr %v: want a part of that", p, whole)
		case p.Bits() <= whole.Bits() || !whole.Contains(p.Addr()):
			n.Add(object.Contradiction, path, " %v: not a smaller part of cidr %v", p, whole)
		default:
			first[p] = i
			out.Except = append(out.Except, p)
		}
	}
}

func (n *networkParser) prefix(s string, path []any) (netip.Prefix, bool) {
	if !n.Tree.Sound(path...) {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
			n.Add(object.BadFormat, path, " %s: want a range: write %s/%d for this address alone", check.Quote(s), s, a.BitLen())
		} else {
			n.Add(object.BadFormat, path, " %s: want a range of addresses such as 10.0.0.0/8 or 2001:db8::/32", check.Quote(s))
		}
		return netip.Prefix{}, false
	}
	switch {
	case p.Addr().Is4In6():
		n.Add(object.BadFormat, path, " %s: want IPv4 written as such, 10.0.0.0/8: a policy holds for mapped addresses too", check.Quote(s))
	case p != p.Masked():
		n.Add(object.BadFormat, path, " %s: bits are set behind the first %d: want %v, or %v/%d for this address alone", check.Quote(s), p.Bits(), p.Masked(), p.Addr(), p.Addr().BitLen())
	default:
		return p, true
	}
	return netip.Prefix{}, false
}

func (n *networkParser) ports(in []networkPorts, rule func(...any) []any) []object.PortRange {
	if !n.Tree.Has(rule("ports")...) || !n.Tree.Sound(rule("ports")...) {
		return nil
	}
	if len(in) == 0 {
		n.Add(object.SelectsNothing, rule("ports"), "no ports: want at least one, or the key removed, which means every port")
		return nil
	}
	n.Count(len(in), 1, maxPortRanges, rule("ports")...)
	var out []object.PortRange
	for i := range in {
		at := func(f ...any) []any { return append(rule("ports", i), f...) }
		if n.Tree.Sound(at()...) {
			out = append(out, n.portRange(&in[i], at))
		}
	}
	return out
}

func (n *networkParser) portRange(in *networkPorts, at func(...any) []any) object.PortRange {
	out := object.PortRange{Protocol: object.TransportTCP, Pos: n.Tree.At(at()...)}
	if in.Protocol != nil {
		if !n.Enum(*in.Protocol, []string{"TCP", "UDP", "ICMP"}, at("protocol")...) {
			return out
		}
		out.Protocol = object.Transport(*in.Protocol)
	}
	hasPort, hasEnd := n.Tree.Has(at("port")...), n.Tree.Has(at("endPort")...)
	switch {
	case !hasPort && !hasEnd && !n.Tree.Has(at("protocol")...):
		n.Add(object.SelectsNothing, at(), "an empty entry: want port, protocol or both, such as {port: 8080}")
		return out
	case out.Protocol == object.TransportICMP && (hasPort || hasEnd):
		n.Add(object.Contradiction, at(), "ICMP has no ports: want {protocol: ICMP} alone")
		return out
	case hasEnd && !hasPort:
		n.Add(object.MissingField, at("port"), "missing: want the first port of the range beside endPort")
		return out
	case !hasPort:
		return out
	}
	if in.Port == nil || !n.Range(*in.Port, 1, 65535, at("port")...) {
		return out
	}
	out.First, out.Last = uint16(*in.Port), uint16(*in.Port)
	if in.EndPort != nil && n.Range(*in.EndPort, 1, 65535, at("endPort")...) {
		if *in.EndPort < *in.Port {
			n.Add(object.OutOfRange, at("endPort"), " %d is below port %d: the range is empty: want at least %d", *in.EndPort, *in.Port, *in.Port)
			return out
		}
		out.Last = uint16(*in.EndPort)
	}
	return out
}
