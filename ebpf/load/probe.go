package load

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
)

// Probe says of each hook whether this kernel takes its program, by loading the real one over maps of
// the least size and attaching it to a cgroup made for that. Nothing is pinned and nothing stays. A
// machine that cannot run programs at all has every hook off, with one reason (see [Check]).
func Probe() []Hook { return probe(parts{hooks: hooks, objects: objects}) }

func probe(p parts) []Hook {
	loaded, err := probeLoad(p)
	out := make([]Hook, 0, len(p.hooks))
	if err != nil {
		for _, h := range p.hooks {
			h.On, h.Why = false, oneLine(err)
			out = append(out, h.Hook)
		}
		return out
	}
	for _, l := range loaded {
		out = append(out, l.Hook)
	}
	return out
}

func probeLoad(p parts) (list []loaded, err error) {
	if err := Check(); err != nil {
		return nil, err
	}
	mnt, err := FindCgroup2()
	if err != nil {
		return nil, err
	}
	cgroup := filepath.Join(mnt, fmt.Sprintf("inlay-probe-%08x", rand.Uint32()))
	if err := ensureCgroup(cgroup); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(cgroup)) }()
	t, err := openTarget(cgroup)
	if err != nil {
		return nil, err
	}
	defer t.close()
	vars, err := settings(Config{Cgroup: cgroup, DNSStale: time.Second})
	if err != nil {
		return nil, err
	}
	set, err := leastMaps()
	if err != nil {
		return nil, err
	}
	defer closeMaps(set)
	list, err = loadPrograms(p, set, vars, false)
	if err != nil {
		return nil, err
	}
	defer closeLoaded(list)
	for i := range list {
		l := &list[i]
		if l.prog == nil {
			continue
		}
		on, err := t.attach(l.hook, l.prog)
		if err == nil {
			err = on.Close()
		}
		if err != nil {
			l.On, l.Why = false, oneLine(fmt.Errorf("loads, but cannot be attached: %w", err))
		}
	}
	return list, nil
}

// leastMaps creates every map as small as the kernel lets it be.
func leastMaps() (map[string]*ebpf.Map, error) {
	specs, err := mapSpecs(nil)
	if err != nil {
		return nil, err
	}
	set := make(map[string]*ebpf.Map, len(specs))
	for name, spec := range specs {
		switch spec.Type {
		case ebpf.SkStorage, ebpf.Array, ebpf.PerCPUArray:
		case ebpf.RingBuf:
			spec.MaxEntries = uint32(os.Getpagesize())
		default:
			spec.MaxEntries = 1
		}
		if set[name], err = ebpf.NewMap(spec); err != nil {
			delete(set, name)
			closeMaps(set)
			return nil, fmt.Errorf("create map %s: %w", name, err)
		}
	}
	return set, nil
}
