package tables

import (
	"errors"
	"slices"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// trash are entries that nothing leads to any longer. A program that began before may still read
// them, so they go after all such programs have ended.
type trash struct {
	slots    []bpfobj.InlaySlotKey
	policies []bpfobj.InlayPolKey
	cidrs    []bpfobj.InlayCidrKey
	portSets []*portSet
}

func (x *trash) empty() bool {
	return len(x.slots)+len(x.policies)+len(x.cidrs)+len(x.portSets) == 0
}

// commit writes what is dirty. What found no room is tried once more after the trash made some, and then
// once more in the place of what it replaces: a workload whose old and new policies do not fit beside
// each other is closed in between.
func (t *Table) commit() error {
	t.faults = nil
	err := t.pass(false)
	if t.faults != nil {
		t.collect()
		t.faults = nil
		err = t.pass(true)
		if t.faults != nil && !t.trash.empty() { // who was closed has made room
			t.collect()
			t.faults = nil
			err = t.pass(true)
		}
	}
	t.collect()
	t.change.Closed = t.closed()
	slices.Sort(t.change.Subjects)
	t.change.Subjects = slices.Compact(t.change.Subjects)
	t.warn()
	return errors.Join(err, t.faults.err())
}

// pass writes what is dirty: policies before the workloads and services that they speak of, so that
// nobody is reached before it is known what may reach it. Last says that no other pass follows.
func (t *Table) pass(last bool) error {
	t.change.Refused = nil
	err := t.writeSubjects(last)
	err = errors.Join(err, t.writeWorkloads())
	t.writeServices()
	return err
}

// collect empties the trash.
func (t *Table) collect() {
	if t.trash.empty() {
		return
	}
	if t.c.settle != nil {
		t.c.settle()
	}
	x := t.trash
	t.trash = trash{}
	// Policies before port sets: an entry without its ports would close the workload.
	t.trash.policies = remove(t, &t.subjects.policies, x.policies)
	t.trash.cidrs = remove(t, &t.subjects.cidrs, x.cidrs)
	t.trash.slots = remove(t, &t.sets.ledger, x.slots)
	s := &t.subjects
	var ids []uint32
	for _, set := range x.portSets {
		if set.users == 0 && s.byID[set.id] == set { // nobody took it meanwhile
			delete(s.byID, set.id)
			if s.byContents[set.contents] == set {
				delete(s.byContents, set.contents)
			}
			ids = append(ids, set.id)
		}
	}
	for _, id := range remove(t, &s.portSets, ids) {
		set := &portSet{id: id, written: true}
		s.byID[id] = set
		t.trash.portSets = append(t.trash.portSets, set)
	}
}

// remove deletes keys and returns those that are to be tried again.
func remove[K comparable, V any](t *Table, l *ledger[K, V], keys []K) []K {
	left, err := l.remove(keys, &t.change)
	if err != nil {
		t.fail(l.Name(), "a deletion", l.entries, l.Capacity(), err)
	}
	return left
}

// MapUsage is how full a map is.
type MapUsage struct {
	Name              string
	Entries, Capacity int
	// Refused counts writes that found no room, over the life of the Table.
	Refused uint64
}

// Usage of the maps that a Table writes, by name, then of those that programs fill, as Count found
// them last.
func (t *Table) Usage() []MapUsage {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var out []MapUsage
	t.ledgers(func(u MapUsage, _ *bool) { out = append(out, u) })
	for _, f := range t.filled {
		out = append(out, f.usage())
	}
	return out
}

func (t *Table) ledgers(f func(u MapUsage, warned *bool)) {
	s := &t.subjects
	f(t.sources.usage())
	f(s.cidrs.usage())
	f(t.endpoints.usage())
	f(t.gone.usage())
	f(t.local.usage())
	f(t.names.usage())
	f(s.policies.usage())
	f(s.portSets.usage())
	f(t.addresses.usage())
	f(t.sets.usage())
	f(s.values.usage())
	f(t.workloads.usage())
}

func (l *ledger[K, V]) usage() (MapUsage, *bool) {
	return MapUsage{l.Name(), l.entries, l.Capacity(), l.refused}, &l.warned
}

// warn tells of maps that are nearly full, once until they are less so.
func (t *Table) warn() {
	t.ledgers(t.warnOf)
}

func (t *Table) warnOf(u MapUsage, warned *bool) {
	full := u.Entries*10 >= u.Capacity*9
	if full && !*warned {
		t.log.Warn("map is nearly full", "map", u.Name, "entries", u.Entries, "capacity", u.Capacity, "refused", u.Refused)
	}
	if full || u.Entries*10 < u.Capacity*8 {
		*warned = full
	}
}
