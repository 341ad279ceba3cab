package tables

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Protocols of a service address and of a decision: numbers of IANA. ICMP stands for that of IPv6
// too.
const (
	ICMP uint8 = 1
	TCP  uint8 = 6
	UDP  uint8 = 17
)

// Numbers that are no workload's.
const (
	IDUnknown = uint64(bpfobj.InlayIdID_UNKNOWN)
	IDHost    = uint64(bpfobj.InlayIdID_HOST)
	IDWorld   = uint64(bpfobj.InlayIdID_WORLD)
	IDAgent   = uint64(bpfobj.InlayIdID_AGENT)
	// IDFirst is the first that a workload may have.
	IDFirst = uint64(bpfobj.InlayIdID_FIRST)
)

// Config of a Table.
type Config struct {
	Log *slog.Logger // nil discards
	// Now seeds the generations of policies, so that one is not used twice although the maps forgot
	// it. Nil means time.Now.
	Now func() time.Time
}

// Identity is who a workload is. Its number is identity.Number of these.
type Identity struct {
	Namespace, Service string
	Labels             map[string]string
}

// Number of the identity.
func (i Identity) Number() uint64 { return identity.Number(i.Namespace, i.Service, i.Labels) }

// Workload is what runs in one cgroup of this node.
type Workload struct {
	Namespace, Service string
	Labels             map[string]string
	UID                uint32
	Raw                bool   // raw sockets are granted
	RunID, Path        string // of its registration and its cgroup; for flows and status, in no map
}

// Endpoint is one address that connections to a service go to.
type Endpoint struct {
	Addr  netip.AddrPort
	Proto uint8 // TCP or UDP
}

// Change is what a Commit did.
type Change struct {
	// Writes and Deletes count entries of all maps.
	Writes, Deletes int
	// Gone are endpoints that no service has any longer: their connections are to end after a grace.
	// A draining endpoint is not gone. See Table.MarkGone.
	Gone []Endpoint
	// Subjects are identities of this node whose policies changed: their live sockets are to be
	// decided again.
	Subjects []uint64
	// Closed are identities of this node to which nothing is allowed, because their policies found no
	// room. Unlike the others this is the state, not a difference.
	Closed []uint64
	// Refused are cgroups that were not registered because there was no room for them or for the word
	// that they are closed. What runs in them would be outside every policy: do not start it. This is
	// the state, too.
	Refused []uint64
}

// Table owns the contents of the maps. It is safe for concurrent use; Commit and Prune make system
// calls and keep others waiting meanwhile, everything else returns at once.
type Table struct {
	log *slog.Logger
	c   contents

	mu     sync.RWMutex
	synced bool // Prune has run: what is wanted is the whole truth
	change Change
	faults faults // of the commit under way
	trash  trash

	idents     identities
	rules      rules
	services   map[string]*service
	claimed    claims[bpfobj.InlaySvcKey, *address] // service addresses
	dialled    claims[bpfobj.InlaySvcKey, *endpoint]
	registered claims[bpfobj.InlayAddr, *source]
	sets       slotSets
	names      mirror[string, bpfobj.InlayName] // by NAME.NAMESPACE
	addresses  mirror[bpfobj.InlaySvcKey, bpfobj.InlaySvc]
	endpoints  mirror[bpfobj.InlaySvcKey, uint64]
	sources    mirror[bpfobj.InlayAddr, uint64]

	workloads     mirror[uint64, bpfobj.InlayWorkload]
	wantWorkloads map[uint64]*hosted
	local         mirror[bpfobj.InlayLocalKey, uint8]
	wantLocal     map[bpfobj.InlayLocalKey]uint8
	gone          mirror[bpfobj.InlayGoneKey, uint8]

	filled   []*filled  // that programs fill
	counting sync.Mutex // held while Count reads; before mu

	policies map[string]*policySet // by NAMESPACE/SERVICE
	hosts    map[uint64]int        // workloads of this node by identity
	subjects subjects
}

// New returns a table over maps, which must outlive it, and reads what they hold. Nothing is
// written before the first Commit.
func New(maps *bpfobj.InlayMaps, cfg Config) (*Table, error) {
	return newTable(kernelContents(maps), cfg)
}

