package tables

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Policies that draw too many lines between ports close the workload and say so; fewer open it.
func TestTooManySegmentsCloseTheWorkload(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	table.SetWorkload(1, runs(billing))
	p := forBilling()
	p.Policies = append(p.Policies, tooMany("shop", "billing"))
	setPolicies(t, table, p)
	c, err := table.Commit()
	var many *TooManySegmentsError
	if !errors.As(err, &many) || many.Subject.Service != "billing" || many.Proto != TCP || many.Direction != "egress" {
		t.Fatalf("error %v, want *TooManySegmentsError of billing, egress, tcp", err)
	}
	if !slices.Equal(c.Closed, []uint64{billing.Number()}) || len(c.Refused) != 0 {
		t.Errorf("change %+v: want billing closed and registered", c)
	}
	if got := n.decide(egress(IDWorld, 105)); got.Verdict != deny || got.Flags != uint32(bpfobj.InlayFlowFlagFLOW_CLOSED) {
		t.Errorf("of a closed workload: %+v", got)
	}
	p.Policies[1].Egress[0].Ports = p.Policies[1].Egress[0].Ports[:maxSegs]
	setPolicies(t, table, p)
	if c := commit(t, table); len(c.Closed) != 0 {
		t.Errorf("change %+v: want nobody closed", c)
	}
	for port, want := range map[uint16]uint8{100: allow, 109: allow, 110: deny, 99: deny, 6400: allow, 6409: allow, 6410: deny, 65535: deny} {
		if got := n.decide(egress(IDWorld, port)); got.Verdict != want {
			t.Errorf("port %d: %+v, want verdict %d", port, got, want)
		}
	}
	n.check(t, table)
}

// A map of policies that is full closes the workload, new or not; room opens it.
func TestFullMapsClose(t *testing.T) {
	allowOrders := forBilling(&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders)}, Ports: []*nodepb.PortRange{tcp(80, 80)}})
	bigger := forBilling(
		&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders), inCIDR("10.0.0.0/8", "10.1.0.0/16")}, Ports: []*nodepb.PortRange{tcp(80, 90)}},
		&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(bank), inCIDR("192.0.2.0/24")}, Ports: []*nodepb.PortRange{{First: 99, Last: 99}}})
	for _, full := range []string{"policies", "port_sets", "cidrs"} {
		t.Run(full, func(t *testing.T) {
			n := newNode(1000, map[string]int{full: 1})
			table := memoryTable(t, n)
			set(t, table, workloadsOf(billing, orders, bank)...)
			table.SetWorkload(1, runs(billing))
			setPolicies(t, table, bigger)
			closed := func() {
				t.Helper()
				c, err := table.Commit()
				var e *FullError
				if !errors.As(err, &e) || e.Map != full || e.Capacity != 1 || e.Lost == 0 || !errors.Is(err, syscall.E2BIG) || !strings.Contains(err.Error(), "billing.shop") {
					t.Errorf("error %v, want *FullError of map %s that names billing.shop", err, full)
				}
				if !slices.Equal(c.Closed, []uint64{billing.Number()}) || len(c.Refused) != 0 {
					t.Errorf("change %+v: want billing closed and registered", c)
				}
				if got := n.decide(egress(orders.Number(), 80)); got.Verdict != deny || got.Flags == 0 {
					t.Errorf("of a closed workload: %+v", got)
				}
				n.check(t, table)
			}
			open := func() {
				t.Helper()
				if c := commit(t, table); len(c.Closed) != 0 {
					t.Errorf("change %+v: want nobody closed", c)
				}
				if got := n.decide(egress(orders.Number(), 80)); got.Verdict != allow {
					t.Errorf("to orders: %+v", got)
				}
				n.check(t, table)
			}
			closed() // a new workload
			setPolicies(t, table, allowOrders)
			open()
			setPolicies(t, table, bigger) // one that was open
			closed()
			was := n.subjects.puts
			closed() // it is tried again, and is not closed once more
			if n.subjects.puts != was {
				t.Error("a closed workload was closed again")
			}
			for _, u := range table.Usage() {
				if u.Name == full && u.Refused == 0 {
					t.Errorf("usage %+v: want refusals counted", u)
				}
			}
			switch full {
			case "policies":
				n.policies.capacity = 1000
			case "port_sets":
				n.portSets.capacity = 1000
			case "cidrs":
				n.cidrs.capacity = 1000
			}
			open() // by itself
		})
	}
	t.Run("subjects: a workload that cannot even be closed is not registered", func(t *testing.T) {
		n := newNode(1000, map[string]int{"subjects": 0})
		table := memoryTable(t, n)
		table.SetWorkload(1, runs(billing))
		table.SetWorkload(2, runs(orders))
		setPolicies(t, table, allowOrders)
		c, err := table.Commit()
		if err == nil || !slices.Equal(c.Refused, []uint64{1}) || !slices.Equal(c.Closed, []uint64{billing.Number()}) {
			t.Errorf("change %+v, error %v: want cgroup 1 refused", c, err)
		}
		if _, ok := n.workloads.m[1]; ok || len(n.workloads.m) != 1 {
			t.Errorf("workloads %v: want orders alone", n.workloads.m)
		}
		n.subjects.capacity = 10
		if c := commit(t, table); len(c.Refused)+len(c.Closed) != 0 || len(n.workloads.m) != 2 {
			t.Errorf("change %+v: want both registered", c)
		}
		n.check(t, table)
	})
	t.Run("what goes makes room for what comes in the same commit", func(t *testing.T) {
		n := newNode(1000, map[string]int{"policies": 1, "port_sets": 1})
		table := memoryTable(t, n)
		set(t, table, workloadsOf(billing, orders, bank)...)
		table.SetWorkload(1, runs(billing))
		setPolicies(t, table, allowOrders)
		commit(t, table)
		setPolicies(t, table, forBilling())
		table.SetWorkload(2, runs(cart))
		setPolicies(t, table, &nodepb.Policies{Namespace: "shop", Service: "cart", Policies: []*nodepb.Policy{{
			Subjects: []*nodepb.Selector{{}}, Egress: []*nodepb.PolicyRule{{Peers: []*nodepb.Peer{of(bank)}, Ports: []*nodepb.PortRange{tcp(1, 2)}}},
		}}})
		if c := commit(t, table); len(c.Closed) != 0 {
			t.Errorf("change %+v: want nobody closed", c)
		}
		n.check(t, table)
	})
}

