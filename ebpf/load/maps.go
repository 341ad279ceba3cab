package load

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Layout is the version of the maps' shapes that this program knows: LAYOUT of ebpf/bpf/types.h.
const Layout = "2"

const (
	mapsDir  = "maps"
	linksDir = "links"
	fresh    = "-new" // ends the name of a pin that is about to replace another
)

// kept are the maps that hold what only this kernel knows: what programs and the DNS proxy wrote, and what
// an operator set. A new layout goes on with the very same maps where their shape did not change: old and
// new programs see each other's entries, so nothing falls between them. The others are the agent's:
// they are created anew and filled. So are the records, whose shape no map tells, and with them the
// counters, of which two are about that ring: the others are carried over (see carryCounters).
var kept = []string{
	bpfobj.InlayMapSettingsMap, bpfobj.InlayMapSockets, bpfobj.InlayMapPeers,
	bpfobj.InlayMapListeners, bpfobj.InlayMapTold, bpfobj.InlayMapUdpPeers, bpfobj.InlayMapUdpFlows,
	bpfobj.InlayMapUdpReverse, bpfobj.InlayMapDnsClients, bpfobj.InlayMapDnsProxies,
}

// CheckMapSizes says what of Config.MapSizes cannot be, all of it at once; nil for sizes that Open takes.
func CheckMapSizes(sizes map[string]uint32) error {
	_, err := mapSpecs(sizes)
	return err
}

