package tables

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Rule is one rule of a NetworkPolicy, as flows name it.
type Rule struct {
	Policy    string // NAMESPACE/NAME
	Name      string // of the rule, or its index
	Source    string // file:line
	Direction string // "egress" or "ingress", seen from the workload that the policy selects
	Deny      bool
	Audit     bool // the policy's mode
}

// policySet is what selects workloads of one service, parsed.
type policySet struct {
	name     string // NAMESPACE/SERVICE
	policies []*policy
}

type policy struct {
	subjects []selector
	rules    [2][]*policyRule // by direction
}

type policyRule struct {
	Rule
	number    uint32
	errno     uint16
	everybody bool
	mesh      bool // every workload
	host      bool
	world     bool
	workloads []selector
	cidrs     []cidr
	ports     [len(protocols)][]span // of each protocol; none: it does not speak of it
}

// protocols in the order of policyRule.ports.
var protocols = [...]uint8{TCP, UDP, ICMP}

// span is a range of ports, inclusive.
type span struct{ lo, hi uint16 }

// selector selects workloads; what is empty selects each.
type selector struct {
	namespace, service string
	labels             map[string]string
}

func (s *selector) all() bool { return s.namespace == "" && s.service == "" && len(s.labels) == 0 }

func (s *selector) matches(i *Identity) bool {
	if s.namespace != "" && s.namespace != i.Namespace || s.service != "" && s.service != i.Service {
		return false
	}
	for k, v := range s.labels {
		if got, ok := i.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// cidr is a range of addresses without some.
type cidr struct {
	in     netip.Prefix
	except []netip.Prefix
}

// selects says whether any policy speaks of a workload of the service.
func (p *policySet) selects(who *Identity) []*policy {
	if p == nil {
		return nil
	}
	var out []*policy
	for _, pol := range p.policies {
		if slices.ContainsFunc(pol.subjects, func(s selector) bool { return s.matches(who) }) {
			out = append(out, pol)
		}
	}
	return out
}

// names says whether a rule names the workload by more than that it is one.
func (p *policySet) names(who *Identity) bool {
	if p == nil {
		return false
	}
	for _, pol := range p.policies {
		for _, rules := range pol.rules {
			for _, r := range rules {
				if slices.ContainsFunc(r.workloads, func(s selector) bool { return s.matches(who) }) {
					return true
				}
			}
		}
	}
	return false
}

const maxErrno = 4095 // MAX_ERRNO of the kernel

func parsePolicies(p *nodepb.Policies) (*policySet, error) {
	if err := checkNames(p.GetNamespace(), p.GetService()); err != nil {
		return nil, err
	}
	out := &policySet{name: p.GetNamespace() + "/" + p.GetService()}
	var errs []error
	for _, in := range p.GetPolicies() {
		pol, err := parsePolicy(in)
		if err != nil {
			errs = append(errs, fmt.Errorf("policy %.130q (%.200s): %w", in.GetNamespace()+"/"+in.GetName(), in.GetSource(), err))
			continue
		}
		out.policies = append(out.policies, pol)
	}
	return out, errors.Join(errs...)
}

func parsePolicy(in *nodepb.Policy) (*policy, error) {
	out := &policy{}
	for _, s := range in.GetSubjects() {
		out.subjects = append(out.subjects, parseSelector(s))
	}
	var errs []error
	for dir, list := range [2][]*nodepb.PolicyRule{in.GetEgress(), in.GetIngress()} {
		for i, r := range list {
			rule, err := parseRule(r)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s[%d] (%.200s): %w", directions[dir], i, r.GetSource(), err))
				continue
			}
			rule.Rule = Rule{
				Policy:    in.GetNamespace() + "/" + in.GetName(),
				Name:      cmp.Or(r.GetName(), fmt.Sprint(i)),
				Source:    r.GetSource(),
				Direction: directions[dir],
				Deny:      r.GetDeny(),
				Audit:     in.GetAudit(),
			}
			out.rules[dir] = append(out.rules[dir], rule)
		}
	}
	return out, errors.Join(errs...)
}

// directions by number.
var directions = [2]string{"egress", "ingress"}

func parseSelector(s *nodepb.Selector) selector {
	return selector{namespace: s.GetNamespace(), service: s.GetService(), labels: s.GetLabels()}
}

func parseRule(in *nodepb.PolicyRule) (*policyRule, error) {
	out := &policyRule{errno: uint16(in.GetErrno()), everybody: len(in.GetPeers()) == 0}
	var errs []error
	if in.GetErrno() > maxErrno {
		errs = append(errs, fmt.Errorf("errno %d: want 0 to %d", in.GetErrno(), maxErrno))
	}
	for i, p := range in.GetPeers() {
		if err := out.parsePeer(p); err != nil {
			errs = append(errs, fmt.Errorf("peers[%d]: %w", i, err))
		}
	}
	if len(in.GetPorts()) == 0 { // "Empty means every port of every protocol."
		for i := range out.ports {
			out.ports[i] = []span{everyPort}
		}
	}
	for i, p := range in.GetPorts() {
		if err := out.parsePorts(p); err != nil {
			errs = append(errs, fmt.Errorf("ports[%d]: %w", i, err))
		}
	}
	for i := range out.ports {
		out.ports[i] = merge(out.ports[i])
	}
	return out, errors.Join(errs...)
}

// merge makes spans disjoint, apart and ascending.
func merge(list []span) []span {
	slices.SortFunc(list, func(a, b span) int { return cmp.Compare(a.lo, b.lo) })
	out := list[:0]
	for _, s := range list {
		if n := len(out); n > 0 && int(s.lo) <= int(out[n-1].hi)+1 {
			out[n-1].hi = max(out[n-1].hi, s.hi)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// speaks says whether one of the spans, as merge makes them, holds the port.
func speaks(list []span, port uint16) bool {
	i, ok := slices.BinarySearchFunc(list, port, func(s span, p uint16) int { return cmp.Compare(s.lo, p) })
	return ok || i > 0 && port <= list[i-1].hi
}

// parsePeer refuses what it does not know: a rule never speaks of more or fewer peers than its
// author wrote.
func (r *policyRule) parsePeer(p *nodepb.Peer) error {
	switch kind := p.GetKind().(type) {
	case *nodepb.Peer_Workloads:
		if s := parseSelector(kind.Workloads); s.all() {
			r.mesh = true
		} else {
			r.workloads = append(r.workloads, s)
		}
	case *nodepb.Peer_Entity:
		switch kind.Entity {
		case nodepb.Entity_ENTITY_HOST:
			r.host = true
		case nodepb.Entity_ENTITY_WORLD:
			r.world = true
		case nodepb.Entity_ENTITY_MESH:
			r.mesh = true
		default:
			return fmt.Errorf("entity %d: want host, world or mesh", kind.Entity)
		}
	case *nodepb.Peer_Cidr:
		in, err := parsePrefix(kind.Cidr.GetCidr())
		if err != nil {
			return err
		}
		c := cidr{in: in}
		for i, e := range kind.Cidr.GetExcept() {
			x, err := parsePrefix(e)
			if err != nil {
				return fmt.Errorf("except[%d]: %w", i, err)
			}
			c.except = append(c.except, x)
		}
		r.cidrs = append(r.cidrs, c)
	default:
		return errors.New("neither workloads, cidr nor entity: want one of them")
	}
	return nil
}

// parsePrefix reads a CIDR; one inside ::ffff:0:0/96 is that of IPv4.
func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("cidr %.80q: want an address, a slash and a number of bits", s)
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

var everyPort = span{0, 65535}

func (r *policyRule) parsePorts(p *nodepb.PortRange) error {
	every := p.GetFirst() == 0 && p.GetLast() == 0 // "both 0 means every port"
	s := everyPort
	if !every {
		if p.GetLast() > 65535 || p.GetFirst() > p.GetLast() {
			return fmt.Errorf("ports %d to %d: want first <= last <= 65535", p.GetFirst(), p.GetLast())
		}
		s = span{uint16(p.GetFirst()), uint16(p.GetLast())}
	}
	switch p.GetProtocol() {
	case nodepb.Transport_TRANSPORT_UNSPECIFIED:
		r.add(TCP, s)
		r.add(UDP, s)
		if every {
			r.add(ICMP, s)
		}
	case nodepb.Transport_TRANSPORT_TCP:
		r.add(TCP, s)
	case nodepb.Transport_TRANSPORT_UDP:
		r.add(UDP, s)
	case nodepb.Transport_TRANSPORT_ICMP:
		if !every {
			return fmt.Errorf("ports %d to %d of ICMP: it has none: want no port", p.GetFirst(), p.GetLast())
		}
		r.add(ICMP, s)
	default:
		return fmt.Errorf("protocol %d: want TCP, UDP or ICMP", p.GetProtocol())
	}
	return nil
}

func (r *policyRule) add(proto uint8, s span) {
	i := slices.Index(protocols[:], proto)
	r.ports[i] = append(r.ports[i], s)
}
