// Package vip gives each service its virtual addresses, one of each family, and keeps them: over
// restarts, and when a service goes and comes again. The pipeline asks it before each build; store
// remembers what it gave.
//
// It knows no instances and decides nothing about traffic. What is remembered is a number for each
// service; the addresses follow from it and the ranges, so that other ranges are a restart away.
package vip

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"sync"
)

// Ranges that are used unless others are given.
var (
	// RFC 2544, appendix C.2.2: 198.18.0.0 to 198.19.255.255 "have been assigned to the BMWG by the
	// IANA for this purpose" (tests of network devices): no host on any network is called by them.
	DefaultIPv4 = netip.MustParsePrefix("198.18.0.0/15")
	// RFC 4193, section 3: fd00::/8 are local addresses; the next 40 bits spell "inlay".
	DefaultIPv6 = netip.MustParsePrefix("fd69:6e6c:6179::/64")
)

// Service names a service.
type Service struct{ Namespace, Name string }

func compareServices(a, b Service) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// Given is one service with its number.
type Given struct {
	Service
	Index uint32 // at least 1
}

// Store remembers the numbers. Both methods may block on a disk; an error is logged and the
// allocator goes on from memory.
type Store interface {
	// VirtualIndexes returns what was written.
	VirtualIndexes() ([]Given, error)
	// WriteVirtualIndexes puts and deletes by service, all or none.
	WriteVirtualIndexes(put []Given, del []Service) error
}

// Config is what New needs.
type Config struct {
	// IPv4 and IPv6 are the ranges; zero means DefaultIPv4 and DefaultIPv6.
	IPv4, IPv6 netip.Prefix
	Store      Store        // nil remembers nothing
	Log        *slog.Logger // nil discards
}

// Allocator gives addresses. It is safe for concurrent use.
type Allocator struct {
	cfg Config
	cap uint32 // the highest number that both ranges have an address for

	mu     sync.Mutex
	given  map[Service]uint32
	holder map[uint32]Service   // the inverse of given, within cap
	next   uint32               // no lower number is free
	dirty  map[Service]struct{} // what the store has not got yet
	failed bool                 // the last write failed
	table  *Table
}

// Table is the addresses of one moment. It is immutable and safe for concurrent use.
type Table struct {
	of     map[Service][]netip.Addr
	ranges string
}

// Of returns the addresses of a service, IPv4 first; none when there was none left for it. They
// are shared and not to be written.
func (t *Table) Of(namespace, service string) []netip.Addr { return t.of[Service{namespace, service}] }

// Range names what addresses are taken from.
func (t *Table) Range() string { return t.ranges }

// Check says what is wrong with a pair of ranges; zero ones are good. The names are those by which
// the ranges were given.
func Check(ipv4 netip.Prefix, ipv4Name string, ipv6 netip.Prefix, ipv6Name string) error {
	return errors.Join(check(ipv4, ipv4Name, false, DefaultIPv4), check(ipv6, ipv6Name, true, DefaultIPv6))
}

func check(p netip.Prefix, name string, six bool, usual netip.Prefix) error {
	if p == (netip.Prefix{}) {
		return nil
	}
	family, longest := "IPv4", 30
	if six {
		family, longest = "IPv6", 126
	}
	a := p.Addr()
	switch {
	case !p.IsValid() || a.Is4In6() || a.Is6() != six:
		return fmt.Errorf("%s %v: want a range of %s such as %v", name, p, family, usual)
	case p != p.Masked():
		return fmt.Errorf("%s %v: bits are set behind the first %d: want %v", name, p, p.Bits(), p.Masked())
	case p.Bits() > longest:
		return fmt.Errorf("%s %v: too small: want at most /%d", name, p, longest)
	case p.Bits() < 8:
		return fmt.Errorf("%s %v: more than a network has: want at least /8", name, p)
	case a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.IsLinkLocalUnicast():
		return fmt.Errorf("%s %v: loopback, multicast, link-local and unspecified addresses cannot be a service's: want a private range such as %v", name, p, usual)
	}
	return nil
}

