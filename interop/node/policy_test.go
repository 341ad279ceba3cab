package node

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// onePolicies are the network policies of TestOneNode.
const onePolicies = `
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: denied}
spec:
  workloads: {service: denied}
  egress:
  - name: not-to-a
    action: deny
    to: [{service: shut-a}]
  - name: not-to-b
    action: deny
    errno: EHOSTUNREACH
    to: [{service: shut-b}]
  - name: not-there
    action: deny
    errno: ECONNREFUSED
    to: [{cidr: 192.0.2.0/24, except: [192.0.2.128/25]}]
  - name: no-ping
    action: deny
    ports: [{protocol: ICMP}]
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: tight}
spec:
  workloads: {service: tight}
  egress:
  - name: to-a
    to: [{service: shut-a}]
    ports: [{port: 80}]
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: guarded}
spec:
  workloads: {labels: {guard: "on"}}
  ingress:
  - name: from-at-home-go
    from: [{service: at-home-go}]
    ports: [{port: 8021}, {port: 8021, protocol: UDP}]
  - name: from-away-go
    from: [{service: away-go}]
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: watched}
spec:
  mode: audit
  workloads: {service: watched}
  ingress:
  - name: from-nobody-here
    from: [{namespace: shop}]
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: hosted}
spec:
  workloads: {service: hosted}
  ingress:
  - name: from-host
    from: [{entity: host}]
`

// sourceOf is where a rule stands in onePolicies, as flows tell it.
func sourceOf(t *testing.T, rule string) string {
	t.Helper()
	for i, line := range strings.Split(onePolicies, "\n") {
		if strings.HasSuffix(line, "- name: "+rule) {
			return fmt.Sprintf("policies.yaml:%d", i+1)
		}
	}
	t.Fatalf("rule %q is not in onePolicies", rule)
	return ""
}

// deniedBy waits for the flow of a denial and checks what it says. To whom may be empty: any. Where
// it was the default, the rule is the allow rule that closed the direction.
func (n *oneNode) deniedBy(from, to, protocol, policy, rule string, errno syscall.Errno) {
	n.t.Helper()
	f := n.flow(fmt.Sprintf("%s denied from %s to %s by %s/%s", protocol, from, to, policy, rule), func(f *nodepb.Flow) bool {
		return f.Kind == "denied" && f.Reason != "no_endpoint" && f.From.Name == from && (to == "" || f.To.Name == to) && f.Protocol == protocol
	})
	if f.Verdict != "denied" || f.Reason != "denied" || f.Policy != policy || f.Rule != rule || syscall.Errno(f.Errno) != errno {
		n.t.Errorf("flow %v, want it denied by %s/%s with errno %d", f, policy, rule, errno)
	}
	if !strings.HasSuffix(f.Source, sourceOf(n.t, rule)) {
		n.t.Errorf("source %q, want %s", f.Source, sourceOf(n.t, rule))
	}
}

