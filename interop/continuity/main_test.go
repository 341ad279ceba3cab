package continuity

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/load"
)

// Variables between the processes of these tests.
const (
	roleVariable   = "CONTINUITY_ROLE"   // what a program of the mesh does
	prefixVariable = "CONTINUITY_PREFIX" // of the names of cgroups; set within the own namespace
)

func TestMain(m *testing.M) {
	// A program built with the race detector sleeps a second before it exits. It still reports what it
	// saw.
	if os.Getenv("GORACE") == "" {
		_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // fails only for a bad name
	}
	if role := os.Getenv(roleVariable); role != "" {
		if err := play(role); err != nil {
			say(report{Kind: "error", Text: err.Error()})
			os.Exit(1)
		}
		return
	}
	if os.Getenv(prefixVariable) != "" {
		if err := loopbackUp(); err != nil {
			fmt.Fprintln(os.Stderr, "continuity: loopback:", err)
			os.Exit(1)
		}
		code := m.Run()
		removeBinaries()
		os.Exit(code)
	}
	if os.Geteuid() != 0 || load.Check() != nil {
		os.Exit(m.Run()) // each test says why it cannot run
	}
	os.Exit(within())
}

// within runs the tests in a network namespace of their own, ends what they left, and returns their
// exit code; it is not 0 when anything of theirs was left.
func within() int {
	id := make([]byte, 4)
	_, _ = rand.Read(id) // never fails (crypto/rand)
	prefix := "inlay-test-" + hex.EncodeToString(id)
	// What the tests leave becomes a child of this process, which ends it.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "continuity: child subreaper:", err)
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), prefixVariable+"="+prefix)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "continuity: a network namespace of its own:", err)
		return 1
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended meanwhile
		}
	}()
	code := 0
	if err := cmd.Wait(); err != nil {
		code = 1
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			fmt.Fprintln(os.Stderr, "continuity:", err)
		}
	}
	left := append(endOrphans(), removeLeft(prefix)...)
	if len(left) > 0 {
		fmt.Fprintf(os.Stderr, "continuity: the tests left behind, and it was removed:\n  %s\n", strings.Join(left, "\n  "))
		return 1
	}
	return code
}

// endOrphans waits for the children of this process, and theirs: a DNS proxy that was told to stop has said
// so a moment before it ends. Those that are there after that are killed, and named.
func endOrphans() (left []string) {
	began := time.Now()
	for {
		var ws syscall.WaitStatus
		switch pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil); {
		case errors.Is(err, syscall.ECHILD):
			return left
		case err == nil && pid > 0:
			continue // one that had ended
		}
		if took := time.Since(began); took > 10*time.Second {
			return append(left, "children of this process that SIGKILL does not end")
		} else if took > 3*time.Second {
			left = append(left, killChildren()...)
		}
		<-time.After(20 * time.Millisecond) // to end takes its time
	}
}

// killChildren kills the children of this process and names them.
func killChildren() (names []string) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
	if err != nil {
		return []string{err.Error()}
	}
	for _, child := range strings.Fields(string(raw)) {
		pid, err := strconv.Atoi(child)
		if err != nil {
			continue
		}
		if line, _ := os.ReadFile(filepath.Join("/proc", child, "cmdline")); len(line) > 0 { // else a zombie
			names = append(names, "process "+child+": "+strings.ReplaceAll(string(line), "\x00", " "))
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	return names
}

// removeLeft removes pins and cgroups of a prefix and names them.
func removeLeft(prefix string) (left []string) {
	mnt, err := load.FindCgroup2()
	if err != nil {
		return []string{err.Error()}
	}
	pins, _ := filepath.Glob(filepath.Join(load.BPFFS, "inlay-"+prefix+"*"))
	for _, pin := range pins {
		_, err := load.Cleanup(pin)
		left = append(left, fmt.Sprintf("pins %s (%v)", pin, err))
	}
	roots, _ := filepath.Glob(filepath.Join(mnt, prefix+"*"))
	for _, root := range roots {
		_ = os.WriteFile(filepath.Join(root, "cgroup.kill"), []byte("1"), 0)
		left = append(left, fmt.Sprintf("cgroup %s (%v)", root, removeCgroup(root)))
	}
	return left
}

// removeCgroup removes a cgroup and those in it, once they are empty.
func removeCgroup(path string) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		children, _ := filepath.Glob(filepath.Join(path, "*/"))
		for _, c := range children {
			if st, err := os.Stat(c); err == nil && st.IsDir() {
				_ = removeCgroup(c)
			}
		}
		err := os.Remove(path)
		if err == nil || errors.Is(err, os.ErrNotExist) || time.Now().After(deadline) {
			return err
		}
		<-time.After(10 * time.Millisecond) // the kernel lets go of the processes
	}
}

// loopbackUp brings up the one interface of a new network namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return err
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}
