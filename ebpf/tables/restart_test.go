package tables

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// A restarted agent that sets the same again writes nothing, whatever the order, and prunes what
// is not there any longer.
func TestRestart(t *testing.T) {
	r := newRandom(t)
	for range 40 {
		n := newNode(100000, nil)
		table := memoryTable(t, n)
		identities := []Identity{billing, orders, cart, bank}
		policies := []*nodepb.Policies{r.policies("shop", "billing"), r.policies("shop", "orders"), r.policies("bank", "ledger")}
		for _, p := range policies {
			p.Policies = slices.DeleteFunc(p.Policies, func(p *nodepb.Policy) bool { return p.Name == "stripes" })
		}
		var services []*nodepb.Service
		for i := range 20 {
			services = append(services, numberedService(i, r.IntN(4)))
		}
		for i, s := range workloadsOf(identities...) {
			s.VirtualAddresses = []string{vip(100 + i).String()}
			s.Workloads[0].Addresses = []string{"10.0.0.1"} // shared
			s.Ports = []*nodepb.ServicePort{{Port: 80, Endpoints: []*nodepb.Endpoint{ep("10.9.9.9:80")}}}
			services = append(services, s)
		}
		say := func(table *Table) (steps []func()) {
			for _, s := range services {
				steps = append(steps, func() { set(t, table, s) })
			}
			for _, p := range policies {
				steps = append(steps, func() { setPolicies(t, table, p) })
			}
			for i, who := range identities {
				steps = append(steps, func() { table.SetWorkload(uint64(i+1), runs(who)) })
			}
			steps = append(steps, func() { table.SetLocalAddrs(4, []netip.Addr{netip.MustParseAddr("10.0.0.5"), {}}) })
			r.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
			return steps
		}
		for _, step := range say(table) {
			step()
			if r.chance(50) {
				commit(t, table)
			}
		}
		commit(t, table)
		if err := table.Prune(); err != nil {
			t.Fatal(err)
		}
		n.check(t, table)
		before, writes := n.meaning(), n.writes()

		again := memoryTable(t, n)
		for _, step := range say(again) {
			step()
			if r.chance(50) {
				commit(t, again)
			}
		}
		commit(t, again)
		if err := again.Prune(); err != nil {
			t.Fatal(err)
		}
		if c := commit(t, again); len(c.Gone) != 0 || n.writes() != writes {
			t.Fatalf("the same state after a restart: %d writes, gone %v: want none", n.writes()-writes, c.Gone)
		}
		n.check(t, again)
		equalMeaning(t, n.meaning(), before)

		// Meanwhile half of it went.
		third := memoryTable(t, n)
		services, policies, identities = services[:10], policies[:1], identities[:2]
		for _, step := range say(third) {
			step()
			if r.chance(30) {
				commit(t, third)
			}
		}
		if err := third.Prune(); err != nil {
			t.Fatal(err)
		}
		n.check(t, third)
		fresh := newNode(100000, nil)
		fourth := memoryTable(t, fresh)
		for _, step := range say(fourth) {
			step()
		}
		commit(t, fourth)
		equalMeaning(t, n.meaning(), fresh.meaning())
		if third.Services() != 10 {
			t.Errorf("%d services, want 10", third.Services())
		}
	}
}

