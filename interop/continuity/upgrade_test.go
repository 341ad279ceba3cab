package continuity

import (
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/load"
)

// Five upgrades, each as an init system does it: the old agent ends, the new one starts. One of them
// has another layout of its maps, and the next one goes back. No denied connection passes, no
// allowed one fails, the long one lives, and no query is lost while the DNS proxy is replaced as well.
func TestUpgradedAgent(t *testing.T) {
	need(t)
	versions := []string{versionB, versionA, versionLayout, versionB, versionA}
	for _, v := range versions {
		inlay(t, v) // building takes the processors
	}
	w := newWorld(t)
	began := time.Now()
	w.startProbes(100)
	first := w.names().PID
	pids := []int{first}
	var carried uint64 // refusals counted before the first change of layout
	for i, v := range versions {
		last := w.settled()
		if v == versionLayout {
			carried = w.counters()[uint32(bpfobj.InlayCounterCOUNT_DENIED_EGRESS)]
		}
		at := time.Now()
		w.node.signal(syscall.SIGTERM)
		w.node.wait()
		ended := time.Since(at)
		started := w.startNode(v).ready()
		w.eventually("a DNS proxy of version "+v, func() bool { return w.names().Version == "continuity-"+v })
		pids = append(pids, w.names().PID)
		t.Logf("upgrade %d to version %s: it ended in %v, started in %v, the DNS proxy followed after %v; before: made %d, kept %d, lost %d",
			i+1, v, ended.Round(time.Millisecond), started.Round(time.Millisecond), time.Since(at).Round(time.Millisecond), last.Made, last.Kept, last.Lost)
		want := []string{filepath.Join(w.pin(), "v"+load.Layout)}
		if v == versionLayout {
			want = []string{filepath.Join(w.pin(), otherLayoutDir)}
		}
		if got, err := filepath.Glob(filepath.Join(w.pin(), "v*")); err != nil || !slices.Equal(got, want) {
			t.Errorf("version %s: pins of %v, %v: want %v", v, got, err, want)
		}
		if a := w.agent(); a.Version != "continuity-"+v {
			t.Errorf("the agent is version %q, want %q", a.Version, "continuity-"+v)
		}
		w.settled() // made = kept + lost, of the new ring too
		w.progress(25)
	}
	slices.Sort(pids)
	if n := len(slices.Compact(pids)); n != len(versions)+1 {
		t.Errorf("%d processes answered names, want %d: one a version", n, len(versions)+1)
	}
	seen := w.conclude(began).stranger.Probes["egress"].Tries
	// Counters go on, but for what old programs counted in the moment of a change of layout.
	if n := w.counters()[uint32(bpfobj.InlayCounterCOUNT_DENIED_EGRESS)]; n < carried || int64(n) > seen {
		t.Errorf("refusals at egress: the kernel counted %d, %d before the change of layout; the stranger saw %d", n, carried, seen)
	} else {
		t.Logf("refusals at egress: the stranger saw %d, counted over two changes of layout: %d", seen, n)
	}
	a := w.settled()
	t.Logf("records since the last change of layout: made %d = kept %d + lost %d", a.Made, a.Kept, a.Lost)
	if a.Made == 0 || a.Lost != 0 {
		t.Errorf("records: made %d, lost %d: want some, and none lost", a.Made, a.Lost)
	}
}

// An upgrade with a program that the kernel refuses ends with one line, and what was attached serves on.
func TestRefusedUpgrade(t *testing.T) {
	need(t)
	inlay(t, versionRefused)
	w := newWorld(t)
	began := time.Now()
	w.startProbes(100)
	w.node.signal(syscall.SIGTERM)
	w.node.wait()
	refused := w.startNode(versionRefused)
	refused.wait()
	failed, ok := errors.AsType[*exec.ExitError](refused.err)
	said := strings.Join(last(refused.errLines(), 5), "\n")
	if !ok || failed.ExitCode() != 3 || !strings.Contains(said, "connect4") {
		t.Errorf("the refused version ended with %v:\n%s\nwant exit code 3 and the hook connect4", refused.err, said)
	}
	t.Logf("refused: %v: %s", refused.err, said)
	w.progress(20) // without an agent
	w.startNode(versionA).ready()
	w.progress(20)
	w.conclude(began)
	w.settled()
}