// egressPolicy: what leaves is decided at connect() and sendmsg(), with the errno that the rule names.
func egressPolicy(t *testing.T, n *oneNode) {
	n.serve(program{service: "shut-a"}, "127.0.0.1", 8031, "4")
	n.serve(program{service: "shut-b"}, home4, 8032, "4")
	another := n.client("go", program{service: "another"})
	for _, service := range []string{"shut-a", "shut-b"} { // registered
		answers(t, another, []any{"tcp", "4", n.vip[service].v4, 80}, service)
		answers(t, another, []any{"udp", "4", n.vip[service].v4, 5300}, service)
	}
	clients := map[string]*proc{}
	for _, kind := range kinds {
		clients[kind] = n.client(kind, program{service: "denied"})
		answers(t, clients[kind], []any{"tcp", "4", n.vip["open"].v4, 80}, "open")
	}
	for kind, c := range clients {
		for _, tc := range []struct {
			service string
			want    syscall.Errno
		}{{"shut-a", syscall.EPERM}, {"shut-b", syscall.EHOSTUNREACH}} {
			for _, op := range []string{"tcp", "udp", "udpc"} {
				for _, net := range []string{"4", "6", "mapped"} {
					if kind == "curl" && op != "tcp" || op == "udp" && net == "6" {
						continue // see unreachableBy
					}
					port := 80
					if op != "tcp" {
						port = 5300
					}
					a := c.askSoon(op, net, n.vip[tc.service].family(net), port)
					if kind == "curl" && a.Curl == 7 {
						continue
					}
					if a.Errno != tc.want || a.took() > soon {
						t.Errorf("%s %s %s to %s: %+v, want %v at once", kind, op, net, tc.service, a, tc.want)
					}
				}
			}
		}
	}
	n.deniedBy("denied.default", "shut-a.default", "tcp", "default/denied", "not-to-a", syscall.EPERM)
	n.deniedBy("denied.default", "shut-a.default", "udp", "default/denied", "not-to-a", syscall.EPERM)
	n.deniedBy("denied.default", "shut-b.default", "tcp", "default/denied", "not-to-b", syscall.EHOSTUNREACH)

	// The endpoint itself is the service too, however it is dialled.
	if a := clients["go"].ask("tcp", "4", "127.0.0.1", 8031); a.Errno != syscall.EPERM {
		t.Errorf("the endpoint's own address: %+v, want EPERM", a)
	}
	// An address of a CIDR, and one of its except: that has no route here.
	if a := clients["glibc"].ask("tcp", "4", "192.0.2.7", 80); a.Errno != syscall.ECONNREFUSED {
		t.Errorf("an address of the CIDR: %+v, want ECONNREFUSED", a)
	}
	if a := clients["glibc"].ask("tcp", "mapped", "192.0.2.200", 80); a.Errno != syscall.ENETUNREACH {
		t.Errorf("an address of the except: %+v, want ENETUNREACH", a)
	}

	// An allow rule closes the direction for all else, names excepted.
	tight := n.client("go", program{service: "tight"})
	answers(t, tight, []any{"tcp", "any", "shut-a", 80}, "shut-a")
	for _, words := range [][]any{
		{"tcp", "4", n.vip["open"].v4, 80}, {"udp", "4", n.vip["shut-a"].v4, 5300}, {"tcp", "4", "192.0.2.200", 80}, {"tcp", "6", "fd99::1", 80},
	} {
		if a := tight.ask(words...); a.Errno != syscall.EPERM {
			t.Errorf("default-deny: %v: %+v, want EPERM", words, a)
		}
	}
	n.deniedBy("tight.default", "open.default", "tcp", "default/tight", "to-a", syscall.EPERM)

	// ICMP, by a ping socket.
	n.home.sh("echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range")
	if a := another.ask("echo", away4); a.failed() != "" {
		t.Errorf("echo without policy: %+v", a)
	}
	if a := clients["go"].ask("echo", away4); a.Errno != syscall.EPERM {
		t.Errorf("echo denied: %+v, want EPERM", a)
	}
	n.deniedBy("denied.default", "", "icmp", "default/denied", "no-ping", syscall.EPERM)
	n.query("from=denied and verdict=denied and rule=not-to-b", func(f *nodepb.Flow) bool {
		return f.From.Name == "denied.default" && f.Verdict == "denied" && f.Rule == "not-to-b"
	})
}

// query asks for the flows there have been, of which some must be shown, and none for which holds is false.
func (n *oneNode) query(text string, holds func(*nodepb.Flow) bool) {
	n.t.Helper()
	stdout, stderr, code := n.cli("observe", "-o", "json", "--last", "1000", text)
	if code != 0 || stdout == "" {
		n.t.Errorf("observe %q: exit code %d: %s%s", text, code, stdout, stderr)
	}
	for line := range strings.Lines(stdout) {
		f := &nodepb.Flow{}
		if err := protojson.Unmarshal([]byte(line), f); err != nil || !holds(f) {
			n.t.Errorf("observe %q: %v in %s", text, err, line)
		}
	}
}

