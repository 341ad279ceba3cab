package tables

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// setName is svc.id and svc.gen: a generation is not given again (before 2^32 others were), so that
// a program which still holds an old struct svc finds the old slots or none. A service address
// keeps the id when its endpoints change, which keeps the choice by hash as stable as it can be.
type setName struct{ id, gen uint32 }

// slotSet is one alias table, known by its contents: service addresses with the same endpoints share
// it. It lies in the slots map, that of a single endpoint in the service addresses themselves.
type slotSet struct {
	setName
	sum     [16]byte
	n       uint32
	only    bpfobj.InlayBackend // when n is 1
	slots   []bpfobj.InlaySlot  // until they are written
	written bool
	claims  int // addresses of services that want it
	users   int // service addresses in the map that lead to it
}

// slotSets are all of them.
type slotSets struct {
	ledger[bpfobj.InlaySlotKey, bpfobj.InlaySlot]
	bySum  map[[16]byte]*slotSet
	byName map[setName]*slotSet
	last   setName               // id and generation that were given last
	queued map[*slotSet]struct{} // to be written
}

func sumSlots(slots []bpfobj.InlaySlot) [16]byte {
	b := make([]byte, 0, len(slots)*72)
	backend := func(x *bpfobj.InlayBackend) {
		b = append(b, x.Addr.B[:]...)
		b = binary.NativeEndian.AppendUint16(b, x.Port)
		b = binary.NativeEndian.AppendUint16(b, x.Flags)
		b = binary.NativeEndian.AppendUint64(b, x.Identity)
	}
	for i := range slots {
		b = binary.NativeEndian.AppendUint32(b, slots[i].Cut)
		backend(&slots[i].A)
		backend(&slots[i].B)
	}
	sum := sha256.Sum256(b)
	return [16]byte(sum[:16])
}

// readSets rebuilds the sets from what services and slots hold; slots that no service leads to are
// left over from a commit that was cut short.
func (t *Table) readSets() error {
	s := &t.sets
	s.Map = t.c.slots
	s.bySum = make(map[[16]byte]*slotSet)
	s.byName = make(map[setName]*slotSet)
	s.queued = make(map[*slotSet]struct{})
	lead := make(map[setName]uint32) // slots that services expect
	for _, v := range t.addresses.have {
		n := nameOf(v)
		s.last = setName{max(s.last.id, n.id), max(s.last.gen, n.gen)}
		switch {
		case v.Slots > 1:
			lead[n] = v.Slots
		case v.Slots == 1 && s.byName[n] == nil:
			s.know(&slotSet{setName: n, sum: sumSlots(single(v.Only)), n: 1, only: v.Only, written: true})
		}
	}
	type slot struct {
		index uint32
		bpfobj.InlaySlot
	}
	held := make(map[setName][]slot)
	err := s.Each(func(k bpfobj.InlaySlotKey, v bpfobj.InlaySlot) {
		s.entries++
		n := setName{k.Svc, k.Gen}
		s.last = setName{max(s.last.id, n.id), max(s.last.gen, n.gen)}
		if k.Index >= lead[n] {
			t.trash.slots = append(t.trash.slots, k)
			return
		}
		held[n] = append(held[n], slot{k.Index, v})
	})
	if err != nil {
		return err
	}
	for n, list := range held {
		slices.SortFunc(list, func(a, b slot) int { return cmp.Compare(a.index, b.index) })
		slots := make([]bpfobj.InlaySlot, len(list))
		for i := range list {
			slots[i] = list[i].InlaySlot
		}
		set := &slotSet{setName: n, sum: sumSlots(slots), n: lead[n], written: true}
		if uint32(len(list)) != lead[n] {
			set.sum = [16]byte{} // incomplete: nobody's contents are these
		}
		s.know(set)
	}
	for _, v := range t.addresses.have {
		if set := s.of(v); set != nil {
			set.users++
		}
	}
	return nil
}

