package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Breakglass turns policies off (everything is allowed) or on again, by one write into the pinned
// settings, in every layout that is pinned. It works with and without an agent, and reports whether it
// changed anything. The caller audits it.
func Breakglass(pin string, on bool) (changed bool, err error) {
	layouts, err := layoutDirs(pin)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("pin directory: %w", err)
	}
	found := false
	for _, l := range layouts {
		path := filepath.Join(pin, l, mapsDir, bpfobj.InlayMapSettingsMap)
		m, err := ebpf.LoadPinnedMap(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return changed, fmt.Errorf("pinned map %s: %w", path, err)
		}
		found = true
		c, err := flip(m, on)
		m.Close()
		if err != nil {
			return changed, fmt.Errorf("pinned map %s: %w", path, err)
		}
		changed = changed || c
	}
	if !found {
		return false, fmt.Errorf("pins in %s: no settings are pinned, so no policy is enforced: name the cgroup of a running agent with --cgroup: %w", pin, fs.ErrNotExist)
	}
	return changed, nil
}

// flip writes allow_all, which is the first field of settings in every layout.
func flip(m *ebpf.Map, on bool) (changed bool, err error) {
	var value []byte
	if value, err = m.LookupBytes(uint32(0)); err != nil {
		return false, err
	}
	if len(value) < 4 {
		return false, fmt.Errorf("value of %d bytes: want at least 4", len(value))
	}
	var want uint32
	if on {
		want = 1
	}
	if binary.NativeEndian.Uint32(value) == want {
		return false, nil
	}
	binary.NativeEndian.PutUint32(value, want)
	return true, m.Update(uint32(0), value, ebpf.UpdateExist)
}

// Cleanup detaches every program and removes every pin in pin, of all layouts, and the directory. It
// returns what it removed, as paths relative to pin. It needs no agent, and removes nothing the
// second time. While an agent is at work it returns [ErrBusy].
func Cleanup(pin string) (removed []string, err error) {
	pin = filepath.Clean(pin)
	if _, err := os.Stat(pin); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err := ownedPin(pin); err != nil {
		return nil, err
	}
	lock, err := lockPins(pin)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	o := &opener{cfg: Config{Pin: pin}, parts: parts{hooks: hooks}}
	layouts, err := o.layoutsBeside("")
	if err != nil {
		return nil, err
	}
	var faults []error
	for _, dir := range layouts {
		names, err := o.dropLayout(dir)
		for _, n := range names {
			removed = append(removed, filepath.Join(filepath.Base(dir), n))
		}
		faults = append(faults, err)
	}
	if err := os.Remove(pin); err != nil {
		faults = append(faults, fmt.Errorf("pin directory: %w", err))
	}
	return removed, errors.Join(faults...)
}

// ownedPin refuses a directory that is no pin directory of an agent: on another file system, or
// the bpf file system itself, which other programs pin in.
func ownedPin(pin string) error {
	var st, up unix.Stat_t
	if err := errors.Join(unix.Stat(pin, &st), unix.Stat(filepath.Dir(pin), &up)); err != nil {
		return fmt.Errorf("pin directory %s: %w", pin, err)
	}
	if !onBPFFS(pin) {
		return fmt.Errorf("pin directory %s: not on a bpf file system: want a directory like %s/%s", pin, BPFFS, DefaultRoot)
	}
	if st.Dev != up.Dev {
		return fmt.Errorf("pin directory %s: is the bpf file system itself, where others pin too: want a directory in it, like %s/%s", pin, BPFFS, DefaultRoot)
	}
	return nil
}

// dropLayout detaches the links of a layout, then removes its maps and its directory. It returns what
// it removed, relative to dir.
func (o *opener) dropLayout(dir string) (removed []string, err error) {
	links, err := pins(filepath.Join(dir, linksDir))
	faults := []error{err}
	// Who redirects and judges goes before who tells who somebody is.
	order := func(name string) int {
		return slices.IndexFunc(o.parts.hooks, func(h hook) bool { return h.Name == strings.TrimSuffix(name, fresh) })
	}
	slices.SortStableFunc(links, func(a, b string) int { return order(b) - order(a) })
	for _, name := range links {
		if err := o.step("drop link " + name); err != nil {
			return removed, err
		}
		if err := unpinLink(filepath.Join(dir, linksDir, name)); err != nil {
			faults = append(faults, err)
			continue
		}
		removed = append(removed, filepath.Join(linksDir, name))
	}
	names, err := pins(filepath.Join(dir, mapsDir))
	faults = append(faults, err)
	for _, name := range names {
		if err := o.step("drop map " + name); err != nil {
			return removed, err
		}
		if err := removePin(filepath.Join(dir, mapsDir, name)); err != nil {
			faults = append(faults, err)
			continue
		}
		removed = append(removed, filepath.Join(mapsDir, name))
	}
	for _, d := range []string{filepath.Join(dir, linksDir), filepath.Join(dir, mapsDir), dir} {
		faults = append(faults, removePin(d))
	}
	return removed, errors.Join(faults...)
}
