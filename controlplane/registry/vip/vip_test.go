package vip_test

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
)

// memory is a store that may fail.
type memory struct {
	given  map[vip.Service]uint32
	fail   error
	writes int
}

func newMemory() *memory { return &memory{given: map[vip.Service]uint32{}} }

func (m *memory) VirtualIndexes() ([]vip.Given, error) {
	var out []vip.Given
	for s, n := range m.given {
		out = append(out, vip.Given{Service: s, Index: n})
	}
	return out, m.fail
}

func (m *memory) WriteVirtualIndexes(put []vip.Given, del []vip.Service) error {
	m.writes++
	if m.fail != nil {
		return m.fail
	}
	for _, g := range put {
		m.given[g.Service] = g.Index
	}
	for _, s := range del {
		delete(m.given, s)
	}
	return nil
}

func services(names ...string) []vip.Service {
	var out []vip.Service
	for _, n := range names {
		out = append(out, vip.Service{Namespace: "default", Name: n})
	}
	return out
}

func open(t testing.TB, cfg vip.Config) *vip.Allocator {
	t.Helper()
	a, err := vip.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func of(t *vip.Table, name string) string { return fmt.Sprint(t.Of("default", name)) }

func TestAServiceKeepsItsAddresses(t *testing.T) {
	m := newMemory()
	a := open(t, vip.Config{Store: m})
	first := a.Assign(services("orders", "cart"))
	if got := of(first, "orders"); got != "[198.18.0.1 fd69:6e6c:6179::1]" {
		t.Errorf("orders = %s, want the lowest addresses but the first", got)
	}
	if got := of(first, "cart"); got != "[198.18.0.2 fd69:6e6c:6179::2]" {
		t.Errorf("cart = %s", got)
	}
	writes := m.writes
	a.Assign(services("cart")) // orders goes
	a.Assign(services("cart", "pay", "orders"))
	if m.writes != writes+1 {
		t.Errorf("%d writes for one new service, want 1", m.writes-writes)
	}
	again := open(t, vip.Config{Store: m}).Assign(services("pay", "orders", "late"))
	for name, want := range map[string]string{
		"orders": "[198.18.0.1 fd69:6e6c:6179::1]", "pay": "[198.18.0.3 fd69:6e6c:6179::3]",
		"late": "[198.18.0.4 fd69:6e6c:6179::4]", // not cart's, which is away
	} {
		if got := of(again, name); got != want {
			t.Errorf("after a restart %s = %s, want %s", name, got, want)
		}
	}
	if again.Of("shop", "orders") != nil {
		t.Error("a service of another namespace has the address")
	}
}

func TestOtherRangesAreDerivedAnew(t *testing.T) {
	m := newMemory()
	open(t, vip.Config{Store: m}).Assign(services("a", "b", "c", "d"))
	other := vip.Config{Store: m, IPv4: netip.MustParsePrefix("10.96.0.0/30"), IPv6: netip.MustParsePrefix("fd00:1::/112")}
	small := open(t, other).Assign(services("d", "a"))
	if got := of(small, "a"); got != "[10.96.0.1 fd00:1::1]" {
		t.Errorf("a = %s: the same number in the other range", got)
	}
	// d's number has no address there, and 2 belongs to b, which is away.
	if got := of(small, "d"); got != "[10.96.0.2 fd00:1::2]" {
		t.Errorf("d = %s, want the one that nobody uses", got)
	}
}

func TestAUsedUpRange(t *testing.T) {
	var log strings.Builder
	cfg := vip.Config{IPv4: netip.MustParsePrefix("10.0.0.0/29"), Store: newMemory(), Log: slog.New(slog.NewTextHandler(&log, nil))}
	a := open(t, cfg) // 10.0.0.1 to 10.0.0.6
	a.Assign(services("a", "b", "c", "d", "e"))
	// While there is a free one nobody loses one.
	if got := of(a.Assign(services("f")), "f"); got != "[10.0.0.6 fd69:6e6c:6179::6]" {
		t.Errorf("f = %s, want the free one: a to e are only away", got)
	}
	// Then the lowest of those that are away changes hands.
	table := a.Assign(services("a", "c", "f", "g"))
	if got := of(table, "g"); got != "[10.0.0.2 fd69:6e6c:6179::2]" || table.Of("default", "b") != nil {
		t.Errorf("g = %s, b = %s; want b's for g", got, of(table, "b"))
	}
	if !strings.Contains(log.String(), "virtual address changes hands") {
		t.Errorf("log = %s", &log)
	}
	// And when all are in use, the rest has none.
	all := a.Assign(services("a", "c", "d", "e", "f", "g", "h", "i"))
	if all.Of("default", "h") != nil || all.Of("default", "i") != nil || all.Of("default", "g") == nil {
		t.Errorf("h = %s, g = %s; want none for h", of(all, "h"), of(all, "g"))
	}
	if all.Range() != "10.0.0.0/29 and fd69:6e6c:6179::/64" {
		t.Errorf("Range = %s", all.Range())
	}
	seen := map[netip.Addr]string{}
	for _, s := range services("a", "c", "d", "e", "f", "g") {
		for _, addr := range all.Of(s.Namespace, s.Name) {
			if other := seen[addr]; other != "" {
				t.Errorf("%s and %s are both at %s", other, s.Name, addr)
			}
			seen[addr] = s.Name
			if addr == netip.MustParseAddr("10.0.0.0") || addr == netip.MustParseAddr("10.0.0.7") {
				t.Errorf("%s is at %s, the network's or the broadcast's", s.Name, addr)
			}
		}
	}
	// What changed hands is so after a restart too.
	if got := of(open(t, cfg).Assign(services("g")), "g"); got != "[10.0.0.2 fd69:6e6c:6179::2]" {
		t.Errorf("after a restart g = %s", got)
	}
}

func TestAStoreThatFailsIsTriedAgain(t *testing.T) {
	m := newMemory()
	a := open(t, vip.Config{Store: m})
	m.fail = errors.New("full")
	before := of(a.Assign(services("a")), "a")
	m.fail = nil
	if got := of(a.Assign(services("a")), "a"); got != before || len(m.given) != 1 {
		t.Errorf("a = %s, was %s; stored %v", got, before, m.given)
	}
	m.fail = errors.New("damaged")
	if _, err := vip.New(vip.Config{Store: m}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("New = %v, want that the store cannot be read", err)
	}
}

func TestNumbersThatNobodyWroteAreNotTrusted(t *testing.T) {
	m := newMemory()
	for i, n := range []uint32{0, 7, 7} {
		m.given[vip.Service{Namespace: "default", Name: fmt.Sprint("s", i)}] = n
	}
	table := open(t, vip.Config{Store: m}).Assign(services("s0", "s1", "s2"))
	got := []string{of(table, "s0"), of(table, "s1"), of(table, "s2")}
	slices.Sort(got)
	if len(slices.Compact(got)) != 3 || of(table, "s1") != "[198.18.0.7 fd69:6e6c:6179::7]" {
		t.Errorf("addresses = %v, want three, with s1 at 7", got)
	}
}

func TestRangesThatCannotBe(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1/8": "bits are set behind the first 8: want 10.0.0.0/8", "10.0.0.0/31": "too small: want at most /30",
		"0.0.0.0/0": "at least /8", "127.0.0.0/8": "loopback", "224.0.0.0/8": "multicast", "fd00::/64": "want a range of IPv4",
		"169.254.0.0/16": "link-local",
	} {
		if _, err := vip.New(vip.Config{IPv4: netip.MustParsePrefix(in)}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
	err := vip.Check(netip.MustParsePrefix("fd00::/64"), "--a", netip.MustParsePrefix("10.0.0.0/8"), "--b")
	if err == nil || !strings.Contains(err.Error(), "--a fd00::/64: want a range of IPv4") || !strings.Contains(err.Error(), "--b 10.0.0.0/8: want a range of IPv6") {
		t.Errorf("Check = %v, want both", err)
	}
	if err := vip.Check(netip.Prefix{}, "a", netip.Prefix{}, "b"); err != nil {
		t.Errorf("Check of none = %v", err)
	}
}

// Distinct services have distinct addresses, within the ranges, whatever comes and goes.
func FuzzAssign(f *testing.F) {
	f.Add([]byte{1, 2, 3, 250, 4}, uint8(28))
	f.Add([]byte("abcabcxyz"), uint8(30))
	f.Fuzz(func(t *testing.T, names []byte, bits uint8) {
		cfg := vip.Config{IPv4: netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), 24+int(bits%7)), Store: newMemory()}
		a := open(t, cfg)
		live := map[vip.Service]bool{}
		for i, n := range names {
			s := services(fmt.Sprint("s", n%32))[0]
			if n >= 128 {
				delete(live, s)
			} else {
				live[s] = true
			}
			if i%5 == 4 {
				a = open(t, cfg)
			}
			table := a.Assign(slices.SortedFunc(maps.Keys(live), func(x, y vip.Service) int { return strings.Compare(x.Name, y.Name) }))
			seen := map[netip.Addr]bool{}
			without := 0
			for s := range live {
				addrs := table.Of(s.Namespace, s.Name)
				if len(addrs) == 0 {
					without++
				}
				for _, addr := range addrs {
					if seen[addr] || addr.Is4() && !cfg.IPv4.Contains(addr) {
						t.Fatalf("%v at %v: twice or out of %v", s, addr, cfg.IPv4)
					}
					seen[addr] = true
				}
			}
			room := 1<<(32-cfg.IPv4.Bits()) - 2
			if want := max(0, len(live)-room); without != want {
				t.Fatalf("%d of %d services have none, want %d: there are %d addresses", without, len(live), want, room)
			}
		}
	})
}
