package tables

import (
	"slices"
	"testing"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Policies that fill more than half of a map are replaced all the same: there is no room for the new ones
// beside the old ones, so the workload is closed for a moment, and then follows the new ones.
func TestPoliciesOfMoreThanHalfAMapAreReplaced(t *testing.T) {
	to := func(first uint32) *nodepb.Policies {
		return forBilling(
			&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders)}, Ports: []*nodepb.PortRange{tcp(first, first)}},
			&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(bank)}, Ports: []*nodepb.PortRange{tcp(first+1, first+1)}})
	}
	n := newNode(1000, map[string]int{"policies": 3})
	table := memoryTable(t, n)
	set(t, table, workloadsOf(billing, orders, bank)...)
	table.SetWorkload(1, runs(billing))
	for _, first := range []uint32{80, 90, 100} {
		setPolicies(t, table, to(first))
		if c := commit(t, table); len(c.Closed) != 0 || !slices.Contains(c.Subjects, billing.Number()) {
			t.Errorf("change %+v: want billing changed and open", c)
		}
		for _, p := range []uint16{80, 90, 100} {
			want := deny
			if uint32(p) == first {
				want = allow
			}
			if got := n.decide(egress(orders.Number(), p)); got.Verdict != want {
				t.Errorf("ports from %d: to orders at %d: %+v, want verdict %v", first, p, got, want)
			}
		}
		n.check(t, table)
	}
	if got := len(n.policies.m); got > 3 {
		t.Errorf("%d entries", got)
	}
}
