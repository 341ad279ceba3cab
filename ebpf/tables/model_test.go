package tables

import (
	"net/netip"
	"syscall"
	"testing"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// What the model says of each sentence of the semantics, of billing's connections to others.
func TestModel(t *testing.T) {
	rule := func(f func(*nodepb.PolicyRule)) *nodepb.PolicyRule {
		r := &nodepb.PolicyRule{}
		f(r)
		return r
	}
	allowTo := func(peers ...*nodepb.Peer) *nodepb.PolicyRule {
		return rule(func(r *nodepb.PolicyRule) { r.Peers = peers })
	}
	denyTo := func(peers ...*nodepb.Peer) *nodepb.PolicyRule {
		return rule(func(r *nodepb.PolicyRule) { r.Peers, r.Deny = peers, true })
	}
	policy := func(f func(*nodepb.Policy), egress ...*nodepb.PolicyRule) *nodepb.Policy {
		p := &nodepb.Policy{Namespace: "shop", Name: "p", Subjects: []*nodepb.Selector{{Namespace: "shop", Service: "billing"}}, Egress: egress}
		if f != nil {
			f(p)
		}
		return p
	}
	audit := func(p *nodepb.Policy) { p.Name, p.Audit = "a", true }
	on := func(ports ...*nodepb.PortRange) *nodepb.PolicyRule {
		return rule(func(r *nodepb.PolicyRule) { r.Ports = ports })
	}
	const (
		allowed = "allowed"
		denied  = "denied"
		audited = "audited" // allowed, and would not be
	)
	type ask struct {
		peer  uint64
		addr  string
		proto uint8
		port  uint16
		dir   uint8
	}
	to := func(who Identity) ask { return ask{peer: who.Number(), addr: "10.1.2.3", proto: TCP, port: 80} }
	number := func(n uint64) ask { return ask{peer: n, addr: "10.1.2.3", proto: TCP, port: 80} }
	port := func(proto uint8, p uint16) ask {
		return ask{peer: orders.Number(), addr: "10.1.2.3", proto: proto, port: p}
	}
	addr := func(a string) ask { return ask{peer: IDWorld, addr: a, proto: TCP, port: 80} }
	type answers map[ask]string
	for name, tc := range map[string]struct {
		policies []*nodepb.Policy
		want     answers
	}{
		"a workload that no policy selects may do everything": {nil, answers{to(orders): allowed, number(IDUnknown): allowed}},
		"a policy that selects another version says nothing": {
			[]*nodepb.Policy{policy(func(p *nodepb.Policy) { p.Subjects[0].Labels = map[string]string{"version": "v1"} }, denyTo())},
			answers{to(orders): allowed},
		},
		"any of the subjects suffices": {
			[]*nodepb.Policy{policy(func(p *nodepb.Policy) {
				p.Subjects = append([]*nodepb.Selector{{Service: "cart"}}, p.Subjects...)
			}, denyTo())},
			answers{to(orders): denied},
		},
		"a policy without subjects selects nobody": {
			[]*nodepb.Policy{policy(func(p *nodepb.Policy) { p.Subjects = nil }, denyTo())}, answers{to(orders): allowed},
		},
		"empty lists of rules change nothing": {[]*nodepb.Policy{policy(nil)}, answers{to(orders): allowed}},
		"a direction that an allow rule selects is default-deny, the other is not": {
			[]*nodepb.Policy{policy(nil, allowTo(of(orders)))},
			answers{to(orders): allowed, to(cart): denied, number(IDHost): denied, {peer: cart.Number(), addr: "10.1.2.3", proto: TCP, port: 80, dir: 1}: allowed},
		},
		"one that only deny rules select is not": {
			[]*nodepb.Policy{policy(nil, denyTo(of(orders)))}, answers{to(orders): denied, to(cart): allowed},
		},
		"one that only audited rules select is not, and would be": {
			[]*nodepb.Policy{policy(audit, allowTo(of(orders)))}, answers{to(orders): allowed, to(cart): audited},
		},
		"an audited deny is told and denies nothing": {
			[]*nodepb.Policy{policy(audit, denyTo(of(orders)))}, answers{to(orders): audited, to(cart): allowed},
		},
		"an audited deny tells of what an enforced rule allows": {
			[]*nodepb.Policy{policy(audit, denyTo(of(orders))), policy(nil, allowTo(entity(nodepb.Entity_ENTITY_MESH)))},
			answers{to(orders): audited, to(cart): allowed, number(IDWorld): denied},
		},
		"an audited allow would allow what is denied by default, and does not": {
			[]*nodepb.Policy{policy(audit, allowTo(of(cart))), policy(nil, allowTo(of(orders)))},
			answers{to(orders): allowed, to(cart): denied},
		},
		"deny first, in any order": {
			[]*nodepb.Policy{policy(nil, allowTo(of(orders)), denyTo(of(orders)), allowTo(of(orders)))}, answers{to(orders): denied},
		},
		"an allow rule without peers allows everybody": {
			[]*nodepb.Policy{policy(nil, allowTo())},
			answers{to(orders): allowed, number(IDUnknown): allowed, number(IDHost): allowed, number(IDWorld): allowed, number(IDAgent): allowed},
		},
		"host is a process of the machine that is no workload": {
			[]*nodepb.Policy{policy(nil, allowTo(entity(nodepb.Entity_ENTITY_HOST)))},
			answers{number(IDHost): allowed, number(IDAgent): allowed, number(IDWorld): denied, number(IDUnknown): denied, to(orders): denied},
		},
		"world is everybody outside the mesh and the machine": {
			[]*nodepb.Policy{policy(nil, allowTo(entity(nodepb.Entity_ENTITY_WORLD)))},
			answers{number(IDWorld): allowed, number(IDHost): denied, number(IDUnknown): denied, to(orders): denied},
		},
		"mesh is every workload, known or not": {
			[]*nodepb.Policy{policy(nil, allowTo(entity(nodepb.Entity_ENTITY_MESH)))},
			answers{to(orders): allowed, number(1 << 40): allowed, number(IDFirst): allowed, number(IDFirst - 1): denied, number(IDHost): denied, number(IDUnknown): denied},
		},
		"a selector of labels holds across namespaces; of a workload that nobody announced it knows nothing": {
			[]*nodepb.Policy{policy(nil, allowTo(&nodepb.Peer{Kind: &nodepb.Peer_Workloads{Workloads: &nodepb.Selector{Labels: map[string]string{"tier": "web"}}}}))},
			answers{to(orders): allowed, to(bank): allowed, to(cart): denied, number(1 << 40): denied},
		},
		"a CIDR is whoever is behind it, without its exceptions": {
			[]*nodepb.Policy{policy(nil, allowTo(inCIDR("10.0.0.0/8", "10.1.0.0/16")))},
			answers{addr("10.2.0.1"): allowed, addr("10.1.0.1"): denied, addr("192.0.2.1"): denied, {peer: orders.Number(), addr: "10.2.0.1", proto: TCP, port: 80}: allowed, {peer: IDUnknown, addr: "10.2.0.1", proto: TCP, port: 80}: allowed},
		},
		"an exception holds for its own CIDR only": {
			[]*nodepb.Policy{policy(nil, allowTo(inCIDR("10.0.0.0/8", "10.1.0.0/16"), inCIDR("10.1.2.0/24")))},
			answers{addr("10.1.2.3"): allowed, addr("10.1.3.3"): denied},
		},
		"a mapped address and a mapped CIDR are IPv4": {
			[]*nodepb.Policy{policy(nil, allowTo(inCIDR("::ffff:10.0.0.0/104")))},
			answers{addr("10.1.2.3"): allowed, addr("::ffff:10.1.2.3"): allowed, addr("11.0.0.1"): denied, addr("::1"): denied},
		},
		"every address of IPv6 is none of IPv4": {
			[]*nodepb.Policy{policy(nil, allowTo(inCIDR("::/0")))},
			answers{addr("fd00::1"): allowed, addr("10.1.2.3"): denied, addr("::ffff:10.1.2.3"): denied},
		},
		"every address of IPv4 is none of IPv6": {
			[]*nodepb.Policy{policy(nil, denyTo(inCIDR("0.0.0.0/0")))},
			answers{addr("fd00::1"): allowed, addr("10.1.2.3"): denied},
		},
		"a deny by address comes before an allow by name": {
			[]*nodepb.Policy{policy(nil, allowTo(of(orders)), denyTo(inCIDR("10.1.0.0/16")))}, answers{to(orders): denied},
		},
		"a range of ports, inclusive": {
			[]*nodepb.Policy{policy(nil, on(tcp(80, 90)))},
			answers{port(TCP, 80): allowed, port(TCP, 90): allowed, port(TCP, 79): denied, port(TCP, 91): denied, port(UDP, 80): denied, port(ICMP, 0): denied},
		},
		"a protocol alone is every port of it": {
			[]*nodepb.Policy{policy(nil, on(&nodepb.PortRange{Protocol: nodepb.Transport_TRANSPORT_UDP}))},
			answers{port(UDP, 0): allowed, port(UDP, 65535): allowed, port(TCP, 80): denied, port(ICMP, 0): denied},
		},
		"ICMP": {
			[]*nodepb.Policy{policy(nil, on(&nodepb.PortRange{Protocol: nodepb.Transport_TRANSPORT_ICMP}))},
			answers{port(ICMP, 0): allowed, port(TCP, 80): denied},
		},
		"a port of no protocol is that of TCP and UDP; ICMP has none": {
			[]*nodepb.Policy{policy(nil, on(&nodepb.PortRange{First: 0, Last: 80}))},
			answers{port(TCP, 80): allowed, port(UDP, 0): allowed, port(UDP, 81): denied, port(ICMP, 0): denied},
		},
		"no port and no protocol is everything": {
			[]*nodepb.Policy{policy(nil, on(&nodepb.PortRange{}))},
			answers{port(TCP, 1): allowed, port(UDP, 1): allowed, port(ICMP, 0): allowed},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := NewModel()
			for _, who := range []Identity{billing, orders, cart, bank} {
				m.SetIdentity(who)
			}
			m.SetPolicies(&nodepb.Policies{Namespace: "shop", Service: "billing", Policies: tc.policies})
			for q, want := range tc.want {
				v := m.Decide(Query{Subject: billing.Number(), Dir: q.dir, Proto: q.proto, Port: q.port, Peer: q.peer, Addr: netip.MustParseAddr(q.addr)})
				got := denied
				if v.Allowed && v.WouldAllow {
					got = allowed
				} else if v.Allowed {
					got = audited
				}
				if got != want {
					t.Errorf("%+v: %s, want %s (%+v)", q, got, want, v)
				}
				if (v.Errno != 0) == v.Allowed {
					t.Errorf("%+v: errno %d", q, v.Errno)
				}
			}
		})
	}
}

