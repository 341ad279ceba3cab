package tables

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// batchBytes bounds what one batched system call moves.
const batchBytes = 1 << 20

// kernelMap is a Map of the kernel.
type kernelMap[K comparable, V any] struct {
	name  string
	m     *ebpf.Map
	chunk int // entries of one batch
}

func kernel[K comparable, V any](name string, m *ebpf.Map) Map[K, V] {
	return &kernelMap[K, V]{name: name, m: m, chunk: max(64, min(8192, batchBytes/int(m.KeySize()+m.ValueSize())))}
}

func kernelContents(m *bpfobj.InlayMaps) contents {
	return contents{
		workloads:  kernel[uint64, bpfobj.InlayWorkload](bpfobj.InlayMapWorkloads, m.Workloads),
		services:   kernel[bpfobj.InlaySvcKey, bpfobj.InlaySvc](bpfobj.InlayMapServices, m.Services),
		slots:      kernel[bpfobj.InlaySlotKey, bpfobj.InlaySlot](bpfobj.InlayMapSlots, m.Slots),
		endpoints:  kernel[bpfobj.InlaySvcKey, uint64](bpfobj.InlayMapEndpoints, m.Endpoints),
		addresses:  kernel[bpfobj.InlayAddr, uint64](bpfobj.InlayMapAddresses, m.Addresses),
		localAddrs: kernel[bpfobj.InlayLocalKey, uint8](bpfobj.InlayMapLocalAddrs, m.LocalAddrs),
		subjects:   kernel[uint64, bpfobj.InlaySubject](bpfobj.InlayMapSubjects, m.Subjects),
		policies:   kernel[bpfobj.InlayPolKey, uint32](bpfobj.InlayMapPolicies, m.Policies),
		portSets:   kernel[uint32, bpfobj.InlayPortSet](bpfobj.InlayMapPortSets, m.PortSets),
		cidrs:      kernel[bpfobj.InlayCidrKey, uint32](bpfobj.InlayMapCidrs, m.Cidrs),
		names:      kernel[bpfobj.InlayNameKey, bpfobj.InlayName](bpfobj.InlayMapNames, m.Names),
		gone:       kernel[bpfobj.InlayGoneKey, uint8](bpfobj.InlayMapGone, m.Gone),
		filled:     kernelFilled(m),
		settle:     settle,
	}
}

// settle waits until every program that runs now has ended. Programs run inside read-side sections
// of RCU, and MEMBARRIER_CMD_GLOBAL of membarrier(2) is synchronize_rcu in the kernel. Where it is
// not offered (nohz_full), or does nothing because there is one processor, a program that misses an
// entry still reads the generation again (decide.h, service.h).
func settle() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
}

func (k *kernelMap[K, V]) Name() string  { return k.name }
func (k *kernelMap[K, V]) Capacity() int { return int(k.m.MaxEntries()) }

func (k *kernelMap[K, V]) Each(f func(K, V)) error {
	size := k.chunk
	keys, values := make([]K, size), make([]V, size)
	var at ebpf.MapBatchCursor
	for {
		n, err := k.m.BatchLookup(&at, keys, values, nil)
		end := errors.Is(err, ebpf.ErrKeyNotExist)
		switch {
		case errors.Is(err, ebpf.ErrNotSupported):
			return k.walk(f)
		case errors.Is(err, unix.ENOSPC):
			// "batch size too small": a bucket holds more than that.
			size *= 2
			keys, values = make([]K, size), make([]V, size)
			continue
		case err != nil && !end:
			return fmt.Errorf("map %q: %w", k.name, err)
		}
		for i := range n {
			f(keys[i], values[i])
		}
		if end {
			return nil
		}
	}
}

// walk is Each by one entry at a time.
func (k *kernelMap[K, V]) walk(f func(K, V)) error {
	var key K
	var value V
	it := k.m.Iterate()
	for it.Next(&key, &value) {
		f(key, value)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("map %q: %w", k.name, err)
	}
	return nil
}

func (k *kernelMap[K, V]) Put(keys []K, values []V) (int, error) {
	done := 0
	for done < len(keys) {
		end := min(done+k.chunk, len(keys))
		if end-done > 1 {
			n, err := k.m.BatchUpdate(keys[done:end], values[done:end], nil)
			if err == nil {
				done = end
				continue
			}
			// Some errors leave the count as it was given: write those again, one by one.
			if n < end-done {
				done += max(n, 0)
			}
		}
		for ; done < end; done++ {
			if err := k.m.Put(&keys[done], &values[done]); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

func (k *kernelMap[K, V]) Delete(keys []K) (int, error) {
	done := 0
	for done < len(keys) {
		end := min(done+k.chunk, len(keys))
		if end-done > 1 {
			n, err := k.m.BatchDelete(keys[done:end], nil)
			if err == nil {
				done = end
				continue
			}
			if n < end-done {
				done += max(n, 0)
			}
		}
		for ; done < end; done++ {
			if err := k.m.Delete(&keys[done]); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return done, err
			}
		}
	}
	return done, nil
}
