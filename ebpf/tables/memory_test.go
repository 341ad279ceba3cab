package tables

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"slices"
	"syscall"
	"testing"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// memory is a Map without a kernel, as full and as strict as one.
type memory[K comparable, V any] struct {
	name      string
	capacity  int
	m         map[K]V
	puts      int
	deletes   int
	after     func() // runs after each entry was written or deleted
	strangers int    // deletions of what was not there
}

func newMemory[K comparable, V any](name string, capacity int) *memory[K, V] {
	return &memory[K, V]{name: name, capacity: capacity, m: make(map[K]V)}
}

func (m *memory[K, V]) Name() string  { return m.name }
func (m *memory[K, V]) Capacity() int { return m.capacity }

func (m *memory[K, V]) Each(f func(K, V)) error {
	for k, v := range m.m {
		f(k, v)
	}
	return nil
}

func (m *memory[K, V]) Put(keys []K, values []V) (int, error) {
	for i, k := range keys {
		if _, ok := m.m[k]; !ok && len(m.m) >= m.capacity {
			return i, syscall.E2BIG
		}
		m.m[k] = values[i]
		m.puts++
		if m.after != nil {
			m.after()
		}
	}
	return len(keys), nil
}

func (m *memory[K, V]) Delete(keys []K) (int, error) {
	for _, k := range keys {
		if _, ok := m.m[k]; !ok {
			m.strangers++
		}
		delete(m.m, k)
		m.deletes++
		if m.after != nil {
			m.after()
		}
	}
	return len(keys), nil
}

// node is all maps of a node in memory.
type node struct {
	workloads  *memory[uint64, bpfobj.InlayWorkload]
	services   *memory[bpfobj.InlaySvcKey, bpfobj.InlaySvc]
	slots      *memory[bpfobj.InlaySlotKey, bpfobj.InlaySlot]
	endpoints  *memory[bpfobj.InlaySvcKey, uint64]
	addresses  *memory[bpfobj.InlayAddr, uint64]
	localAddrs *memory[bpfobj.InlayLocalKey, uint8]
	subjects   *memory[uint64, bpfobj.InlaySubject]
	policies   *memory[bpfobj.InlayPolKey, uint32]
	portSets   *memory[uint32, bpfobj.InlayPortSet]
	cidrs      *memory[bpfobj.InlayCidrKey, uint32]
	names      *memory[bpfobj.InlayNameKey, bpfobj.InlayName]
	gone       *memory[bpfobj.InlayGoneKey, uint8]
}

// newNode makes maps of that many entries each, or as many as sizes says.
func newNode(capacity int, sizes map[string]int) *node {
	size := func(name string) int {
		if n, ok := sizes[name]; ok {
			return n
		}
		return capacity
	}
	return &node{
		workloads:  newMemory[uint64, bpfobj.InlayWorkload]("workloads", size("workloads")),
		services:   newMemory[bpfobj.InlaySvcKey, bpfobj.InlaySvc]("services", size("services")),
		slots:      newMemory[bpfobj.InlaySlotKey, bpfobj.InlaySlot]("slots", size("slots")),
		endpoints:  newMemory[bpfobj.InlaySvcKey, uint64]("endpoints", size("endpoints")),
		addresses:  newMemory[bpfobj.InlayAddr, uint64]("addresses", size("addresses")),
		localAddrs: newMemory[bpfobj.InlayLocalKey, uint8]("local_addrs", size("local_addrs")),
		subjects:   newMemory[uint64, bpfobj.InlaySubject]("subjects", size("subjects")),
		policies:   newMemory[bpfobj.InlayPolKey, uint32]("policies", size("policies")),
		portSets:   newMemory[uint32, bpfobj.InlayPortSet]("port_sets", size("port_sets")),
		cidrs:      newMemory[bpfobj.InlayCidrKey, uint32]("cidrs", size("cidrs")),
		names:      newMemory[bpfobj.InlayNameKey, bpfobj.InlayName]("names", size("names")),
		gone:       newMemory[bpfobj.InlayGoneKey, uint8]("gone", size("gone")),
	}
}

func (n *node) contents() contents {
	return contents{
		workloads: n.workloads, services: n.services, slots: n.slots, endpoints: n.endpoints,
		addresses: n.addresses, localAddrs: n.localAddrs, subjects: n.subjects, policies: n.policies,
		portSets: n.portSets, cidrs: n.cidrs, names: n.names, gone: n.gone,
	}
}

// writes is how often any map was written or an entry deleted.
func (n *node) writes() int {
	return n.workloads.puts + n.workloads.deletes + n.services.puts + n.services.deletes +
		n.slots.puts + n.slots.deletes + n.endpoints.puts + n.endpoints.deletes +
		n.addresses.puts + n.addresses.deletes + n.localAddrs.puts + n.localAddrs.deletes +
		n.subjects.puts + n.subjects.deletes + n.policies.puts + n.policies.deletes +
		n.portSets.puts + n.portSets.deletes + n.cidrs.puts + n.cidrs.deletes +
		n.names.puts + n.names.deletes + n.gone.puts + n.gone.deletes
}

