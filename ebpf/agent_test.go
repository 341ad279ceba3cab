package ebpf

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/tables"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

var billing = Admission{RunID: "r1", Namespace: "default", Service: "billing", Version: "v2", Labels: map[string]string{"tier": "back"}, UID: 1000}

func TestConfigIsChecked(t *testing.T) {
	good := Config{RunDir: "/r", StateDir: "/s", ControlPlane: "/c"}
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no run directory":             {func(c *Config) { c.RunDir = "" }, "RunDir"},
		"no state directory":           {func(c *Config) { c.StateDir = "" }, "StateDir"},
		"no control plane":             {func(c *Config) { c.ControlPlane = "" }, "ControlPlane"},
		"negative grace":               {func(c *Config) { c.Grace = -1 }, "grace"},
		"metrics for everybody":        {func(c *Config) { c.Metrics = "0.0.0.0:15090" }, "loopback"},
		"metrics on all addresses":     {func(c *Config) { c.Metrics = ":15090" }, "loopback"},
		"metrics without a port":       {func(c *Config) { c.Metrics = "127.0.0.1" }, "HOST:PORT"},
		"metrics on another's address": {func(c *Config) { c.Metrics = "example.com:80" }, "loopback"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			tc.change(&cfg)
			if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("New: %v, want an error about %s", err, tc.want)
			}
		})
	}
	for _, m := range []string{"", "off", "127.0.0.1:0", "[::1]:9", "localhost:9"} {
		cfg := good
		cfg.Metrics = m
		if _, err := New(cfg); err != nil {
			t.Errorf("metrics %q: %v", m, err)
		}
	}
}

func TestServicesAndPoliciesReachTheTable(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.set(service("orders"), service("cart"), policies("billing"), policies("other"))
	cp.start()
	defer cp.stop()
	a := run(t, testConfig(t, cp, clock), k.rooms())
	k.until(t, "services, pruned", func() bool { return len(k.services) == 2 && k.prunes == 1 })
	if k.is(func() bool { return len(k.policies) != 0 }) {
		t.Error("policies without a workload")
	}
	cp.until(t, "the agent's name", func() bool { return slices.Equal(cp.agents, []string{"inlay-node"}) })
	if _, err := a.Admit(t.Context(), billing); err != nil {
		t.Fatal(err)
	}
	k.until(t, "its policies and no others", func() bool { return len(k.policies) == 1 && k.policies["default/billing"] != nil })
	cp.remove(ServiceType, "default/cart")
	k.until(t, "the removal", func() bool { return len(k.services) == 1 })
	// The service is gone while its program runs: what held goes on to hold.
	cp.remove(PoliciesType, "default/billing")
	cp.set(service("more"))
	k.until(t, "later news", func() bool { return k.services["default/more"] != nil })
	if k.is(func() bool { return k.policies["default/billing"] == nil }) {
		t.Error("policies of a running workload went with the service")
	}
	// An invalid one changes nothing and is told.
	cp.set(service("invalid"))
	a.log.until(t, "the fault", a.log.has("service cannot be used", "default/invalid"))
}

func TestEndpointsThatAreGoneAndChangedPoliciesLeadToSweeps(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.start()
	defer cp.stop()
	cfg := testConfig(t, cp, clock)
	cfg.Grace = 3 * time.Second
	run(t, cfg, k.rooms())
	k.until(t, "start", func() bool { return k.prunes == 1 })
	gone := tables.Endpoint{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Proto: tables.TCP}
	k.do(func() { k.next = tables.Change{Gone: []tables.Endpoint{gone}} })
	cp.set(service("orders"))
	k.until(t, "the commit", func() bool { return k.services["default/orders"] != nil && len(k.next.Gone) == 0 })
	clock.until(t, "the grace", func() bool {
		return slices.ContainsFunc(clock.timers, func(x *testTimer) bool { return x.at.Sub(clock.now) == 3*time.Second })
	})
	clock.advance(2 * time.Second)
	if k.is(func() bool { return len(k.marked) != 0 }) {
		t.Error("marked before the grace")
	}
	clock.advance(time.Second)
	k.until(t, "the end of its connections", func() bool { return slices.Equal(k.marked, []tables.Endpoint{gone}) && k.sweeps > 0 })
	before := 0
	k.do(func() { before, k.next = k.sweeps, tables.Change{Subjects: []uint64{300}} })
	cp.set(service("more"))
	k.until(t, "a sweep for changed policies", func() bool { return k.sweeps > before })
	k.do(func() { before = k.sweeps })
	clock.until(t, "the next wait", func() bool {
		return slices.ContainsFunc(clock.timers, func(x *testTimer) bool { return x.at.Sub(clock.now) == sweepEvery })
	})
	clock.advance(sweepEvery)
	k.until(t, "a sweep by the clock", func() bool { return k.sweeps > before })
}

