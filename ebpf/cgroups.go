package ebpf

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/fsnotify/fsnotify"

	"github.com/inlay-mesh/inlay/ebpf/load"
)

// cgroups is the managed part of the hierarchy: the root that programs are attached to and, directly
// below it, one leaf a workload.
type cgroups struct {
	root  string // absolute
	mount string // of cgroup2
	proc  string // where processes are read; /proc
	id    func(path string) (uint64, error)
	rmdir func(path string) error
	// watch tells of leaves that become empty; nil when the machine has no watch left, and the
	// caller asks now and then instead.
	watch *fsnotify.Watcher
}

func openCgroups(root string) (*cgroups, error) {
	mount, err := load.FindCgroup2()
	if err != nil {
		return nil, err
	}
	c := &cgroups{root: root, mount: mount, proc: "/proc", id: load.CgroupID, rmdir: os.Remove}
	c.watch, _ = fsnotify.NewWatcher() // EMFILE: fs.inotify.max_user_instances
	return c, nil
}

func (c *cgroups) Close() error {
	if c.watch == nil {
		return nil
	}
	return c.watch.Close()
}

// make creates a leaf, or takes one that is there and empty, and returns its id.
func (c *cgroups) make(path string) (id uint64, made bool, err error) {
	err = os.Mkdir(path, 0o755)
	switch {
	case err == nil:
		made = true
	case errors.Is(err, fs.ErrExist):
	default:
		return 0, false, fmt.Errorf("cgroup: %w", err)
	}
	if id, err = c.id(path); err != nil {
		return 0, made, err
	}
	if c.watch != nil {
		_ = c.watch.Add(filepath.Join(path, "cgroup.events")) // else it is asked now and then
	}
	return id, made, nil
}

// exists says whether a cgroup is there.
func (c *cgroups) exists(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// populated says whether any process is in the cgroup or below it. Documentation, cgroup-v2: the
// "populated" field of cgroup.events "is 0 if there is no live process in the cgroup and its
// descendants; otherwise, 1".
func (c *cgroups) populated(path string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "populated "); ok {
			return v != "0", nil
		}
	}
	return false, fmt.Errorf("%s: no line populated", filepath.Join(path, "cgroup.events"))
}

// remove takes a leaf away, with the empty cgroups that its program made below it.
func (c *cgroups) remove(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := c.remove(filepath.Join(path, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	if c.watch != nil {
		_ = c.watch.Remove(filepath.Join(path, "cgroup.events")) // it may not be watched
	}
	return c.rmdir(path) // fails while a process is in it
}

// leaves lists the cgroups directly below the root.
func (c *cgroups) leaves() ([]string, error) {
	entries, err := os.ReadDir(c.root)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, filepath.Join(c.root, e.Name()))
		}
	}
	return out, nil
}

// events calls f when a leaf may have become empty, until ctx is done.
func (c *cgroups) events(ctx context.Context, f func()) {
	if c.watch == nil {
		<-ctx.Done()
		return
	}
	for {
		select {
		case _, ok := <-c.watch.Events:
			if !ok {
				return
			}
			f()
		case _, ok := <-c.watch.Errors: // the queue overflowed: something happened
			if !ok {
				return
			}
			f()
		case <-ctx.Done():
			return
		}
	}
}

// of returns the absolute path of a process's cgroup.
func (c *cgroups) of(pid int) (string, error) {
	f, err := os.Open(filepath.Join(c.proc, fmt.Sprint(pid), "cgroup"))
	if err != nil {
		return "", fmt.Errorf("process %d: %w", pid, err)
	}
	defer f.Close()
	path, err := unified(f)
	if err != nil {
		return "", fmt.Errorf("process %d: %w", pid, err)
	}
	return filepath.Join(c.mount, path), nil
}

// unified reads the line of cgroup2. cgroups(7): "For the cgroups version 2 hierarchy, this field
// contains the value 0", and the list of controllers is empty; in hybrid mode it is one line of many.
func unified(r io.Reader) (string, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		path, ok := strings.CutPrefix(lines.Text(), "0::")
		switch {
		case !ok:
		case !strings.HasPrefix(path, "/"):
			return "", fmt.Errorf("cgroup line %.200q: want 0::/PATH", lines.Text())
		case path == "/.." || strings.HasPrefix(path, "/../"):
			return "", fmt.Errorf("cgroup %.200q lies outside the cgroup namespace of this agent", path)
		default:
			return strings.TrimSuffix(path, " (deleted)"), nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	return "", errors.New("it has no cgroup of version 2 (no line 0::)")
}

// leafOf returns the cgroup directly below root that path is or lies in.
func leafOf(root, path string) (string, bool) {
	rest, ok := strings.CutPrefix(path, root+"/")
	if !ok || rest == "" {
		return "", false
	}
	name, _, _ := strings.Cut(rest, "/")
	return filepath.Join(root, name), true
}
