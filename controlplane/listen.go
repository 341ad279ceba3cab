package controlplane

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

// requireLoopback refuses an address that other machines could reach, without asking DNS.
func requireLoopback(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%w: want host:port, as 127.0.0.1:15010", err)
	}
	if strings.EqualFold(host, "localhost") {
		return nil
	}
	if host == "" {
		return errors.New("that is every address of this machine: want a loopback address, as 127.0.0.1")
	}
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.Unmap().IsLoopback() {
		return errors.New("want a loopback address, as 127.0.0.1")
	}
	return nil
}

// listenTCP listens, and names the process that has the address already.
func listenTCP(cfg Config, addr, flag string) (net.Listener, error) {
	lis, err := cfg.Listen("tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("listen %s: address in use%s; stop it or pass %s", addr, holderOf(addr, "/proc"), flag)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("listen %s: %w: this user may not; pass %s with a port from 1024", addr, err, flag)
	case err != nil:
		return nil, fmt.Errorf("listen %s: %w; pass another one with %s", addr, err, flag)
	}
	return lis, nil
}

// listenUnix listens on a path that every local user may connect to: the kernel says who they are.
// What a dead process left is removed; a live one is refused by its number.
func listenUnix(cfg Config, path, flag string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen %s: something that is no socket is in the way; move it away or pass another %s", path, flag)
	case err == nil:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			defer conn.Close()
			holder := ""
			if p, err := attest.PeerProcess(conn.(*net.UnixConn)); err == nil {
				holder = " by pid " + strconv.Itoa(p.Process.PID) + nameOf(p.Process.PID, "/proc")
			}
			return nil, fmt.Errorf("listen %s: address in use%s; stop it or pass another %s", path, holder, flag)
		}
		// unix(7): "ECONNREFUSED: The remote address specified by connect(2) was not a listening
		// socket." Any other failure is of one that lives: of another user, or with a full backlog.
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("listen %s: address in use, it seems: %w; stop who has it or pass another %s", path, err, flag)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("listen %s: socket of a dead process: %w; pass another %s", path, err, flag)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("listen %s: %w; pass another %s", path, err, flag)
	}
	// unix(7): sun_path holds 108 bytes with the closing zero.
	if len(path) > 107 {
		return nil, fmt.Errorf("listen %s: the path has %d bytes: want at most 107; pass a shorter %s", path, len(path), flag)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen %s: %w; pass another %s", path, err, flag)
	}
	lis, err := cfg.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w; pass another %s", path, err, flag)
	}
	if _, ok := lis.(*net.UnixListener); ok { // not one in memory
		if err := os.Chmod(path, 0o666); err != nil {
			return nil, errors.Join(fmt.Errorf("listen %s: %w", path, err), lis.Close())
		}
	}
	return lis, nil
}

// holderOf returns " by pid N (NAME)" of the process that listens on a TCP address, as far as proc
// shows it to this user; empty otherwise.
func holderOf(addr, proc string) string {
	_, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return ""
	}
	inodes := append(listening(filepath.Join(proc, "net/tcp"), uint16(port)), listening(filepath.Join(proc, "net/tcp6"), uint16(port))...)
	if len(inodes) == 0 {
		return ""
	}
	links, _ := filepath.Glob(filepath.Join(proc, "[0-9]*/fd/*"))
	for _, link := range links {
		target, err := os.Readlink(link)
		if err != nil {
			continue
		}
		inode, ok := strings.CutPrefix(target, "socket:[")
		if !ok || !slices.Contains(inodes, strings.TrimSuffix(inode, "]")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(link))))
		if err != nil {
			continue
		}
		return " by pid " + strconv.Itoa(pid) + nameOf(pid, proc)
	}
	return " by a process of another user"
}

// listening reads the inodes of the sockets that listen on a port from a table in the form of
// proc(5): local address in the second field, state in the fourth, inode in the tenth.
func listening(path string, port uint16) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []string
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 10 || fields[3] != "0A" { // TCP_LISTEN
			continue
		}
		_, portHex, _ := strings.Cut(fields[1], ":")
		b, err := hex.DecodeString(portHex)
		if err == nil && len(b) == 2 && uint16(b[0])<<8|uint16(b[1]) == port {
			out = append(out, fields[9])
		}
	}
	return out
}

func nameOf(pid int, proc string) string {
	b, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "comm"))
	if err != nil {
		return ""
	}
	return " (" + strings.TrimSpace(string(b)) + ")"
}
