package tables

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// service is what one service wants of the maps.
type service struct {
	name       string           // NAMESPACE/NAME
	host       string           // NAME.NAMESPACE
	virtual    bpfobj.InlayName // zero: it has no virtual address
	addresses  []address
	endpoints  []endpoint
	sources    []source
	workloads  []Identity
	identities []uint64 // of workloads, in their order
}

// address is one service address.
type address struct {
	key   bpfobj.InlaySvcKey
	slots []bpfobj.InlaySlot // until a set took them
	set   *slotSet           // nil until claimed, and when there are no slots
}

// endpoint is an address that is one.
type endpoint struct {
	key      bpfobj.InlaySvcKey
	identity uint64
	port     uint16 // of the service
}

// source is an address that connections of a workload come from.
type source struct {
	key      bpfobj.InlayAddr
	identity uint64
}

// compileService checks s and says what it wants of the maps. It touches no state.
func compileService(s *nodepb.Service) (*service, error) {
	if err := checkNames(s.GetNamespace(), s.GetName()); err != nil {
		return nil, err
	}
	out := &service{name: s.GetNamespace() + "/" + s.GetName(), host: s.GetName() + "." + s.GetNamespace()}
	v4, v6, err := virtualAddresses(s.GetVirtualAddresses())
	errs := []error{err}
	if v4.IsValid() {
		out.virtual.Addr4 = mapped(v4)
	}
	if v6.IsValid() {
		out.virtual.Addr6 = mapped(v6)
	}
	errs = append(errs, out.compileWorkloads(s))
	type portKey struct {
		port  uint32
		proto uint8
	}
	seen := make(map[portKey]bool, len(s.GetPorts()))
	for i, p := range s.GetPorts() {
		proto := TCP
		if p.GetUdp() {
			proto = UDP
		}
		k := portKey{p.GetPort(), proto}
		if p.GetPort() < 1 || p.GetPort() > 65535 {
			errs = append(errs, fmt.Errorf("ports[%d]: port %d: want 1 to 65535", i, p.GetPort()))
			continue
		}
		if seen[k] {
			errs = append(errs, fmt.Errorf("ports[%d]: %s port %d is there twice: want each once", i, protoName(proto), p.GetPort()))
			continue
		}
		seen[k] = true
		eps, err := out.compilePort(p, proto)
		if err != nil {
			errs = append(errs, fmt.Errorf("port %d: %w", p.GetPort(), err))
			continue
		}
		four := balance(eps, func(e *placed) bool { return e.addr.Addr().Is4() })
		if v4.IsValid() {
			out.addresses = append(out.addresses, address{key: svcKey(v4, uint16(p.GetPort()), proto), slots: four})
		}
		if v6.IsValid() {
			out.addresses = append(out.addresses, address{key: svcKey(v6, uint16(p.GetPort()), proto), slots: balance6(eps)})
		}
	}
	// What no port is of is refused there, and does not leave the machine (types.h, struct svc).
	for _, a := range []netip.Addr{v4, v6} {
		if a.IsValid() {
			out.addresses = append(out.addresses, address{key: svcKey(a, 0, 0)})
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return out, nil
}

func checkNames(namespace, name string) error {
	if err := identity.CheckName(namespace); err != nil {
		return fmt.Errorf("namespace: %w", err)
	}
	if err := identity.CheckName(name); err != nil {
		return fmt.Errorf("name: %w", err)
	}
	return nil
}

// virtualAddresses parses at most one address of each family.
func virtualAddresses(list []string) (v4, v6 netip.Addr, err error) {
	var errs []error
	for i, s := range list {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("virtual_addresses[%d]: %.80q: want an IP address", i, s))
			continue
		case !usable(a):
			errs = append(errs, fmt.Errorf("virtual_addresses[%d]: %s: want a unicast address without zone", i, a))
			continue
		}
		to := &v6
		if a = a.Unmap(); a.Is4() {
			to = &v4
		}
		if to.IsValid() {
			errs = append(errs, fmt.Errorf("virtual_addresses[%d]: %s after %s: want one of a family", i, a, *to))
			continue
		}
		*to = a
	}
	return v4, v6, errors.Join(errs...)
}

func usable(a netip.Addr) bool {
	a2 := a.Unmap()
	return a2.IsValid() && a.Zone() == "" && !a2.IsUnspecified() && !a2.IsMulticast()
}

func (out *service) compileWorkloads(s *nodepb.Service) error {
	var errs []error
	seen := make(map[source]bool)
	for i, w := range s.GetWorkloads() {
		who := Identity{Namespace: s.GetNamespace(), Service: s.GetName(), Labels: w.GetLabels()}
		n := who.Number()
		out.workloads = append(out.workloads, who)
		out.identities = append(out.identities, n)
		for j, text := range w.GetAddresses() {
			a, err := netip.ParseAddr(text)
			if err != nil || !usable(a) {
				errs = append(errs, fmt.Errorf("workloads[%d]: addresses[%d]: %.80q: want a unicast IP address without zone", i, j, text))
				continue
			}
			if a.Unmap().IsLoopback() {
				continue // it says nothing about who is behind it, on this machine or another
			}
			if src := (source{mapped(a), n}); !seen[src] {
				seen[src] = true
				out.sources = append(out.sources, src)
			}
		}
	}
	return errors.Join(errs...)
}