func TestAdmissionOverReconnectLeaveAndRestart(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.set(policies("billing"))
	cp.start()
	defer cp.stop()
	cfg := testConfig(t, cp, clock)
	a := run(t, cfg, k.rooms())
	path, err := a.Admit(t.Context(), billing)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(k.root, "billing.default-r1"); path != want {
		t.Errorf("cgroup %s, want %s", path, want)
	}
	w := k.workload(path)
	if w.Service != "billing" || w.Labels["version"] != "v2" || w.Labels["tier"] != "back" || w.UID != 1000 || w.Path != path {
		t.Errorf("workload in the table: %+v", w)
	}
	if len(billing.Labels) != 1 {
		t.Error("the caller's labels were written")
	}
	info, err := os.Stat(filepath.Join(cfg.StateDir, workloadsFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("state file: %v, %v: want mode 0600", info, err)
	}
	again := billing
	again.Cgroup = path
	if p, err := a.Admit(t.Context(), again); err != nil || p != path {
		t.Errorf("reconnect: %q, %v", p, err)
	}
	stolen := again
	stolen.RunID = "r2"
	if _, err := a.Admit(t.Context(), stolen); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "another's") {
		t.Errorf("another's cgroup: %v", err)
	}
	if a.log.now(a.log.has("refused")) {
		t.Error("the agent told the log of a refusal that it returned: the node tells it, with who asked")
	}

	// Processes are found by their cgroup, also below the leaf.
	for pid, line := range map[string]string{
		"10": "12:cpu:/x\n0::/inlay/billing.default-r1\n", "11": "0::/inlay/billing.default-r1/nested/deep\n",
		"12": "0::/user.slice\n", "13": "0::/inlay\n", "14": "0::/inlay/other\n", "15": "1:cpu:/inlay/billing.default-r1\n",
	} {
		dir := filepath.Join(filepath.Dir(k.root), "proc", pid)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup"), []byte(line), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for pid, want := range map[int]string{10: "r1", 11: "r1", 12: "", 13: "", 14: ""} {
		if run, ok, err := a.Find(pid); run != want || ok != (want != "") || err != nil {
			t.Errorf("Find(%d) = %q, %v, %v, want %q", pid, run, ok, err, want)
		}
	}
	for _, pid := range []int{15, 99} {
		if _, ok, err := a.Find(pid); ok || err == nil {
			t.Errorf("Find(%d): %v, %v, want an error", pid, ok, err)
		}
	}

	// A restart remembers; the registration ended meanwhile but the program runs on.
	events := filepath.Join(path, "cgroup.events")
	if err := os.WriteFile(events, []byte("populated 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	a.Leave("r1")
	a.Leave("unknown")
	a.stop()
	k.do(func() { clear(k.workloads) })
	a = run(t, cfg, k.rooms())
	if w := k.workload(path); w.Service != "billing" || w.Labels["version"] != "v2" {
		t.Errorf("after the restart: %+v", w)
	}
	clock.advance(time.Hour)
	a.reapNow(t.Context())
	if k.workload(path).Service == "" {
		t.Error("a populated cgroup was given up")
	}
	if err := os.WriteFile(events, []byte("populated 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	signal(a.reap) // the kernel's event
	k.until(t, "the workload's end", func() bool { return len(k.workloads) == 0 })
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("cgroup after the end: %v, want none", err)
	}
}

func TestUnclaimedEmptyCgroupIsKeptForAWhile(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.set(policies("billing"))
	cp.start()
	defer cp.stop()
	cfg := testConfig(t, cp, clock)
	a := run(t, cfg, k.rooms())
	path, err := a.Admit(t.Context(), billing)
	if err != nil {
		t.Fatal(err)
	}
	a.stop()
	a = run(t, cfg, k.rooms())
	clock.advance(claimWait - time.Second)
	a.reapNow(t.Context())
	if !a.cgroups.exists(path) {
		t.Fatal("gone before its time")
	}
	clock.advance(time.Second)
	signal(a.reap)
	k.until(t, "its end", func() bool { return len(k.workloads) == 0 })
}

func TestAdmitFailsWhileNobodyKnowsThePolicies(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	a := run(t, testConfig(t, cp, clock), k.rooms()) // the control plane is away
	result := make(chan error, 1)
	admit := func(ctx context.Context) { go func() { _, err := a.Admit(ctx, billing); result <- err }() }
	awaitTimer := func() {
		clock.until(t, "the wait", func() bool {
			return slices.ContainsFunc(clock.timers, func(x *testTimer) bool { return x.at.Sub(clock.now) == policyWait })
		})
	}
	admit(t.Context())
	awaitTimer()
	clock.advance(policyWait)
	if err := <-result; err == nil || !strings.Contains(err.Error(), "does not answer") || errors.Is(err, ErrRefused) {
		t.Errorf("while away: %v", err)
	}
	if k.is(func() bool { return len(k.workloads) != 0 }) {
		t.Error("a workload whose policies nobody knows was registered")
	}
	if _, err := os.Stat(filepath.Join(k.root, billing.leaf())); !os.IsNotExist(err) {
		t.Errorf("its cgroup: %v, want none", err)
	}
	// It comes, and has the service only by the registration: its policies come a moment later.
	cp.start()
	defer cp.stop()
	admit(t.Context())
	cp.until(t, "the question", func() bool { return cp.asked["default/billing"] })
	cp.set(policies("billing"))
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	k.until(t, "policies and workload", func() bool { return len(k.policies) == 1 && len(k.workloads) == 1 })
}

func TestAdmitOfAServiceWithoutAnyPolicies(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.start()
	defer cp.stop()
	a := run(t, testConfig(t, cp, clock), k.rooms())
	k.until(t, "start", func() bool { return k.prunes == 1 })
	result := make(chan error, 1)
	go func() { _, err := a.Admit(t.Context(), billing); result <- err }()
	clock.until(t, "the word that there are none", func() bool {
		return slices.ContainsFunc(clock.timers, func(x *testTimer) bool { return x.at.Sub(clock.now) == absentWait })
	})
	clock.advance(absentWait)
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestAdmitWithoutRoomIsUndone(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.set(policies("billing"))
	cp.start()
	defer cp.stop()
	k.refuseAll = true
	a := run(t, testConfig(t, cp, clock), k.rooms())
	if _, err := a.Admit(t.Context(), billing); err == nil || !strings.Contains(err.Error(), "do not hold it") {
		t.Errorf("Admit: %v", err)
	}
	if k.is(func() bool { return len(k.workloads) != 0 }) || a.cgroups.exists(filepath.Join(k.root, billing.leaf())) {
		t.Error("something was left behind")
	}
	b, err := os.ReadFile(filepath.Join(a.cfg.StateDir, workloadsFile))
	if err != nil || strings.Contains(string(b), "billing") {
		t.Errorf("state %s, %v", b, err)
	}
}

func TestColdStartFromDiskThenTheControlPlane(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.set(service("orders"), policies("billing"))
	cp.start()
	cfg := testConfig(t, cp, clock)
	a := run(t, cfg, k.rooms())
	if _, err := a.Admit(t.Context(), billing); err != nil {
		t.Fatal(err)
	}
	k.until(t, "all", func() bool { return k.prunes == 1 && len(k.policies) == 1 })
	a.stop() // the cache is written
	cp.stop()
	cp.remove(ServiceType, "default/orders")
	cp.set(service("cart"))

	k.do(func() { clear(k.services); clear(k.policies); clear(k.workloads) })
	clock.advance(time.Hour)
	prunes := 1
	a = run(t, cfg, k.rooms())
	if k.is(func() bool {
		return k.services["default/orders"] == nil || k.policies["default/billing"] == nil || len(k.workloads) != 1
	}) {
		t.Error("cold start: want the service, the policies and the workload of before")
	}
	if k.is(func() bool { return k.prunes != prunes }) {
		t.Error("pruned by what is on disk alone")
	}
	status, err := a.describe(t.Context())
	if err != nil || status.GetConfigAge().AsDuration() < time.Hour || status.GetServices() != 1 || status.GetWorkloads() != 1 {
		t.Errorf("status %v, %v: want the age of the configuration", status, err)
	}
	if _, err := a.Admit(t.Context(), billing); err != nil {
		t.Errorf("Admit by what is on disk: %v", err)
	}
	cp.start()
	defer cp.stop()
	k.until(t, "what changed meanwhile", func() bool {
		return k.services["default/cart"] != nil && k.services["default/orders"] == nil && k.prunes == prunes+1
	})
}

func TestMachineWithoutPrograms(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	k.openErr = &load.Unsupported{Missing: "CAP_BPF", Remedy: "run as root"}
	cfg := testConfig(t, cp, clock)
	a, err := newAgent(cfg, k.rooms())
	if err != nil {
		t.Fatal(err)
	}
	var lacking *load.Unsupported
	if err := a.Run(t.Context()); !errors.As(err, &lacking) {
		t.Errorf("Run: %v, want *load.Unsupported", err)
	}
	if err := a.Run(t.Context()); err == nil {
		t.Error("a second Run was accepted")
	}
	cfg.AllowUnmanaged = true
	un := run(t, cfg, k.rooms())
	if _, err := un.Admit(t.Context(), billing); err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "CAP_BPF") {
		t.Errorf("Admit: %v: want the machine's fault, not the caller's", err)
	}
	if _, ok, err := un.Find(os.Getpid()); ok || err != nil {
		t.Errorf("Find: %v, %v", ok, err)
	}
	un.Leave("r1")
}

func TestFlowsSocketIsTheOwnersAndTellsTheState(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.start()
	defer cp.stop()
	cfg := testConfig(t, cp, clock)
	path := filepath.Join(cfg.RunDir, FlowsSocket)
	stale, err := net.Listen("unix", path) // of a dead agent
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	a := run(t, cfg, k.rooms())
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("socket: %v, %v: want mode 0600", info, err)
	}
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	got, err := nodepb.NewFlowsClient(cc).GetAgent(t.Context(), &nodepb.GetAgentRequest{})
	if err != nil || got.GetVersion() != "test" || got.GetCgroup() != k.root || got.GetPin() != "/pins" {
		t.Errorf("GetAgent: %v, %v", got, err)
	}
	// A flip by another process is told within a second.
	k.do(func() { k.breakglass = true })
	clock.until(t, "the look", func() bool {
		return slices.ContainsFunc(clock.timers, func(x *testTimer) bool { return x.at.Sub(clock.now) <= time.Second })
	})
	clock.advance(time.Second)
	a.log.until(t, "the audit", a.log.has("level=WARN", "breakglass flipped", "allow_all=true"))
	if got, err = nodepb.NewFlowsClient(cc).GetAgent(t.Context(), &nodepb.GetAgentRequest{}); err != nil || !got.GetBreakglass() {
		t.Errorf("GetAgent: %v, %v: want breakglass", got, err)
	}
}

// Another user's directory, or one that others may write, is no place for the sockets and logs of root.
func TestRunDirectoryOfOthersIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"others may write": func(dir string) error { return os.Chmod(dir, 0o777) },
		"another user's":   func(dir string) error { return os.Chown(dir, 65534, -1) },
	} {
		t.Run(name, func(t *testing.T) {
			cp, k := newFakeControlPlane(t), newFakeKernel(t)
			cfg := testConfig(t, cp, newTestClock())
			if err := spoil(cfg.RunDir); errors.Is(err, os.ErrPermission) {
				if os.Getenv("CI") == "true" {
					t.Fatal("CI runs as root")
				}
				t.Skip("only root can give a directory away")
			} else if err != nil {
				t.Fatal(err)
			}
			cfg.StateDir = t.TempDir()
			if err := os.Chmod(cfg.StateDir, 0o700); err != nil {
				t.Fatal(err)
			}
			a, err := newAgent(cfg, k.rooms())
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "run directory") {
				t.Errorf("Run: %v: want the run directory refused", err)
			}
			if left, err := os.ReadDir(cfg.RunDir); err != nil || len(left) != 0 {
				t.Errorf("files %v were made there (%v)", left, err)
			}
		})
	}
}

