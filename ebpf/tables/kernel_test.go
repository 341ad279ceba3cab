package tables

import (
	"encoding/binary"
	"errors"
	"math"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// kernelMaps makes real maps that nobody else sees, with the sizes given and else the defaults.
func kernelMaps(t testing.TB, sizes map[string]uint32) *bpfobj.InlayMaps {
	t.Helper()
	if err := rlimit.RemoveMemlock(); err != nil {
		unprivileged(t, err)
	}
	spec, err := bpfobj.LoadInlay()
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range sizes {
		spec.Maps[name].MaxEntries = n
	}
	var maps bpfobj.InlayMaps
	if err := spec.LoadAndAssign(&maps, nil); err != nil {
		if errors.Is(err, os.ErrPermission) {
			unprivileged(t, err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := maps.Close(); err != nil {
			t.Error(err)
		}
	})
	return &maps
}

// unprivileged skips a test that needs the kernel's leave; in CI that is a failure.
func unprivileged(t testing.TB, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("needs root, or CAP_BPF and CAP_NET_ADMIN: %v", err)
	}
	t.Skipf("NOT TESTED: needs root, or CAP_BPF and CAP_NET_ADMIN: %v", err)
}

// testProgram loads decide_test or pick_test over maps of the default sizes.
func testProgram(t testing.TB, name string, maps *bpfobj.InlayMaps) *ebpf.Program {
	t.Helper()
	spec, err := bpfobj.LoadDecide()
	if err != nil {
		t.Fatal(err)
	}
	replace := map[string]*ebpf.Map{}
	for m, of := range map[string]*ebpf.Map{
		bpfobj.InlayMapSubjects: maps.Subjects, bpfobj.InlayMapPolicies: maps.Policies,
		bpfobj.InlayMapPortSets: maps.PortSets, bpfobj.InlayMapCidrs: maps.Cidrs,
		bpfobj.InlayMapServices: maps.Services, bpfobj.InlayMapSlots: maps.Slots,
		bpfobj.InlayMapSettingsMap: maps.SettingsMap,
	} {
		if spec.Maps[m] != nil {
			replace[m] = of
		}
	}
	objs, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(objs.Close)
	return objs.Programs[name]
}

func split(name string) (namespace, service string) {
	namespace, service, _ = strings.Cut(name, "/")
	return namespace, service
}

// load reads a whole map, past the table.
func load[K comparable, V any](t *testing.T, m Map[K, V]) map[K]V {
	t.Helper()
	out := make(map[K]V)
	if err := m.Each(func(k K, v V) {
		if _, ok := out[k]; ok {
			t.Errorf("map %s: %v was read twice", m.Name(), k)
		}
		out[k] = v
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// loadNode reads the kernel's maps into memory, where they can be checked.
func loadNode(t *testing.T, maps *bpfobj.InlayMaps) *node {
	t.Helper()
	c := kernelContents(maps)
	n := newNode(1<<30, nil)
	n.workloads.m, n.services.m, n.slots.m = load(t, c.workloads), load(t, c.services), load(t, c.slots)
	n.endpoints.m, n.addresses.m, n.localAddrs.m = load(t, c.endpoints), load(t, c.addresses), load(t, c.localAddrs)
	n.subjects.m, n.policies.m, n.portSets.m = load(t, c.subjects), load(t, c.policies), load(t, c.portSets)
	n.cidrs.m, n.names.m, n.gone.m = load(t, c.cidrs), load(t, c.names), load(t, c.gone)
	return n
}

// The maps of the kernel hold what those in memory hold: filled by batches, changed, read again by
// a restarted agent that then writes nothing, and pruned.
func TestKernelMaps(t *testing.T) {
	maps := kernelMaps(t, nil)
	table, err := New(maps, Config{})
	if err != nil {
		t.Fatal(err)
	}
	mem := newNode(1<<20, nil)
	shadow := memoryTable(t, mem)
	const services = 10_000 // several batches of each map
	say := func(table *Table, from, to, endpoints int) {
		for i := from; i < to; i++ {
			set(t, table, numberedService(i, endpoints))
		}
		set(t, table, workloadsOf(billing, orders, cart, bank)...)
		table.SetWorkload(1, runs(billing))
		table.SetLocalAddrs(7, []netip.Addr{netip.MustParseAddr("10.0.0.5")})
		var rules []*nodepb.PolicyRule
		for i := range uint32(3000) { // several batches of prefixes and policies
			rules = append(rules, &nodepb.PolicyRule{
				Peers: []*nodepb.Peer{inCIDR(netip.PrefixFrom(vip(int(i)*16), 28).String())},
				Ports: []*nodepb.PortRange{tcp(i, i)},
			})
		}
		setPolicies(t, table, forBilling(append(rules, &nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders)}})...))
	}
	same := func(table *Table) {
		t.Helper()
		n := loadNode(t, maps)
		n.check(t, table)
		equalMeaning(t, n.meaning(), mem.meaning())
	}
	for _, at := range []*Table{table, shadow} {
		say(at, 0, services, 1)
		commit(t, at)
		set(t, at, numberedService(5, 3))
		at.DeleteService("ns6/svc6")
		commit(t, at)
	}
	same(table)

	again, err := New(maps, Config{})
	if err != nil {
		t.Fatal(err)
	}
	say(again, 0, services, 1)
	set(t, again, numberedService(5, 3))
	again.DeleteService("ns6/svc6")
	commit(t, again)
	if err := again.Prune(); err != nil {
		t.Fatal(err)
	}
	if c := commit(t, again); c.Writes+c.Deletes != 0 {
		t.Errorf("the same after a restart: %+v: want no write", c)
	}
	same(again)

	last, err := New(maps, Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := last.Prune(); err != nil {
		t.Fatal(err)
	}
	if c := commit(t, last); len(c.Gone) != services+1 { // svc5 has 3, svc6 none
		t.Errorf("%d endpoints gone, want %d", len(c.Gone), services+1)
	}
	if n := loadNode(t, maps); len(n.meaning()) != 0 || len(n.slots.m)+len(n.portSets.m) != 0 {
		t.Errorf("left after pruning all: %d entries", len(n.meaning()))
	}
}

// Real maps that are full: what the kernel says, and what becomes of it.
func TestKernelMapsFull(t *testing.T) {
	t.Run("services stay as they were", func(t *testing.T) {
		maps := kernelMaps(t, map[string]uint32{"slots": 8})
		table, err := New(maps, Config{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			set(t, table, numberedService(i, 2))
		}
		commit(t, table)
		for i := range 4 {
			set(t, table, numberedService(i, 3))
		}
		_, err = table.Commit()
		var e *FullError
		if !errors.As(err, &e) || e.Map != "slots" || e.Entries != 8 || e.Capacity != 8 || !errors.Is(err, syscall.E2BIG) {
			t.Fatalf("error %v, want *FullError of slots", err)
		}
		n := loadNode(t, maps)
		n.check(t, table)
		for k, v := range n.services.m {
			if k.Proto != 0 && v.Slots != 2 {
				t.Errorf("%s: %d slots, want the 2 of before", describe(k), v.Slots)
			}
		}
	})
	for name, size := range map[string]uint32{"policies": 2, "port_sets": 1, "cidrs": 2} {
		t.Run("a workload is closed for want of "+name, func(t *testing.T) {
			maps := kernelMaps(t, map[string]uint32{name: size})
			table, err := New(maps, Config{})
			if err != nil {
				t.Fatal(err)
			}
			set(t, table, workloadsOf(billing, orders, cart, bank)...)
			table.SetWorkload(1, runs(billing))
			setPolicies(t, table, forBilling(
				&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders)}, Ports: []*nodepb.PortRange{tcp(1, 2)}},
				&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(cart)}, Ports: []*nodepb.PortRange{tcp(3, 4)}},
				&nodepb.PolicyRule{Peers: []*nodepb.Peer{inCIDR("10.0.0.0/8", "10.1.0.0/16", "10.2.0.0/16")}, Ports: []*nodepb.PortRange{tcp(5, 6)}}))
			c, err := table.Commit()
			var e *FullError
			if !errors.As(err, &e) || e.Map != name || !slices.Equal(c.Closed, []uint64{billing.Number()}) {
				t.Fatalf("change %+v, error %v: want billing closed for want of %s", c, err, name)
			}
			if !strings.Contains(err.Error(), "--map-size") {
				t.Errorf("error %v: want the remedy", err)
			}
			n := loadNode(t, maps)
			n.check(t, table)
			if got := n.decide(egress(orders.Number(), 1)); got.Verdict != deny || len(n.workloads.m) != 1 {
				t.Errorf("decided %+v, workloads %v", got, n.workloads.m)
			}
			setPolicies(t, table, forBilling(&nodepb.PolicyRule{Peers: []*nodepb.Peer{of(orders)}, Ports: []*nodepb.PortRange{tcp(1, 2)}}))
			if c := commit(t, table); len(c.Closed) != 0 {
				t.Errorf("change %+v: want billing open", c)
			}
			n = loadNode(t, maps)
			n.check(t, table)
			if got := n.decide(egress(orders.Number(), 1)); got.Verdict != allow {
				t.Errorf("decided %+v", got)
			}
		})
	}
}