// Until a restarted agent knows all, the policies that it found stay: half of what they name would
// deny what is allowed or allow what is denied.
func TestRestartKeepsPoliciesUntilAllIsKnown(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	denyOrders := forBilling(&nodepb.PolicyRule{Deny: true, Peers: []*nodepb.Peer{of(orders)}})
	say := func(table *Table) {
		table.SetWorkload(1, runs(billing))
		setPolicies(t, table, denyOrders)
	}
	set(t, table, workloadsOf(orders)...)
	say(table)
	commit(t, table)
	again := memoryTable(t, n)
	say(again)
	if c := commit(t, again); c.Writes+c.Deletes != 0 {
		t.Errorf("before orders was announced again: %+v", c)
	}
	if got := n.decide(egress(orders.Number(), 80)); got.Verdict != deny {
		t.Fatalf("to orders before all was known: %+v", got)
	}
	set(t, again, workloadsOf(orders)...)
	if err := again.Prune(); err != nil {
		t.Fatal(err)
	}
	if c := commit(t, again); c.Writes+c.Deletes != 0 {
		t.Errorf("all is as it was: %+v", c)
	}
	if got := n.decide(egress(orders.Number(), 80)); got.Verdict != deny {
		t.Fatalf("to orders: %+v", got)
	}
	// A third agent finds that orders is gone.
	third := memoryTable(t, n)
	say(third)
	if err := third.Prune(); err != nil {
		t.Fatal(err)
	}
	if c := commit(t, third); !slices.Equal(c.Subjects, []uint64{billing.Number()}) {
		t.Errorf("change %+v: want billing written anew, as Prune did", c)
	}
	n.check(t, third)
}

// A commit that was cut short at any write leaves maps that the next agent repairs, and until then
// the old policies.
func TestCommitCutShort(t *testing.T) {
	for cut := range 60 {
		n := newNode(1000, nil)
		table := memoryTable(t, n)
		set(t, table, workloadsOf(orders, bank)...)
		set(t, table, numberedService(1, 2))
		table.SetWorkload(1, runs(billing))
		setPolicies(t, table, forBilling(&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders), inCIDR("10.0.0.0/8")}, Ports: []*nodepb.PortRange{tcp(80, 80)}}))
		commit(t, table)
		type killed struct{}
		left := cut
		die := func() {
			if left--; left < 0 {
				panic(killed{})
			}
		}
		n.subjects.after, n.policies.after, n.portSets.after, n.cidrs.after, n.services.after, n.slots.after = die, die, die, die, die, die
		next := func(table *Table) {
			set(t, table, workloadsOf(orders, bank)...)
			set(t, table, numberedService(1, 3))
			table.SetWorkload(1, runs(billing))
			setPolicies(t, table, forBilling(&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(bank), inCIDR("10.0.0.0/8", "10.1.0.0/16")}, Ports: []*nodepb.PortRange{tcp(80, 81)}}))
		}
		finished := func() (ok bool) {
			defer func() {
				if e := recover(); e != nil {
					if _, is := e.(killed); !is {
						panic(e)
					}
				}
			}()
			next(table)
			_, err := table.Commit()
			return err == nil
		}()
		n.subjects.after, n.policies.after, n.portSets.after, n.cidrs.after, n.services.after, n.slots.after = nil, nil, nil, nil, nil, nil
		for peer, port := range map[uint64]uint16{orders.Number(): 80, bank.Number(): 81} {
			if got := n.decide(Query{Subject: billing.Number(), Proto: TCP, Port: port, Peer: peer, Addr: netip.MustParseAddr("192.0.2.1")}); got.Flags != 0 {
				t.Errorf("cut %d: closed: %+v", cut, got)
			}
		}
		again := memoryTable(t, n)
		next(again)
		_, _ = again.Commit()
		if err := again.Prune(); err != nil {
			t.Fatal(err)
		}
		n.check(t, again)
		fresh := newNode(1000, nil)
		want := memoryTable(t, fresh)
		next(want)
		commit(t, want)
		equalMeaning(t, n.meaning(), fresh.meaning())
		if finished {
			if cut < 10 {
				t.Errorf("the commit was done after %d writes", cut)
			}
			return
		}
	}
	t.Error("the commit was never done: raise the bound")
}

