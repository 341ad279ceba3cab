package node

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// twoPolicies let one service, which lives on the other node, call guarded.
const twoPolicies = `
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: guarded}
spec:
  workloads: {service: guarded}
  ingress:
  - name: from-caller
    from: [{service: caller}]
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: barred}
spec:
  workloads: {service: barred}
  egress:
  - name: not-to-guarded
    action: deny
    to: [{service: guarded}]
`

// home4other is an address of the first node that no workload is registered by.
const home4other = "10.77.0.3"

// secondNode starts `inlay node --ebpf` in a namespace of its own, with the control plane of m, and
// gives the mesh as it is seen from there.
func (m *mesh) secondNode(at *space, c *cgroup, addresses ...string) *mesh {
	m.t.Helper()
	far := *m
	far.home, far.cgroup, far.run = at, c, filepath.Join(m.dir, "second")
	var p *proc
	m.t.Cleanup(func() {
		if p != nil {
			p.end()
		}
		c.clean(m.bin, far.run)
	})
	args := []string{m.bin.inlay, "node", "--ebpf", "--cgroup", c.name, "--run-dir", far.run,
		"--control-plane", filepath.Join(m.run, "controlplane.sock"), "--metrics-addr", "off", "--ready-fd", "1"}
	for _, a := range addresses {
		args = append(args, "--node-address", a)
	}
	p = startProc(m.t, "node", at.command(args...))
	p.line(far.run + "/flows.sock")
	far.dev, far.log = p, observe(m.t, m.bin, far.run)
	return &far
}

// TestTwoNodes: two agents, each in its namespace with a cgroup, pins and directories of its own, share
// nothing but the control plane. What one node knows of who calls from the other is the address.
func TestTwoNodes(t *testing.T) {
	need(t)
	t.Parallel()
	home, away := newSpace(t), newSpace(t)
	wire(home, away, []string{home4 + "/24", home4other + "/24", home6 + "/64"}, []string{away4 + "/24", away6 + "/64"})
	m := newMesh(t, home, newCgroup(t), map[string]string{
		"services.yaml": declared("caller", "guarded", "barred", "neighbour"), "policies.yaml": twoPolicies,
	}, home4, home6)
	far := m.secondNode(away, newCgroup(t), away4, away6)
	vip := m.virtuals()

	near, remote := &oneNode{mesh: m, vip: vip}, &oneNode{mesh: far, vip: vip}
	near.serve(program{service: "caller"}, home4, 8051, "4")
	remote.serve(program{service: "guarded"}, away4, 8052, "4")
	remote.serve(program{service: "guarded"}, "["+away6+"]", 8052, "6")

	var calls []called
	for _, kind := range kinds {
		t.Run("by name from "+kind, func(t *testing.T) { calls = append(calls, callAcross(t, near.with(t), kind)...) })
	}
	t.Run("there and back", func(t *testing.T) {
		c := remote.in(t).client("go", program{service: "guarded"})
		answers(t, c, []any{"tcp", "any", "caller", 80}, "caller")
		a := c.ask("tcp", "4", "caller", 80)
		if a.failed() != "" || a.peer().Addr() != vip["caller"].v4 {
			t.Errorf("%+v, want an answer from %v", a, vip["caller"].v4)
		}
		acrossFlows(t, remote, near, called{"guarded", "caller", "tcp", a})
	})
	t.Run("an address that nobody registered", func(t *testing.T) {
		c := near.in(t).client("go", program{service: "caller"})
		a := c.ask("from", home4other+":0", "4", vip["guarded"].v4, 80)
		if a.Errno != syscall.ECONNREFUSED { // by sk_lookup, which is in the namespace of the second agent
			t.Errorf("from %s: %+v, want it refused", home4other, a)
		}
		remote.with(t).deniedTwo("world", false)
	})
	t.Run("the caller's own node denies", func(t *testing.T) {
		c := near.in(t).client("glibc", program{service: "barred"})
		for op, port := range map[string]int{"tcp": 80, "udp": 5300} {
			if a := c.ask(op, "4", "guarded", port); a.Errno != syscall.EPERM {
				t.Errorf("%s: %+v, want EPERM", op, a)
			}
			if a := c.ask(op, "4", away4, 8052); a.Errno != syscall.EPERM { // its endpoint, dialled by hand
				t.Errorf("%s to the endpoint: %+v, want EPERM", op, a)
			}
		}
		f := near.with(t).flow("denied on the caller's node", func(f *nodepb.Flow) bool { return f.Kind == "denied" && f.From.Name == "barred.default" })
		if f.To.Name != "guarded.default" || f.To.Hint || f.Policy != "default/barred" || f.Rule != "not-to-guarded" {
			t.Errorf("flow %v", f)
		}
	})
	t.Run("an address that two services share", func(t *testing.T) { shareAddress(t, near.with(t), remote.with(t)) })
	t.Run("a new deny ends a live connection", func(t *testing.T) { denyAcross(t, near.with(t), remote.with(t)) })
	t.Run("flows of both nodes", func(t *testing.T) { // the last: a datagram exchange ends when it idles (30 s)
		for _, c := range calls {
			acrossFlows(t, near, remote, c)
		}
	})
}

