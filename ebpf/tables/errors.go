package tables

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"syscall"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// FullError says that a map had no room for some entries, or refused them.
type FullError struct {
	Map               string
	Entries, Capacity int
	// Lost is how many entries were not written, First what the first of them was for.
	Lost  int
	First string
	// Err is what the kernel said: E2BIG when a hash is full, ENOSPC when a trie is.
	Err error
}

func (e *FullError) Error() string {
	remedy := "the next commit tries again"
	if errors.Is(e.Err, syscall.E2BIG) || errors.Is(e.Err, syscall.ENOSPC) { // ENOSPC: of a trie
		remedy = fmt.Sprintf("remove services or policies, or give the agent --map-size %s=N and start it after inlay node cleanup", e.Map)
	}
	return fmt.Sprintf("map %q: %d of %d entries used: %d not written, first %s: %v: %s",
		e.Map, e.Entries, e.Capacity, e.Lost, e.First, e.Err, remedy)
}

func (e *FullError) Unwrap() error { return e.Err }

// TooManySegmentsError says that the policies of a workload draw more lines between ports than a
// program can follow. The workload is closed: nothing is allowed to it.
type TooManySegmentsError struct {
	Subject   Identity
	Direction string
	Proto     uint8
	Segments  int // found before giving up
}

func (e *TooManySegmentsError) Error() string {
	return fmt.Sprintf("workload %s.%s: %s: %s: policies divide the ports into %d or more ranges: want at most %d: nothing is allowed to it until its policies name fewer ranges",
		e.Subject.Service, e.Subject.Namespace, e.Direction, protoName(e.Proto), e.Segments, maxSegs)
}

// faults are the failures of one commit by map, so that a full map is told once and not once an
// entry.
type faults map[string]*FullError

func (f faults) err() error {
	var errs []error
	for _, m := range slices.Sorted(maps.Keys(f)) {
		errs = append(errs, f[m])
	}
	return errors.Join(errs...)
}

// fail notes a failure of the commit under way.
func (t *Table) fail(m, what string, entries, capacity int, err error) {
	if f := t.faults[m]; f != nil {
		f.Lost++
		f.Entries = entries
		return
	}
	if t.faults == nil {
		t.faults = make(faults)
	}
	t.faults[m] = &FullError{Map: m, Entries: entries, Capacity: capacity, Lost: 1, First: what, Err: err}
}

// describe names a key in an error.
func describe(key any) string {
	switch k := key.(type) {
	case bpfobj.InlaySvcKey:
		if k.Proto == 0 {
			return "the other ports of " + netip.AddrFrom16(k.Addr.B).Unmap().String()
		}
		return fmt.Sprintf("%s %s", protoName(k.Proto), addrPort(k.Addr, k.Port))
	case bpfobj.InlayAddr:
		return netip.AddrFrom16(k.B).Unmap().String()
	case bpfobj.InlayLocalKey:
		return netip.AddrFrom16(k.Addr.B).Unmap().String()
	case bpfobj.InlayGoneKey:
		return addrPort(k.Addr, k.Port).String()
	default:
		return fmt.Sprint(key)
	}
}

func protoName(p uint8) string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMP:
		return "icmp"
	}
	return fmt.Sprintf("protocol %d", p)
}