// check fails the test when the maps contradict each other or the table's count of them.
func (n *node) check(t testing.TB, table *Table) {
	t.Helper()
	slots := 0
	sets := make(map[setName]bool)
	for k, v := range n.services.m {
		if got := len(n.leads(v)); uint32(got) != v.Slots {
			t.Errorf("service address %s: %d slots of %d", describe(k), got, v.Slots)
		}
		if v.Slots > 0 {
			sets[nameOf(v)] = true
		}
	}
	for name, set := range table.sets.byName {
		if set.n > 1 {
			slots += int(set.n)
		}
		if !sets[name] && set.claims == 0 {
			t.Errorf("slots %+v: nobody wants them", name)
		}
	}
	if slots != len(n.slots.m) {
		t.Errorf("%d slots, of which sets have %d", len(n.slots.m), slots)
	}
	used := make(map[uint32]bool)
	for k, id := range n.policies.m {
		used[id] = true
		sub, ok := n.subjects.m[k.Subject]
		if !ok || sub.Gen != k.Gen {
			t.Errorf("policy entry %+v of no generation of a subject (%+v)", k, sub)
		}
		set, ok := n.portSets.m[id]
		if !ok {
			t.Errorf("policy entry %+v: port set %d is missing", k, id)
		}
		next := 0
		for _, s := range set.Segs[:set.N] {
			if int(s.Lo) < next || s.Hi < s.Lo || s.Action == none && s.Audit == none {
				t.Errorf("port set %d: segment %+v after port %d", id, s, next)
			}
			next = int(s.Hi) + 1
		}
	}
	for k, class := range n.cidrs.m {
		if sub, ok := n.subjects.m[k.Subject]; !ok || sub.Gen != k.Gen {
			t.Errorf("prefix %+v (class %d) of no generation of a subject (%+v)", k, class, sub)
		}
	}
	if len(used) != len(n.portSets.m) {
		t.Errorf("%d port sets, of which %d are used", len(n.portSets.m), len(used))
	}
	for _, u := range table.Usage() {
		if got := n.len(u.Name); got != u.Entries {
			t.Errorf("map %s: %d entries, counted as %d", u.Name, got, u.Entries)
		}
	}
	if s := n.policies.strangers + n.portSets.strangers + n.cidrs.strangers + n.slots.strangers + n.services.strangers; s != 0 {
		t.Errorf("%d deletions of what was not there", s)
	}
}

func (n *node) len(name string) int {
	return map[string]int{
		"workloads": len(n.workloads.m), "services": len(n.services.m), "slots": len(n.slots.m),
		"endpoints": len(n.endpoints.m), "addresses": len(n.addresses.m), "local_addrs": len(n.localAddrs.m),
		"subjects": len(n.subjects.m), "policies": len(n.policies.m), "port_sets": len(n.portSets.m),
		"cidrs": len(n.cidrs.m), "names": len(n.names.m), "gone": len(n.gone.m),
	}[name]
}

// leads are the slots that a service address leads to, as far as they are there.
func (n *node) leads(v bpfobj.InlaySvc) []bpfobj.InlaySlot {
	if v.Slots == 1 {
		return single(v.Only)
	}
	var out []bpfobj.InlaySlot
	for i := range v.Slots {
		if s, ok := n.slots.m[bpfobj.InlaySlotKey{Svc: v.Id, Gen: v.Gen, Index: i}]; ok {
			out = append(out, s)
		}
	}
	return out
}

// meaning is what the maps say, without the numbers that depend on how they came to say it.
func (n *node) meaning() map[string]string {
	out := make(map[string]string)
	for k, v := range n.services.m {
		out["service "+describe(k)] = fmt.Sprint(n.leads(v))
	}
	for k, v := range n.endpoints.m {
		out["endpoint "+describe(k)] = fmt.Sprint(v)
	}
	for k, v := range n.addresses.m {
		out["address "+describe(k)] = fmt.Sprint(v)
	}
	for k, v := range n.names.m {
		out["name "+text(k.Text[:])] = fmt.Sprint(v)
	}
	for k, v := range n.workloads.m {
		out[fmt.Sprint("workload ", k)] = fmt.Sprint(v)
	}
	for k, v := range n.localAddrs.m {
		out[fmt.Sprint("local ", k)] = fmt.Sprint(v)
	}
	for k, v := range n.subjects.m {
		v.Gen = 0
		out[fmt.Sprint("subject ", k)] = fmt.Sprint(v)
	}
	for k, v := range n.policies.m {
		k.Gen = 0
		out[fmt.Sprint("policy ", k)] = fmt.Sprint(n.portSets.m[v])
	}
	for k, v := range n.cidrs.m {
		k.Gen = 0
		out[fmt.Sprint("prefix ", k)] = fmt.Sprint(v)
	}
	return out
}

