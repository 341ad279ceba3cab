package continuity

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// staleAfter is the age at which a heartbeat of the DNS proxy no longer counts.
const staleAfter = 2 * time.Second

// The DNS proxy is killed. Names outside of the mesh come from the machine's own resolver once its
// heartbeat is stale, also while no agent can start another; names of the mesh as soon as one runs.
func TestKilledNames(t *testing.T) {
	w := newWorld(t)
	began := time.Now()
	all := w.clientProbes(100)
	all = slices.DeleteFunc(all, func(p probe) bool { return !strings.HasPrefix(p.Kind, "dns") })
	for i := range all {
		all[i].Rate = 100
	}
	all = append(all, probe{
		Name: "other-name-tcp", Kind: "dns-tcp", Target: []string{w.resolver.addr}, Question: outsideName, Want: outsideAddr, Rate: 50,
	})
	w.startClient(all)
	asked := func(n int64) {
		t.Helper()
		before := w.ask(w.client)
		w.eventually("more answers", func() bool {
			now := w.ask(w.client)
			for name, c := range now.Probes {
				if c.OK < before.Probes[name].OK+n {
					return false
				}
			}
			return true
		})
	}
	asked(20)
	if n := w.names().Queries; n == 0 {
		t.Fatal("the proxy was asked nothing: names do not come by it")
	}

	// The agent lives: it starts another.
	first := w.names()
	killed := time.Now()
	kill := func(pid int) {
		t.Helper()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	kill(first.PID)
	restarted := w.eventually("another DNS proxy", func() bool { return w.names().PID != first.PID })
	asked(50)
	t.Logf("killed at %v; another one answers after %v", killed.Sub(began).Round(time.Millisecond), restarted.Round(time.Millisecond))

	// Nobody starts another: the agent stands still.
	second := w.names()
	before := w.resolver.times("guarded.default.mesh")
	w.node.signal(syscall.SIGSTOP)
	alone := time.Now()
	kill(second.PID)
	w.eventually("answers of the machine's own resolver about a name of the mesh", func() bool {
		return w.resolver.times("guarded.default.mesh") > before && time.Since(alone) > 3*time.Second
	})
	w.node.signal(syscall.SIGCONT)
	resumed := time.Now()
	third := w.eventually("a third DNS proxy", func() bool { p := w.names().PID; return p != first.PID && p != second.PID })
	asked(50)

	r := w.finish(w.client)
	// A query that was on its way when the proxy was killed may be lost too.
	const onItsWay = 250 * time.Millisecond
	rounds := []struct {
		what string
		from time.Time
		mesh time.Duration // after which names of the mesh are there again
	}{
		{"the agent starts another", killed, restarted},
		{"nobody starts another", alone, resumed.Sub(alone) + third},
	}
	for _, name := range []string{"other-name", "other-name-tcp", "mesh-name", "mesh-name-tcp"} {
		c := r.Probes[name]
		if len(c.Fails) == maxFails {
			t.Fatalf("%s: more than %d queries failed: %v", name, maxFails, c.Errors)
		}
		mesh := strings.HasPrefix(name, "mesh")
		lost, longest := make([]int, len(rounds)), make([]time.Duration, len(rounds))
		elsewhere := 0 // answers about the mesh by the machine's own resolver
		for _, f := range c.Fails {
			excused := false
			for i, round := range slices.Backward(rounds) { // the second begins within the limit of the first
				// What began while the heartbeat counted went to nobody. A second more for a machine with
				// other things to do.
				limit := staleAfter
				if mesh {
					limit = max(limit, round.mesh)
				}
				since := time.Unix(0, f.At).Sub(round.from)
				if since < -onItsWay || since > limit+time.Second {
					continue
				}
				excused = true
				lost[i]++
				longest[i] = max(longest[i], since)
				if f.Why == "RCodeNameError" && i == 1 {
					elsewhere++
				}
				break
			}
			if !excused {
				t.Errorf("%s: a query failed %v after the first kill, %v after the second: %s",
					name, time.Unix(0, f.At).Sub(killed), time.Unix(0, f.At).Sub(alone), f.Why)
			}
		}
		for i, round := range rounds {
			t.Logf("%s, while %s: %d failed, the last began %v after the kill", name, round.what, lost[i], longest[i].Round(time.Millisecond))
		}
		t.Logf("%s: %d queries, %d failed: %v", name, c.Tries, c.failed(), c.Errors)
		if mesh && elsewhere == 0 {
			t.Errorf("%s: the machine's own resolver answered none of %v", name, c.Errors)
		}
	}
}
