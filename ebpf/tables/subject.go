package tables

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// portSet is one entry of the port_sets map, known by its contents and shared by all that have the
// same. Its number is not given again before 2^32 others were.
type portSet struct {
	id       uint32
	contents string // as encodeSegs
	users    int
	written  bool
}

// subject is what the maps hold of the policies of one workload. Keys are without generation.
type subject struct {
	value bpfobj.InlaySubject // generation 0: nothing is in the map
	pol   map[bpfobj.InlayPolKey]*portSet
	cidr  map[bpfobj.InlayCidrKey]uint32
	held  bool // written by an earlier agent, and kept until all is known
}

// subjects are all of them, with their maps.
type subjects struct {
	values   ledger[uint64, bpfobj.InlaySubject]
	policies ledger[bpfobj.InlayPolKey, uint32]
	cidrs    ledger[bpfobj.InlayCidrKey, uint32]
	portSets ledger[uint32, bpfobj.InlayPortSet]

	all        map[uint64]*subject
	dirty      map[uint64]struct{}
	blocked    map[uint64]bool // closed, and not even that found room
	byContents map[string]*portSet
	byID       map[uint32]*portSet
	gen        uint32 // given last
	id         uint32 // of a port set, given last
}

// generations stay below the bit by which programs tell a closed subject from the open one of the
// same generation.
const generations = 1<<31 - 1

func (s *subjects) touch(n uint64) { s.dirty[n] = struct{}{} }

func (s *subjects) touchAll() {
	for n, sub := range s.all {
		sub.held = false
		s.touch(n)
	}
}

// readSubjects rebuilds what an earlier agent wrote; entries of another generation than their
// subject's are left over from a commit that was cut short.
func (t *Table) readSubjects(seed uint32) error {
	s := &t.subjects
	s.values.Map, s.policies.Map, s.cidrs.Map, s.portSets.Map = t.c.subjects, t.c.policies, t.c.cidrs, t.c.portSets
	s.all = make(map[uint64]*subject)
	s.dirty = make(map[uint64]struct{})
	s.blocked = make(map[uint64]bool)
	s.byContents = make(map[string]*portSet)
	s.byID = make(map[uint32]*portSet)
	s.gen = seed & generations
	saw := func(gen uint32) { s.gen = max(s.gen, gen&generations) }
	err := errors.Join(
		s.portSets.Each(func(id uint32, v bpfobj.InlayPortSet) {
			s.portSets.entries++
			s.id = max(s.id, id)
			set := &portSet{id: id, contents: encodeSegs(v.Segs[:min(int(v.N), maxSegs)]), written: true}
			s.byID[id] = set
			if s.byContents[set.contents] == nil {
				s.byContents[set.contents] = set
			}
		}),
		s.values.Each(func(n uint64, v bpfobj.InlaySubject) {
			s.values.entries++
			saw(v.Gen)
			s.all[n] = &subject{
				value: v, held: true,
				pol: make(map[bpfobj.InlayPolKey]*portSet), cidr: make(map[bpfobj.InlayCidrKey]uint32),
			}
		}),
	)
	if err != nil {
		return err
	}
	err = errors.Join(
		s.policies.Each(func(k bpfobj.InlayPolKey, id uint32) {
			s.policies.entries++
			saw(k.Gen)
			sub := s.all[k.Subject]
			if sub == nil || sub.value.Gen != k.Gen {
				t.trash.policies = append(t.trash.policies, k)
				return
			}
			set := s.byID[id]
			if set == nil {
				set = &portSet{id: id} // of no contents that anybody wants: written anew
			}
			set.users++
			k.Gen = 0
			sub.pol[k] = set
		}),
		s.cidrs.Each(func(k bpfobj.InlayCidrKey, class uint32) {
			s.cidrs.entries++
			saw(k.Gen)
			sub := s.all[k.Subject]
			if sub == nil || sub.value.Gen != k.Gen {
				t.trash.cidrs = append(t.trash.cidrs, k)
				return
			}
			k.Gen = 0
			sub.cidr[k] = class
		}),
	)
	for _, set := range s.byID {
		if set.users == 0 {
			t.trash.portSets = append(t.trash.portSets, set)
		}
	}
	return err
}

// subjectsOf marks the workloads of this node that run a service.
func (t *Table) subjectsOf(name string) {
	for n := range t.hosts {
		if who, ok := t.idents.lookup(n); ok && who.Namespace+"/"+who.Service == name {
			t.subjects.touch(n)
		}
	}
}

// spread marks the workloads of this node whose policies name a workload that came or went.
func (t *Table) spread() {
	if len(t.idents.changed) == 0 {
		return
	}
	for n := range t.hosts {
		who, _ := t.idents.lookup(n)
		set := t.policies[who.Namespace+"/"+who.Service]
		for _, other := range t.idents.changed {
			if set.names(&other) {
				t.subjects.touch(n)
				break
			}
		}
	}
	t.idents.changed = make(map[uint64]Identity) // not cleared: it was large once
}