// The program picks endpoints by their weights.
func TestProgramPicksByWeight(t *testing.T) {
	maps := kernelMaps(t, nil)
	program := testProgram(t, "pick_test", maps)
	table, err := New(maps, Config{})
	if err != nil {
		t.Fatal(err)
	}
	s := svc("orders", vips, ep("10.0.0.1:1"), ep("10.0.0.2:1"), ep("10.0.0.3:1"))
	for i, w := range []uint32{1, 3, 6} {
		s.Ports[0].Endpoints[i].Weight = w
	}
	set(t, table, s, svc("empty", []string{"198.18.0.2"}))
	commit(t, table)
	pick := func(addr string) (c bpfobj.InlayPickCase) {
		k := key(addr)
		in := append(slices.Clone(k.Addr.B[:]), make([]byte, 48)...)
		binary.NativeEndian.PutUint16(in[16:], k.Port)
		in[18] = k.Proto
		opts := ebpf.RunOptions{Data: in, DataOut: make([]byte, 256)}
		if _, err := program.Run(&opts); err != nil {
			t.Fatal(err)
		}
		if _, err := binary.Decode(opts.DataOut, binary.NativeEndian, &c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	const draws = 20_000
	got := make(map[string]int)
	for range draws {
		c := pick("198.18.0.1:80")
		if c.Found != 1 {
			t.Fatalf("found %d", c.Found)
		}
		if who := (Identity{Namespace: "shop", Service: "orders", Labels: map[string]string{"version": "v1"}}); c.Backend.Identity != who.Number() {
			t.Fatalf("identity %d", c.Backend.Identity)
		}
		got[addrPort(c.Backend.Addr, c.Backend.Port).String()]++
	}
	for addr, want := range map[string]float64{"10.0.0.1:1": .1, "10.0.0.2:1": .3, "10.0.0.3:1": .6} {
		// 6 standard deviations: once in 500 million runs by chance.
		if d := math.Abs(float64(got[addr]) - want*draws); d > 6*math.Sqrt(draws*want*(1-want)) {
			t.Errorf("%s: %d of %d draws, want a share of %v", addr, got[addr], draws, want)
		}
	}
	if c := pick("198.18.0.2:80"); c.Found != 2 {
		t.Errorf("a service without endpoint: found %d, want 2", c.Found)
	}
	if c := pick("198.18.0.3:80"); c.Found != 0 {
		t.Errorf("no service: found %d, want 0", c.Found)
	}
}