func TestModelTellsTheRule(t *testing.T) {
	m := NewModel()
	m.SetIdentity(billing)
	m.SetIdentity(orders)
	q := egress(orders.Number(), 80)
	p := forBilling(
		&nodepb.PolicyRule{Name: "first", Source: "p.yaml:3", Peers: []*nodepb.Peer{entity(nodepb.Entity_ENTITY_MESH)}},
		&nodepb.PolicyRule{Name: "by address", Deny: true, Errno: 13, Peers: []*nodepb.Peer{inCIDR("10.0.0.0/8")}},
		&nodepb.PolicyRule{Deny: true, Errno: 111, Peers: []*nodepb.Peer{of(orders)}},
		&nodepb.PolicyRule{Name: "last", Deny: true, Errno: 113},
	)
	m.SetPolicies(p)
	step := func(what, rule string, errno syscall.Errno) {
		t.Helper()
		if v := m.Decide(q); v.Rule.Name != rule || v.Errno != uint16(errno) {
			t.Errorf("%s: %+v, want rule %q and errno %d", what, v, rule, errno)
		}
	}
	step("of several that deny, the first that knows the peer by who it is", "2", 111)
	p.Policies[0].Egress = p.Policies[0].Egress[:2]
	step("then by its address", "by address", 13)
	p.Policies[0].Egress = p.Policies[0].Egress[:1]
	step("then the first that allows", "first", 0)
	q.Peer = IDWorld
	step("nobody speaks: the one that makes it default-deny", "first", syscall.EPERM)
	m.SetClosed(billing.Number(), true)
	step("closed", "", syscall.EPERM)
	m.AllowAll = true
	step("breakglass", "", 0)
	m.AllowAll = false
	m.SetClosed(billing.Number(), false)
	q.Peer = orders.Number()
	m.DeleteIdentity(orders.Number())
	step("the mesh, announced or not", "first", 0)
}
