package continuity

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/load"
)

// The control plane stops, then is gone: addresses, policies and names go on, also over a restart of the
// agent, which says how old what it knows is. Then the machine begins anew with no control
// plane: what is on disk serves, for programs that live and for new ones.
func TestControlPlaneAway(t *testing.T) {
	w := newWorld(t)
	began := time.Now()
	w.startProbes(100)
	age := func() time.Duration {
		t.Helper()
		a := w.agent()
		if a.ConfigAge == nil {
			return -1
		}
		return a.ConfigAge.AsDuration()
	}
	if got := age(); got < 0 || got > 5*time.Second {
		t.Errorf("the configuration is %v old while the control plane is there", got)
	}

	// A change is on disk 5 s after it was told (ebpf, cacheDebounce).
	known := time.Now()
	w.eventually("what is known on disk", func() bool {
		st, err := os.Stat(filepath.Join(w.state, "node.xds"))
		return err == nil && st.Size() > 0 && time.Since(known) > 6*time.Second
	})

	w.cp.signal(syscall.SIGSTOP)
	w.progress(20)
	w.cp.kill()
	killed := time.Now()
	w.eventually("a configuration of more than 3 s", func() bool { return age() > 3*time.Second })
	told, ok := w.metric("inlay_config_age_seconds")
	t.Logf("gone for %v: GetAgent says %v, the metric %.1f s", time.Since(killed).Round(time.Millisecond), age().Round(time.Millisecond), told)
	if !ok || told < 3 || told > age().Seconds()+1 {
		t.Errorf("metric inlay_config_age_seconds %v, %v: want that of GetAgent, %v", told, ok, age())
	}
	w.progress(20)

	before := age()
	w.node.kill()
	w.startNode(versionA).ready()
	if got := age(); got < before {
		t.Errorf("after a restart of the agent the configuration is %v old, before it was %v: nobody confirmed it", got, before)
	}
	w.progress(20)
	w.conclude(began)
	w.settled()

	// As after a reboot: nothing is pinned, no proxy runs, what is known lies on disk.
	w.node.kill()
	if err := syscall.Kill(w.names().PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := load.Cleanup(w.pin()); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(w.pin(), "v*")); len(left) > 0 {
		t.Fatalf("pins are left: %v", left)
	}
	started := w.startNode(versionA).ready()
	a := w.agent()
	t.Logf("cold start without a control plane in %v: %d services, configuration %v old", started.Round(time.Millisecond), a.Services, age().Round(time.Millisecond))
	if a.Services < 3 || age() < before {
		t.Errorf("cold start: %d services, configuration %v old: want those of before, older than %v", a.Services, age(), before)
	}
	// New programs of services that it knows; guarded, forbidden and echo are older than the programs of
	// the kernel.
	old := map[string]report{"guarded": w.ask(w.guarded), "echo": w.ask(w.echo)}
	w.startClient(w.clientProbes(50))
	w.startStranger(w.strangerProbes(20))
	w.progress(20)
	client, stranger := w.finish(w.client), w.finish(w.stranger)
	for name, c := range client.Probes {
		t.Logf("cold: %s: %d tries, %d went well, errors %v", name, c.Tries, c.OK, c.Errors)
		if c.OK == 0 || c.failed() > 0 {
			t.Errorf("cold: client: probe %s: %d of %d tries failed: %v", name, c.failed(), c.Tries, c.Errors)
		}
	}
	for name, c := range stranger.Probes {
		t.Logf("cold: %s: %d tries, %d went well, errors %v", name, c.Tries, c.OK, c.Errors)
		for why, n := range c.Errors {
			if strings.HasPrefix(why, "connected") {
				c.OK += n
			}
		}
		if c.OK > 0 || c.Tries == 0 {
			t.Errorf("cold: stranger: probe %s: %d of %d connections came to be: %v", name, c.OK, c.Tries, c.Errors)
		}
	}
	if got, want := w.ask(w.guarded).Served["accepted"]-old["guarded"].Served["accepted"], client.Probes["allowed"].OK+1; got != want {
		t.Errorf("cold: guarded accepted %d, want %d", got, want)
	}
	if n := w.ask(w.forbidden).Served["accepted"]; n > 0 {
		t.Errorf("cold: forbidden accepted %d", n)
	}

	// It comes back.
	w.startControlPlane()
	w.eventually("a confirmed configuration", func() bool { g := age(); return g >= 0 && g < 2*time.Second })
}
