package load

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// loaded is a program in the kernel, attached to nothing yet.
type loaded struct {
	hook
	prog *ebpf.Program // nil: the kernel refused it, Why says so
}

func closeLoaded(list []loaded) {
	for _, l := range list {
		if l.prog != nil {
			l.prog.Close()
		}
	}
}

// settings are the variables of programs that are set before they are loaded (const volatile).
func settings(cfg Config) (map[string]any, error) {
	level, err := cgroupLevel(cfg.Cgroup)
	if err != nil {
		return nil, err
	}
	cookie, err := netnsCookie()
	if err != nil {
		return nil, err
	}
	vars := map[string]any{
		"managed_level": uint32(level + 1), // of the leaves
		"dns_stale":     uint64(cfg.DNSStale),
		"own_netns":     cookie,
	}
	if cfg.SampleAfter > 0 {
		vars["sample_after"] = uint64(cfg.SampleAfter)
	}
	return vars, nil
}

// netnsCookie is the number that programs know the network namespace of this thread by.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, &Unsupported{Missing: "cookies of network namespaces (Linux 5.14)", Found: "kernel " + release(), Remedy: "use Linux 6.1 or newer", Err: err}
	}
	return cookie, nil
}

// loadPrograms loads the program of each hook into the kernel by itself, so that one that is refused
// takes no other with it. A refused one has a reason instead of a program; with whole, a required one
// that is refused ends it with an *[Unsupported].
func loadPrograms(p parts, set map[string]*ebpf.Map, vars map[string]any, whole bool) ([]loaded, error) {
	specs := make(map[string]*ebpf.CollectionSpec)
	spec := func(stem string) (*ebpf.CollectionSpec, error) {
		if s := specs[stem]; s != nil {
			return s, nil
		}
		load := p.objects[stem]
		if load == nil {
			return nil, fmt.Errorf("object %q: not part of this program", stem)
		}
		s, err := load()
		if err != nil {
			return nil, fmt.Errorf("object %q: %w", stem, err)
		}
		for name, v := range vars {
			if s.Variables[name] == nil {
				continue // not every object asks for it
			}
			if err := s.Variables[name].Set(v); err != nil {
				return nil, fmt.Errorf("object %q: variable %s: %w", stem, name, err)
			}
		}
		for name, m := range set {
			if s.Maps[name] != nil {
				s.Maps[name].MaxEntries = m.MaxEntries()
			}
		}
		specs[stem] = s
		return s, nil
	}

	cache := btf.NewCache()
	var out []loaded
	fail := func(h hook, err error) ([]loaded, error) {
		closeLoaded(out)
		return nil, fmt.Errorf("hook %s: %w", h.Name, err)
	}
	for _, h := range p.hooks {
		l := loaded{hook: h}
		s, err := spec(h.object)
		if err == nil {
			err = has(s, h.program)
		}
		if err != nil {
			return fail(h, err) // a fault of this program, not of the kernel
		}
		l.prog, err = loadProgram(s, h.program, set, cache)
		if err != nil && h.fallback != "" {
			first := err
			if s, err = spec(h.fallback); err == nil {
				err = has(s, h.program)
			}
			if err != nil {
				return fail(h, err)
			}
			if l.prog, err = loadProgram(s, h.program, set, cache); err == nil {
				l.Why = h.lesser
			} else {
				err = fmt.Errorf("%w; and in its lesser variant: %w", first, err)
			}
		}
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) {
			return fail(h, err) // says nothing about the hook
		}
		if l.On = err == nil; !l.On {
			l.Why = oneLine(err)
			if whole && h.Required {
				closeLoaded(out)
				return nil, &Unsupported{
					Missing: "hook " + h.Name, Found: "kernel " + release() + " refused it, nothing was changed", Err: err,
					Remedy: "use Linux 6.1 or newer; inlay node probe tells of each hook",
				}
			}
		}
		out = append(out, l)
	}
	return out, nil
}

// has reports an object that does not hold a program that the table of hooks names.
func has(s *ebpf.CollectionSpec, program string) error {
	if s.Programs[program] == nil {
		return fmt.Errorf("program %s: not in the object, which holds %v", program, slices.Sorted(maps.Keys(s.Programs)))
	}
	return nil
}

// loadProgram loads one program of an object over the given maps.
func loadProgram(s *ebpf.CollectionSpec, name string, set map[string]*ebpf.Map, cache *btf.Cache) (*ebpf.Program, error) {
	one := s.Copy()
	maps.DeleteFunc(one.Programs, func(n string, _ *ebpf.ProgramSpec) bool { return n != name })
	replace := make(map[string]*ebpf.Map)
	for n, m := range set {
		if one.Maps[n] != nil {
			replace[n] = m
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{MapReplacements: replace, Cache: cache})
	if err != nil {
		return nil, err
	}
	prog := coll.Programs[name]
	delete(coll.Programs, name)
	coll.Close()
	return prog, nil
}
