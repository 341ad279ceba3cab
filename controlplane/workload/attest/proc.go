package attest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// Proc is the Table of a mounted proc file system.
type Proc struct {
	// Root is where it is mounted; empty means /proc.
	Root string
}

// Stat implements Table. It reads stat and status of the process and, since these are two files,
// stat again: all three are of one process.
func (p Proc) Stat(pid int) (Stat, error) {
	if pid <= 0 {
		return Stat{}, fmt.Errorf("process %d: %w", pid, ErrNoProcess)
	}
	before, err := p.stat(pid)
	if err != nil {
		return Stat{}, err
	}
	raw, err := p.read(pid, "status")
	if err != nil {
		return Stat{}, err
	}
	if before.UID, err = parseStatusUID(raw); err != nil {
		return Stat{}, fmt.Errorf("process %d: status: %w", pid, err)
	}
	after, err := p.stat(pid)
	if err != nil {
		return Stat{}, err
	}
	if after.Process != before.Process {
		return Stat{}, fmt.Errorf("process %d: %w", pid, ErrNoProcess)
	}
	return before, nil
}

func (p Proc) stat(pid int) (Stat, error) {
	raw, err := p.read(pid, "stat")
	if err != nil {
		return Stat{}, err
	}
	s, err := parseStat(raw)
	if err != nil {
		return Stat{}, fmt.Errorf("process %d: stat: %w", pid, err)
	}
	if s.PID != pid {
		return Stat{}, fmt.Errorf("process %d: stat speaks of process %d: is %s mounted in another PID namespace?", pid, s.PID, p.root())
	}
	return s, nil
}

func (p Proc) root() string {
	if p.Root == "" {
		return "/proc"
	}
	return p.Root
}

func (p Proc) read(pid int, name string) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(p.root(), strconv.Itoa(pid), name))
	// A process that ends while its file is open reads as ESRCH.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil, fmt.Errorf("process %d: %w", pid, ErrNoProcess)
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("process %d: %w: mount proc without hidepid, or run the node as a user who may read it", pid, err)
	}
	return raw, err
}

// parseStat reads the fields of /proc/PID/stat (proc_pid_stat(5)): pid (1), ppid (4) and
// starttime (22). The command (2) stands in parentheses and may hold anything, parentheses and
// spaces too: the last closing one ends it, since no later field holds any.
func parseStat(raw []byte) (Stat, error) {
	open, end := bytes.IndexByte(raw, '('), bytes.LastIndexByte(raw, ')')
	if open < 0 || end < open {
		return Stat{}, errors.New("no command in parentheses")
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(raw[:open])))
	if err != nil {
		return Stat{}, fmt.Errorf("field 1: %w", err)
	}
	rest := bytes.Fields(raw[end+1:]) // from field 3 on
	const ppidAt, startAt = 4 - 3, 22 - 3
	if len(rest) <= startAt {
		return Stat{}, fmt.Errorf("%d fields: want at least 22", len(rest)+2)
	}
	ppid, err := strconv.Atoi(string(rest[ppidAt]))
	if err != nil {
		return Stat{}, fmt.Errorf("field 4: %w", err)
	}
	start, err := strconv.ParseUint(string(rest[startAt]), 10, 64)
	if err != nil {
		return Stat{}, fmt.Errorf("field 22: %w", err)
	}
	if pid <= 0 || ppid < 0 {
		return Stat{}, fmt.Errorf("process %d with parent %d: want positive numbers", pid, ppid)
	}
	return Stat{Process: Process{PID: pid, StartTime: start}, PPID: ppid}, nil
}

// parseStatusUID reads the effective user of /proc/PID/status: the second number of "Uid:". It is
// the one that SO_PEERCRED reports too.
func parseStatusUID(raw []byte) (uint32, error) {
	for line := range bytes.Lines(raw) {
		rest, ok := bytes.CutPrefix(line, []byte("Uid:"))
		if !ok {
			continue
		}
		f := bytes.Fields(rest)
		if len(f) != 4 {
			return 0, fmt.Errorf("line Uid has %d numbers: want 4", len(f))
		}
		uid, err := strconv.ParseUint(string(f[1]), 10, 32)
		if err != nil {
			return 0, fmt.Errorf("line Uid: %w", err)
		}
		return uint32(uid), nil
	}
	return 0, errors.New("no line Uid")
}