// plan is what is to become of one subject.
type plan struct {
	n      uint64
	who    Identity
	was    *subject // nil: new
	want   *flat
	next   *subject
	failed bool
}

// writeSubjects makes the maps of policies hold what is wanted. Entries of a new generation are
// written whole, then the subject's one value leads to them, then the old entries go. A subject
// whose entries find no room is closed: nothing is allowed to it until they do.
func (t *Table) writeSubjects(last bool) error {
	t.spread()
	s := &t.subjects
	var errs []error
	var plans []*plan
	for _, n := range slices.Sorted(maps.Keys(s.dirty)) {
		was := s.all[n]
		if was != nil && was.held && !t.synced {
			continue // some of those that its policies name may not be known yet
		}
		delete(s.dirty, n)
		who, _ := t.idents.lookup(n)
		var policies []*policy
		if t.hosts[n] > 0 {
			policies = t.policies[who.Namespace+"/"+who.Service].selects(&who)
		}
		if len(policies) == 0 {
			t.dropSubject(n, was)
			continue
		}
		want, err := flatten(n, who, policies, &t.idents)
		if err != nil {
			errs = append(errs, err)
			want = &flat{value: bpfobj.InlaySubject{Flags: uint32(bpfobj.InlaySubjectFlagSUBJECT_CLOSED)}}
		}
		if was != nil && was.holds(want) {
			continue
		}
		plans = append(plans, &plan{n: n, who: who, was: was, want: want})
	}
	if len(plans) > 0 {
		t.writeEntries(plans)
		t.flip(plans, last)
	}
	return errors.Join(errs...)
}

// holds says whether the maps hold what is wanted.
func (sub *subject) holds(want *flat) bool {
	v := sub.value
	v.Gen = 0
	if v != want.value || len(sub.pol) != len(want.pol) || len(sub.cidr) != len(want.cidr) {
		return false
	}
	for k, contents := range want.pol {
		if set := sub.pol[k]; set == nil || set.contents != contents || !set.written {
			return false
		}
	}
	for k, class := range want.cidr {
		if got, ok := sub.cidr[k]; !ok || got != class {
			return false
		}
	}
	return true
}

func (s *subjects) generation() uint32 {
	s.gen = (s.gen + 1) & generations
	if s.gen == 0 {
		s.gen = 1
	}
	return s.gen
}

// take returns the port set with these contents and counts one more user.
func (s *subjects) take(contents string) *portSet {
	set := s.byContents[contents]
	if set == nil {
		for s.id++; s.id == 0 || s.byID[s.id] != nil; s.id++ {
		}
		set = &portSet{id: s.id, contents: contents}
		s.byContents[contents] = set
		s.byID[set.id] = set
	}
	set.users++
	return set
}

// drop takes back take.
func (t *Table) drop(set *portSet) {
	s := &t.subjects
	if set.users--; set.users > 0 || s.byID[set.id] != set {
		return
	}
	if set.written {
		t.trash.portSets = append(t.trash.portSets, set)
		return
	}
	delete(s.byContents, set.contents)
	delete(s.byID, set.id)
}

// writeEntries writes the entries of new generations; plans with an entry that found no room fail
// and theirs go to the trash.
func (t *Table) writeEntries(plans []*plan) {
	s := &t.subjects
	var ids []uint32
	var sets []*portSet
	var setValues []bpfobj.InlayPortSet
	var polKeys []bpfobj.InlayPolKey
	var polSets []*portSet
	var polPlans, cidrPlans []*plan
	var cidrKeys []bpfobj.InlayCidrKey
	var classes []uint32
	queued := make(map[*portSet]bool)
	for _, p := range plans {
		value := p.want.value
		value.Gen = s.generation()
		p.next = &subject{value: value, pol: make(map[bpfobj.InlayPolKey]*portSet, len(p.want.pol)), cidr: p.want.cidr}
		for k, contents := range p.want.pol {
			set := s.take(contents)
			p.next.pol[k] = set
			if !set.written && !queued[set] {
				queued[set] = true
				ids, sets, setValues = append(ids, set.id), append(sets, set), append(setValues, decodeSegs(contents))
			}
			k.Gen = value.Gen
			polKeys, polSets, polPlans = append(polKeys, k), append(polSets, set), append(polPlans, p)
		}
		for k, class := range p.want.cidr {
			k.Gen = value.Gen
			cidrKeys, classes, cidrPlans = append(cidrKeys, k), append(classes, class), append(cidrPlans, p)
		}
	}
	for _, set := range sets {
		set.written = true
	}
	lost := make(map[*portSet]error)
	s.portSets.put(ids, setValues, false, &t.change, func(i int, err error) {
		sets[i].written = false
		lost[sets[i]] = err
	})
	if len(lost) > 0 {
		for i, set := range polSets {
			if err, ok := lost[set]; ok {
				polPlans[i].fail(t, s.portSets.Name(), s.portSets.entries, s.portSets.Capacity(), err)
			}
		}
	}
	wrotePolicies := enter(t, &s.policies, polKeys, idsOf(polSets), polPlans)
	wroteCIDRs := enter(t, &s.cidrs, cidrKeys, classes, cidrPlans)
	for i, k := range polKeys {
		if wrotePolicies[i] && polPlans[i].failed {
			t.trash.policies = append(t.trash.policies, k)
		}
	}
	for i, k := range cidrKeys {
		if wroteCIDRs[i] && cidrPlans[i].failed {
			t.trash.cidrs = append(t.trash.cidrs, k)
		}
	}
	for _, p := range plans {
		if p.failed {
			t.forget(p.next)
		}
	}
}

