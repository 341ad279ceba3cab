package tables

import (
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

func memoryTable(t testing.TB, n *node) *Table {
	t.Helper()
	table, err := newTable(n.contents(), Config{})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func commit(t testing.TB, table *Table) Change {
	t.Helper()
	c, err := table.Commit()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func set(t testing.TB, table *Table, services ...*nodepb.Service) {
	t.Helper()
	for _, s := range services {
		if err := table.SetService(s); err != nil {
			t.Fatal(err)
		}
	}
}

// svc is a service with one workload and one TCP port 80 of those endpoints.
func svc(name string, vips []string, endpoints ...*nodepb.Endpoint) *nodepb.Service {
	return &nodepb.Service{
		Namespace: "shop", Name: name, VirtualAddresses: vips,
		Ports:     []*nodepb.ServicePort{{Port: 80, Endpoints: endpoints}},
		Workloads: []*nodepb.Workload{{Labels: map[string]string{"version": "v1"}, Addresses: []string{"10.0.0.1"}}},
	}
}

func ep(address string) *nodepb.Endpoint { return &nodepb.Endpoint{Address: address, Weight: 1} }

var vips = []string{"198.18.0.1", "fd69:6e6c:6179::1"}

// shares is the part of connections that each endpoint of a service address gets.
func shares(t *testing.T, n *node, addr string) map[string]float64 {
	t.Helper()
	v, ok := n.services.m[key(addr)]
	if !ok {
		return nil
	}
	out := make(map[string]float64)
	slots := n.leads(v)
	if uint32(len(slots)) != v.Slots {
		t.Fatalf("%d slots of %d", len(slots), v.Slots)
	}
	for _, s := range slots {
		a := float64(s.Cut) / (1 << 32)
		if s.Cut == math.MaxUint32 {
			a = 1
		}
		out[addrPort(s.A.Addr, s.A.Port).String()] += a / float64(v.Slots)
		if a < 1 {
			out[addrPort(s.B.Addr, s.B.Port).String()] += (1 - a) / float64(v.Slots)
		}
	}
	return out
}

func key(addr string) bpfobj.InlaySvcKey {
	a := netip.MustParseAddrPort(addr)
	return svcKey(a.Addr(), a.Port(), TCP)
}

func TestShares(t *testing.T) {
	at := func(e *nodepb.Endpoint, f func(*nodepb.Endpoint)) *nodepb.Endpoint { f(e); return e }
	weight := func(w uint32) func(*nodepb.Endpoint) { return func(e *nodepb.Endpoint) { e.Weight = w } }
	zone := func(z string, w uint32) func(*nodepb.Endpoint) {
		return func(e *nodepb.Endpoint) { e.Zone, e.LocalityWeight = z, w }
	}
	priority := func(p uint32) func(*nodepb.Endpoint) { return func(e *nodepb.Endpoint) { e.Priority = p } }
	health := func(h nodepb.Health) func(*nodepb.Endpoint) { return func(e *nodepb.Endpoint) { e.Health = h } }
	for name, tc := range map[string]struct {
		endpoints []*nodepb.Endpoint
		v4, v6    map[string]float64
	}{
		"no endpoint: the address is there and leads nowhere": {
			v4: map[string]float64{}, v6: map[string]float64{},
		},
		"equal endpoints share evenly, on both addresses": {
			endpoints: []*nodepb.Endpoint{ep("10.0.0.1:1"), ep("10.0.0.2:1")},
			v4:        map[string]float64{"10.0.0.1:1": .5, "10.0.0.2:1": .5},
			v6:        map[string]float64{"10.0.0.1:1": .5, "10.0.0.2:1": .5},
		},
		"weights within a locality": {
			endpoints: []*nodepb.Endpoint{at(ep("10.0.0.1:1"), weight(1)), at(ep("10.0.0.2:1"), weight(2)), at(ep("10.0.0.3:1"), weight(7))},
			v4:        map[string]float64{"10.0.0.1:1": .1, "10.0.0.2:1": .2, "10.0.0.3:1": .7},
			v6:        map[string]float64{"10.0.0.1:1": .1, "10.0.0.2:1": .2, "10.0.0.3:1": .7},
		},
		"the weight of a locality is shared by its endpoints, however many": {
			endpoints: []*nodepb.Endpoint{at(ep("10.0.0.1:1"), zone("a", 3)), at(ep("10.0.0.2:1"), zone("b", 1)), at(ep("10.0.0.3:1"), zone("b", 1))},
			v4:        map[string]float64{"10.0.0.1:1": .75, "10.0.0.2:1": .125, "10.0.0.3:1": .125},
			v6:        map[string]float64{"10.0.0.1:1": .75, "10.0.0.2:1": .125, "10.0.0.3:1": .125},
		},
		"a locality without weight counts one for each of its endpoints": {
			endpoints: []*nodepb.Endpoint{at(ep("10.0.0.1:1"), zone("a", 0)), at(ep("10.0.0.2:1"), zone("b", 0)), at(ep("10.0.0.3:1"), zone("b", 0))},
			v4:        map[string]float64{"10.0.0.1:1": 1. / 3, "10.0.0.2:1": 1. / 3, "10.0.0.3:1": 1. / 3},
			v6:        map[string]float64{"10.0.0.1:1": 1. / 3, "10.0.0.2:1": 1. / 3, "10.0.0.3:1": 1. / 3},
		},
		"the first priority with somebody healthy takes all": {
			endpoints: []*nodepb.Endpoint{
				at(at(ep("10.0.0.1:1"), priority(0)), health(nodepb.Health_HEALTH_UNHEALTHY)),
				at(at(ep("10.0.0.2:1"), priority(1)), health(nodepb.Health_HEALTH_DRAINING)),
				at(ep("10.0.0.3:1"), priority(2)), at(ep("10.0.0.4:1"), priority(3)),
			},
			v4: map[string]float64{"10.0.0.3:1": 1}, v6: map[string]float64{"10.0.0.3:1": 1},
		},
		"draining, unhealthy and unknown healths get nothing": {
			endpoints: []*nodepb.Endpoint{
				at(ep("10.0.0.1:1"), health(nodepb.Health_HEALTH_UNHEALTHY)), at(ep("10.0.0.2:1"), health(nodepb.Health_HEALTH_DRAINING)),
				at(ep("10.0.0.3:1"), health(77)), ep("10.0.0.4:1"),
			},
			v4: map[string]float64{"10.0.0.4:1": 1}, v6: map[string]float64{"10.0.0.4:1": 1},
		},
		"an address of IPv4 leads to IPv4 only, one of IPv6 to IPv6 first": {
			endpoints: []*nodepb.Endpoint{ep("10.0.0.1:1"), ep("[fd00::1]:1"), ep("[fd00::2]:1")},
			v4:        map[string]float64{"10.0.0.1:1": 1},
			v6:        map[string]float64{"[fd00::1]:1": .5, "[fd00::2]:1": .5},
		},
		"IPv6 does not come before a better priority": {
			endpoints: []*nodepb.Endpoint{ep("10.0.0.1:1"), at(ep("[fd00::1]:1"), priority(1))},
			v4:        map[string]float64{"10.0.0.1:1": 1},
			v6:        map[string]float64{"10.0.0.1:1": 1},
		},
		"a mapped address is one of IPv4": {
			endpoints: []*nodepb.Endpoint{ep("[::ffff:10.0.0.1]:1")},
			v4:        map[string]float64{"10.0.0.1:1": 1},
			v6:        map[string]float64{"10.0.0.1:1": 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(1000, nil)
			table := memoryTable(t, n)
			set(t, table, svc("orders", vips, tc.endpoints...))
			commit(t, table)
			n.check(t, table)
			for addr, want := range map[string]map[string]float64{"198.18.0.1:80": tc.v4, "[fd69:6e6c:6179::1]:80": tc.v6} {
				got := shares(t, n, addr)
				if got == nil || len(got) != len(want) {
					t.Errorf("%s: shares %v, want %v", addr, got, want)
				}
				for a, w := range want {
					if math.Abs(got[a]-w) > 1e-6 {
						t.Errorf("%s: %s gets %v, want %v", addr, a, got[a], w)
					}
				}
				if slots := n.services.m[key(addr)].Slots; int(slots) > len(tc.endpoints) {
					t.Errorf("%s: %d slots for %d endpoints", addr, slots, len(tc.endpoints))
				}
			}
		})
	}
}

func TestAliasKeepsRandomWeights(t *testing.T) {
	r := newRandom(t)
	for range 200 {
		var in []share
		total := 0.0
		for i := range 1 + r.IntN(300) {
			w := math.Exp(r.Float64()*20 - 10)
			total += w
			in = append(in, share{weight: w, backend: bpfobj.InlayBackend{Identity: uint64(i)}})
		}
		got := make([]float64, len(in))
		slots := alias(in)
		if len(slots) != len(in) {
			t.Fatalf("%d slots for %d endpoints", len(slots), len(in))
		}
		for _, s := range slots {
			a := float64(s.Cut) / (1 << 32)
			if s.Cut == always {
				a = 1
			}
			got[s.A.Identity] += a / float64(len(slots))
			got[s.B.Identity] += (1 - a) / float64(len(slots))
		}
		for i := range in {
			if want := in[i].weight / total; math.Abs(got[i]-want) > 1e-6 {
				t.Fatalf("endpoint %d of %d gets %v, want %v", i, len(in), got[i], want)
			}
		}
	}
}

func TestServiceThatIsNotValidIsRefusedWhole(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*nodepb.Service)
		want   string
	}{
		"a namespace that is no label":      {func(s *nodepb.Service) { s.Namespace = "a.b" }, "namespace"},
		"no name":                           {func(s *nodepb.Service) { s.Name = "" }, "name: empty"},
		"a name too long for a key":         {func(s *nodepb.Service) { s.Name = strings.Repeat("a", 64) }, "64 characters: want at most 63"},
		"a virtual address that is none":    {func(s *nodepb.Service) { s.VirtualAddresses = []string{"x"} }, `virtual_addresses[0]: "x"`},
		"a virtual address with a zone":     {func(s *nodepb.Service) { s.VirtualAddresses = []string{"fe80::1%eth0"} }, "without zone"},
		"a multicast virtual address":       {func(s *nodepb.Service) { s.VirtualAddresses = []string{"224.0.0.1"} }, "unicast"},
		"two virtual addresses of a family": {func(s *nodepb.Service) { s.VirtualAddresses = []string{"1.1.1.1", "1.1.1.2"} }, "want one of a family"},
		"port 0":                            {func(s *nodepb.Service) { s.Ports[0].Port = 0 }, "port 0: want 1 to 65535"},
		"port 65536":                        {func(s *nodepb.Service) { s.Ports[0].Port = 65536 }, "port 65536"},
		"a port twice":                      {func(s *nodepb.Service) { s.Ports = append(s.Ports, s.Ports[0]) }, "is there twice"},
		"an endpoint without port":          {func(s *nodepb.Service) { s.Ports[0].Endpoints[0].Address = "10.0.0.1" }, `endpoints[0]: address "10.0.0.1"`},
		"an endpoint with port 0":           {func(s *nodepb.Service) { s.Ports[0].Endpoints[0].Address = "10.0.0.1:0" }, "want IP:PORT"},
		"an endpoint at every address":      {func(s *nodepb.Service) { s.Ports[0].Endpoints[0].Address = "0.0.0.0:80" }, "want IP:PORT"},
		"an endpoint twice": {func(s *nodepb.Service) {
			s.Ports[0].Endpoints = append(s.Ports[0].Endpoints, ep("[::ffff:10.0.0.9]:80"))
		}, "is there twice"},
		"an endpoint of no workload":     {func(s *nodepb.Service) { s.Ports[0].Endpoints[0].Workload = 1 }, "workload 1: the service has 1"},
		"an endpoint of workload 2^32-1": {func(s *nodepb.Service) { s.Ports[0].Endpoints[0].Workload = math.MaxUint32 }, "want an index"},
		"an address of a workload":       {func(s *nodepb.Service) { s.Workloads[0].Addresses = []string{"10.0.0.1:80"} }, "addresses[0]"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(1000, nil)
			table := memoryTable(t, n)
			good := svc("orders", vips, ep("10.0.0.9:80"))
			set(t, table, good)
			commit(t, table)
			before := n.meaning()
			bad := svc("orders", vips, ep("10.0.0.9:80"))
			tc.change(bad)
			err := table.SetService(bad)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
			if c := commit(t, table); c.Writes+c.Deletes != 0 {
				t.Errorf("a refused service wrote %+v", c)
			}
			equalMeaning(t, n.meaning(), before)
		})
	}
}

