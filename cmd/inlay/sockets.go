package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// bound is a socket of /proc/PID/net/{tcp,udp}{,6} that waits for peers.
type bound struct {
	addr  netip.AddrPort
	inode uint64
}

// States of a socket in these tables (include/net/tcp_states.h): a listening TCP socket, and a UDP
// socket that is bound and not connected.
const (
	stateListen = 0x0a
	stateClose  = 0x07
)

// readSockets reads one table and returns the sockets in the given state, bound to the port.
// Lines that are no socket are left out: the kernel may add columns, and pads the lines.
func readSockets(r io.Reader, state uint64, port uint16) ([]bound, error) {
	var out []bound
	s := bufio.NewScanner(r)
	for s.Scan() {
		// "sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode"
		// (proc_net_tcp.rst)
		f := strings.Fields(s.Text())
		if len(f) < 10 {
			continue
		}
		addr, ok := parseSocketAddress(f[1])
		st, err1 := strconv.ParseUint(f[3], 16, 8)
		inode, err2 := strconv.ParseUint(f[9], 10, 64)
		if !ok || err1 != nil || err2 != nil || st != state || addr.Port() != port {
			continue
		}
		out = append(out, bound{addr, inode})
	}
	return out, s.Err()
}

// parseSocketAddress reads HEX:PORT, where HEX is one word of 32 bits, or four, each as this machine
// orders its bytes.
func parseSocketAddress(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	p, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || len(host) != 8 && len(host) != 32 {
		return netip.AddrPort{}, false
	}
	raw := make([]byte, 0, 16)
	for ; len(host) > 0; host = host[8:] {
		w, err := strconv.ParseUint(host[:8], 16, 32)
		if err != nil {
			return netip.AddrPort{}, false
		}
		raw = binary.NativeEndian.AppendUint32(raw, uint32(w))
	}
	a, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), true
}

// program is a managed one, as /proc shows it.
type program struct {
	pid    int    // the first process; its network namespace is looked at
	cgroup string // whose processes are the program
}

// listeningAt returns where the program waits on a port; ok is false while it does not. Nobody is
// dialled: a policy may refuse even this machine, and a half-open call may count for the program.
func (p program) listeningAt(port uint16, udp bool) (addr netip.AddrPort, ok bool, err error) {
	table, state := "tcp", uint64(stateListen)
	if udp {
		table, state = "udp", stateClose
	}
	var all []bound
	for _, name := range []string{table, table + "6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", p.pid, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6, or the program has ended
		}
		if err != nil {
			return addr, false, err
		}
		got, err := readSockets(f, state, port)
		_ = f.Close()
		if err != nil {
			return addr, false, fmt.Errorf("%s: %w", f.Name(), err)
		}
		all = append(all, got...)
	}
	if len(all) == 0 {
		return addr, false, nil
	}
	own, err := p.sockets()
	if err != nil {
		return addr, false, err
	}
	for _, b := range all {
		// Of several the one that takes the most callers: any address, then IPv4 as listed.
		if own[b.inode] && (!ok || b.addr.Addr().IsUnspecified() && !addr.Addr().IsUnspecified()) {
			addr, ok = b.addr, true
		}
	}
	return addr, ok, nil
}

// sockets are the inodes of the sockets that the program's processes hold.
func (p program) sockets() (map[uint64]bool, error) {
	pids, err := cgroupProcesses(p.cgroup)
	if err != nil {
		return nil, err
	}
	out := map[uint64]bool{}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		for _, fd := range fds {
			link, err := os.Readlink(filepath.Join(dir, fd.Name()))
			if err != nil {
				continue
			}
			text, isSocket := strings.CutPrefix(link, "socket:[")
			if n, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 64); isSocket && err == nil {
				out[n] = true
			}
		}
	}
	return out, nil
}

// cgroupProcesses are the processes of a cgroup and of those below it.
func cgroupProcesses(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // removed meanwhile
		case err != nil || !d.IsDir():
			return err
		}
		raw, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil //nolint:nilerr // removed meanwhile, or a threaded one, whose processes its parent lists
		}
		for line := range bytes.Lines(raw) {
			if pid, err := strconv.Atoi(string(bytes.TrimSpace(line))); err == nil {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// awaitListening asks until the program listens; no event tells of another process's listen.
func (p program) awaitListening(ctx context.Context, port uint16, udp bool) (netip.AddrPort, bool) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if addr, ok, err := p.listeningAt(port, udp); err == nil && ok {
			return addr, true
		}
		select {
		case <-ctx.Done():
			return netip.AddrPort{}, false
		case <-tick.C:
		}
	}
}
