package tables

import (
	"fmt"
	"slices"
)

// identities are the workloads that are known: of services, and those of this node.
type identities struct {
	byNumber map[uint64]*known
	byPlace  map[string]map[string][]*known // namespace, service
	changed  map[uint64]Identity            // came or went since the policies were last written
	retired  []*known                       // without users, oldest first; still known to lookup
}

type known struct {
	Identity
	number uint64
	users  int
}

func (i *identities) init() {
	i.byNumber = make(map[uint64]*known)
	i.byPlace = make(map[string]map[string][]*known)
	i.changed = make(map[uint64]Identity)
}

// check says whether all of who may be known together with those that are.
func (i *identities) check(who []Identity) error {
	for _, w := range who {
		if e := i.byNumber[w.Number()]; e != nil && !same(&e.Identity, &w) {
			return fmt.Errorf("workload %s.%s %v has the same numeric identity %d as %s.%s %v: change a label of one",
				w.Service, w.Namespace, w.Labels, e.number, e.Service, e.Namespace, e.Labels)
		}
	}
	return nil
}

func same(a, b *Identity) bool {
	if a.Namespace != b.Namespace || a.Service != b.Service || len(a.Labels) != len(b.Labels) {
		return false
	}
	for k, v := range a.Labels {
		if got, ok := b.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func (i *identities) acquire(n uint64, who Identity) {
	e := i.byNumber[n]
	if e == nil {
		e = &known{Identity: who, number: n}
		i.byNumber[n] = e
	}
	if e.users++; e.users > 1 {
		return
	}
	i.changed[n] = e.Identity
	services := i.byPlace[e.Namespace]
	if services == nil {
		services = make(map[string][]*known)
		i.byPlace[e.Namespace] = services
	}
	services[e.Service] = append(services[e.Service], e)
}

func (i *identities) release(n uint64) {
	e := i.byNumber[n]
	if e.users--; e.users > 0 {
		return
	}
	i.changed[n] = e.Identity
	services := i.byPlace[e.Namespace]
	if left := slices.DeleteFunc(services[e.Service], func(o *known) bool { return o == e }); len(left) > 0 {
		services[e.Service] = left
	} else if delete(services, e.Service); len(services) == 0 {
		delete(i.byPlace, e.Namespace)
	}
	i.retired = append(i.retired, e)
	for len(i.retired) > remembered {
		old := i.retired[0]
		i.retired = i.retired[1:]
		if old.users == 0 && i.byNumber[old.number] == old {
			delete(i.byNumber, old.number)
		}
	}
}

func (i *identities) lookup(n uint64) (Identity, bool) {
	if e := i.byNumber[n]; e != nil {
		return e.Identity, true
	}
	return Identity{}, false
}

// matching implements directory.
func (i *identities) matching(s *selector, f func(n uint64)) {
	in := func(services map[string][]*known) {
		of := func(list []*known) {
			for _, e := range list {
				if s.matches(&e.Identity) {
					f(e.number)
				}
			}
		}
		if s.service != "" {
			of(services[s.service])
			return
		}
		for _, list := range services {
			of(list)
		}
	}
	if s.namespace != "" {
		in(i.byPlace[s.namespace])
		return
	}
	for _, services := range i.byPlace {
		in(services)
	}
}