func TestEndpointsNamesAndAddresses(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	s := svc("orders", vips, ep("10.0.0.9:8080"), &nodepb.Endpoint{Address: "10.0.0.8:8080", Health: nodepb.Health_HEALTH_DRAINING})
	s.Ports = append(s.Ports, &nodepb.ServicePort{Port: 53, Udp: true, Endpoints: []*nodepb.Endpoint{ep("10.0.0.9:5353")}})
	s.Workloads[0].Addresses = []string{"10.0.0.1", "::ffff:10.0.0.2", "127.0.0.1", "fd00::1"}
	set(t, table, s)
	commit(t, table)
	who := Identity{Namespace: "shop", Service: "orders", Labels: map[string]string{"version": "v1"}}
	for _, addr := range []string{"10.0.0.9:8080", "10.0.0.8:8080"} {
		if got := n.endpoints.m[key(addr)]; got != who.Number() {
			t.Errorf("endpoint %s: identity %d, want %d: a draining endpoint is still who it is", addr, got, who.Number())
		}
	}
	a := netip.MustParseAddr
	if got := n.endpoints.m[svcKey(a("10.0.0.9"), 5353, UDP)]; got != who.Number() {
		t.Errorf("endpoint of UDP: identity %d", got)
	}
	if _, ok := n.services.m[svcKey(a("198.18.0.1"), 53, UDP)]; !ok {
		t.Error("service address of UDP is missing")
	}
	for addr, want := range map[string]bool{"10.0.0.1": true, "10.0.0.2": true, "fd00::1": true, "127.0.0.1": false} {
		if _, ok := n.addresses.m[mapped(a(addr))]; ok != want {
			t.Errorf("address %s: there %t, want %t", addr, ok, want)
		}
	}
	var k bpfobj.InlayNameKey
	putText(k.Text[:], "orders.shop")
	if got := n.names.m[k]; got.Addr4 != mapped(a("198.18.0.1")) || got.Addr6 != mapped(a("fd69:6e6c:6179::1")) {
		t.Errorf("name orders.shop: %+v", got)
	}
	for addr, want := range map[string]string{"198.18.0.1:80": "orders.shop:80", "[fd69:6e6c:6179::1]:80": "orders.shop:80", "10.0.0.9:8080": "orders.shop:80", "10.0.0.7:1": ":0"} {
		name, port, _ := table.ServiceAt(netip.MustParseAddrPort(addr), TCP)
		if got := fmt.Sprintf("%s:%d", name, port); got != want {
			t.Errorf("ServiceAt(%s) = %s, want %s", addr, got, want)
		}
	}
	if got, ok := table.Identity(who.Number()); !ok || !same(&got, &who) {
		t.Errorf("Identity: %+v", got)
	}

	// A second service at the same places: nobody knows who is behind them.
	other := svc("cart", []string{"198.18.0.2"}, ep("10.0.0.9:8080"))
	set(t, table, other)
	commit(t, table)
	if got := n.endpoints.m[key("10.0.0.9:8080")]; got != IDUnknown {
		t.Errorf("endpoint of two services: identity %d, want unknown", got)
	}
	if got := n.addresses.m[mapped(a("10.0.0.1"))]; got != IDUnknown {
		t.Errorf("address of two services: identity %d, want unknown", got)
	}
	// It goes, and orders keeps its places.
	table.DeleteService("shop/cart")
	if c := commit(t, table); len(c.Gone) != 0 {
		t.Errorf("gone %v: want none, orders has it", c.Gone)
	}
	if got := n.endpoints.m[key("10.0.0.9:8080")]; got != who.Number() {
		t.Errorf("endpoint of one service again: identity %d", got)
	}
	table.DeleteService("shop/orders")
	table.DeleteService("shop/orders")
	table.DeleteService("shop/never")
	c := commit(t, table)
	if len(c.Gone) != 3 {
		t.Errorf("gone %v: want 3 endpoints", c.Gone)
	}
	n.check(t, table)
	if got := n.meaning(); len(got) != 0 {
		t.Errorf("left over: %v", got)
	}
	if got, ok := table.Identity(who.Number()); !ok || got.Service != "orders" {
		t.Errorf("identity of a service that is gone: %+v, %t: want it still known", got, ok)
	}

	// Grace is over for one; another came back.
	set(t, table, svc("orders", vips, ep("10.0.0.9:8080")))
	commit(t, table)
	if left, err := table.MarkGone(c.Gone); err != nil || left != 2 || len(n.gone.m) != 2 {
		t.Errorf("MarkGone: %d, %v, %v", left, err, n.gone.m)
	}
	if _, ok := n.gone.m[bpfobj.InlayGoneKey{Addr: mapped(a("10.0.0.9")), Port: htons(8080), Proto: TCP}]; ok {
		t.Error("an endpoint that came back is marked as gone")
	}
	if err := table.ClearGone(); err != nil || len(n.gone.m) != 0 {
		t.Errorf("ClearGone: %v, %v", err, n.gone.m)
	}
}

