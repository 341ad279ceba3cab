package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/controlplane"
)

// places are the files of one mesh on this machine; everything that meets finds each other here.
type places struct{ run string }

// placesAt returns the places in dir, or in the user's own run directory when dir is empty:
// $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run.
func placesAt(dir string) (places, error) {
	if dir != "" {
		abs, err := filepath.Abs(dir)
		return places{abs}, err
	}
	if x := os.Getenv("XDG_RUNTIME_DIR"); x != "" {
		return places{filepath.Join(x, "inlay")}, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return places{}, fmt.Errorf("no run directory: neither XDG_RUNTIME_DIR nor a home directory: %w; pass --run-dir", err)
	}
	return places{filepath.Join(home, ".inlay", "run")}, nil
}

// systemRun is where a mesh of root's lives: every user's programs must reach its sockets, and
// root's home is closed to them.
const systemRun = "/run/inlay"

// placesFor is placesAt for a verb with --ebpf, whose own directory is the system's.
func placesFor(dir string, ebpf bool) (places, error) {
	if dir == "" && ebpf {
		return places{systemRun}, nil
	}
	return placesAt(dir)
}

// placesOf finds the mesh that a verb asks about or joins: in dir, else in the user's own run
// directory, else, where none runs, in the system's.
func placesOf(dir string) (places, error) {
	p, err := placesAt(dir)
	if system := (places{systemRun}); err == nil && dir == "" && !p.inUse() && system.inUse() {
		return system, nil
	}
	return p, err
}

// inUse says that a daemon runs here, or ran and was killed.
func (p places) inUse() bool {
	for _, path := range []string{p.nodeSocket(), p.xdsSocket(), filepath.Join(p.run, controlplane.StateFileName)} {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	return false
}

func (p places) xdsSocket() string      { return filepath.Join(p.run, "controlplane.sock") }
func (p places) nodeSocket() string     { return filepath.Join(p.run, "node.sock") }
func (p places) workloadSocket() string { return filepath.Join(p.run, "workload.sock") }
func (p places) flowsSocket() string    { return filepath.Join(p.run, "flows.sock") }
func (p places) proxySocket() string    { return filepath.Join(p.run, "dns.sock") }
func (p places) devLock() string        { return filepath.Join(p.run, "dev.lock") }

// defaultData is where state that outlives a reboot is kept: $XDG_DATA_HOME/inlay, else
// ~/.local/share/inlay.
func defaultData() (string, error) {
	if x := os.Getenv("XDG_DATA_HOME"); x != "" {
		return filepath.Join(x, "inlay"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("no data directory: %w; pass --data", err)
	}
	return filepath.Join(home, ".local", "share", "inlay"), nil
}

// holder is what a lock file says about who holds it.
type holder struct {
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Config  string    `json:"config,omitempty"`
}

// lock takes the lock file, writes who holds it, and returns what releases it. When somebody else
// holds it the error says who.
func lock(path string, me holder) (release func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("run directory: %w; pass --run-dir", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		var other holder
		if raw, err := os.ReadFile(path); err == nil {
			_ = json.Unmarshal(raw, &other) // an empty holder prints as pid 0
		}
		return nil, &exitError{exitRunning, fmt.Errorf(
			"a mesh runs here already: `inlay dev`, pid %d, since %s, configuration %s; stop it with `kill %d`, or use another --run-dir",
			other.PID, other.Started.Format(time.TimeOnly), other.Config, other.PID)}
	}
	raw, err := json.Marshal(me)
	if err == nil {
		err = errors.Join(f.Truncate(0), writeAll(f, raw))
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = f.Close() }, nil // closing releases a flock; the file stays for the next one
}

func writeAll(f *os.File, b []byte) error {
	_, err := f.WriteAt(b, 0)
	return err
}

// readState finds the control plane of these places.
func (p places) readState() (controlplane.StateFile, error) {
	s, err := controlplane.ReadStateFile(p.run)
	if errors.Is(err, fs.ErrNotExist) {
		return s, &exitError{exitAbsent, fmt.Errorf("no control plane runs here (%s has no %s): start one with `inlay dev`, or name its address with --admin", p.run, controlplane.StateFileName)}
	}
	return s, err
}