// with is the same node for a subtest.
func (n *oneNode) with(t *testing.T) *oneNode {
	return &oneNode{mesh: n.mesh.in(t), away: n.away, vip: n.vip}
}

// callAcross calls the service of the other node by its name, and gives the calls that came through.
func callAcross(t *testing.T, near *oneNode, kind string) (calls []called) {
	c := near.client(kind, program{service: "caller"})
	for op, port := range map[string]int{"tcp": 80, "udp": 5300, "udpc": 5300} {
		if kind == "curl" && op != "tcp" {
			continue
		}
		for net, from := range map[string]string{"4": home4, "6": home6, "mapped": home4} {
			words := []any{op, net, "guarded", port}
			if net == "mapped" { // a resolver gives no mapped address of a name that has both families
				words[2] = near.vip["guarded"].v4
			}
			var a answer
			var name, seen string
			eventually(t, fmt.Sprintf("%v answered from %s", words, from), func() bool {
				a = c.ask(words...) // of an IPv6 address each endpoint is one, of either family
				name, seen, _ = strings.Cut(a.Text, " ")
				return name == "guarded" && address(seen).Addr().String() == from
			})
			if got := a.peer(); got.Addr() != near.vip["guarded"].family(net) || int(got.Port()) != port {
				t.Errorf("%v: the peer is %s, want the address that was asked", words, a.Peer)
			}
			a.Local = seen // an unconnected socket does not know its own
			calls = append(calls, called{"caller", "guarded", strings.TrimSuffix(op, "c"), a})
		}
	}
	return calls
}

// acrossFlows checks what both nodes say of a call: the caller's node knows both ends, the other knows
// the caller by its address, and says so.
func acrossFlows(t *testing.T, from, to *oneNode, c called) {
	t.Helper()
	for direction, n := range map[string]*oneNode{"egress": from, "ingress": to} {
		f := n.log.await(t, fmt.Sprintf("of the %s %s from %s", direction, c.protocol, c.Local), func(f *nodepb.Flow) bool {
			at := address(f.From.Address)
			return f.Kind == "close" && f.Direction == direction && f.Protocol == c.protocol && at.Port() == c.local().Port() &&
				(at.Addr() == c.local().Addr() || at.Addr().IsUnspecified()) && f.To.Name == c.server+".default"
		})
		if f.From.Name != c.client+".default" || f.Verdict != "allowed" || f.From.Hint != (direction == "ingress") || f.To.Hint {
			t.Errorf("%s flow of a call from %s to %s: %v", direction, c.client, c.server, f)
		}
	}
}

// deniedTwo waits for a denied connection to guarded from somebody.
func (n *oneNode) deniedTwo(from string, hint bool) {
	n.t.Helper()
	f := n.flow("denied from "+from, func(f *nodepb.Flow) bool {
		return f.Kind == "denied" && f.Direction == "ingress" && f.From.Name == from && f.To.Name == "guarded.default"
	})
	if f.Verdict != "denied" || f.Policy != "default/guarded" || f.Rule != "from-caller" || f.From.Hint != hint || !strings.Contains(f.Source, "policies.yaml:") {
		n.t.Errorf("flow %v", f)
	}
}

// shareAddress: once another service of the node is registered by the same address, that says nothing
// any more, and a rule that names one of them lets neither pass.
func shareAddress(t *testing.T, near, remote *oneNode) {
	c := near.client("go", program{service: "caller"})
	answers(t, c, []any{"tcp", "4", "guarded", 80}, "guarded")
	tcp, udp := near.serve(program{service: "neighbour"}, home4, 8053, "4")
	eventually(t, "the caller refused", func() bool { return c.ask("tcp", "4", "guarded", 80).Errno == syscall.ECONNREFUSED })
	remote.deniedTwo("unknown", true)
	tcp.end()
	udp.end()
	answers(t, c, []any{"tcp", "4", "guarded", 80}, "guarded")
}

// denyAcross: the node of the server ends what a new policy denies, by the hint.
func denyAcross(t *testing.T, near, remote *oneNode) {
	c := near.client("go", program{service: "caller"})
	answers(t, c, []any{"tcp", "4", "guarded", 80}, "guarded")
	if a := c.ask("open", "a", "4", "guarded", 80); a.failed() != "" {
		t.Fatalf("open: %+v", a)
	}
	if a := c.ask("ping", "a"); a.Text != "ping" {
		t.Fatalf("ping: %+v", a)
	}
	near.write("deny.yaml", `
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: no-caller}
spec:
  workloads: {service: guarded}
  ingress:
  - name: not-from-caller
    action: deny
    from: [{service: caller}]
`)
	if a := c.ask("ended", "a"); a.Errno != syscall.ECONNRESET && a.Errno != syscall.ECONNABORTED {
		t.Errorf("the denied connection: %+v, want it reset", a)
	}
	f := remote.flow("of the ended connection", func(f *nodepb.Flow) bool {
		return f.Kind == "close" && f.Verdict == "denied" && f.From.Name == "caller.default"
	})
	if !f.From.Hint || f.Rule != "not-from-caller" || !strings.HasSuffix(f.Source, "deny.yaml:8") {
		t.Errorf("flow %v", f)
	}
	near.remove("deny.yaml")
	answers(t, c, []any{"tcp", "4", "guarded", 80}, "guarded")
}