// mapSpecs returns the maps with the sizes asked for.
func mapSpecs(sizes map[string]uint32) (map[string]*ebpf.MapSpec, error) {
	spec, err := bpfobj.LoadInlay()
	if err != nil {
		return nil, err
	}
	var faults []error
	for _, name := range slices.Sorted(maps.Keys(sizes)) {
		m := spec.Maps[name]
		switch {
		case m == nil || isData(name):
			faults = append(faults, fmt.Errorf("size of map %q: no such map: want one of %s", name, strings.Join(mapNames(spec), ", ")))
		case m.Type == ebpf.SkStorage:
			faults = append(faults, fmt.Errorf("size of map %q: it lives in the sockets and has no size: leave it out", name))
		case (m.Type == ebpf.Array || m.Type == ebpf.PerCPUArray) && sizes[name] < m.MaxEntries:
			faults = append(faults, fmt.Errorf("size of map %q: %d: want at least %d", name, sizes[name], m.MaxEntries))
		case sizes[name] == 0:
			faults = append(faults, fmt.Errorf("size of map %q: 0: want at least 1", name))
		case m.Type == ebpf.RingBuf && (sizes[name]&(sizes[name]-1) != 0 || int(sizes[name])%os.Getpagesize() != 0):
			faults = append(faults, fmt.Errorf("size of map %q: %d bytes: want a power of two that is a multiple of %d", name, sizes[name], os.Getpagesize()))
		default:
			m.MaxEntries = sizes[name]
		}
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	maps.DeleteFunc(spec.Maps, func(name string, _ *ebpf.MapSpec) bool { return isData(name) })
	return spec.Maps, nil
}

// isData reports whether a map stands for a section of an object (".rodata"), which belongs to it alone.
func isData(name string) bool { return strings.HasPrefix(name, ".") }

func mapNames(spec *ebpf.CollectionSpec) []string {
	var names []string
	for name := range spec.Maps {
		if !isData(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// sameShape says what differs between a pinned map and the one that programs expect; its size does
// not count: a map keeps that as long as it lives.
func sameShape(m *ebpf.Map, spec *ebpf.MapSpec) error {
	like := spec.Copy()
	like.MaxEntries = m.MaxEntries()
	return like.Compatible(m)
}

// closeMaps closes a set of maps; pins stay.
func closeMaps(set map[string]*ebpf.Map) {
	for _, m := range set {
		m.Close()
	}
}

// ensureMaps opens the pinned maps of the layout in dir and makes and pins the missing ones: the kept ones
// are taken from others (directories of other layouts), the rest is created.
func (o *opener) ensureMaps(dir string, others []string) (set map[string]*ebpf.Map, err error) {
	specs, err := mapSpecs(o.cfg.MapSizes)
	if err != nil {
		return nil, err
	}
	set = make(map[string]*ebpf.Map, len(specs))
	defer func() {
		if err != nil {
			closeMaps(set)
		}
	}()
	for _, name := range slices.Sorted(maps.Keys(specs)) {
		path := filepath.Join(dir, mapsDir, name)
		m, err := ebpf.LoadPinnedMap(path, nil)
		switch {
		case err == nil:
			set[name] = m
			if err := sameShape(m, specs[name]); err != nil {
				return nil, fmt.Errorf("pinned map %s: another shape under the same layout %s: %w: remove what is pinned (inlay node cleanup) and start again", path, filepath.Base(dir), err)
			}
			if m.MaxEntries() != specs[name].MaxEntries {
				o.log.Warn("pinned map keeps its size", "map", name, "entries", m.MaxEntries(), "wanted", specs[name].MaxEntries)
			}
			continue
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("pinned map %s: %w", path, err)
		}
		if slices.Contains(kept, name) {
			if m, err = keep(name, specs[name], others); err != nil {
				// Connections that are being made this moment have an unknown maker.
				o.apart = true
				o.log.Warn("map starts empty", "map", name, "err", err)
			}
		}
		if m == nil {
			if m, err = ebpf.NewMap(specs[name]); err != nil {
				return nil, fmt.Errorf("create map %s of %d entries: %w", name, specs[name].MaxEntries, err)
			}
		}
		set[name] = m
		if err := o.step("map " + name); err != nil {
			return nil, err
		}
		if err := m.Pin(path); err != nil {
			return nil, fmt.Errorf("pin map %s: %w", path, err)
		}
		o.undo(func() error { return os.Remove(path) })
	}
	return set, nil
}

// keep gives the map of the first of the other layouts that has one by that name; nil when none has, or
// when its shape is another.
func keep(name string, spec *ebpf.MapSpec, others []string) (*ebpf.Map, error) {
	for _, dir := range others {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, mapsDir, name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var again *ebpf.Map
		if err == nil {
			if err = sameShape(m, spec); err == nil {
				again, err = m.Clone() // a handle that is pinned nowhere yet
			}
			m.Close()
		}
		if err != nil {
			return nil, fmt.Errorf("from layout %s: %w", filepath.Base(dir), err)
		}
		return again, nil
	}
	return nil, nil
}

// ofRing are the counters that speak of the records of one ring. Those of a new ring begin at 0, or made =
// kept + lost would not hold.
var ofRing = []bpfobj.InlayCounter{bpfobj.InlayCounterCOUNT_MADE, bpfobj.InlayCounterCOUNT_LOST}

// carryCounters lets the counters of a new layout go on from those of the newest other one, except for
// ofRing. No program may write to them yet. A counter that the other layout did not have stays as it
// is.
func carryCounters(to *ebpf.Map, others []string) error {
	for _, dir := range others {
		path := filepath.Join(dir, mapsDir, bpfobj.InlayMapCounters)
		from, err := ebpf.LoadPinnedMap(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("pinned map %s: %w", path, err)
		}
		defer from.Close()
		if from.Type() != to.Type() || from.KeySize() != to.KeySize() || from.ValueSize() != to.ValueSize() {
			return fmt.Errorf("pinned map %s: another shape", path)
		}
		for i := range min(from.MaxEntries(), to.MaxEntries()) {
			if slices.Contains(ofRing, bpfobj.InlayCounter(i)) {
				continue
			}
			var each []uint64 // by CPU
			if err := from.Lookup(i, &each); err != nil {
				return fmt.Errorf("pinned map %s: counter %d: %w", path, i, err)
			}
			if err := to.Put(i, each); err != nil {
				return fmt.Errorf("counter %d: %w", i, err)
			}
		}
		return nil
	}
	return nil
}

// assign puts maps into the struct that tables, flow and proxy use. The struct holds its own handles.
func assign(set map[string]*ebpf.Map) (*bpfobj.InlayMaps, error) {
	spec, err := bpfobj.LoadInlay()
	if err != nil {
		return nil, err
	}
	for name, m := range set {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	out := new(bpfobj.InlayMaps)
	if err := spec.LoadAndAssign(out, &ebpf.CollectionOptions{MapReplacements: set}); err != nil {
		return nil, fmt.Errorf("maps: %w", err)
	}
	return out, nil
}

// OpenMaps opens the maps that a running or dead agent left pinned in pin, in this program's layout.
// It takes no lock and creates nothing; the caller closes them.
func OpenMaps(pin string) (*bpfobj.InlayMaps, error) { return openMaps(pin, Layout) }

func openMaps(pin, layout string) (*bpfobj.InlayMaps, error) {
	dir := filepath.Join(pin, "v"+layout)
	specs, err := mapSpecs(nil)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(dir); err != nil {
		if found, _ := layoutDirs(pin); len(found) > 0 {
			return nil, fmt.Errorf("pins in %s: layout %s: want v%s: start the agent of this version, which takes them over", pin, strings.Join(found, ", "), layout)
		}
		return nil, fmt.Errorf("pins in %s: nothing is pinned: start the agent first (inlay node --ebpf): %w", pin, fs.ErrNotExist)
	}
	set := make(map[string]*ebpf.Map, len(specs))
	defer func() { closeMaps(set) }()
	for _, name := range slices.Sorted(maps.Keys(specs)) {
		path := filepath.Join(dir, mapsDir, name)
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return nil, fmt.Errorf("pinned map %s: %w: start the agent of this version, which completes them", path, err)
		}
		set[name] = m
		if err := sameShape(m, specs[name]); err != nil {
			return nil, fmt.Errorf("pinned map %s: %w", path, err)
		}
	}
	return assign(set)
}

// discard is the log of a nil logger.
func discard(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}