func equalMeaning(t testing.TB, got, want map[string]string) {
	t.Helper()
	if reflect.DeepEqual(got, want) {
		return
	}
	for k, w := range want {
		if g, ok := got[k]; !ok || g != w {
			t.Errorf("%s: %.300s, want %.300s", k, g, w)
		}
	}
	for k, g := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %.300s, want nothing", k, g)
		}
	}
}

// decide walks the maps as decide.h says, for tests without a kernel.
func (n *node) decide(q Query) (c bpfobj.InlayDecideCase) {
	c = bpfobj.InlayDecideCase{Verdict: allow, Audit: allow}
	sub, ok := n.subjects.m[q.Subject]
	if !ok {
		return c
	}
	if sub.Flags&uint32(bpfobj.InlaySubjectFlagSUBJECT_CLOSED) != 0 {
		return bpfobj.InlayDecideCase{Verdict: deny, Audit: deny, Err: uint16(syscall.EPERM), Flags: uint32(bpfobj.InlayFlowFlagFLOW_CLOSED)}
	}
	key := bpfobj.InlayPolKey{Subject: q.Subject, Gen: sub.Gen, Dir: q.Dir, Proto: q.Proto}
	find := func(kind bpfobj.InlayPeerKind, peer uint64) (bpfobj.InlaySeg, bool) {
		k := key
		k.Kind, k.Peer = uint8(kind), peer
		id, ok := n.policies.m[k]
		if !ok {
			return bpfobj.InlaySeg{}, false
		}
		set := n.portSets.m[id]
		for _, s := range set.Segs[:set.N] {
			if s.Lo <= q.Port && q.Port <= s.Hi {
				return s, true
			}
		}
		return bpfobj.InlaySeg{}, true
	}
	var peer, addr bpfobj.InlaySeg
	found := false
	if q.Peer != 0 {
		peer, found = find(bpfobj.InlayPeerKindPEER_IDENTITY, q.Peer)
		if !found && q.Peer >= IDFirst {
			peer, found = find(bpfobj.InlayPeerKindPEER_MESH, 0)
		}
	}
	if !found {
		peer, _ = find(bpfobj.InlayPeerKindPEER_ANY, 0)
	}
	if class, ok := n.longest(q, sub.Gen); ok {
		addr, _ = find(bpfobj.InlayPeerKindPEER_CIDR, uint64(class))
	}
	combine := func(a, b uint8, aRule, bRule uint32) (uint8, uint32) {
		switch {
		case a == deny:
			return deny, aRule
		case b == deny:
			return deny, bRule
		case a == allow:
			return allow, aRule
		case b == allow:
			return allow, bRule
		}
		return none, 0
	}
	c.Verdict, c.Rule = combine(peer.Action, addr.Action, peer.Rule, addr.Rule)
	c.Audit, c.AuditRule = combine(peer.Audit, addr.Audit, peer.AuditRule, addr.AuditRule)
	if c.Verdict == deny {
		if c.Err = addr.Err; peer.Action == deny {
			c.Err = peer.Err
		}
	}
	flag := func(f bpfobj.InlaySubjectFlag) bool { return sub.Flags&(uint32(f)<<q.Dir) != 0 }
	if c.Verdict == none {
		if c.Verdict = allow; flag(bpfobj.InlaySubjectFlagSUBJECT_DENY_EGRESS) {
			c.Verdict, c.Rule = deny, sub.Rule[q.Dir]
		}
	}
	if c.Audit == none {
		if c.Audit = allow; flag(bpfobj.InlaySubjectFlagSUBJECT_AUDIT_DENY_EGRESS) {
			c.Audit, c.AuditRule = deny, sub.AuditRule[q.Dir]
		}
	}
	if c.Verdict == deny && c.Err == 0 {
		c.Err = uint16(syscall.EPERM)
	}
	return c
}

// longest is the look-up of a trie.
func (n *node) longest(q Query, gen uint32) (class uint32, found bool) {
	bits := -1
	at := q.Addr.As16()
	for k, v := range n.cidrs.m {
		l := int(k.Prefixlen) - cidrBase
		if k.Gen != gen || k.Subject != q.Subject || k.Dir != uint32(q.Dir) || l <= bits || !sameBits(at, k.Addr.B, l) {
			continue
		}
		bits, class, found = l, v, true
	}
	return class, found
}

func sameBits(a, b [16]byte, bits int) bool {
	full := bits / 8
	if !slices.Equal(a[:full], b[:full]) {
		return false
	}
	rest := bits % 8
	return rest == 0 || (a[full]^b[full])>>(8-rest) == 0
}

// bytesOf is a decide_case as decide_test reads it.
func bytesOf(q Query) []byte {
	b := make([]byte, 0, 64)
	b = binary.NativeEndian.AppendUint64(b, q.Subject)
	b = binary.NativeEndian.AppendUint64(b, q.Peer)
	a := q.Addr.As16()
	b = append(b, a[:]...)
	b = binary.BigEndian.AppendUint16(b, q.Port)
	b = append(b, q.Proto, q.Dir)
	return append(b, make([]byte, 56-len(b))...)
}