// placed is an endpoint that was parsed.
type placed struct {
	addr           netip.AddrPort
	identity       uint64
	weight         uint32
	priority       uint32
	healthy        bool
	locality       [3]string
	localityWeight uint32
}

// compilePort notes the endpoints of a port and returns those in use, by address.
func (out *service) compilePort(p *nodepb.ServicePort, proto uint8) ([]placed, error) {
	var errs []error
	var eps []placed
	seen := make(map[netip.AddrPort]bool, len(p.GetEndpoints()))
	for i, e := range p.GetEndpoints() {
		a, err := netip.ParseAddrPort(e.GetAddress())
		switch {
		case err != nil || !usable(a.Addr()) || a.Port() == 0:
			errs = append(errs, fmt.Errorf("endpoints[%d]: address %.80q: want IP:PORT with a unicast address without zone", i, e.GetAddress()))
			continue
		case int64(e.GetWorkload()) >= int64(len(out.identities)):
			errs = append(errs, fmt.Errorf("endpoints[%d]: workload %d: the service has %d: want an index of them", i, e.GetWorkload(), len(out.identities)))
			continue
		}
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		if seen[a] {
			errs = append(errs, fmt.Errorf("endpoints[%d]: address %s is there twice: want each once", i, a))
			continue
		}
		seen[a] = true
		n := out.identities[e.GetWorkload()]
		out.endpoints = append(out.endpoints, endpoint{svcKey(a.Addr(), a.Port(), proto), n, uint16(p.GetPort())})
		eps = append(eps, placed{
			addr:     a,
			identity: n,
			weight:   max(e.GetWeight(), 1),
			priority: e.GetPriority(),
			// A health that is not known here may be any: no connection goes there.
			healthy:        e.GetHealth() == nodepb.Health_HEALTH_HEALTHY,
			locality:       [3]string{e.GetRegion(), e.GetZone(), e.GetSubZone()},
			localityWeight: e.GetLocalityWeight(),
		})
	}
	slices.SortFunc(eps, func(a, b placed) int { return a.addr.Compare(b.addr) })
	return eps, errors.Join(errs...)
}

// balance6 is balance for a virtual address of IPv6. Programs reach it by IPv6 sockets, which reach
// endpoints of IPv4 as mapped addresses, unless they are bound to IPv6 or IPV6_V6ONLY. So of the
// first priority that has anybody healthy, the endpoints of IPv6 are used when there are some, else
// those of IPv4.
func balance6(eps []placed) []bpfobj.InlaySlot {
	first, ok := firstPriority(eps, func(*placed) bool { return true })
	if !ok {
		return nil
	}
	six := func(e *placed) bool { return !e.addr.Addr().Is4() && e.priority == first }
	if slots := balance(eps, six); slots != nil {
		return slots
	}
	return balance(eps, func(*placed) bool { return true })
}

func firstPriority(eps []placed, usable func(*placed) bool) (p uint32, ok bool) {
	for i := range eps {
		if e := &eps[i]; e.healthy && usable(e) && (!ok || e.priority < p) {
			p, ok = e.priority, true
		}
	}
	return p, ok
}

// balance shares connections between the healthy endpoints that are usable, of the first priority
// that has one. Envoy, ClusterLoadAssignment: the weight of a locality "is divided by the sum of
// the weights of all localities at the same priority level to produce the effective percentage of
// traffic for the locality", and that of an endpoint by "the sum of the weights of all endpoints in
// the endpoint's locality".
func balance(eps []placed, usable func(*placed) bool) []bpfobj.InlaySlot {
	first, ok := firstPriority(eps, usable)
	if !ok {
		return nil
	}
	type locality struct {
		given, sum float64 // weight of the locality, 0 when none was given; sum of its endpoints'
		taking     float64
	}
	localities := make(map[[3]string]locality)
	var used []*placed
	for i := range eps {
		e := &eps[i]
		if !e.healthy || e.priority != first || !usable(e) {
			continue
		}
		l := localities[e.locality]
		l.given = max(l.given, float64(e.localityWeight))
		l.sum += float64(e.weight)
		l.taking++
		localities[e.locality] = l
		used = append(used, e)
	}
	shares := make([]share, 0, len(used))
	for _, e := range used {
		l := localities[e.locality]
		weight := l.given
		if weight == 0 {
			weight = l.taking // "0 means 1 for each endpoint in it"
		}
		shares = append(shares, share{
			backend: bpfobj.InlayBackend{Addr: mapped(e.addr.Addr()), Port: htons(e.addr.Port()), Identity: e.identity},
			weight:  weight * float64(e.weight) / l.sum,
		})
	}
	return alias(shares)
}

// claim is one service's word about a key.
type claim[V any] struct {
	owner *service
	v     V
}

// claims are what services say of keys that several may speak of: by name of the service.
type claims[K comparable, V any] map[K][]claim[V]

func (c claims[K, V]) add(k K, owner *service, v V) {
	list := c[k]
	at, _ := slices.BinarySearchFunc(list, owner.name, func(e claim[V], name string) int { return cmp.Compare(e.owner.name, name) })
	if len(list) == 0 {
		c[k] = []claim[V]{{owner, v}}
		return
	}
	c[k] = slices.Insert(list, at, claim[V]{owner, v})
}

func (c claims[K, V]) remove(k K, owner *service) {
	list := slices.DeleteFunc(c[k], func(e claim[V]) bool { return e.owner == owner })
	if len(list) == 0 {
		delete(c, k)
	} else {
		c[k] = list
	}
}
