package tables

import (
	"encoding/binary"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Whatever the control plane sends, a table does not panic, its maps hold together, and a fresh
// table that is told the same says the same.
func FuzzSet(f *testing.F) {
	add := func(small bool, list ...proto.Message) {
		var b []byte
		for _, m := range list {
			kind := byte(0)
			if _, ok := m.(*nodepb.Policies); ok {
				kind = 1
			}
			raw, err := proto.Marshal(m)
			if err != nil {
				f.Fatal(err)
			}
			b = append(b, kind)
			b = binary.BigEndian.AppendUint16(b, uint16(len(raw)))
			b = append(b, raw...)
		}
		f.Add(small, b)
	}
	policies := forBilling(&nodepb.PolicyRule{Name: "r", Peers: []*nodepb.Peer{of(orders), entity(nodepb.Entity_ENTITY_MESH), inCIDR("10.0.0.0/8", "10.1.0.0/16")}, Ports: []*nodepb.PortRange{tcp(80, 90)}})
	two := svc("orders", vips, ep("10.0.0.1:80"), ep("10.0.0.2:80"))
	add(false, two, policies)
	add(true, two, svc("cart", vips, ep("10.0.0.1:80")), svc("orders", vips[:1], ep("10.0.0.3:80")), policies, &nodepb.Policies{Namespace: "shop", Service: "billing"})
	add(true, numberedService(1, 3), numberedService(1, 2), workloadsOf(billing)[0], forBilling(&nodepb.PolicyRule{Deny: true}))
	add(false, &nodepb.Policies{Namespace: "shop", Service: "billing", Policies: []*nodepb.Policy{tooMany("shop", "billing")}})
	f.Fuzz(func(t *testing.T, small bool, b []byte) {
		capacity := 1 << 16
		if small {
			capacity = 3
		}
		n := newNode(capacity, nil)
		table := memoryTable(t, n)
		last := make(map[string]func(*Table))
		host := func(table *Table) {
			table.SetWorkload(1, runs(billing))
			table.SetWorkload(2, runs(orders))
		}
		host(table)
		_, _ = table.Commit()
		for len(b) >= 3 {
			kind, size := b[0], min(int(binary.BigEndian.Uint16(b[1:])), len(b)-3)
			raw := b[3 : 3+size]
			b = b[3+size:]
			switch kind % 4 {
			case 0:
				var s nodepb.Service
				if proto.Unmarshal(raw, &s) == nil && table.SetService(&s) == nil {
					last["service "+s.Namespace+"/"+s.Name] = func(t *Table) { _ = t.SetService(&s) }
				}
			case 1:
				var p nodepb.Policies
				if proto.Unmarshal(raw, &p) == nil && table.SetPolicies(&p) == nil {
					last["policies "+p.Namespace+"/"+p.Service] = func(t *Table) { _ = t.SetPolicies(&p) }
				}
			case 2:
				table.DeleteService(string(raw))
				delete(last, "service "+string(raw))
			case 3:
				table.DeletePolicies(string(raw))
				delete(last, "policies "+string(raw))
			}
			c, err := table.Commit()
			if err == nil && len(c.Refused) > 0 {
				t.Errorf("%+v without error", c)
			}
			n.check(t, table)
		}
		if small {
			return // what found room depends on the way
		}
		fresh := newNode(capacity, nil)
		other := memoryTable(t, fresh)
		host(other)
		for _, f := range last {
			f(other)
		}
		_, _ = other.Commit()
		equalMeaning(t, n.meaning(), fresh.meaning())
	})
}