// ingressPolicy: what arrives is decided by who sent it, wherever that is.
func ingressPolicy(t *testing.T, n *oneNode) {
	guard := []string{"--label", "guard=on"}
	n.serve(program{service: "guarded", flags: guard}, home4, 8021, "4")
	n.serve(program{service: "guarded-far", flags: guard, at: n.away}, away4, 8022, "4")
	clients := []struct {
		service, kind string
		at            *space
		home, away    bool // whether it may call guarded, and guarded-far
	}{
		{"away-go", "go", n.away, true, true}, // the first: once it was answered, both are registered
		{"at-home-go", "go", nil, true, false},
		{"at-home-glibc", "glibc", nil, false, false},
		{"away-python", "python", n.away, false, false},
	}
	for _, tc := range clients {
		c := n.client(tc.kind, program{service: tc.service, at: tc.at})
		answers(t, c, []any{"tcp", "4", n.vip["open"].v4, 80}, "open")
		for server, may := range map[string]bool{"guarded": tc.home, "guarded-far": tc.away} {
			if may {
				answers(t, c, []any{"tcp", "4", n.vip[server].v4, 80}, server)
				answers(t, c, []any{"udp", "4", n.vip[server].v4, 5300}, server)
				continue
			}
			// Where sk_lookup is, in the namespace of the agent, it is refused; elsewhere nobody answers.
			want := syscall.ECONNREFUSED
			if server == "guarded-far" {
				want = syscall.ETIMEDOUT
			}
			ask := c.ask
			if want == syscall.ECONNREFUSED {
				ask = c.askSoon
			}
			a := ask("tcp", "4", n.vip[server].v4, 80)
			if a.Errno != want || want == syscall.ECONNREFUSED && a.took() > soon {
				t.Errorf("%s calls %s: %+v, want %v", tc.service, server, a, want)
			}
			if a := c.ask("udp", "4", n.vip[server].v4, 5300); a.Errno != syscall.ETIMEDOUT {
				t.Errorf("%s sends to %s: %+v, want no answer", tc.service, server, a)
			}
			for _, protocol := range []string{"tcp", "udp"} {
				n.deniedBy(tc.service+".default", server+".default", protocol, "default/guarded", "from-at-home-go", 0)
			}
		}
	}

	// An entity: only what is no workload.
	n.serve(program{service: "hosted"}, "127.0.0.1", 8023, "4")
	cmd := n.home.command(self(t))
	host := startProc(t, "host", cmd, "NODE_ROLE=client", "GODEBUG="+clientDebug)
	eventually(t, "the host's call", func() bool { return strings.HasPrefix(host.ask("tcp", "4", "127.0.0.1", 8023).Text, "hosted ") })
	c := n.client("go", program{service: "another"})
	if a := c.ask("tcp", "4", "127.0.0.1", 8023); a.Errno != syscall.ECONNREFUSED {
		t.Errorf("a workload calls what is the host's: %+v, want it refused", a)
	}
	n.deniedBy("another.default", "hosted.default", "tcp", "default/hosted", "from-host", 0)
	if a := host.ask("tcp", "4", home4, 8021); a.Errno != syscall.ECONNREFUSED {
		t.Errorf("the host calls guarded: %+v, want it refused", a)
	}
	n.deniedBy("host", "guarded.default", "tcp", "default/guarded", "from-at-home-go", 0)
}

// auditPolicy lets everything pass and tells what enforcing would have denied.
func auditPolicy(t *testing.T, n *oneNode) {
	n.serve(program{service: "watched"}, "127.0.0.1", 8024, "4")
	c := n.client("python", program{service: "another"})
	answers(t, c, []any{"tcp", "4", n.vip["watched"].v4, 80}, "watched")
	answers(t, c, []any{"udp", "4", n.vip["watched"].v4, 5300}, "watched")
	for _, protocol := range []string{"tcp", "udp"} {
		f := n.flow("audited "+protocol, func(f *nodepb.Flow) bool {
			return f.Kind == "audit" && f.To.Name == "watched.default" && f.Protocol == protocol
		})
		if f.Verdict != "audited" || f.From.Name != "another.default" || f.Direction != "ingress" {
			t.Errorf("flow %v", f)
		}
	}
	f := n.flow("close of what was audited", func(f *nodepb.Flow) bool {
		return f.Kind == "close" && f.To.Name == "watched.default" && f.Direction == "ingress"
	})
	if f.Verdict != "allowed" {
		t.Errorf("flow %v, want it allowed", f)
	}
	// One whom the rule allows is not told of.
	shopper := n.client("go", program{service: "shopper.shop"})
	answers(t, shopper, []any{"tcp", "4", n.vip["watched"].v4, 80}, "watched")
	n.flow("from the shop", func(f *nodepb.Flow) bool {
		if f.Kind == "audit" && f.From.Name == "shopper.shop" {
			t.Errorf("audited what the rule allows: %v", f)
		}
		return f.Kind == "close" && f.From.Name == "shopper.shop" && f.To.Name == "watched.default" && f.Direction == "ingress"
	})
}

