package flow

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// recordSpan is what a record takes in the ring buffer: "every record has an 8-byte header" and is
// aligned to 8 bytes (Documentation/bpf/ringbuf.rst and BPF_RINGBUF_HDR_SZ).
const recordSpan = (RecordSize + 7 + 8) &^ 7

// Counts returns how many records the programs made, how many of them were read from the ring, by
// this agent or one before it, and how many found no room. made is at least kept + lost, and equal
// whenever no record waits in the ring. All are 0 where the log has no maps; maps that cannot be
// read are told in the log, and count as 0 too.
func (l *Log) Counts() (made, kept, lost uint64) {
	made, kept, lost, err := l.counts()
	if err != nil {
		l.cfg.Log.Warn("records not counted", "err", err)
		return 0, 0, 0
	}
	return made, kept, lost
}

func (l *Log) counts() (made, kept, lost uint64, err error) {
	if l.cfg.Maps == nil {
		return 0, 0, 0, nil
	}
	// In this order: a record that comes between two reads is made, and not yet kept or lost.
	if kept, err = consumed(l.cfg.Maps.Events); err != nil {
		return 0, 0, 0, err
	}
	if lost, err = counter(l.cfg.Maps.Counters, bpfobj.InlayCounterCOUNT_LOST); err != nil {
		return 0, 0, 0, err
	}
	made, err = counter(l.cfg.Maps.Counters, bpfobj.InlayCounterCOUNT_MADE)
	return made, kept, lost, err
}

// consumed is how many records were ever read from a ring buffer. Its first page, which any reader
// may map, holds the consumer position: a count of bytes that only grows (kernel/bpf/ringbuf.c:
// "consumer_pos" and "producer_pos" are logical, never reset).
func consumed(ring *ebpf.Map) (uint64, error) {
	page, err := unix.Mmap(ring.FD(), 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("ring buffer events: map its consumer position: %w", err)
	}
	defer func() { _ = unix.Munmap(page) }()
	return uint64(atomic.LoadUintptr((*uintptr)(unsafe.Pointer(&page[0])))) / uint64(recordSpan), nil
}

// counter sums one counter over the CPUs.
func counter(m *ebpf.Map, i bpfobj.InlayCounter) (uint64, error) {
	var each []uint64
	if err := m.Lookup(uint32(i), &each); err != nil {
		return 0, fmt.Errorf("counter %d: %w", i, err)
	}
	var sum uint64
	for _, n := range each {
		sum += n
	}
	return sum, nil
}

// counterNames are those of enum counter, in lower case without its prefix.
var counterNames = map[bpfobj.InlayCounter]string{
	bpfobj.InlayCounterCOUNT_DENIED_EGRESS:  "denied_egress",
	bpfobj.InlayCounterCOUNT_DENIED_INGRESS: "denied_ingress",
	bpfobj.InlayCounterCOUNT_AUDITED:        "audited",
	bpfobj.InlayCounterCOUNT_RAW_REFUSED:    "raw_refused",
	bpfobj.InlayCounterCOUNT_NO_ENDPOINT:    "no_endpoint",
	bpfobj.InlayCounterCOUNT_PEERS_FULL:     "peers_full",
	bpfobj.InlayCounterCOUNT_PEERS_CLASH:    "peers_clash",
	bpfobj.InlayCounterCOUNT_DNS_REDIRECTED: "dns_redirected",
	bpfobj.InlayCounterCOUNT_DNS_PASSED:     "dns_passed",
	bpfobj.InlayCounterCOUNT_DESTROYED:      "destroyed",
	bpfobj.InlayCounterCOUNT_RETRANSMITS:    "retransmits",
	bpfobj.InlayCounterCOUNT_NO_PORT:        "no_port",
}

// Counters returns what the programs counted beside records, by name; empty without maps.
func (l *Log) Counters() (map[string]uint64, error) {
	out := map[string]uint64{}
	if l.cfg.Maps == nil {
		return out, nil
	}
	var faults []string
	for i, name := range counterNames {
		n, err := counter(l.cfg.Maps.Counters, i)
		if err != nil {
			faults = append(faults, err.Error())
			continue
		}
		out[name] = n
	}
	if faults != nil {
		return out, fmt.Errorf("map counters: %s", strings.Join(faults, "; "))
	}
	return out, nil
}

// monotonic is CLOCK_MONOTONIC, that of bpf_ktime_get_ns(), in ns.
func monotonic() uint64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return 0 // EINVAL alone is documented, for a clock that does not exist
	}
	return uint64(t.Nano())
}