// Two services claim one virtual address: the first by name has it, and when it goes the other.
func TestVirtualAddressOfTwoServices(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	b, a := svc("b", vips[:1], ep("10.0.0.2:80")), svc("a", vips[:1], ep("10.0.0.1:80"))
	set(t, table, b)
	commit(t, table)
	set(t, table, a)
	commit(t, table)
	if got := shares(t, n, "198.18.0.1:80"); got["10.0.0.1:80"] != 1 {
		t.Errorf("shares %v: want all to service a", got)
	}
	n.check(t, table)
	table.DeleteService("shop/a")
	commit(t, table)
	if got := shares(t, n, "198.18.0.1:80"); got["10.0.0.2:80"] != 1 {
		t.Errorf("shares %v: want all to service b", got)
	}
	n.check(t, table)
}

// Each virtual address has one entry for the ports that its service does not have: refused there, and
// told under the name of the service.
func TestOtherPortsOfAVirtualAddress(t *testing.T) {
	n := newNode(1000, nil)
	table := memoryTable(t, n)
	set(t, table, svc("a", vips, ep("10.0.0.1:80")))
	commit(t, table)
	for _, a := range vips {
		at := netip.MustParseAddr(a)
		if v, ok := n.services.m[svcKey(at, 0, 0)]; !ok || v.Slots != 0 {
			t.Errorf("%s: %+v, %v: want one without slots", a, v, ok)
		}
		if name, port, ok := table.ServiceAt(netip.AddrPortFrom(at, 4711), TCP); name != "a.shop" || port != 4711 || !ok {
			t.Errorf("%s, port 4711: %q, %d, %v", a, name, port, ok)
		}
	}
	table.DeleteService("shop/a")
	if commit(t, table); len(n.services.m) != 0 {
		t.Errorf("left: %v", n.services.m)
	}
}

