package tables

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

var (
	billing = Identity{Namespace: "shop", Service: "billing", Labels: map[string]string{"version": "v2"}}
	orders  = Identity{Namespace: "shop", Service: "orders", Labels: map[string]string{"tier": "web"}}
	cart    = Identity{Namespace: "shop", Service: "cart"}
	bank    = Identity{Namespace: "bank", Service: "ledger", Labels: map[string]string{"tier": "web"}}
)

func workloadsOf(who ...Identity) []*nodepb.Service {
	var out []*nodepb.Service
	for _, i := range who {
		out = append(out, &nodepb.Service{Namespace: i.Namespace, Name: i.Service, Workloads: []*nodepb.Workload{{Labels: i.Labels}}})
	}
	return out
}

func of(who Identity) *nodepb.Peer {
	return &nodepb.Peer{Kind: &nodepb.Peer_Workloads{Workloads: &nodepb.Selector{Namespace: who.Namespace, Service: who.Service}}}
}

func entity(e nodepb.Entity) *nodepb.Peer {
	return &nodepb.Peer{Kind: &nodepb.Peer_Entity{Entity: e}}
}

func inCIDR(cidr string, except ...string) *nodepb.Peer {
	return &nodepb.Peer{Kind: &nodepb.Peer_Cidr{Cidr: &nodepb.Cidr{Cidr: cidr, Except: except}}}
}

func tcp(first, last uint32) *nodepb.PortRange {
	return &nodepb.PortRange{Protocol: nodepb.Transport_TRANSPORT_TCP, First: first, Last: last}
}

// forBilling is one policy of billing with those egress rules.
func forBilling(rules ...*nodepb.PolicyRule) *nodepb.Policies {
	return &nodepb.Policies{Namespace: "shop", Service: "billing", Policies: []*nodepb.Policy{{
		Namespace: "shop", Name: "p", Source: "p.yaml:1",
		Subjects: []*nodepb.Selector{{Namespace: "shop", Service: "billing"}},
		Egress:   rules,
	}}}
}

func runs(who Identity) Workload {
	return Workload{Namespace: who.Namespace, Service: who.Service, Labels: who.Labels, UID: 1000}
}

func egress(peer uint64, port uint16) Query {
	return Query{Subject: billing.Number(), Proto: TCP, Port: port, Peer: peer, Addr: netip.MustParseAddr("10.1.2.3")}
}

func setPolicies(t testing.TB, table *Table, p *nodepb.Policies) {
	t.Helper()
	if err := table.SetPolicies(p); err != nil {
		t.Fatal(err)
	}
}

func TestPolicyThatIsNotValidIsRefusedWhole(t *testing.T) {
	for name, tc := range map[string]struct {
		rule *nodepb.PolicyRule
		want string
	}{
		"a peer of no kind":                {&nodepb.PolicyRule{Peers: []*nodepb.Peer{{}}}, "want one of them"},
		"an entity that is unknown":        {&nodepb.PolicyRule{Peers: []*nodepb.Peer{entity(9)}}, "entity 9: want host, world or mesh"},
		"no entity":                        {&nodepb.PolicyRule{Peers: []*nodepb.Peer{entity(0)}}, "entity 0"},
		"a CIDR without bits":              {&nodepb.PolicyRule{Peers: []*nodepb.Peer{inCIDR("10.0.0.0")}}, `cidr "10.0.0.0"`},
		"a CIDR of too many bits":          {&nodepb.PolicyRule{Peers: []*nodepb.Peer{inCIDR("10.0.0.0/33")}}, "want an address, a slash"},
		"an exception that is none":        {&nodepb.PolicyRule{Peers: []*nodepb.Peer{inCIDR("10.0.0.0/8", "x")}}, "except[0]"},
		"a port above 65535":               {&nodepb.PolicyRule{Ports: []*nodepb.PortRange{tcp(1, 65536)}}, "last <= 65535"},
		"a range that ends before it is":   {&nodepb.PolicyRule{Ports: []*nodepb.PortRange{tcp(80, 0)}}, "ports 80 to 0: want first <= last"},
		"a port of ICMP":                   {&nodepb.PolicyRule{Ports: []*nodepb.PortRange{{Protocol: nodepb.Transport_TRANSPORT_ICMP, First: 8, Last: 8}}}, "it has none"},
		"a protocol that is unknown":       {&nodepb.PolicyRule{Ports: []*nodepb.PortRange{{Protocol: 12}}}, "protocol 12"},
		"an errno that no system call has": {&nodepb.PolicyRule{Deny: true, Errno: 70000}, "errno 70000"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(1000, nil)
			table := memoryTable(t, n)
			table.SetWorkload(1, runs(billing))
			setPolicies(t, table, forBilling(&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders)}}))
			commit(t, table)
			before := n.writes()
			err := table.SetPolicies(forBilling(&nodepb.PolicyRule{}, tc.rule))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
			commit(t, table)
			if n.writes() != before {
				t.Error("refused policies wrote to the maps")
			}
		})
	}
}

