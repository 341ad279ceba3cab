package proxy_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

func TestEnsure(t *testing.T) {
	t.Parallel()
	c := child{Socket: socketPath(t), Version: "1"}
	stopAfter(t, c.Socket)
	first := ensure(t, c)
	if again := ensure(t, c); again != first {
		t.Errorf("process %d was started beside %d", again, first)
	}
	if sid, err := unix.Getsid(first); err != nil || sid != first {
		t.Errorf("session %d, %v: want the process's own, %d", sid, err, first)
	}
	t.Run("older is another version too", func(t *testing.T) {
		c := c
		c.Version = "0"
		pid := ensure(t, c)
		if pid == first {
			t.Error("the newer one serves on")
		}
		first = pid
	})
	t.Run("another suffix", func(t *testing.T) {
		c := c
		c.Suffix = "inside"
		cfg := ensureConfig(t, c)
		cfg.Suffix = ".Inside."
		pid, err := proxy.Ensure(t.Context(), cfg)
		if err != nil || pid == first {
			t.Fatalf("%d, %v: want a new process", pid, err)
		}
		first = pid
	})
	t.Run("dead", func(t *testing.T) {
		fd, err := unix.PidfdOpen(first, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10000); err != nil {
			t.Fatal(err)
		}
		pid := ensure(t, c)
		if pid == first {
			t.Error("the dead is said to live")
		}
	})
	t.Run("a command that fails", func(t *testing.T) {
		for what, tc := range map[string]struct {
			command []string
			want    string
		}{
			"its last words are told": {[]string{"/bin/sh", "-c", "echo first; echo no such map >&2; exit 3"}, "exit status 3: no such map"},
			"it does not exist":       {[]string{"/nonexistent/inlay"}, "no such file"},
			"it is not given":         {nil, "no command"},
		} {
			_, err := proxy.Ensure(t.Context(), proxy.EnsureConfig{Command: tc.command, Socket: socketPath(t), Version: "1"})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v: want %q", what, err, tc.want)
			}
		}
	})
	t.Run("a command that serves another version", func(t *testing.T) {
		c := child{Socket: socketPath(t), Version: "7"}
		stopAfter(t, c.Socket)
		cfg := ensureConfig(t, c)
		cfg.Version, cfg.Wait = "8", 3*time.Second
		if _, err := proxy.Ensure(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), `version "7"`) {
			t.Errorf("%v: want an error that names both versions", err)
		}
	})
}

// TestEnsureAtOnce: agents that start together leave one proxy.
func TestEnsureAtOnce(t *testing.T) {
	t.Parallel()
	c := child{Socket: socketPath(t), Version: "1"}
	stopAfter(t, c.Socket)
	cfg := ensureConfig(t, c)
	var wg sync.WaitGroup
	var pids sync.Map
	for range 3 {
		wg.Go(func() {
			pid, err := proxy.Ensure(t.Context(), cfg)
			if err != nil {
				t.Error(err)
			}
			pids.Store(pid, true)
		})
	}
	wg.Wait()
	st, err := proxy.Ask(t.Context(), c.Socket)
	if err != nil {
		t.Fatal(err)
	}
	pids.Range(func(pid, _ any) bool {
		if pid != st.PID {
			t.Errorf("process %d was started too, %d answers", pid, st.PID)
		}
		return true
	})
	if s := got(ask(t, "udp", st.Addresses[0], question("orders.", dns.TypeA))); s != "NOERROR 198.18.0.1" {
		t.Error(s)
	}
}

// TestEnsureHung: a proxy that lives and answers nothing is not taken for a dead one.
func TestEnsureHung(t *testing.T) {
	t.Parallel()
	c := child{Socket: socketPath(t), Version: "1"}
	pid := ensure(t, c)
	stopAfter(t, c.Socket)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	})
	for running := true; running; { // until the signal has reached every thread
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil || len(threads) == 0 {
			t.Fatalf("process %d: %d threads, %v", pid, len(threads), err)
		}
		running = slices.ContainsFunc(threads, func(path string) bool {
			b, err := os.ReadFile(path)
			return err == nil && !strings.Contains(string(b), "State:\tT")
		})
	}
	if _, err := proxy.Ensure(t.Context(), ensureConfig(t, c)); err == nil || !strings.Contains(err.Error(), "lives and does not answer") {
		t.Errorf("%v: want an error that says what to do", err)
	}
}