// know enters a set that is in the kernel.
func (s *slotSets) know(set *slotSet) {
	s.byName[set.setName] = set
	if set.sum != ([16]byte{}) && s.bySum[set.sum] == nil {
		s.bySum[set.sum] = set
	}
}

func nameOf(v bpfobj.InlaySvc) setName { return setName{v.Id, v.Gen} }

// of is the set that a value of the services map leads to; nil for none.
func (s *slotSets) of(v bpfobj.InlaySvc) *slotSet {
	if v.Slots == 0 {
		return nil
	}
	return s.byName[nameOf(v)]
}

// want returns the set of these slots and counts one more claim; nil for none.
func (s *slotSets) want(slots []bpfobj.InlaySlot) *slotSet {
	if len(slots) == 0 {
		return nil
	}
	sum := sumSlots(slots)
	set := s.bySum[sum]
	if set == nil {
		set = &slotSet{sum: sum, n: uint32(len(slots)), slots: slots}
		if set.n == 1 {
			set.only, set.slots = slots[0].A, nil
		}
		s.bySum[sum] = set
	}
	set.claims++
	return set
}

// unused forgets a set that nobody wants or uses, and hands its slots to the trash.
func (t *Table) unused(set *slotSet) {
	if set == nil || set.claims > 0 || set.users > 0 {
		return
	}
	s := &t.sets
	if s.bySum[set.sum] == set {
		delete(s.bySum, set.sum)
	}
	if set.written {
		delete(s.byName, set.setName)
		if set.n == 1 {
			return // it was never in the map of slots
		}
		for i := range set.n {
			t.trash.slots = append(t.trash.slots, bpfobj.InlaySlotKey{Svc: set.id, Gen: set.gen, Index: i})
		}
	}
}

// claim enters what a service wants.
func (t *Table) claim(s *service) {
	for i := range s.addresses {
		a := &s.addresses[i]
		a.set = t.sets.want(a.slots)
		a.slots = nil
		t.claimed.add(a.key, s, a)
		t.addresses.touch(a.key)
	}
	for i := range s.endpoints {
		e := &s.endpoints[i]
		t.dialled.add(e.key, s, e)
		t.endpoints.touch(e.key)
	}
	for i := range s.sources {
		src := &s.sources[i]
		t.registered.add(src.key, s, src)
		t.sources.touch(src.key)
	}
	for i, n := range s.identities {
		t.idents.acquire(n, s.workloads[i])
	}
	t.names.touch(s.host)
}

// unclaim takes back what a service wanted; its name goes unless it was replaced.
func (t *Table) unclaim(s *service) {
	if s == nil {
		return
	}
	for i := range s.addresses {
		a := &s.addresses[i]
		t.claimed.remove(a.key, s)
		t.addresses.touch(a.key)
		if a.set != nil {
			a.set.claims--
			t.unused(a.set)
		}
	}
	for i := range s.endpoints {
		t.dialled.remove(s.endpoints[i].key, s)
		t.endpoints.touch(s.endpoints[i].key)
	}
	for i := range s.sources {
		t.registered.remove(s.sources[i].key, s)
		t.sources.touch(s.sources[i].key)
	}
	for _, n := range s.identities {
		t.idents.release(n)
	}
	if t.services[s.name] == s {
		delete(t.services, s.name)
		t.names.touch(s.host)
	}
}

// wantAddress is the value of a service address; of several services that claim it the first by
// name has it.
func (t *Table) wantAddress(k bpfobj.InlaySvcKey) (bpfobj.InlaySvc, bool) {
	c := t.claimed[k]
	if len(c) == 0 {
		return bpfobj.InlaySvc{}, false
	}
	set := c[0].v.set
	if set == nil {
		return bpfobj.InlaySvc{}, true // no endpoint: refused at once
	}
	return bpfobj.InlaySvc{Id: set.id, Gen: set.gen, Slots: set.n, Only: set.only}, true
}