// denyTheLiving: a policy that comes ends the connections that it denies, and no others, whichever end
// it is about.
func denyTheLiving(t *testing.T, n *oneNode) {
	n.serve(program{service: "steady"}, "127.0.0.1", 8025, "4")
	victim, other := n.client("go", program{service: "steady-caller"}), n.client("go", program{service: "another"})
	for _, tc := range []struct {
		direction, subject, peer string
		refused                  syscall.Errno // of a new connection
	}{{"ingress", "steady", "from: [{service: steady-caller}]", syscall.ECONNREFUSED}, {"egress", "steady-caller", "to: [{service: steady}]", syscall.EPERM}} {
		for _, c := range []*proc{victim, other} {
			answers(t, c, []any{"tcp", "4", n.vip["steady"].v4, 80}, "steady")
			if a := c.ask("open", tc.direction, "4", n.vip["steady"].v4, 80); a.failed() != "" {
				t.Fatalf("open: %+v", a)
			}
			if a := c.ask("ping", tc.direction); a.Text != "ping" {
				t.Fatalf("ping: %+v", a)
			}
			answers(t, c, []any{"udp", "4", n.vip["steady"].v4, 5300}, "steady")
			if a := c.ask("hold", "datagrams", "4", n.vip["steady"].v4, 5300); a.failed() != "" {
				t.Fatalf("hold: %+v", a)
			}
			if a := c.ask("ping", "datagrams"); !strings.HasPrefix(a.Text, "steady ") {
				t.Fatalf("ping by datagrams: %+v", a)
			}
		}
		n.write("deny-steady.yaml", fmt.Sprintf(`
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: steady-%[1]s}
spec:
  workloads: {service: %[2]s}
  %[1]s:
  - name: not-these
    action: deny
    %[3]s
`, tc.direction, tc.subject, tc.peer))
		a := victim.ask("ended", tc.direction)
		if a.Errno != syscall.ECONNRESET && a.Errno != syscall.ECONNABORTED {
			t.Errorf("%s: the denied connection: %+v, want it ended", tc.direction, a)
		}
		t.Logf("%s: the denied connection ended %v after the policy was written: %v", tc.direction, a.took(), a.Errno)
		if a := other.ask("ping", tc.direction); a.Text != "ping" {
			t.Errorf("%s: a connection that is still allowed: %+v", tc.direction, a)
		}
		if a := victim.ask("ping", "datagrams"); a.failed() == "" {
			t.Errorf("%s: datagrams of a socket that had an answer: %+v, want them denied", tc.direction, a)
		} else {
			t.Logf("%s: the next datagram: %v", tc.direction, a.failed())
		}
		if a := other.ask("ping", "datagrams"); !strings.HasPrefix(a.Text, "steady ") {
			t.Errorf("%s: datagrams that are still allowed: %+v", tc.direction, a)
		}
		if a := victim.ask("tcp", "4", n.vip["steady"].v4, 80); a.Errno != tc.refused {
			t.Errorf("%s: a new one: %+v, want %v", tc.direction, a, tc.refused)
		}
		f := n.flow("of the ended connection", func(f *nodepb.Flow) bool {
			return f.Kind == "close" && f.From.Name == "steady-caller.default" && f.Verdict == "denied" && f.Direction == tc.direction
		})
		if f.Policy != "default/steady-"+tc.direction || f.Rule != "not-these" || !strings.HasSuffix(f.Source, "deny-steady.yaml:8") {
			t.Errorf("%s: flow %v", tc.direction, f)
		}
		for _, c := range []*proc{victim, other} {
			c.ask("close", "datagrams")
		}
		n.remove("deny-steady.yaml")
		answers(t, victim, []any{"tcp", "4", n.vip["steady"].v4, 80}, "steady")
	}
}

