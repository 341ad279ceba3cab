package attest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/fsnotify/fsnotify"
)

// WaitCgroupEmpty returns nil when no process is left in the cgroup at path or below it, or the
// cgroup is gone, or stop is closed, or ctx is done. It is woken by the kernel (cgroup-v2: "The
// cgroup.events file ... generates file modified events"), and returns an error when it cannot be.
func WaitCgroupEmpty(ctx context.Context, path string, stop <-chan struct{}) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", path, err)
	}
	defer w.Close()
	events := filepath.Join(path, "cgroup.events")
	// The watch comes before the first reading, so that no change falls between.
	switch err := w.Add(events); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("cgroup %s: %w", path, err)
	}
	for {
		populated, err := Populated(path)
		if err != nil || !populated {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-stop:
			return nil
		case _, open := <-w.Events:
			if !open {
				return fmt.Errorf("cgroup %s: the watch ended", path)
			}
		case err := <-w.Errors:
			if !errors.Is(err, fsnotify.ErrEventOverflow) { // then something changed: read again
				return fmt.Errorf("cgroup %s: %w", path, err)
			}
		}
	}
}

// Populated says whether a process lives in the cgroup at path or below it; a cgroup that does not
// exist is empty.
func Populated(path string) (bool, error) {
	raw, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
	// Reading the file of a cgroup that is removed meanwhile fails with ENODEV.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cgroup %s: %w", path, err)
	}
	for line := range bytes.Lines(raw) {
		// cgroup-v2, cgroup.events: "populated: 1 if the cgroup or its descendants contains any live
		// processes; otherwise, 0."
		if v, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("populated ")); ok {
			return !bytes.Equal(v, []byte("0")), nil
		}
	}
	return false, fmt.Errorf("cgroup %s: cgroup.events has no line populated: is it a cgroup of version 2?", path)
}