func newTable(c contents, cfg Config) (*Table, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	t := &Table{
		log:           cfg.Log,
		c:             c,
		services:      make(map[string]*service),
		claimed:       make(claims[bpfobj.InlaySvcKey, *address]),
		dialled:       make(claims[bpfobj.InlaySvcKey, *endpoint]),
		registered:    make(claims[bpfobj.InlayAddr, *source]),
		wantWorkloads: make(map[uint64]*hosted),
		wantLocal:     make(map[bpfobj.InlayLocalKey]uint8),
		policies:      make(map[string]*policySet),
		hosts:         make(map[uint64]int),
	}
	for _, m := range c.filled {
		t.filled = append(t.filled, &filled{Counted: m})
	}
	t.idents.init()
	t.rules.init()
	err := errors.Join(
		t.names.read(byText{c.names}),
		t.addresses.read(c.services),
		t.endpoints.read(c.endpoints),
		t.sources.read(c.addresses),
		t.workloads.read(c.workloads),
		t.local.read(c.localAddrs),
		t.gone.read(c.gone),
		t.readSets(),
		t.readSubjects(uint32(cfg.Now().Unix())),
	)
	if err != nil {
		return nil, fmt.Errorf("contents of the maps: %w", err)
	}
	return t, nil
}

// SetService says what a service is. A service that is not valid is refused whole and the one
// before stays.
func (t *Table) SetService(s *nodepb.Service) error {
	next, err := compileService(s)
	if err != nil {
		return fmt.Errorf("service %.130q: %w", s.GetNamespace()+"/"+s.GetName(), err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.idents.check(next.workloads); err != nil {
		return fmt.Errorf("service %q: %w", next.name, err)
	}
	prev := t.services[next.name]
	t.services[next.name] = next
	t.claim(next) // first, so that what both have is never without an owner
	t.unclaim(prev)
	return nil
}

// DeleteService says that the service NAMESPACE/NAME is gone. An unknown one is no fault.
func (t *Table) DeleteService(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unclaim(t.services[name])
}

// SetPolicies says which policies select workloads of a service. Policies that are not valid are
// refused whole and those before stay.
func (t *Table) SetPolicies(p *nodepb.Policies) error {
	next, err := parsePolicies(p)
	if err != nil {
		return fmt.Errorf("policies of service %.130q: %w", p.GetNamespace()+"/"+p.GetService(), err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rules.number(next)
	prev := t.policies[next.name]
	t.policies[next.name] = next
	t.rules.release(prev)
	t.subjectsOf(next.name)
	return nil
}

// DeletePolicies says that no policy selects a workload of the service NAMESPACE/NAME.
func (t *Table) DeletePolicies(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rules.release(t.policies[name])
	delete(t.policies, name)
	t.subjectsOf(name)
}

// SetWorkload says what runs in a cgroup of this node. Its policies must have been set before the
// Commit that registers it: a workload of whose policies nothing was said may do everything.
func (t *Table) SetWorkload(cgroup uint64, w Workload) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := host(w)
	if h.fault == nil {
		h.fault = t.idents.check([]Identity{h.who})
	}
	if h.fault == nil {
		t.hosts[h.number]++
		t.idents.acquire(h.number, h.who)
		t.subjects.touch(h.number)
	}
	t.dropWorkload(cgroup)
	t.wantWorkloads[cgroup] = h
	t.workloads.touch(cgroup)
}

// DeleteWorkload says that a cgroup is empty for good.
func (t *Table) DeleteWorkload(cgroup uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropWorkload(cgroup)
}

// Workload is what was set for a cgroup.
func (t *Table) Workload(cgroup uint64) (Workload, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	h := t.wantWorkloads[cgroup]
	if h == nil {
		return Workload{}, false
	}
	return h.Workload, true
}

// SetLocalAddrs says which addresses this machine has in the network namespace with that cookie;
// none forgets the namespace.
func (t *Table) SetLocalAddrs(netns uint64, addrs []netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := make(map[bpfobj.InlayLocalKey]bool, len(addrs))
	for _, a := range addrs {
		if a.IsValid() {
			next[bpfobj.InlayLocalKey{Netns: netns, Addr: mapped(a)}] = true
		}
	}
	for k := range t.wantLocal {
		if k.Netns == netns && !next[k] {
			delete(t.wantLocal, k)
			t.local.touch(k)
		}
	}
	for k := range t.local.have { // those of an agent before this one
		if k.Netns == netns {
			t.local.touch(k)
		}
	}
	for k := range next {
		t.wantLocal[k] = 1
		t.local.touch(k)
	}
}

// Commit writes what changed since the last one. What found no room is tried again by the next
// Commit; the error is then a *FullError, or several joined, and everything else was written.
func (t *Table) Commit() (Change, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.commit()
	c := t.change
	t.change = Change{}
	return c, err
}

// Prune is called once all services and policies of the control plane and all live workloads of the
// node have been set: what the maps hold beyond them goes, and what was kept until all was known
// (policies and identities of addresses that an earlier agent wrote) is brought up to date. It writes
// as Commit does and fails as Commit does; what it did is in the Change of the next Commit. Called
// again, it does no harm.
func (t *Table) Prune() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.synced = true
	t.names.touchAll()
	t.addresses.touchAll()
	t.endpoints.touchAll()
	t.sources.touchAll()
	t.workloads.touchAll()
	t.local.touchAll()
	t.subjects.touchAll()
	return t.commit()
}

// MarkGone writes those of eps that are still no endpoint to the map of gone endpoints, whose
// connections the next sweep of the iterators ends, and returns how many it holds now.
func (t *Table) MarkGone(eps []Endpoint) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.faults = nil
	want := make(map[bpfobj.InlayGoneKey]bool)
	for _, ep := range eps {
		if !ep.Addr.IsValid() {
			continue
		}
		k := svcKey(ep.Addr.Addr(), ep.Addr.Port(), ep.Proto)
		g := bpfobj.InlayGoneKey{Addr: k.Addr, Port: k.Port, Proto: k.Proto}
		if _, back := t.endpoints.have[k]; !back {
			want[g] = true
			t.gone.touch(g)
		}
	}
	t.gone.apply(&t.change, func(k bpfobj.InlayGoneKey) (uint8, bool) {
		_, held := t.gone.have[k]
		return 1, want[k] || held
	}, nil, t.fail)
	return len(t.gone.have), t.faults.err()
}

// ClearGone empties the map of gone endpoints, after the sweep.
func (t *Table) ClearGone() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.faults = nil
	t.gone.touchAll()
	t.gone.apply(&t.change, func(bpfobj.InlayGoneKey) (uint8, bool) { return 0, false }, nil, t.fail)
	return t.faults.err()
}