func idsOf(sets []*portSet) []uint32 {
	out := make([]uint32, len(sets))
	for i, set := range sets {
		out[i] = set.id
	}
	return out
}

// enter writes the entries of plans that have not failed, and says which it wrote.
func enter[K comparable, V any](t *Table, l *ledger[K, V], keys []K, values []V, owners []*plan) []bool {
	wrote := make([]bool, len(keys))
	var at []int
	var ks []K
	var vs []V
	for i, p := range owners {
		if !p.failed {
			at, ks, vs = append(at, i), append(ks, keys[i]), append(vs, values[i])
			wrote[i] = true
		}
	}
	l.put(ks, vs, false, &t.change, func(i int, err error) {
		wrote[at[i]] = false
		owners[at[i]].fail(t, l.Name(), l.entries, l.Capacity(), err)
	})
	return wrote
}

func (p *plan) fail(t *Table, m string, entries, capacity int, err error) {
	p.failed = true
	t.fail(m, fmt.Sprintf("for the policies of %s.%s", p.who.Service, p.who.Namespace), entries, capacity, err)
}

// forget gives back the port sets of a subject.
func (t *Table) forget(sub *subject) {
	for _, set := range sub.pol {
		t.drop(set)
	}
}

// discard sends all entries of a subject to the trash.
func (t *Table) discard(sub *subject) {
	for k := range sub.pol {
		k.Gen = sub.value.Gen
		t.trash.policies = append(t.trash.policies, k)
	}
	for k := range sub.cidr {
		k.Gen = sub.value.Gen
		t.trash.cidrs = append(t.trash.cidrs, k)
	}
	t.forget(sub)
}

// flip makes subjects follow their new entries, each by one write. Those that failed are tried once
// more after the trash was emptied; if that was it (last), they are closed.
func (t *Table) flip(plans []*plan, last bool) {
	s := &t.subjects
	var now []*plan
	for _, p := range plans {
		if !p.failed {
			now = append(now, p)
			continue
		}
		s.touch(p.n)
		if !last {
			s.blocked[p.n] = p.was == nil
			continue
		}
		// It keeps no entries: nobody reads those of a closed one, and what is wanted may fit in their place.
		p.next = &subject{value: p.next.value, pol: make(map[bpfobj.InlayPolKey]*portSet), cidr: make(map[bpfobj.InlayCidrKey]uint32)}
		if p.was != nil {
			p.next.value = p.was.value
		}
		p.next.value.Flags |= uint32(bpfobj.InlaySubjectFlagSUBJECT_CLOSED)
		if p.was != nil && p.was.value == p.next.value {
			continue // it is closed already
		}
		now = append(now, p)
	}
	for _, replaces := range []bool{false, true} {
		var keys []uint64
		var values []bpfobj.InlaySubject
		var list []*plan
		for _, p := range now {
			if replaces == (p.was != nil) {
				keys, values, list = append(keys, p.n), append(values, p.next.value), append(list, p)
			}
		}
		lost := make(map[*plan]bool)
		s.values.put(keys, values, replaces, &t.change, func(i int, err error) {
			p := list[i]
			lost[p] = true
			s.touch(p.n)
			if p.was == nil {
				s.blocked[p.n] = true
			}
			if !p.failed {
				t.discard(p.next)
			}
			p.fail(t, s.values.Name(), s.values.entries, s.values.Capacity(), err)
		})
		for _, p := range list {
			if lost[p] {
				continue
			}
			delete(s.blocked, p.n)
			if p.was != nil {
				t.discard(p.was)
			}
			s.all[p.n] = p.next
			t.change.Subjects = append(t.change.Subjects, p.n)
		}
	}
}

// dropSubject removes a workload that no policy selects, or that left the node.
func (t *Table) dropSubject(n uint64, was *subject) {
	s := &t.subjects
	delete(s.blocked, n)
	if was == nil {
		return
	}
	if _, err := s.values.remove([]uint64{n}, &t.change); err != nil {
		s.touch(n)
		t.fail(s.values.Name(), "a deletion", s.values.entries, s.values.Capacity(), err)
		return
	}
	t.discard(was)
	delete(s.all, n)
	if t.hosts[n] > 0 {
		t.change.Subjects = append(t.change.Subjects, n)
	}
}

// closed are the workloads of this node to which nothing is allowed.
func (t *Table) closed() (out []uint64) {
	for n := range t.hosts {
		sub := t.subjects.all[n]
		if t.subjects.blocked[n] || sub != nil && sub.value.Flags&uint32(bpfobj.InlaySubjectFlagSUBJECT_CLOSED) != 0 {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}