// wantEndpoint is the identity behind an endpoint: unknown when services disagree.
func (t *Table) wantEndpoint(k bpfobj.InlaySvcKey) (uint64, bool) {
	c := t.dialled[k]
	if len(c) == 0 {
		return 0, false
	}
	for i := range c {
		if c[i].v.identity != c[0].v.identity {
			return IDUnknown, true
		}
	}
	return c[0].v.identity, true
}

// wantSource is the identity behind an address: unknown when several share it.
func (t *Table) wantSource(k bpfobj.InlayAddr) (uint64, bool) {
	c := t.registered[k]
	if len(c) == 0 {
		return 0, false
	}
	for i := range c {
		if c[i].v.identity != c[0].v.identity {
			return IDUnknown, true
		}
	}
	return c[0].v.identity, true
}

// wantName is what a name stands for.
func (t *Table) wantName(host string) (bpfobj.InlayName, bool) {
	name, namespace, _ := strings.Cut(host, ".")
	s := t.services[namespace+"/"+name]
	if s == nil || s.virtual == (bpfobj.InlayName{}) {
		return bpfobj.InlayName{}, false
	}
	return s.virtual, true
}

// writeServices makes the maps of services hold what is wanted: first the sets of slots, whole,
// then the addresses that lead to them, each by one write.
func (t *Table) writeServices() {
	short := t.writeSets()
	before := make(map[bpfobj.InlaySvcKey]*slotSet, len(t.addresses.dirty))
	for k := range t.addresses.dirty {
		before[k] = t.sets.of(t.addresses.have[k])
	}
	touched := keysOf(t.addresses.dirty)
	t.addresses.apply(&t.change, t.wantAddress, func(k bpfobj.InlaySvcKey, _ bool) bool {
		c := t.claimed[k]
		return len(c) > 0 && short[c[0].v.set] // no room for its endpoints: the old ones stay
	}, t.fail)
	for _, k := range touched {
		if was, now := before[k], t.sets.of(t.addresses.have[k]); was != now {
			if now != nil {
				now.users++
			}
			if was != nil {
				was.users--
				t.unused(was)
			}
		}
	}

	// Until all is known, what an earlier agent wrote about an endpoint or an address is added to
	// and not changed: another service may claim it, too.
	untilSynced := func(found bool) func(had bool) bool {
		return func(had bool) bool { return had && found && !t.synced }
	}
	keepEndpoint, keepSource := untilSynced(t.endpoints.found), untilSynced(t.sources.found)
	gone := t.endpoints.apply(&t.change, t.wantEndpoint, func(_ bpfobj.InlaySvcKey, had bool) bool { return keepEndpoint(had) }, t.fail)
	for _, k := range gone {
		t.change.Gone = append(t.change.Gone, endpointOf(k))
	}
	t.sources.apply(&t.change, t.wantSource, func(_ bpfobj.InlayAddr, had bool) bool { return keepSource(had) }, t.fail)
	t.names.apply(&t.change, t.wantName, nil, t.fail)
}

// writeSets writes the sets that dirty addresses want and that are not in the map yet, and returns
// those that found no room.
func (t *Table) writeSets() (short map[*slotSet]bool) {
	s := &t.sets
	var keys []bpfobj.InlaySlotKey
	var values []bpfobj.InlaySlot
	var owners []*slotSet
	for k := range t.addresses.dirty {
		c := t.claimed[k]
		if len(c) == 0 {
			continue
		}
		set := c[0].v.set
		if set == nil || set.written {
			continue
		}
		if _, again := s.queued[set]; again {
			continue
		}
		s.queued[set] = struct{}{}
		set.setName = s.name(t.addresses.have[k].Id)
		s.byName[set.setName] = set
		for i, slot := range set.slots {
			keys = append(keys, bpfobj.InlaySlotKey{Svc: set.id, Gen: set.gen, Index: uint32(i)})
			values = append(values, slot)
			owners = append(owners, set)
		}
	}
	lost := make(map[int]bool)
	s.put(keys, values, false, &t.change, func(i int, err error) {
		if short == nil {
			short = make(map[*slotSet]bool)
		}
		lost[i], short[owners[i]] = true, true
		t.fail(s.Name(), fmt.Sprintf("one of %d slots of a service address", owners[i].n), s.entries, s.Capacity(), err)
	})
	for set := range s.queued {
		if short[set] {
			delete(s.byName, set.setName)
		} else {
			set.written, set.slots = true, nil
		}
	}
	clear(s.queued)
	for i, k := range keys {
		if short[owners[i]] && !lost[i] {
			t.trash.slots = append(t.trash.slots, k)
		}
	}
	return short
}

