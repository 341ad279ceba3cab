package tables

import (
	"cmp"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Model says what network policies mean: the reference that the programs are compared with. It asks
// the policies themselves, rule by rule, and knows nothing of maps. It is for tests and for
// explanations, not fast, and not safe for concurrent use.
type Model struct {
	// AllowAll is breakglass: policies are not asked.
	AllowAll bool

	identities map[uint64]Identity
	policies   map[string]*nodepb.Policies
	closed     map[uint64]bool
}

// Query is one connect, connection request or datagram.
type Query struct {
	Subject uint64 // identity of the workload of this node that is judged
	Dir     uint8  // 0 egress, 1 ingress, seen from the subject
	Proto   uint8  // TCP, UDP or ICMP
	// Port that the subject dialled (egress) or listens on (ingress); 0 with ICMP.
	Port uint16
	Peer uint64     // identity of the other end, or IDUnknown, IDHost, IDWorld, IDAgent
	Addr netip.Addr // of the other end, the real one
}

// Verdict answers a Query.
type Verdict struct {
	Allowed bool
	// Errno that a refused connect gets; 0 when allowed.
	Errno uint16
	// Rule that decided; the zero Rule when none spoke and nothing is denied by default. Of a
	// default-deny it is the first enforced rule that allows something in that direction.
	Rule Rule
	// WouldAllow and WouldRule are the same with audited policies enforced, too.
	WouldAllow bool
	WouldRule  Rule
}

// NewModel returns a model that knows no workload and no policy.
func NewModel() *Model {
	return &Model{
		identities: make(map[uint64]Identity),
		policies:   make(map[string]*nodepb.Policies),
		closed:     make(map[uint64]bool),
	}
}

// SetIdentity says that a workload exists, and returns its number.
func (m *Model) SetIdentity(i Identity) uint64 {
	m.identities[i.Number()] = i
	return i.Number()
}

// DeleteIdentity says that a workload does not exist any longer.
func (m *Model) DeleteIdentity(n uint64) { delete(m.identities, n) }

// SetPolicies says which policies select workloads of a service.
func (m *Model) SetPolicies(p *nodepb.Policies) {
	m.policies[p.GetNamespace()+"/"+p.GetService()] = p
}

// SetClosed says that the policies of a workload found no room in the maps, or have it now.
func (m *Model) SetClosed(subject uint64, closed bool) { m.closed[subject] = closed }

// Decide answers q.
func (m *Model) Decide(q Query) Verdict {
	// Breakglass: allow everything.
	if m.AllowAll {
		return Verdict{Allowed: true, WouldAllow: true}
	}
	// "A full map fails closed for policy."
	if m.closed[q.Subject] {
		return Verdict{Errno: uint16(syscall.EPERM)}
	}
	var v Verdict
	v.Allowed, v.Rule, v.Errno = m.decide(&q, func(p *nodepb.Policy) bool { return !p.GetAudit() })
	// "mode: audit logs what enforcing would have denied": the same question as if it were enforced.
	v.WouldAllow, v.WouldRule, _ = m.decide(&q, func(*nodepb.Policy) bool { return true })
	return v
}

// decide asks the policies that count.
func (m *Model) decide(q *Query, counts func(*nodepb.Policy) bool) (allowed bool, told Rule, errno uint16) {
	subject := m.identities[q.Subject]
	var byPeer, byCIDR best
	var selecting Rule // the first that allows anything in this direction
	for _, p := range m.policies[subject.Namespace+"/"+subject.Service].GetPolicies() {
		if !counts(p) || !selectsAny(p.GetSubjects(), subject) {
			continue
		}
		rules, direction := p.GetEgress(), "egress"
		if q.Dir == 1 {
			rules, direction = p.GetIngress(), "ingress"
		}
		for i, r := range rules {
			rule := Rule{
				Policy: p.GetNamespace() + "/" + p.GetName(), Name: cmp.Or(r.GetName(), fmt.Sprint(i)),
				Source: r.GetSource(), Direction: direction, Deny: r.GetDeny(), Audit: p.GetAudit(),
			}
			// "a direction that any enforced allow rule selects is default-deny, one that only deny or
			// audit rules select is not"
			if !r.GetDeny() && selecting == (Rule{}) {
				selecting = rule
			}
			if !speaksOfPort(r, q) {
				continue
			}
			if m.speaksOfPeer(r, q) {
				byPeer.offer(rule, r.GetErrno())
			}
			if speaksOfAddress(r, q) {
				byCIDR.offer(rule, r.GetErrno())
			}
		}
	}
	// "deny first"; of several the one told is the first that knows the peer by who it is, then the
	// first that knows it by its address.
	for _, denied := range []best{byPeer, byCIDR} {
		if denied.deny {
			return false, denied.rule, denied.errno
		}
	}
	for _, allowed := range []best{byPeer, byCIDR} {
		if allowed.found {
			return true, allowed.rule, 0
		}
	}
	if selecting != (Rule{}) {
		return false, selecting, uint16(syscall.EPERM)
	}
	return true, Rule{}, 0
}

// best is the first rule that denies, else the first that allows.
type best struct {
	found, deny bool
	rule        Rule
	errno       uint16
}

func (b *best) offer(r Rule, errno uint32) {
	if b.deny || b.found && !r.Deny {
		return
	}
	*b = best{found: true, deny: r.Deny, rule: r}
	if r.Deny {
		b.errno = cmp.Or(uint16(errno), uint16(syscall.EPERM)) // "0 means EPERM"
	}
}

// selectsAny: "any of them suffices".
func selectsAny(list []*nodepb.Selector, who Identity) bool {
	for _, s := range list {
		if selects(s, who) {
			return true
		}
	}
	return false
}

// selects: "all set conditions hold together".
func selects(s *nodepb.Selector, who Identity) bool {
	if s.GetNamespace() != "" && s.GetNamespace() != who.Namespace {
		return false
	}
	if s.GetService() != "" && s.GetService() != who.Service {
		return false
	}
	for name, value := range s.GetLabels() {
		if got, ok := who.Labels[name]; !ok || got != value {
			return false
		}
	}
	return true
}

// speaksOfPort: "Empty means every port of every protocol."
func speaksOfPort(r *nodepb.PolicyRule, q *Query) bool {
	if len(r.GetPorts()) == 0 {
		return true
	}
	for _, p := range r.GetPorts() {
		every := p.GetFirst() == 0 && p.GetLast() == 0
		switch p.GetProtocol() {
		case nodepb.Transport_TRANSPORT_TCP:
			if q.Proto != TCP {
				continue
			}
		case nodepb.Transport_TRANSPORT_UDP:
			if q.Proto != UDP {
				continue
			}
		case nodepb.Transport_TRANSPORT_ICMP:
			if q.Proto != ICMP {
				continue
			}
		}
		if every {
			return true
		}
		// "ICMP has none", so a range of ports never speaks of it.
		if q.Proto != ICMP && uint32(q.Port) >= p.GetFirst() && uint32(q.Port) <= p.GetLast() {
			return true
		}
	}
	return false
}

// speaksOfPeer says whether a rule knows the peer by who it is. "Empty means everybody."
func (m *Model) speaksOfPeer(r *nodepb.PolicyRule, q *Query) bool {
	if len(r.GetPeers()) == 0 {
		return true
	}
	for _, p := range r.GetPeers() {
		switch p.GetKind().(type) {
		case *nodepb.Peer_Workloads:
			if q.Peer < IDFirst {
				continue // no workload
			}
			s := p.GetWorkloads()
			if s.GetNamespace() == "" && s.GetService() == "" && len(s.GetLabels()) == 0 {
				return true // every workload, those that nobody announced included
			}
			if who, known := m.identities[q.Peer]; known && selects(s, who) {
				return true
			}
		case *nodepb.Peer_Entity:
			switch p.GetEntity() {
			case nodepb.Entity_ENTITY_HOST: // "a process of the same machine that is no workload"
				if q.Peer == IDHost || q.Peer == IDAgent {
					return true
				}
			case nodepb.Entity_ENTITY_WORLD:
				if q.Peer == IDWorld {
					return true
				}
			case nodepb.Entity_ENTITY_MESH: // "every workload"
				if q.Peer >= IDFirst {
					return true
				}
			}
		}
	}
	return false
}

// speaksOfAddress says whether a rule knows the peer by its address: "a range of addresses, whoever
// is behind them".
func speaksOfAddress(r *nodepb.PolicyRule, q *Query) bool {
	for _, p := range r.GetPeers() {
		c := p.GetCidr()
		if c == nil || !holds(c.GetCidr(), q.Addr) {
			continue
		}
		excepted := false
		for _, e := range c.GetExcept() {
			excepted = excepted || holds(e, q.Addr)
		}
		if !excepted {
			return true
		}
	}
	return false
}

// holds says whether an address is in a CIDR. IPv4 may be written as it is or mapped into IPv6 and
// is the same; a CIDR of IPv6 around the mapped range does not speak of IPv4.
func holds(cidr string, a netip.Addr) bool {
	p, err := netip.ParsePrefix(cidr)
	if err != nil {
		return false
	}
	a = a.Unmap()
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Addr().Is4() == a.Is4() && p.Masked().Contains(a)
}