// Generations do not begin anew with the maps, so that a cached decision of before is not taken
// for one of now.
func TestGenerationsGrow(t *testing.T) {
	n := newNode(1000, nil)
	at := time.Unix(1_700_000_000, 0)
	table, err := newTable(n.contents(), Config{Now: func() time.Time { return at }})
	if err != nil {
		t.Fatal(err)
	}
	table.SetWorkload(1, runs(billing))
	setPolicies(t, table, forBilling(&nodepb.PolicyRule{}))
	commit(t, table)
	first := n.subjects.m[billing.Number()].Gen
	if first <= 1_700_000_000 {
		t.Errorf("generation %d: want it after the clock's", first)
	}
	table.DeletePolicies("shop/billing")
	commit(t, table)
	setPolicies(t, table, forBilling(&nodepb.PolicyRule{}))
	commit(t, table)
	if got := n.subjects.m[billing.Number()].Gen; got <= first {
		t.Errorf("generation %d after %d", got, first)
	}
}

func TestLocalAddresses(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	a, b := netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")
	table.SetLocalAddrs(4, []netip.Addr{a, b})
	table.SetLocalAddrs(5, []netip.Addr{a})
	commit(t, table)
	if len(n.localAddrs.m) != 3 {
		t.Errorf("%v: want 3", n.localAddrs.m)
	}
	again := memoryTable(t, n)
	again.SetLocalAddrs(4, []netip.Addr{b})
	if c := commit(t, again); c.Writes != 0 || c.Deletes != 1 {
		t.Errorf("change %+v: want one deletion", c)
	}
	again.SetLocalAddrs(4, nil)
	if c := commit(t, again); c.Deletes != 1 || len(n.localAddrs.m) != 1 {
		t.Errorf("change %+v: want the namespace forgotten", c)
	}
	if err := again.Prune(); err != nil || len(n.localAddrs.m) != 0 {
		t.Errorf("%v, %v: want namespace 5 pruned", err, n.localAddrs.m)
	}
	n.check(t, again)
}

// Services that come, change, go and claim the same addresses, in maps with room and without: what
// is there in the end is what a table that never knew anything else writes.
func TestServicesInAnyOrder(t *testing.T) {
	r := newRandom(t)
	for range 150 {
		n := newNode(100000, nil)
		table := memoryTable(t, n)
		last := make(map[string]*nodepb.Service)
		for range 60 {
			name := one(r, "a", "b", "c", "d")
			if r.chance(20) {
				table.DeleteService("shop/" + name)
				delete(last, name)
			} else {
				var list []string
				for _, v := range []string{"198.18.0.", "fd69::"} {
					if r.chance(70) {
						list = append(list, v+one(r, "1", "2", "3"))
					}
				}
				s := svc(name, list)
				for i := range 6 {
					if r.chance(40) {
						e := ep(fmt.Sprintf(one(r, "10.0.0.%d:80", "[fd00::%d]:80"), i+1))
						e.Weight, e.Priority, e.Zone = r.Uint32N(4), r.Uint32N(2), one(r, "x", "y")
						e.Health = nodepb.Health(r.IntN(3))
						s.Ports[0].Endpoints = append(s.Ports[0].Endpoints, e)
					}
				}
				s.Workloads[0].Addresses = []string{"10.0.0." + one(r, "1", "2", "3")}
				set(t, table, s)
				last[name] = s
			}
			switch {
			case r.chance(20):
				n.slots.capacity, n.services.capacity = r.IntN(12), r.IntN(6)
				_, _ = table.Commit()
				n.slots.capacity, n.services.capacity = 100000, 100000
			case r.chance(50):
				commit(t, table)
			case r.chance(5):
				table = memoryTable(t, n) // a new agent
				for _, s := range last {
					set(t, table, s)
				}
				commit(t, table)
				if err := table.Prune(); err != nil {
					t.Fatal(err)
				}
			default:
				continue
			}
			n.check(t, table)
		}
		commit(t, table)
		n.check(t, table)
		fresh := newNode(100000, nil)
		other := memoryTable(t, fresh)
		for _, s := range last {
			set(t, other, s)
		}
		commit(t, other)
		equalMeaning(t, n.meaning(), fresh.meaning())
		if t.Failed() {
			return
		}
	}
}
