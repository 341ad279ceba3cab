package tables

import (
	"errors"
	"fmt"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Counted is a map that programs fill, of which only the number of entries is of interest.
type Counted interface {
	Name() string
	// Capacity in entries.
	Capacity() int
	// Len counts the entries. Those that come or go meanwhile may be missed.
	Len() (int, error)
}

// filled is such a map with what Count found last.
type filled struct {
	Counted
	entries int
	warned  bool
}

func (f *filled) usage() MapUsage {
	return MapUsage{Name: f.Name(), Entries: f.entries, Capacity: f.Capacity()}
}

// Count counts the entries of the maps that programs fill, for Usage, and warns of those that are
// nearly full: a connection whose maker finds no room is refused, and an LRU map forgets the oldest.
// It reads every entry, about 0.1 s for 262,144 of them, and keeps nobody waiting; call it now and
// then. A map that cannot be read keeps the number it had.
func (t *Table) Count() error {
	t.counting.Lock()
	defer t.counting.Unlock()
	found := make([]int, len(t.filled))
	faults := make([]error, len(t.filled))
	for i, f := range t.filled {
		if found[i], faults[i] = f.Len(); faults[i] != nil {
			faults[i] = fmt.Errorf("entries of map %q: %w", f.Name(), faults[i])
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, f := range t.filled {
		if faults[i] == nil {
			f.entries = found[i]
			t.warnOf(f.usage(), &f.warned)
		}
	}
	return errors.Join(faults...)
}

// kernelFilled are the maps of which an operator must know before they are full.
func kernelFilled(m *bpfobj.InlayMaps) []Counted {
	return []Counted{
		&kernelMap[bpfobj.InlaySvcKey, bpfobj.InlayDnsClient]{name: bpfobj.InlayMapDnsClients, m: m.DnsClients, chunk: countChunk},
		&kernelMap[bpfobj.InlayListenKey, bpfobj.InlayListener]{name: bpfobj.InlayMapListeners, m: m.Listeners, chunk: countChunk},
		&kernelMap[bpfobj.InlayTuple, bpfobj.InlayPeer]{name: bpfobj.InlayMapPeers, m: m.Peers, chunk: countChunk},
		&kernelMap[bpfobj.InlayUdpKey, bpfobj.InlayUdpFlow]{name: bpfobj.InlayMapUdpFlows, m: m.UdpFlows, chunk: countChunk},
		&kernelMap[bpfobj.InlayTuple, bpfobj.InlayPeer]{name: bpfobj.InlayMapUdpPeers, m: m.UdpPeers, chunk: countChunk},
		&kernelMap[bpfobj.InlayUdpKey, bpfobj.InlayReverse]{name: bpfobj.InlayMapUdpReverse, m: m.UdpReverse, chunk: countChunk},
	}
}

// countChunk is how many entries one batch reads; programs wait for a bucket of it at a time.
const countChunk = 1024

func (k *kernelMap[K, V]) Len() (n int, err error) {
	err = k.Each(func(K, V) { n++ })
	return n, err
}
