package load

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// target is what links of this Set hang on, and how to know that a pinned one hangs on the same.
type target struct {
	cgroup   string
	cgroupID uint64
	netns    *os.File
	netnsIno uint32
}

func openTarget(cgroup string) (*target, error) {
	id, err := CgroupID(cgroup)
	if err != nil {
		return nil, err
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		ns.Close()
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	return &target{cgroup: cgroup, cgroupID: id, netns: ns, netnsIno: uint32(st.Ino)}, nil
}

func (t *target) close() { t.netns.Close() }

// attach makes a link that lives as long as the process, until it is pinned.
func (t *target) attach(h hook, prog *ebpf.Program) (link.Link, error) {
	switch h.place {
	case atCgroup:
		l, err := link.AttachCgroup(link.CgroupOptions{Path: t.cgroup, Attach: h.attach, Program: prog})
		if errors.Is(err, unix.EPERM) {
			// "NONE(default): No further BPF programs allowed in the subtree" (linux/bpf.h): the one reason
			// that is left, since the program was loaded.
			err = fmt.Errorf("%w: a program that allows no other one is attached to this cgroup or to one above it: find it with bpftool cgroup tree", err)
		}
		return l, err
	case atNetNS:
		return link.AttachNetNs(int(t.netns.Fd()), prog)
	case atTracing:
		return link.AttachTracing(link.TracingOptions{Program: prog})
	case atIter:
		return link.AttachIter(link.IterOptions{Program: prog})
	}
	return nil, fmt.Errorf("hook %s: unknown place %d", h.Name, h.place)
}

// same reports whether l is attached where h wants it. A link outlives its cgroup and its network
// namespace, attached to nothing then.
func (t *target) same(h hook, l link.Link) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	switch h.place {
	case atCgroup:
		c := info.Cgroup()
		return c != nil && c.CgroupId == t.cgroupID && uint32(c.AttachType) == uint32(h.attach)
	case atNetNS:
		n := info.NetNs()
		return n != nil && n.NetnsInode == t.netnsIno
	}
	return true
}

// place attaches the program of one hook and pins its link in dir, or swaps it into the link that is
// pinned there, or into the one that is pinned under another layout, which it moves. All of it can
// be repeated after a crash at any point.
func (o *opener) place(l loaded, dir string, others []string) error {
	if l.place == atIter {
		it, err := o.target.attach(l.hook, l.prog)
		if err != nil {
			return err
		}
		o.links[l.Name] = it
		return nil
	}
	path := filepath.Join(dir, linksDir, l.Name)
	cur, err := loadLink(path)
	if err != nil {
		return err
	}
	if cur != nil {
		if l.place != atTracing && o.target.same(l.hook, cur) {
			o.links[l.Name] = cur
			return o.swap(l, cur)
		}
		return o.replace(l, cur, path)
	}
	if l.place != atTracing && (!l.beside || !o.apart) {
		for _, other := range others {
			from := filepath.Join(other, linksDir, l.Name)
			old, err := loadLink(from)
			if err != nil {
				return err
			}
			if old == nil {
				continue
			}
			if !o.target.same(l.hook, old) {
				old.Close() // goes with its layout
				continue
			}
			o.links[l.Name] = old
			if err := o.swap(l, old); err != nil {
				return err
			}
			if err := o.step("move link " + l.Name); err != nil {
				return err
			}
			if err := os.Rename(from, path); err != nil {
				return fmt.Errorf("move pin: %w", err)
			}
			o.undo(func() error { return os.Rename(path, from) })
			return nil
		}
	}
	if err := o.step("attach " + l.Name); err != nil {
		return err
	}
	fresh, err := o.target.attach(l.hook, l.prog)
	if err != nil {
		return err
	}
	o.links[l.Name] = fresh
	o.undo(func() error { return detach(fresh) })
	if err := o.step("pin link " + l.Name); err != nil {
		return err
	}
	if err := fresh.Pin(path); err != nil {
		return fmt.Errorf("pin link: %w", err)
	}
	o.undo(func() error { return os.Remove(path) })
	return nil
}

// swap puts the program into a link that is attached already: the kernel replaces it in one step.
func (o *opener) swap(l loaded, in link.Link) error {
	info, err := in.Info()
	if err != nil {
		return err
	}
	old, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return fmt.Errorf("program %d of the pinned link: %w", info.Program, err)
	}
	if err := o.step("update " + l.Name); err != nil {
		old.Close()
		return err
	}
	if err := in.Update(l.prog); err != nil {
		old.Close()
		return err
	}
	o.closeLater(old)
	o.undo(func() error { return in.Update(old) })
	return nil
}

// replace attaches a new link and puts it in the place of a pinned one that cannot take the program:
// it hangs on a cgroup or namespace that is gone, or is one of tracing, which the kernel does not update. For
// an instant both run, never none.
func (o *opener) replace(l loaded, cur link.Link, path string) error {
	if err := o.step("attach " + l.Name); err != nil {
		cur.Close()
		return err
	}
	next, err := o.target.attach(l.hook, l.prog)
	if err != nil {
		cur.Close()
		return err
	}
	o.links[l.Name] = next
	o.undo(func() error { return detach(next) })
	if err := next.Pin(path + fresh); err != nil {
		cur.Close()
		return fmt.Errorf("pin link: %w", err)
	}
	o.undo(func() error { return removePin(path + fresh) })
	if err := o.step("pin link " + l.Name); err != nil {
		cur.Close()
		return err
	}
	// rename(2): "If newpath already exists, it will be atomically replaced."
	if err := os.Rename(path+fresh, path); err != nil {
		cur.Close()
		return fmt.Errorf("replace pin: %w", err)
	}
	// The one before stays attached until all went well.
	o.commit(func() error { return detach(cur) })
	o.undo(func() error {
		// It lost its pin to the new one: under its first name it is no longer known to the file system.
		err := os.Remove(path)
		if err == nil {
			if err = cur.Pin(path + fresh); err == nil {
				err = os.Rename(path+fresh, path)
			}
		}
		return errors.Join(err, cur.Close())
	})
	return nil
}

// loadLink opens a pinned link; nil when there is none.
func loadLink(path string) (link.Link, error) {
	l, err := link.LoadPinnedLink(path, nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("pinned link %s: %w", path, err)
	}
	return l, nil
}

// detach ends a link even when another process holds it too, where the kernel can; else it closes it.
func detach(l link.Link) error {
	err := l.Detach()
	if errors.Is(err, link.ErrNotSupported) || errors.Is(err, unix.ENOLINK) {
		err = nil // tracing ends with its last handle; or its cgroup is gone
	}
	return errors.Join(err, l.Close())
}

// removePin removes a pin if it is there.
func removePin(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// unpinLink detaches what is pinned at path and removes the pin.
func unpinLink(path string) error {
	l, err := loadLink(path)
	if err != nil || l == nil {
		return err
	}
	return errors.Join(detach(l), removePin(path))
}

// pins returns the names in a directory of pins, sorted; none when the directory is missing.
func pins(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names, nil
}

// dropFresh removes what a crash left between attaching a link and giving it its name.
func dropFresh(dir string) error {
	names, err := pins(filepath.Join(dir, linksDir))
	for _, name := range names {
		if strings.HasSuffix(name, fresh) {
			err = errors.Join(err, unpinLink(filepath.Join(dir, linksDir, name)))
		}
	}
	return err
}
