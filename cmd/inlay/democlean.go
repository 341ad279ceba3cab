package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

// clean takes away what the demo made and then looks whether anything of it is left: a pin, a cgroup
// or a process. It makes no namespace.
func (d *legacyDemo) clean() error {
	root, err := load.ResolveCgroup(d.cgroup)
	if err != nil {
		return err
	}
	pin, err := load.PinDir(d.cgroup)
	if err != nil {
		return err
	}
	var faults []error
	note := func(err error) {
		if err != nil {
			faults = append(faults, fmt.Errorf("demo: clean up: %w", err))
		}
	}
	_, err = load.Cleanup(pin)
	note(err)
	if d.dev != nil { // it outlives the node
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err = stopProxy(ctx, d.dev.places.proxySocket(), func(proxy.Status) bool { return true })
		cancel()
		note(err)
	}
	// What a program left behind in its cgroup ends with the demo.
	note(os.WriteFile(filepath.Join(root, "cgroup.kill"), []byte("1"), 0))
	faults = dropAbsent(faults)
	note(untilGone(func() error {
		_, left, err := removeCgroups(root)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("cgroups %v: %w", left, errLeft)
		}
		return err
	}))
	note(d.leftover(root, pin))
	return errors.Join(faults...)
}

var errLeft = errors.New("left behind")

// dropAbsent takes out faults about what is not there: the demo ended before it was made.
func dropAbsent(faults []error) []error {
	var out []error
	for _, err := range faults {
		if !errors.Is(err, fs.ErrNotExist) {
			out = append(out, err)
		}
	}
	return out
}

// untilGone tries for 5 s: a process that was killed is gone a moment later.
func untilGone(try func() error) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := try()
		if !errors.Is(err, errLeft) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond) // no event tells of the end of a process that is nobody's child
	}
}

// leftover looks for what should be gone.
func (d *legacyDemo) leftover(root, pin string) error {
	return untilGone(func() error {
		var left []string
		for _, path := range []string{root, pin} {
			if _, err := os.Lstat(path); err == nil {
				left = append(left, path)
			}
		}
		pids, err := processesNaming(d.dir)
		for _, pid := range pids {
			left = append(left, fmt.Sprintf("process %d", pid))
		}
		if len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("%s: %w", strings.Join(left, ", "), errLeft))
		}
		return err
	})
}

// processesNaming are the processes, this one aside, whose command line names a directory.
func processesNaming(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		raw, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && dir != "" && bytes.Contains(raw, []byte(dir+"/")) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// isBusy says that a cgroup still has processes, or cgroups below it.
func isBusy(err error) bool {
	return errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.ENOTEMPTY)
}
