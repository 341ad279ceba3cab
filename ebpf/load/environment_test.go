package load

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// elsewhere runs a role in namespaces of its own, or as another user, and returns what it printed.
func elsewhere(t *testing.T, what string, attr *syscall.SysProcAttr, args ...string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), role+"="+what)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", what, err, out)
	}
	return strings.TrimSpace(string(out))
}

// roles in an environment of their own; each prints what it found.
var roles = map[string]func() error{
	"check": func() error {
		err := Check()
		_, ok := errors.AsType[*Unsupported](err)
		fmt.Println(ok, err)
		for _, h := range Probe() {
			if h.On || h.Why != err.Error() {
				return fmt.Errorf("hook %s: on %v, why %q", h.Name, h.On, h.Why)
			}
		}
		return nil
	},
	// No bpf file system, then two starts at once.
	"mount": func() error {
		for unix.Unmount(BPFFS, 0) == nil {
		}
		if onBPFFS(BPFFS) {
			return errors.New("still mounted")
		}
		var wg sync.WaitGroup
		var faults [2]error
		for i := range faults {
			wg.Go(func() { faults[i] = EnsureBPFFS("") })
		}
		wg.Wait()
		if err := errors.Join(faults[:]...); err != nil {
			return err
		}
		info, err := os.ReadFile("/proc/self/mountinfo")
		fmt.Println(onBPFFS(BPFFS), strings.Count(string(info), " "+BPFFS+" "))
		return err
	},
	"nocgroup": func() error {
		for {
			mnt, err := FindCgroup2()
			if err != nil {
				_, ok := errors.AsType[*Unsupported](err)
				fmt.Println(ok, err)
				return nil
			}
			if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
				return err
			}
		}
	},
	// A cgroup namespace, as in a container: the upper levels cannot be seen.
	"levels": func() error {
		dir := os.Args[1]
		if err := unix.Mount("cgroup2", dir, "cgroup2", 0, ""); err != nil {
			return err
		}
		mnt, err := FindCgroup2()
		if err != nil {
			return err
		}
		level, err := cgroupLevel(filepath.Join(mnt, "a", "b"))
		fmt.Println(mnt == dir, level)
		return err
	},
}

func TestWithoutPrivileges(t *testing.T) {
	needKernel(t)
	// The binary lies where only root may look: it is started by its open file.
	got := elsewhere(t, "check", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	if want := "true eBPF is not available: missing CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON; run as root"; !strings.HasPrefix(got, want) {
		t.Errorf("Check as nobody: %q, want %q", got, want)
	}
}

func TestBPFFSIsMountedOnce(t *testing.T) {
	needKernel(t)
	if got := elsewhere(t, "mount", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}); got != "true 1" {
		t.Errorf("mounted, times: %q, want %q", got, "true 1")
	}
}

func TestWithoutCgroup2(t *testing.T) {
	needKernel(t)
	got := elsewhere(t, "nocgroup", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS})
	if want := "true eBPF is not available: missing a cgroup2 mount"; !strings.HasPrefix(got, want) {
		t.Errorf("FindCgroup2: %q, want %q", got, want)
	}
}

func TestLevelsInACgroupNamespace(t *testing.T) {
	r := newRoom(t)
	if err := os.Mkdir(r.cfg.Cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(r.cfg.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	got := elsewhere(t, "levels", &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWCGROUP,
	}, t.TempDir())
	// The managed cgroup of this room is at level 1, its a/b at 3.
	if got != "true 3" {
		t.Errorf("the mount of the namespace found, level: %q, want %q", got, "true 3")
	}
}
