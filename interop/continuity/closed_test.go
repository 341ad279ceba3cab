package continuity

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// One write lets everything pass, one more asks the policies again; a restart of the agent changes
// neither, and each turn is told by the verb and by the agent.
func TestBreakglass(t *testing.T) {
	w := newWorld(t)
	w.startClient(slices.DeleteFunc(w.clientProbes(100), func(p probe) bool { return p.Rate < 50 })) // who waits for the slow ones waits long
	w.startStranger(w.strangerProbes(100))
	turn := func(to string) {
		t.Helper()
		logged := len(w.node.errLines())
		stdout, stderr, code := w.cli("node", "breakglass", to, "--cgroup", w.cgroup, "--run-dir", w.run)
		if code != 0 || !strings.Contains(stdout, "breakglass is "+to) {
			t.Fatalf("breakglass %s: exit code %d: %s%s", to, code, stdout, stderr)
		}
		if !containsAll(stderr, []string{"level=WARN", "breakglass", "to=" + to, "changed=true", "uid=0"}) {
			t.Errorf("breakglass %s: not audited by the verb: %q", to, stderr)
		}
		w.node.logged(logged, "level=WARN", "breakglass flipped", fmt.Sprintf("allow_all=%v", to == "on"))
		holds(w, to == "on")
	}
	// since gives what the stranger met from now on, in so many tries of each probe.
	since := func(n int64) map[string]counts {
		t.Helper()
		// What is under way was judged before.
		w.progress(3)
		before := w.ask(w.stranger).Probes
		w.progress(n)
		after := w.ask(w.stranger).Probes
		out := map[string]counts{}
		for name, c := range after {
			out[name] = counts{Tries: c.Tries - before[name].Tries, OK: c.OK - before[name].OK}
		}
		return out
	}
	closed := func(when string) {
		t.Helper()
		for name, c := range since(30) {
			if c.OK != 0 {
				t.Errorf("%s: %s: %d of %d denied connections passed", when, name, c.OK, c.Tries)
			}
		}
	}
	open := func(when string) {
		t.Helper()
		denied := w.counters()[uint32(bpfobj.InlayCounterCOUNT_DENIED_EGRESS)] + w.counters()[uint32(bpfobj.InlayCounterCOUNT_DENIED_INGRESS)]
		for name, c := range since(30) {
			// The last ones may be under way still.
			if c.OK < c.Tries-3 {
				t.Errorf("%s: %s: %d of %d connections passed", when, name, c.OK, c.Tries)
			}
		}
		if n := w.counters()[uint32(bpfobj.InlayCounterCOUNT_DENIED_EGRESS)] + w.counters()[uint32(bpfobj.InlayCounterCOUNT_DENIED_INGRESS)]; n != denied {
			t.Errorf("%s: %d connections were denied", when, n-denied)
		}
	}
	closed("at first")
	turn("on")
	open("on")
	w.node.kill()
	open("on, without an agent")
	w.startNode(versionA).ready()
	w.node.logged(0, "breakglass flipped", "allow_all=true")
	holds(w, true)
	open("on, after a restart")
	turn("off")
	closed("off")
	w.node.kill()
	w.startNode(versionA).ready()
	closed("off, after a restart")
	holds(w, false)
	client := w.finish(w.client)
	for name, c := range client.Probes {
		if c.failed() > 0 {
			t.Errorf("client: probe %s: %d of %d tries failed: %v", name, c.failed(), c.Tries, c.Errors)
		}
	}
	s := w.finish(w.stranger)
	t.Logf("stranger: %+v", s.Probes)
}

// holds wants the agent to say, in all its ways, whether policies are asked.
func holds(w *world, open bool) {
	w.t.Helper()
	want := 0.0
	if open {
		want = 1
	}
	w.eventually(fmt.Sprintf("breakglass %v by GetAgent and metric", open), func() bool {
		told, ok := w.metric("inlay_breakglass")
		return w.agent().Breakglass == open && ok && told == want
	})
}

// crowdedServices are the services of TestFullMap; their policies are files of their own, so that one
// changes without the other.
func crowdedServices() string {
	var b strings.Builder
	for _, name := range []string{"target", "bulk", "caller"} {
		fmt.Fprintf(&b, `---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: %s}
spec: {ports: [{port: 80, protocol: TCP}]}
`, name)
	}
	return b.String()
}

// crowd is a policy of a service, with n entries beside those that let it call target.
func crowd(service string, n int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: %[1]s}
spec:
  workloads: {service: %[1]s}
  egress:
  - name: target
    to: [{service: target}]
