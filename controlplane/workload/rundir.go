package workload

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Names of the files in the run directory.
const (
	// WorkloadSocket serves the SPIFFE Workload API.
	WorkloadSocket = "workload.sock"
	// NodeSocket serves inlay.node.v1.Node.
	NodeSocket = "node.sock"
	lockFile   = "node.lock"
)

// maxSocketPath is what fits into sun_path with its closing zero (unix(7): 108 bytes).
const maxSocketPath = 107

// runDir is the node's directory, held by a lock until Close.
type runDir struct {
	path string
	lock *os.File
}

// openRunDir creates the directory when it is missing, checks that nobody else can put sockets
// there, and takes its lock. The kernel gives a lock up when its process ends, however it ends.
func openRunDir(path string) (*runDir, error) {
	if n := len(filepath.Join(path, WorkloadSocket)); n > maxSocketPath {
		return nil, fmt.Errorf("node: socket path %s has %d bytes: want at most %d: choose a shorter --run-dir", filepath.Join(path, WorkloadSocket), n, maxSocketPath)
	}
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, fmt.Errorf("node: run directory: %w: choose another --run-dir", err)
		}
		// Whatever the umask is: programs of other users must reach the sockets.
		if err := os.Chmod(path, 0o755); err != nil {
			return nil, fmt.Errorf("node: run directory: %w", err)
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("node: run directory: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("node: run directory %s: it is a file: choose another --run-dir", path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != uint32(os.Geteuid()) {
		return nil, fmt.Errorf("node: run directory %s belongs to user %d: want %d: run: chown %d %s", path, st.Uid, os.Geteuid(), os.Geteuid(), path)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return nil, fmt.Errorf("node: run directory %s: permissions %04o let others put sockets there: want 0755: run: chmod 755 %s", path, perm, path)
	}
	lock, err := os.OpenFile(filepath.Join(path, lockFile), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("node: %w: choose a --run-dir that can be written", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("a node runs already, pid %s, in %s: stop it first, or choose another --run-dir", holder(lock), path)
		}
		return nil, fmt.Errorf("node: lock %s: %w", lock.Name(), err)
	}
	if err := writePID(lock); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("node: write %s: %w", lock.Name(), err)
	}
	return &runDir{path: path, lock: lock}, nil
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// holder reads who holds the lock.
func holder(f *os.File) string {
	raw, _ := io.ReadAll(io.NewSectionReader(f, 0, 32))
	if pid, err := strconv.Atoi(strings.TrimSpace(string(raw))); err == nil {
		return strconv.Itoa(pid)
	}
	return "unknown"
}

// listen opens a socket that every local user may connect to. What is left of a dead node is
// removed: the lock says that no live one has it.
func (d *runDir) listen(name string) (net.Listener, error) {
	path := filepath.Join(d.path, name)
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("node: %s is in the way and is no socket: move it away", path)
	case err == nil:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("node: socket of a dead node: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("node: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("node: %w", err)
	}
	return l, nil
}

// Close gives the directory to the next node.
func (d *runDir) Close() error { return d.lock.Close() }