// Only workloads of this node that a policy selects are written, and the rule behind a number is
// known by file and line.
func TestSubjectsAreThoseOfThisNodeThatAPolicySelects(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	set(t, table, workloadsOf(billing, orders, cart)...)
	p := forBilling(&nodepb.PolicyRule{Name: "to-orders", Source: "p.yaml:7", Peers: []*nodepb.Peer{of(orders)}, Ports: []*nodepb.PortRange{tcp(80, 80)}})
	p.Policies[0].Subjects[0].Labels = map[string]string{"version": "v2"}
	setPolicies(t, table, p)
	commit(t, table)
	if len(n.subjects.m) != 0 {
		t.Fatalf("%d subjects before any workload runs here", len(n.subjects.m))
	}
	old := billing
	old.Labels = map[string]string{"version": "v1"}
	table.SetWorkload(1, runs(billing))
	table.SetWorkload(2, runs(old)) // of the service, and not selected
	table.SetWorkload(3, runs(orders))
	c := commit(t, table)
	if len(n.subjects.m) != 1 || !slices.Equal(c.Subjects, []uint64{billing.Number()}) {
		t.Fatalf("subjects %v, change %+v: want billing v2 alone", n.subjects.m, c)
	}
	if w := n.workloads.m[1]; w.Identity != billing.Number() || w.Uid != 1000 || text(w.Ns[:]) != "shop" || text(w.Service[:]) != "billing" || w.Flags != 0 {
		t.Errorf("workload %+v", w)
	}
	if w, ok := table.Workload(3); !ok || w.Service != "orders" {
		t.Errorf("Workload(3) = %+v, %t", w, ok)
	}
	got := n.decide(egress(orders.Number(), 80))
	rule, ok := table.Rule(got.Rule)
	want := Rule{Policy: "shop/p", Name: "to-orders", Source: "p.yaml:7", Direction: "egress"}
	if got.Verdict != allow || !ok || rule != want {
		t.Errorf("decided %+v by %+v, want by %+v", got, rule, want)
	}
	if got := n.decide(egress(cart.Number(), 80)); got.Verdict != deny || got.Rule == 0 {
		t.Errorf("to cart: %+v: want denied by default, with the rule that makes it so", got)
	}

	// The policy goes: nothing is denied, and its rule is still known to records that come late.
	table.DeletePolicies("shop/billing")
	if c := commit(t, table); !slices.Equal(c.Subjects, []uint64{billing.Number()}) {
		t.Errorf("change %+v: want billing decided again", c)
	}
	if len(n.subjects.m)+len(n.policies.m)+len(n.portSets.m) != 0 {
		t.Errorf("left over: %v", n.meaning())
	}
	if rule, ok := table.Rule(got.Rule); !ok || rule != want {
		t.Errorf("rule of a policy that is gone: %+v, %t", rule, ok)
	}
	table.DeleteWorkload(1)
	table.DeleteWorkload(2)
	table.DeleteWorkload(2)
	table.DeleteWorkload(3)
	commit(t, table)
	if len(n.workloads.m) != 0 {
		t.Errorf("workloads %v", n.workloads.m)
	}
	n.check(t, table)
}

// A workload that comes or goes touches the policies that name it, and no others.
func TestNewIdentityTouchesOnlyPoliciesThatNameIt(t *testing.T) {
	n := newNode(10000, nil)
	table := memoryTable(t, n)
	table.SetWorkload(1, runs(billing))
	table.SetWorkload(2, runs(cart))
	setPolicies(t, table, forBilling(&nodepb.PolicyRule{Peers: []*nodepb.Peer{{Kind: &nodepb.Peer_Workloads{Workloads: &nodepb.Selector{Labels: map[string]string{"tier": "web"}}}}}}))
	setPolicies(t, table, &nodepb.Policies{Namespace: "shop", Service: "cart", Policies: []*nodepb.Policy{{
		Namespace: "shop", Name: "c", Subjects: []*nodepb.Selector{{Service: "cart"}},
		Ingress: []*nodepb.PolicyRule{{Peers: []*nodepb.Peer{entity(nodepb.Entity_ENTITY_MESH)}}},
	}}})
	commit(t, table)
	if got := n.decide(egress(bank.Number(), 80)); got.Verdict != deny {
		t.Errorf("to a workload that nobody announced: %+v: want denied", got)
	}
	set(t, table, workloadsOf(bank)...)
	if c := commit(t, table); !slices.Equal(c.Subjects, []uint64{billing.Number()}) {
		t.Errorf("change %+v: want billing alone", c)
	}
	if got := n.decide(egress(bank.Number(), 80)); got.Verdict != allow {
		t.Errorf("to a workload that the selector names: %+v", got)
	}
	set(t, table, workloadsOf(Identity{Namespace: "bank", Service: "vault"})...)
	if c := commit(t, table); c.Writes != 0 || len(c.Subjects) != 0 {
		t.Errorf("a workload that nobody names: %+v: want no write", c)
	}
	table.DeleteService("bank/ledger")
	commit(t, table)
	if got := n.decide(egress(bank.Number(), 80)); got.Verdict != deny {
		t.Errorf("to a workload that is gone: %+v", got)
	}
	n.check(t, table)
}

