package tables

import (
	"maps"
	"slices"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Map is what a table needs of a BPF map. Its methods may be called by one goroutine at a time.
type Map[K comparable, V any] interface {
	Name() string
	// Capacity in entries.
	Capacity() int
	// Each calls f with every entry, in no order.
	Each(f func(K, V)) error
	// Put writes the pairs in order until one fails, and returns how many it wrote.
	Put(keys []K, values []V) (int, error)
	// Delete removes the keys in order until one fails, and returns how many are gone. One that was
	// not there is no failure.
	Delete(keys []K) (int, error)
}

// contents are the maps of a Table.
type contents struct {
	workloads  Map[uint64, bpfobj.InlayWorkload]
	services   Map[bpfobj.InlaySvcKey, bpfobj.InlaySvc]
	slots      Map[bpfobj.InlaySlotKey, bpfobj.InlaySlot]
	endpoints  Map[bpfobj.InlaySvcKey, uint64]
	addresses  Map[bpfobj.InlayAddr, uint64]
	localAddrs Map[bpfobj.InlayLocalKey, uint8]
	subjects   Map[uint64, bpfobj.InlaySubject]
	policies   Map[bpfobj.InlayPolKey, uint32]
	portSets   Map[uint32, bpfobj.InlayPortSet]
	cidrs      Map[bpfobj.InlayCidrKey, uint32]
	names      Map[bpfobj.InlayNameKey, bpfobj.InlayName]
	gone       Map[bpfobj.InlayGoneKey, uint8]
	filled     []Counted // that programs fill
	// settle returns when no program that began before still runs; nil where none reads the maps.
	settle func()
}

// byText is the map of names with keys that take the room of their text only.
type byText struct {
	Map[bpfobj.InlayNameKey, bpfobj.InlayName]
}

func (m byText) Each(f func(string, bpfobj.InlayName)) error {
	return m.Map.Each(func(k bpfobj.InlayNameKey, v bpfobj.InlayName) { f(text(k.Text[:]), v) })
}

func (m byText) Put(keys []string, values []bpfobj.InlayName) (int, error) {
	return m.Map.Put(nameKeys(keys), values)
}

func (m byText) Delete(keys []string) (int, error) { return m.Map.Delete(nameKeys(keys)) }

func nameKeys(list []string) []bpfobj.InlayNameKey {
	out := make([]bpfobj.InlayNameKey, len(list))
	for i, s := range list {
		putText(out[i].Text[:], s)
	}
	return out
}

// ledger is a map with the number of its entries and of those that found no room.
type ledger[K comparable, V any] struct {
	Map[K, V]
	entries int
	refused uint64
	warned  bool
}

// failure tells which entry of a map was not written, and why.
type failure func(m string, what string, entries, capacity int, err error)

// put writes all pairs, which must be new keys unless replaces, and calls failed with the index of
// each that was not written.
func (l *ledger[K, V]) put(keys []K, values []V, replaces bool, c *Change, failed func(i int, err error)) {
	for at := 0; at < len(keys); {
		n, err := l.Put(keys[at:], values[at:])
		c.Writes += n
		if !replaces {
			l.entries += n
		}
		at += n
		if err != nil {
			l.refused++
			failed(at, err)
			at++
		} else if n == 0 {
			return // never of a Map that keeps its word; not a loop without end of one that does not
		}
	}
}

// remove deletes keys and returns those that could not be.
func (l *ledger[K, V]) remove(keys []K, c *Change) (left []K, err error) {
	for at := 0; at < len(keys); {
		n, e := l.Delete(keys[at:])
		c.Deletes += n
		l.entries -= n
		at += n
		if e != nil {
			left, err = append(left, keys[at]), e
			at++
		} else if n == 0 {
			return append(left, keys[at:]...), err
		}
	}
	return left, err
}

// mirror is a map whose whole contents are known here, so that only differences are written.
type mirror[K comparable, V comparable] struct {
	ledger[K, V]
	have  map[K]V
	dirty map[K]struct{} // to be compared by the next apply
	found bool           // an earlier agent left entries
}

func (m *mirror[K, V]) read(from Map[K, V]) error {
	m.Map = from
	m.have = make(map[K]V)
	m.dirty = make(map[K]struct{})
	err := from.Each(func(k K, v V) { m.have[k] = v })
	m.entries = len(m.have)
	m.found = m.entries > 0
	return err
}

func (m *mirror[K, V]) touch(k K) { m.dirty[k] = struct{}{} }

func (m *mirror[K, V]) touchAll() {
	for k := range m.have {
		m.touch(k)
	}
}

// apply makes the map hold what want says of each dirty key; a key that later accepts stays dirty
// and as it is, one that could not be written stays dirty too. It returns what was deleted.
func (m *mirror[K, V]) apply(c *Change, want func(K) (V, bool), later func(k K, had bool) bool, fail failure) (deleted []K) {
	if len(m.dirty) == 0 {
		return nil
	}
	var fresh, changed, away []K
	var freshV, changedV []V
	kept := make(map[K]struct{})
	for k := range m.dirty {
		v, ok := want(k)
		had, has := m.have[k]
		switch {
		case ok && has && v == had, !ok && !has:
		case later != nil && later(k, has):
			kept[k] = struct{}{}
		case ok && has:
			changed, changedV = append(changed, k), append(changedV, v)
		case ok:
			fresh, freshV = append(fresh, k), append(freshV, v)
		default:
			away = append(away, k)
		}
	}
	m.dirty = kept
	left, err := m.remove(away, c) // first: it makes room
	for _, k := range away {
		delete(m.have, k)
	}
	for _, k := range left {
		m.touch(k)
		fail(m.Name(), "a deletion", m.entries, m.Capacity(), err)
	}
	m.write(changed, changedV, true, c, fail)
	m.write(fresh, freshV, false, c, fail)
	if len(left) > 0 {
		return slices.DeleteFunc(away, func(k K) bool { return slices.Contains(left, k) })
	}
	return away
}

func (m *mirror[K, V]) write(keys []K, values []V, replaces bool, c *Change, fail failure) {
	var failed map[int]bool
	m.put(keys, values, replaces, c, func(i int, err error) {
		if failed == nil {
			failed = make(map[int]bool)
		}
		failed[i] = true
		m.touch(keys[i])
		fail(m.Name(), describe(keys[i]), m.entries, m.Capacity(), err)
	})
	for i, k := range keys {
		if !failed[i] {
			m.have[k] = values[i]
		}
	}
}

// keysOf returns the keys of a set, for loops that change it.
func keysOf[K comparable, V any](m map[K]V) []K { return slices.Collect(maps.Keys(m)) }