// A map of services that is full keeps what it has, says so, and takes the rest when there is room.
func TestFullMapsKeepServices(t *testing.T) {
	n := newNode(1000, map[string]int{"slots": 3})
	table := memoryTable(t, n)
	set(t, table, numberedService(1, 2), numberedService(2, 1))
	commit(t, table)
	was := n.services.m[svcKey(vip(1), 80, TCP)]
	set(t, table, numberedService(1, 3), numberedService(2, 1))
	_, err := table.Commit()
	var e *FullError
	if !errors.As(err, &e) || e.Map != "slots" || e.Lost != 2 {
		t.Fatalf("error %v, want *FullError of 2 slots", err)
	}
	if got := n.services.m[svcKey(vip(1), 80, TCP)]; got != was {
		t.Errorf("service address %+v, want %+v as before", got, was)
	}
	n.check(t, table)
	n.slots.capacity = 100
	commit(t, table)
	if got := n.services.m[svcKey(vip(1), 80, TCP)]; got.Slots != 3 {
		t.Errorf("service address %+v, want 3 slots", got)
	}
	n.check(t, table)
	n.services.capacity = 4 // a service takes two: its port, and one for all others
	set(t, table, numberedService(3, 2))
	if _, err := table.Commit(); !errors.As(err, &e) || e.Map != "services" || !strings.Contains(err.Error(), "198.18.0.3") {
		t.Errorf("error %v, want *FullError of services that names the address", err)
	}
	table.DeleteService("ns2/svc2")
	commit(t, table)
	if _, ok := n.services.m[svcKey(vip(3), 80, TCP)]; !ok {
		t.Error("service 3 did not take the room")
	}
	n.check(t, table)
}

func TestWorkloadThatIsNotValidIsNotRegistered(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	table.SetWorkload(1, Workload{Namespace: "shop", Service: "Bad Name"})
	table.SetWorkload(2, Workload{Namespace: "shop", Service: "orders", Raw: true})
	c, err := table.Commit()
	if err == nil || !strings.Contains(err.Error(), "Bad Name") || !slices.Equal(c.Refused, []uint64{1}) {
		t.Errorf("change %+v, error %v: want cgroup 1 refused by name", c, err)
	}
	if w := n.workloads.m[2]; w.Flags != uint32(bpfobj.InlayWorkloadFlagWORKLOAD_RAW) || len(n.workloads.m) != 1 {
		t.Errorf("workloads %v", n.workloads.m)
	}
	table.DeleteWorkload(1)
	if c := commit(t, table); len(c.Refused) != 0 {
		t.Errorf("change %+v", c)
	}
	n.check(t, table)
}

// A map that is nearly full is told once, and again after it was less so.
func TestNearlyFullIsTold(t *testing.T) {
	var log strings.Builder
	n := newNode(1000, map[string]int{"services": 20})
	table, err := newTable(n.contents(), Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	told := func(want int) {
		t.Helper()
		commit(t, table)
		if got := strings.Count(log.String(), "map is nearly full"); got != want {
			t.Errorf("told %d times, want %d: %s", got, want, log.String())
		}
	}
	for i := range 8 {
		set(t, table, numberedService(i, 1))
	}
	told(0)
	set(t, table, numberedService(8, 1))
	told(1)
	if !strings.Contains(log.String(), "map=services entries=18 capacity=20") {
		t.Errorf("log %q", log.String())
	}
	set(t, table, numberedService(9, 1))
	told(1)
	for i := range 9 {
		table.DeleteService(fmt.Sprintf("ns%d/svc%d", i, i))
	}
	told(1)
	for i := range 9 {
		set(t, table, numberedService(i, 1))
	}
	told(2)
}
