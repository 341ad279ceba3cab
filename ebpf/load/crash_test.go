package load

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// An agent that is killed at any moment of its start leaves programs that judge as before, and pins
// that the next start completes. Each step is one real SIGKILL of a process.
func TestKilledAtEveryStep(t *testing.T) {
	for name, tc := range map[string]struct{ first, second string }{
		"first start":    {"", "1"},
		"restart":        {"1", "1"},
		"another layout": {"1", "2"},
	} {
		t.Run(name, func(t *testing.T) {
			steps := 0
			for ; ; steps++ {
				if whole := killedAt(t, tc.first, tc.second, steps); whole {
					break
				}
			}
			t.Logf("killed at each of %d steps", steps)
			if steps < 5 {
				t.Errorf("only %d steps", steps)
			}
		})
	}
}

// killedAt lets a process die at one step, looks, and starts another. It reports that there was no such
// step any more.
func killedAt(t *testing.T, first, second string, step int) (whole bool) {
	r := newRoom(t)
	if first != "" {
		r.open(r.with(first), version(16)).Close()
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"=opener", fmt.Sprintf("INLAY_LOAD_ARGS=%s,%s,%s,%d", r.cfg.Cgroup, r.cfg.Pin, second, step))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	died := strings.TrimSpace(string(out))
	if whole = died == "whole"; whole != (err == nil) {
		t.Fatalf("step %d: %q, %v", step, died, err)
	}
	if first != "" {
		if dials, wrong := r.once(); wrong != 0 {
			t.Errorf("killed before %q: %d of %d dials judged wrong", died, wrong, dials)
		}
	}
	r.open(r.with(second), version(18)).Close()
	r.check(second, 18)
	for _, at := range []ebpf.AttachType{ebpf.AttachCGroupSockOps, ebpf.AttachCGroupInet4Connect} {
		if n := r.attached(at); n != 1 {
			t.Errorf("killed before %q: %d programs at %v after the next start, want 1", died, n, at)
		}
	}
	for _, path := range tree(t, r.cfg.Pin) {
		if strings.HasSuffix(path, fresh) || path != "" && !strings.HasPrefix(path, "/v"+second) {
			t.Errorf("killed before %q: %s was left", died, path)
		}
	}
	// Not at the end of the test: there are many steps.
	if _, err := Cleanup(r.cfg.Pin); err != nil {
		t.Errorf("killed before %q: %v", died, err)
	}
	if err := os.Remove(r.cfg.Cgroup); err != nil {
		t.Error(err)
	}
	return whole
}