// Whatever moment a program looks, it sees all of the policies before or all of those after.
func TestPoliciesChangeAtOnce(t *testing.T) {
	r := newRandom(t)
	for range 60 {
		n := newNode(100000, nil)
		table := memoryTable(t, n)
		set(t, table, workloadsOf(billing, orders, cart, bank)...)
		table.SetWorkload(1, runs(billing))
		setPolicies(t, table, r.policies("shop", "billing"))
		if _, err := table.Commit(); err != nil {
			continue // too many segments
		}
		known := []uint64{billing.Number(), orders.Number(), cart.Number(), bank.Number()}
		var queries []Query
		for range 40 {
			queries = append(queries, r.query(known[:1], known))
		}
		answers := func() string {
			var b strings.Builder
			for _, q := range queries {
				c := n.decide(q)
				b.WriteByte('0' + c.Verdict)
				b.WriteByte('0' + c.Audit)
			}
			return b.String()
		}
		before := answers()
		var seen []string
		look := func() {
			if now := answers(); len(seen) == 0 || seen[len(seen)-1] != now {
				seen = append(seen, now)
			}
		}
		n.subjects.after, n.policies.after, n.portSets.after, n.cidrs.after = look, look, look, look
		setPolicies(t, table, r.policies("shop", "billing"))
		_, _ = table.Commit()
		n.check(t, table)
		after := answers()
		if len(seen) > 0 && seen[0] == before {
			seen = seen[1:]
		}
		if len(seen) > 1 || len(seen) == 1 && seen[0] != after {
			t.Fatalf("answers\n%s\nbecame\n%s\nover\n%s", before, after, strings.Join(seen, "\n"))
		}
	}
}

// Whatever moment a program looks, a service address leads to slots that are there.
func TestServiceAddressAlwaysLeadsSomewhere(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	set(t, table, numberedService(1, 3))
	commit(t, table)
	look := func() {
		for k, v := range n.services.m {
			if got := len(n.leads(v)); uint32(got) != v.Slots {
				t.Fatalf("%s: %d slots of %d", describe(k), got, v.Slots)
			}
			if k.Proto != 0 && v.Slots == 0 {
				t.Fatalf("%s leads nowhere", describe(k))
			}
		}
	}
	n.services.after, n.slots.after = look, look
	for _, endpoints := range []int{1, 5, 2, 5, 4} {
		set(t, table, numberedService(1, endpoints))
		commit(t, table)
	}
	n.check(t, table)
}

func TestRulesWithOneHashGetTwoNumbers(t *testing.T) {
	var r rules
	r.init()
	a := Rule{Policy: "shop/p", Name: "0"}
	n := hashRule(a)
	r.byNumber[n] = &numbered{number: n} // another rule came first
	if got := r.acquire(a); got != n+1 {
		t.Errorf("number %d, want the next after %d", got, n)
	}
	if again := r.acquire(a); again != r.byRule[a].number {
		t.Errorf("the same rule has two numbers: %d", again)
	}
}

// Flow logs ask for names while the agent commits; -race watches.
func TestLookupsBesideCommits(t *testing.T) {
	n := newNode(100000, nil)
	table := memoryTable(t, n)
	table.SetWorkload(1, runs(billing))
	set(t, table, numberedService(1, 1))
	setPolicies(t, table, forBilling(&nodepb.PolicyRule{Name: "r"}))
	commit(t, table)
	number := n.subjects.m[billing.Number()].Rule[0]
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			who, ok := table.Identity(billing.Number())
			rule, known := table.Rule(number)
			name, _, found := table.ServiceAt(netip.AddrPortFrom(vip(1), 80), TCP)
			if !ok || who.Service != "billing" || !known || rule.Name != "r" || !found || name != "svc1.ns1" {
				t.Errorf("%+v, %+v, %q: want them known throughout", who, rule, name)
				return
			}
			table.Usage()
			table.Workload(1)
		}
	})
	for i := range 200 {
		set(t, table, numberedService(1, 1+i%3), numberedService(i+2, 1))
		setPolicies(t, table, forBilling(&nodepb.PolicyRule{Name: "r", Peers: []*nodepb.Peer{of(orders)}[:i%2]}))
		commit(t, table)
	}
	close(done)
	wg.Wait()
}