// Identity is who has a number. Those that are gone are still known for a while, for records of
// connections that outlived them. Numbers below IDFirst are nobody's.
func (t *Table) Identity(n uint64) (Identity, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.idents.lookup(n)
}

// Rule is the rule with a number of a record. Those that are gone are still known for a while.
func (t *Table) Rule(n uint32) (Rule, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.rules.lookup(n)
}

// ServiceAt is the service, as NAME.NAMESPACE, and its port whose virtual address or endpoint this
// is; at a virtual address also a port that the service does not have.
func (t *Table) ServiceAt(addr netip.AddrPort, proto uint8) (name string, port uint16, ok bool) {
	if !addr.IsValid() {
		return "", 0, false
	}
	k := svcKey(addr.Addr(), addr.Port(), proto)
	t.mu.RLock()
	defer t.mu.RUnlock()
	if c := t.claimed[k]; len(c) > 0 {
		return c[0].owner.host, addr.Port(), true
	}
	if c := t.dialled[k]; len(c) == 1 {
		return c[0].owner.host, c[0].v.port, true
	}
	if c := t.claimed[svcKey(addr.Addr(), 0, 0)]; len(c) > 0 {
		return c[0].owner.host, addr.Port(), true
	}
	return "", 0, false
}

// Services is how many services are set.
func (t *Table) Services() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.services)
}