`, service)
	for i := range n { // ports of its own each, so an entry each
		fmt.Fprintf(&b, "  - name: outside-%d\n    to: [{cidr: 192.0.2.%d/32}]\n    ports: [{port: %d}]\n", i, i, 1000+i)
	}
	return b.String()
}

// A map of policies has no room for what a policy became: its workload may do nothing, which is
// counted and told; before, at nine tenths, there is a warning. With room again it goes on by itself.
func TestFullMap(t *testing.T) {
	const room = 60
	m := newMesh(t, map[string]string{
		"services.yaml": crowdedServices(), "bulk.yaml": crowd("bulk", 1), "caller.yaml": crowd("caller", 1),
	}, "--map-size", fmt.Sprintf("policies=%d", room))
	at := fmt.Sprintf("127.0.0.1:%d", 7000+10*m.number+1)
	m.program("target", "server", serverSettings{TCP: at}, "--port", fmt.Sprintf("80:%d", 7000+10*m.number+1))
	m.program("bulk", "idle", nil)
	vip := m.addressOf("target", 1).String() + ":80"
	caller := m.program("caller", "prober", []probe{{Name: "call", Kind: "tcp", Target: []string{vip}, Word: "caller", Rate: 50}})
	// until waits for tries that all end in one way, and gives how many there were.
	until := func(what string, want func(before, after counts) bool) (counts, counts) {
		t.Helper()
		var before, after counts
		m.eventually(what, func() bool {
			before = m.ask(caller).Probes["call"]
			m.eventually("20 tries more", func() bool {
				after = m.ask(caller).Probes["call"]
				return after.Tries >= before.Tries+20
			})
			return want(before, after)
		})
		return before, after
	}
	passes := func(before, after counts) bool { return after.failed() == before.failed() }
	const refused = "operation not permitted"
	closed := func(before, after counts) bool {
		return after.OK == before.OK && after.Errors[refused] >= before.Errors[refused]+20
	}
	until("calls of a workload whose policies have room", passes)
	entries, capacity := m.usage("policies")
	t.Logf("at first: %d of %d entries", entries, capacity)
	if capacity != room || entries*10 >= capacity*9 {
		t.Fatalf("%d of %d entries, want less than nine tenths of %d", entries, capacity, room)
	}
	for _, l := range m.node.errLines() {
		if strings.Contains(l, "map is nearly full") && strings.Contains(l, "map=policies") {
			t.Errorf("told before it is: %s", l)
		}
	}

	began := len(m.node.errLines())
	// An update is written beside what holds, and both must have room: to 55 of 60, with the 4 before.
	m.write("bulk.yaml", crowd("bulk", 1+55-int(entries)))
	t.Log(m.node.logged(began, "level=WARN", "map is nearly full", "map=policies", fmt.Sprintf("capacity=%d", room)))
	entries, _ = m.usage("policies")
	if entries*10 < room*9 {
		t.Errorf("%d of %d entries: want nine tenths", entries, room)
	}
	for name, want := range map[string]uint64{"inlay_ebpf_map_entries": entries, "inlay_ebpf_map_capacity": room} {
		if got, ok := m.metric(name, `inlay_map="policies"`); !ok || uint64(got) != want {
			t.Errorf("metric %s: %v, %v: want %d", name, got, ok, want)
		}
	}
	before, after := until("calls while the map is nearly full", passes)
	t.Logf("nearly full: %d of %d entries; %d calls, none refused", entries, room, after.Tries-before.Tries)

	began = len(m.node.errLines())
	m.write("caller.yaml", crowd("caller", 20))
	m.node.logged(began, "level=ERROR", "workloads are closed", "caller.default")
	before, after = until("a workload that may do nothing", closed)
	t.Logf("full: %d calls, all refused; %d so far", after.Tries-before.Tries, after.Errors[refused])
	for _, l := range m.node.errLines()[began:] {
		if strings.Contains(l, "level=ERROR") {
			t.Log(l)
		}
	}
	flows := m.flows("from=caller and reason=policy_full")
	if len(flows) == 0 {
		t.Error("no flow says that the policies found no room")
	}

	m.write("caller.yaml", crowd("caller", 0))
	until("calls with room again", passes)
	c := m.finish(caller).Probes["call"]
	m.settled()
	full := len(m.flows("from=caller and reason=policy_full"))
	told, _ := m.metric("inlay_flow_denied_total", `inlay_reason="policy_full"`)
	t.Logf("%d calls: %d went well, %v; %d flows with reason policy_full, metric %v", c.Tries, c.OK, c.Errors, full, told)
	if c.failed() != c.Errors[refused] || int64(full) != c.Errors[refused] || int64(told) != c.Errors[refused] {
		t.Errorf("refused calls: %v, flows %d, metric %v: want the same of each", c.Errors, full, told)
	}
}
