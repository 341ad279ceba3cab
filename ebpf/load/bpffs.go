package load

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// BPFFS is where pins are, unless an operator names another directory of a bpf file system.
const BPFFS = "/sys/fs/bpf"

// ErrBusy means that another agent holds the pin directory.
var ErrBusy = errors.New("another agent holds the pins")

// PinDir returns the pin directory of a managed cgroup: BPFFS/inlay for the default one (or ""), else
// BPFFS/inlay-NAME. It creates nothing.
func PinDir(cgroup string) (string, error) {
	mnt, err := FindCgroup2()
	if err != nil {
		return "", err
	}
	root, err := resolveCgroup(mnt, cgroup)
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(mnt, root)
	if err != nil {
		return "", fmt.Errorf("pin directory of %s: %w", root, err)
	}
	if rel == DefaultRoot {
		return filepath.Join(BPFFS, DefaultRoot), nil
	}
	return filepath.Join(BPFFS, DefaultRoot+"-"+rootName(rel)), nil
}

// EnsureBPFFS makes sure that dir (empty means [BPFFS]) lies on a bpf file system, which it mounts at
// [BPFFS] when that is missing. It does not create dir. A directory elsewhere that is on another
// file system is refused: nothing can be pinned there.
func EnsureBPFFS(dir string) error {
	if dir == "" {
		dir = BPFFS
	}
	if onBPFFS(dir) {
		return nil
	}
	if dir != BPFFS && !strings.HasPrefix(dir, BPFFS+"/") {
		return fmt.Errorf("pin directory %s: not on a bpf file system: want a directory below %s, or mount one there: mount -t bpf bpf DIR", dir, BPFFS)
	}
	// Two agents that start together must not mount one over the other: who has the lock of the
	// directory below mounts, the other finds it mounted.
	under, err := os.Open(BPFFS)
	if err != nil {
		return &Unsupported{Missing: "the bpf file system", Found: "no " + BPFFS, Remedy: "mount sysfs: mount -t sysfs sysfs /sys", Err: err}
	}
	defer under.Close()
	if err := unix.Flock(int(under.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", BPFFS, err)
	}
	if onBPFFS(dir) {
		return nil
	}
	if err := unix.Mount("bpf", BPFFS, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RELATIME, "mode=0700"); err != nil {
		return &Unsupported{
			Missing: "the bpf file system", Found: BPFFS + " is not mounted and mounting it failed",
			Remedy: "mount it as root: mount -t bpf bpf " + BPFFS, Err: err,
		}
	}
	return nil
}

// onBPFFS reports whether dir, or the nearest directory above it that exists, is on a bpf file system.
func onBPFFS(dir string) bool {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return uint32(st.Type) == unix.BPF_FS_MAGIC
		}
		if !errors.Is(err, unix.ENOENT) || dir == "/" {
			return false
		}
		dir = filepath.Dir(dir)
	}
}

// lockPins takes the pin directory for this process. The lock goes with the process, however it ends.
func lockPins(pin string) (*os.File, error) {
	f, err := os.Open(pin)
	if err != nil {
		return nil, fmt.Errorf("pin directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("pin directory %s: %w: stop it first, or choose another cgroup", pin, ErrBusy)
		}
		return nil, fmt.Errorf("lock pin directory %s: %w", pin, err)
	}
	return f, nil
}

// layoutDirs returns the names of the layouts pinned in pin ("v1"), sorted.
func layoutDirs(pin string) ([]string, error) {
	entries, err := os.ReadDir(pin)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), "v") {
			dirs = append(dirs, e.Name())
		}
	}
	return dirs, nil
}