// A change touches the entries of what changed, whatever else there is, and keeps the id of the
// service address, so that choices by hash stay.
func TestChangeWritesOnlyItsEntries(t *testing.T) {
	n := newNode(1<<20, nil)
	table := memoryTable(t, n)
	for i := range 2000 {
		set(t, table, numberedService(i, 1))
	}
	commit(t, table)
	before := n.writes()
	id := n.services.m[svcKey(vip(7), 80, TCP)].Id
	set(t, table, numberedService(7, 2)) // one endpoint more
	c := commit(t, table)
	// 2 slots, 1 service address, 1 endpoint; the one of before stood in the service address.
	if c.Writes != 4 || c.Deletes != 0 || n.writes()-before != 4 {
		t.Errorf("change %+v, %d writes: want 4 writes and no deletion", c, n.writes()-before)
	}
	if got := n.services.m[svcKey(vip(7), 80, TCP)].Id; got != id {
		t.Errorf("id %d after %d: want it kept", got, id)
	}
	set(t, table, numberedService(7, 1)) // and back: 1 service address; 2 slots and 1 endpoint go
	if c := commit(t, table); c.Writes != 1 || c.Deletes != 3 {
		t.Errorf("change %+v: want 1 write and 3 deletions", c)
	}
	set(t, table, numberedService(7, 2))
	commit(t, table)
	for i := range 2000 { // the same again
		set(t, table, numberedService(i, 1+btoi(i == 7)))
	}
	if c := commit(t, table); c.Writes+c.Deletes != 0 {
		t.Errorf("the same state again: %+v: want no write", c)
	}
	n.check(t, table)
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func vip(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)})
}

// numberedService is service i with that many endpoints.
func numberedService(i, endpoints int) *nodepb.Service {
	s := &nodepb.Service{
		Namespace: fmt.Sprint("ns", i%50), Name: fmt.Sprint("svc", i), VirtualAddresses: []string{vip(i).String()},
		Ports:     []*nodepb.ServicePort{{Port: 80}},
		Workloads: []*nodepb.Workload{{Labels: map[string]string{"version": "v1"}}},
	}
	for e := range endpoints {
		s.Ports[0].Endpoints = append(s.Ports[0].Endpoints,
			ep(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10 + byte(e), byte(i >> 16), byte(i >> 8), byte(i)}), 8080).String()))
	}
	return s
}