// rawSockets are for those to whom they were granted; those of packets too.
func rawSockets(t *testing.T, n *oneNode) {
	const ipv4, ipv6, packet, dgram, raw, icmp = 2, 10, 17, 2, 3, 1
	plain := n.client("go", program{service: "raw"})
	granted := n.client("go", program{service: "granted", flags: []string{"--raw"}})
	for what, words := range map[string][]any{
		"IPv4": {"socket", ipv4, raw, icmp}, "IPv6": {"socket", ipv6, raw, 58}, "any protocol": {"socket", ipv4, raw, 255},
		"packets": {"socket", packet, raw, 0}, "packets without header": {"socket", packet, dgram, 0},
	} {
		if a := plain.ask(words...); a.Errno != syscall.EPERM {
			t.Errorf("raw socket of %s: %+v, want EPERM", what, a)
		}
		if a := granted.ask(words...); a.failed() != "" {
			t.Errorf("raw socket of %s with --raw: %+v", what, a)
		}
	}
}

// spoofAddress: a workload that takes the source address of another one stays itself.
func spoofAddress(t *testing.T, n *oneNode) {
	n.serve(program{service: "spoofed", flags: []string{"--label", "guard=on"}}, "127.0.0.1", 8021, "4")
	client := n.client("go", program{service: "at-home-go"})
	spoofer := n.client("go", program{service: "spoofer"})
	var a answer
	eventually(t, "an allowed call over loopback", func() bool {
		a = client.ask("tcp", "4", "127.0.0.1", 8021)
		return a.failed() == ""
	})
	// The same source, while the server keeps the time-wait of the one before, if any.
	if b := spoofer.ask("from", a.Local, "4", "127.0.0.1", 8021); b.Errno != syscall.ECONNREFUSED {
		t.Errorf("from %s, which was another's: %+v, want it refused", a.Local, b)
	}
	f := n.flow("of the spoofer", func(f *nodepb.Flow) bool { return f.Kind == "denied" && f.From.Address == a.Local })
	if f.From.Name != "spoofer.default" {
		t.Errorf("flow %v, want it from the spoofer", f)
	}
	// Over the node's own address, too, which registrations are known by elsewhere.
	if b := spoofer.ask("from", home4+":0", "4", "127.0.0.1", 8021); b.failed() == "" {
		t.Errorf("from the node's address: %+v, want it refused", b)
	}
	if again := client.ask("tcp", "4", "127.0.0.1", 8021); again.failed() != "" {
		t.Errorf("the client itself: %+v", again)
	}
}

// nestProgram: a cgroup below the workload's is the workload.
func nestProgram(t *testing.T, n *oneNode) {
	n.serve(program{service: "nested"}, "127.0.0.1", 8026, "4")
	for _, tc := range []struct {
		service string
		want    syscall.Errno
	}{{"another", 0}, {"tight", syscall.EPERM}} { // once the first was answered, the server is registered
		c := n.client("go", program{service: tc.service})
		if a := c.ask("nest", "inner"); a.failed() != "" {
			t.Fatalf("nest: %+v", a)
		}
		if tc.want == 0 {
			answers(t, c, []any{"tcp", "any", "nested", 80}, "nested")
			a := c.ask("tcp", "6", "nested", 80)
			n.flow("of the nested program", func(f *nodepb.Flow) bool {
				return f.Kind == "close" && address(f.From.Address).Port() == a.local().Port() && f.From.Name == tc.service+".default" && f.To.Name == "nested.default"
			})
			continue
		}
		if a := c.ask("tcp", "any", "nested", 80); a.Errno != tc.want {
			t.Errorf("%s in a nested cgroup: %+v, want %v", tc.service, a, tc.want)
		}
	}
}