// name is one that no set has: under the id that the address has already, 0 for none.
func (s *slotSets) name(id uint32) setName {
	for id == 0 {
		s.last.id++
		id = s.last.id
	}
	for {
		s.last.gen++
		if n := (setName{id, s.last.gen}); s.byName[n] == nil {
			return n
		}
	}
}

func endpointOf(k bpfobj.InlaySvcKey) Endpoint {
	return Endpoint{Addr: addrPort(k.Addr, k.Port), Proto: k.Proto}
}

// hosted is a workload of this node.
type hosted struct {
	Workload
	who    Identity
	number uint64
	value  bpfobj.InlayWorkload
	fault  error // why it is not registered
}

func host(w Workload) *hosted {
	h := &hosted{Workload: w, who: Identity{Namespace: w.Namespace, Service: w.Service, Labels: maps.Clone(w.Labels)}}
	if err := checkNames(w.Namespace, w.Service); err != nil {
		h.fault = err
		return h
	}
	h.number = h.who.Number()
	h.value.Identity = h.number
	h.value.Uid = w.UID
	if w.Raw {
		h.value.Flags |= uint32(bpfobj.InlayWorkloadFlagWORKLOAD_RAW)
	}
	putText(h.value.Ns[:], w.Namespace)
	putText(h.value.Service[:], w.Service)
	return h
}

func (t *Table) dropWorkload(cgroup uint64) {
	h := t.wantWorkloads[cgroup]
	if h == nil {
		return
	}
	delete(t.wantWorkloads, cgroup)
	t.workloads.touch(cgroup)
	if h.fault != nil {
		return
	}
	t.idents.release(h.number)
	if t.hosts[h.number]--; t.hosts[h.number] == 0 {
		delete(t.hosts, h.number)
		t.subjects.touch(h.number)
	}
}

// writeWorkloads registers cgroups, after their policies: one whose closing could not be written
// is not registered.
func (t *Table) writeWorkloads() error {
	var errs []error
	t.workloads.apply(&t.change, func(cgroup uint64) (bpfobj.InlayWorkload, bool) {
		h := t.wantWorkloads[cgroup]
		if h == nil {
			return bpfobj.InlayWorkload{}, false
		}
		return h.value, true
	}, func(cgroup uint64, _ bool) bool {
		h := t.wantWorkloads[cgroup]
		if h == nil {
			return false
		}
		if h.fault != nil {
			errs = append(errs, fmt.Errorf("workload %.80q in namespace %.80q: %w", h.Service, h.Namespace, h.fault))
		}
		return h.fault != nil || t.subjects.blocked[h.number]
	}, t.fail)
	for cgroup := range t.workloads.dirty {
		if t.wantWorkloads[cgroup] != nil {
			t.change.Refused = append(t.change.Refused, cgroup)
		}
	}
	slices.Sort(t.change.Refused)
	t.local.apply(&t.change, func(k bpfobj.InlayLocalKey) (uint8, bool) {
		v, ok := t.wantLocal[k]
		return v, ok
	}, nil, t.fail)
	return errors.Join(errs...)
}