// New checks cfg and reads what was given before. A store that cannot be read is an error.
func New(cfg Config) (*Allocator, error) {
	if err := Check(cfg.IPv4, "range", cfg.IPv6, "range"); err != nil {
		return nil, fmt.Errorf("virtual addresses: %w", err)
	}
	if cfg.IPv4 == (netip.Prefix{}) {
		cfg.IPv4 = DefaultIPv4
	}
	if cfg.IPv6 == (netip.Prefix{}) {
		cfg.IPv6 = DefaultIPv6
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Allocator{
		cfg: cfg, next: 1,
		// Neither the lowest address nor IPv4's highest: hosts may take them for the network and its broadcast.
		cap:    min(highest(cfg.IPv4)-1, highest(cfg.IPv6)),
		given:  map[Service]uint32{},
		holder: map[uint32]Service{},
		dirty:  map[Service]struct{}{},
	}
	a.table = &Table{ranges: fmt.Sprintf("%v and %v", cfg.IPv4, cfg.IPv6)}
	if cfg.Store == nil {
		return a, nil
	}
	stored, err := cfg.Store.VirtualIndexes()
	if err != nil {
		return nil, fmt.Errorf("virtual addresses: load: %w", err)
	}
	slices.SortFunc(stored, func(x, y Given) int { return compareServices(x.Service, y.Service) })
	for _, g := range stored {
		// A number twice, or none, was not written by an Allocator: the first keeps it.
		if _, taken := a.holder[g.Index]; !taken && g.Index > 0 {
			a.given[g.Service] = g.Index
			a.holder[g.Index] = g.Service
		}
	}
	return a, nil
}

// highest is the highest number of an address in p, within 32 bits.
func highest(p netip.Prefix) uint32 {
	host := p.Addr().BitLen() - p.Bits()
	if host >= 32 {
		return math.MaxUint32
	}
	return 1<<host - 1
}

// Assign returns the addresses of services, and gives some to those that have none: the lowest free
// ones. When the range has none left, those of services that are not among the given ones change
// hands; when all are in use, the rest of the services has none. It blocks until the store has what is new.
func (a *Allocator) Assign(services []Service) *Table {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.table
	fresh := map[Service][]netip.Addr{}
	var abandoned []uint32 // nil: not looked for yet
	for _, s := range services {
		if n := a.given[s]; n > 0 && n <= a.cap {
			if old.of[s] == nil {
				fresh[s] = a.addresses(n)
			}
			continue
		}
		n := a.free()
		if n == 0 {
			if abandoned == nil {
				abandoned = a.abandoned(services)
			}
			if len(abandoned) == 0 {
				continue
			}
			n = abandoned[0]
			abandoned = abandoned[1:]
			loser := a.holder[n]
			delete(a.given, loser)
			a.dirty[loser] = struct{}{}
			fresh[loser] = nil
			a.cfg.Log.Warn("virtual address changes hands: the range is used up", "from", loser.Name+"."+loser.Namespace, "to", s.Name+"."+s.Namespace, "range", old.ranges)
		}
		if was := a.given[s]; a.holder[was] == s {
			delete(a.holder, was) // of a larger range
		}
		a.given[s], a.holder[n] = n, s
		a.dirty[s] = struct{}{}
		fresh[s] = a.addresses(n)
	}
	a.flush()
	if len(fresh) == 0 {
		return old
	}
	next := &Table{of: make(map[Service][]netip.Addr, len(old.of)+len(fresh)), ranges: old.ranges}
	for s, addrs := range old.of {
		next.of[s] = addrs
	}
	for s, addrs := range fresh {
		if addrs == nil {
			delete(next.of, s)
		} else {
			next.of[s] = addrs
		}
	}
	a.table = next
	return next
}

// free returns the lowest number that nobody has, or 0.
func (a *Allocator) free() uint32 {
	for ; a.next > 0 && a.next <= a.cap; a.next++ {
		if _, taken := a.holder[a.next]; !taken {
			a.next++
			return a.next - 1
		}
	}
	return 0
}

// abandoned returns the numbers of services that are not among these, ascending; never nil.
func (a *Allocator) abandoned(services []Service) []uint32 {
	live := make(map[Service]struct{}, len(services))
	for _, s := range services {
		live[s] = struct{}{}
	}
	out := []uint32{}
	for n, s := range a.holder {
		if _, ok := live[s]; !ok && n <= a.cap {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

func (a *Allocator) addresses(n uint32) []netip.Addr {
	return []netip.Addr{add(a.cfg.IPv4.Addr(), n), add(a.cfg.IPv6.Addr(), n)}
}

// add counts n up from the first address of a range, whose last bits are zero.
func add(first netip.Addr, n uint32) netip.Addr {
	b := first.As16()
	for i := range 4 {
		b[15-i] |= byte(n >> (8 * i))
	}
	out := netip.AddrFrom16(b)
	if first.Is4() {
		return out.Unmap()
	}
	return out
}

// flush writes what the store has not got. a.mu is held: nobody is told an address that could be
// another one after a crash, unless the disk fails.
func (a *Allocator) flush() {
	if len(a.dirty) == 0 {
		return
	}
	if a.cfg.Store == nil {
		clear(a.dirty)
		return
	}
	var put []Given
	var del []Service
	for s := range a.dirty {
		if n := a.given[s]; n > 0 {
			put = append(put, Given{s, n})
		} else {
			del = append(del, s)
		}
	}
	slices.SortFunc(put, func(x, y Given) int { return compareServices(x.Service, y.Service) })
	slices.SortFunc(del, compareServices)
	err := a.cfg.Store.WriteVirtualIndexes(put, del)
	switch {
	case err != nil && !a.failed:
		a.cfg.Log.Warn("virtual addresses are not remembered over a restart", "err", err)
	case err == nil && a.failed:
		a.cfg.Log.Info("virtual addresses are remembered again")
	}
	a.failed = err != nil
	if err == nil {
		clear(a.dirty)
	}
}