// A commit under way when a program is admitted does not have its refusals taken for those of the
// admission, nor the other way round.
func TestRefusalsAreOfTheCommitThatMadeThem(t *testing.T) {
	cp, k, clock := newFakeControlPlane(t), newFakeKernel(t), newTestClock()
	cp.set(policies("billing"))
	cp.start()
	defer cp.stop()
	a := run(t, testConfig(t, cp, clock), k.rooms())
	if _, err := a.Admit(t.Context(), billing); err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	a.told["refused "+billing.RunID] = "once"
	a.mu.Unlock()
	a.writing.Lock() // a commit is under way
	other, done := billing, make(chan error, 1)
	other.RunID = "r9"
	go func() {
		_, err := a.Admit(context.Background(), other)
		done <- err
	}()
	a.mu.Lock() // free meanwhile: those who only ask do not wait for the maps
	w := a.workloads[other.RunID]
	a.mu.Unlock()
	if w != nil {
		t.Error("a program was admitted in the middle of a commit")
	}
	a.writing.Unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// What was told of a workload goes with it.
	a.Leave(billing.RunID)
	clock.until(t, "the look", func() bool { return len(clock.timers) > 0 })
	a.reapNow(t.Context())
	a.mu.Lock()
	defer a.mu.Unlock()
	if text, left := a.told["refused "+billing.RunID]; left {
		t.Errorf("%q is remembered of a workload that is gone", text)
	}
}
