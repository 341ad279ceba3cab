package node

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Addresses of the two namespaces of these tests, joined by a veth pair.
const (
	home4, home6 = "10.77.0.1", "fd77::1"
	away4, away6 = "10.77.0.2", "fd77::2"
)

// declared is the YAML of services with a TCP port 80 and a UDP port 5300.
func declared(names ...string) string {
	var b strings.Builder
	for _, n := range names {
		name, namespace, dotted := strings.Cut(n, ".")
		if !dotted {
			namespace = "default"
		}
		fmt.Fprintf(&b, "---\napiVersion: inlay.dev/v1alpha1\nkind: MeshService\nmetadata: {name: %s, namespace: %s}\n"+
			"spec:\n  ports: [{port: 80, protocol: TCP}, {port: 5300, protocol: UDP}]\n", name, namespace)
	}
	return b.String()
}

var kinds = []string{"go", "glibc", "python", "curl"}

// TestOneNode puts programs of every kind into one mesh, in the namespace of the agent and in another
// one, and has them do what programs do.
func TestOneNode(t *testing.T) {
	need(t)
	t.Parallel()
	home, away := newSpace(t), newSpace(t)
	wire(home, away, []string{home4 + "/24", home6 + "/64"}, []string{away4 + "/24", away6 + "/64"})
	c := newCgroup(t)
	foreign := attachForeign(t, c.parent)
	m := newMesh(t, home, c, map[string]string{
		"services.yaml": declared("lo4", "lo6", "net4", "net6", "far4", "empty", "names.shop",
			"at-home-go", "at-home-glibc", "at-home-python", "at-home-curl", "away-go", "away-glibc", "away-python", "away-curl",
			"open", "shut-a", "shut-b", "spoofed", "shopper.shop", "denied", "tight", "guarded", "guarded-far", "watched", "hosted", "steady", "steady-caller", "shift",
			"spoofer", "nested", "bulk", "bulk-caller", "raw", "granted", "another"),
		"policies.yaml": onePolicies,
	}, home4)
	n := &oneNode{mesh: m, away: away, vip: m.virtuals()}
	n.serve(program{service: "open", at: away}, away4, 8000, "4") // that everybody may call
	for name, test := range map[string]func(*testing.T, *oneNode){
		"every client calls every server":   callEverything,
		"names":                             resolveNames,
		"no endpoint":                       callNobody,
		"egress policy":                     egressPolicy,
		"ingress policy":                    ingressPolicy,
		"audit":                             auditPolicy,
		"a new deny ends a live connection": denyTheLiving,
		"raw sockets":                       rawSockets,
		"an endpoint drains and goes":       drainEndpoint,
		"a former client's address is not its identity":      spoofAddress,
		"a program in a nested cgroup":                       nestProgram,
		"bytes are counted right at both ends":               countBytes,
		"registrations that are refused":                     refuseRegistrations,
		"a foreign program above the managed root counts on": func(t *testing.T, n *oneNode) { foreign.countsOn(t, n) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sub := *n
			sub.mesh = n.mesh.in(t)
			test(t, &sub)
		})
	}
}

// oneNode is the mesh of TestOneNode.
type oneNode struct {
	*mesh
	away *space
	vip  map[string]virtual
}

// serve starts a server for a service's TCP port, and one for its UDP port, at host:port.
func (n *oneNode) serve(p program, host string, port int, network string) (tcp, udp *proc) {
	n.t.Helper()
	at := fmt.Sprintf("%s:%d", host, port)
	start := func(flag, env string) *proc {
		q := p
		q.flags = append([]string{"--port", flag}, p.flags...)
		q.args = []string{self(n.t)}
		q.env = append([]string{"NODE_ROLE=server", "NODE_NAME=" + p.service, "NODE_NETWORK=" + network, env}, p.env...)
		return n.start(q)
	}
	tcp = start(fmt.Sprintf("80:%d", port), "NODE_TCP="+at)
	udp = start(fmt.Sprintf("5300:%d/udp", port), "NODE_UDP="+at)
	for _, s := range []*proc{tcp, udp} {
		if line := s.reply(); line != "ready" {
			n.t.Fatalf("%s said %q", s.name, line)
		}
	}
	return tcp, udp
}

// called is one successful call of the table, to be found in the flows.
type called struct {
	client, server string
	protocol       string
	answer
}

// callEverything is the table: what is called, how, by which client, from where.
func callEverything(t *testing.T, n *oneNode) {
	type server struct {
		name     string
		family   string // of its endpoint
		at       *space
		host     string
		port     int
		network  string
		loopback bool
		procs    [2]*proc
	}
	servers := []*server{
		{name: "lo4", family: "4", host: "127.0.0.1", port: 8001, network: "4", loopback: true},
		{name: "lo6", family: "6", host: "[::1]", port: 8002, network: "6", loopback: true},
		{name: "net4", family: "4", host: "", port: 8003}, // Go's own listener on [::], for both families
		{name: "net6", family: "6", host: "[" + home6 + "]", port: 8004, network: "6"},
		{name: "far4", family: "4", host: away4, port: 8005, network: "4", at: n.away},
	}
	for _, s := range servers {
		s.procs[0], s.procs[1] = n.serve(program{service: s.name, at: s.at}, s.host, s.port, s.network)
	}
	type client struct {
		*proc
		kind, service string
		away          bool
	}
	var clients []client
	for _, kind := range kinds {
		clients = append(clients,
			client{n.client(kind, program{service: "at-home-" + kind}), kind, "at-home-" + kind, false},
			client{n.client(kind, program{service: "away-" + kind, at: n.away}), kind, "away-" + kind, true})
	}
	for _, s := range servers { // registered
		answers(t, clients[0].proc, []any{"tcp", "6", n.vip[s.name].v6, 80}, s.name)
		answers(t, clients[0].proc, []any{"udp", s.family, n.vip[s.name].family(s.family), 5300}, s.name)
	}
	before := map[string][2]int64{}
	for _, s := range servers {
		before[s.name] = [2]int64{s.procs[0].ask("count").Count, s.procs[1].ask("count").Count}
	}
	counts := map[string][2]int64{}
	var calls []called
	for _, c := range clients {
		for _, s := range servers {
			if c.away && s.loopback {
				continue // that is another machine's loopback
			}
			for _, net := range []string{"4", "6", "mapped"} {
				for i, op := range []string{"tcp", "udp", "udpc"} {
					if op != "tcp" && c.kind == "curl" {
						continue
					}
					port, protocol := 80, "tcp"
					if i > 0 {
						port, protocol = 5300, "udp"
					}
					words := []any{op, net, n.vip[s.name].family(net), port}
					a := c.ask(words...)
					what := fmt.Sprintf("%s calls %s (%s): %v", c.service, s.name, s.family, words)
					if why := unreachableBy(op, net, s.family); why != "" {
						if a.failed() != why && a.Curl != 7 { // curl(1): "Failed to connect to host"
							t.Errorf("%s: %+v, want %s", what, a, why)
						}
						continue
					}
					// The server says its name and whom it saw.
					name, seen, _ := strings.Cut(a.Text, " ")
					if a.failed() != "" || name != s.name {
						t.Errorf("%s: %+v (%s)", what, a, a.failed())
						continue
					}
					if got := a.peer(); got.Addr() != n.vip[s.name].family(net) || int(got.Port()) != port {
						t.Errorf("%s: the peer is %s, want the address that was asked", what, a.Peer)
					}
					if address(seen).Port() != a.local().Port() {
						t.Errorf("%s: from %s, but the server saw %s", what, a.Local, seen)
					}
					count := counts[s.name]
					count[min(i, 1)]++
					counts[s.name] = count
					a.Local = seen // an unconnected socket does not know its own
					calls = append(calls, called{c.service, s.name, protocol, a})
				}
			}
		}
	}
	for _, s := range servers {
		for i, p := range s.procs {
			if got, want := p.ask("count").Count-before[s.name][i], counts[s.name][i]; got != want {
				t.Errorf("%s answered %d %s calls, the clients made %d", s.name, got, []string{"TCP", "UDP"}[i], want)
			}
		}
	}
	if len(calls) < 150 {
		t.Errorf("%d calls of the table came through", len(calls))
	}
	t.Logf("%d calls came through", len(calls))
	// Both ends of each are in the flow log, by name: the client's at its close, the server's too; a
	// datagram exchange ends for the client with its socket, for the server when it idles (30 s).
	for _, direction := range []string{"egress", "ingress"} {
		for _, protocol := range []string{"tcp", "udp"} {
			for _, c := range calls {
				if c.protocol != protocol {
					continue
				}
				f := n.flow(fmt.Sprintf("of %s %s from %s (%s) to %s", direction, c.protocol, c.client, c.Local, c.server), func(f *nodepb.Flow) bool {
					from := address(f.From.Address) // without IP at the unconnected socket's own end
					return f.Kind == "close" && f.Direction == direction && f.Protocol == c.protocol && from.Port() == c.local().Port() &&
						(from.Addr() == c.local().Addr() || from.Addr().IsUnspecified()) &&
						f.From.Name == c.client+".default" && f.To.Name == c.server+".default" // a port is used again and again
				})
				if f.Verdict != "allowed" || f.From.Hint || f.To.Hint {
					t.Errorf("flow of a call from %s to %s: %v", c.client, c.server, f)
				}
				if asked := address(f.ServiceAddress); direction == "egress" && asked != c.peer() {
					t.Errorf("flow of a call from %s to %s: service address %q, want %s", c.client, c.server, f.ServiceAddress, c.peer())
				}
				if f.BytesSent == 0 || f.BytesReceived == 0 {
					t.Errorf("flow of a call from %s to %s: %d bytes sent, %d received", c.client, c.server, f.BytesSent, f.BytesReceived)
				}
			}
		}
	}
}

// unreachableBy says how a call must fail for want of a common family; empty when it must not. An IPv4
// address has IPv4 endpoints only, so another's has none. The kernel sends a datagram of an
// unconnected IPv6 socket to IPv4 only when its program said so.
func unreachableBy(op, net, endpoint string) string {
	switch {
	case endpoint == "6" && net != "6":
		return "connection refused"
	case endpoint == "4" && op == "udp" && net == "6":
		return "network is unreachable"
	}
	return ""
}

// callNobody calls a service without endpoints: refused at once.
func callNobody(t *testing.T, n *oneNode) {
	clients := map[string]*proc{}
	for _, kind := range kinds {
		clients[kind] = n.client(kind, program{service: "another"})
	}
	for kind, c := range clients {
		for _, op := range []string{"tcp", "udp", "udpc"} {
			for _, net := range []string{"4", "6", "mapped"} {
				if kind == "curl" && op != "tcp" {
					continue
				}
				port := 80
				if op != "tcp" {
					port = 5300
				}
				a := c.askSoon(op, net, n.vip["empty"].family(net), port)
				if kind == "curl" {
					if a.Curl != 7 || !strings.Contains(a.Fault, "ms: ") { // curl(1): "Failed to connect to host"
						t.Errorf("curl %s: %+v, want it refused", net, a)
					}
					continue
				}
				if a.failed() != "connection refused" || a.took() > soon {
					t.Errorf("%s %s %s: %q after %v, want connection refused at once", kind, op, net, a.failed(), a.took())
				}
			}
		}
	}
	for _, protocol := range []string{"tcp", "udp"} {
		f := n.flow(protocol+" to nobody", func(f *nodepb.Flow) bool {
			return f.Reason == "no_endpoint" && f.To.Name == "empty.default" && f.Protocol == protocol
		})
		if f.From.Name != "another.default" || f.Kind != "denied" || f.Verdict != "denied" || syscall.Errno(f.Errno) != syscall.ECONNREFUSED {
			t.Errorf("flow %v", f)
		}
	}
	// Somebody comes: the same program is served, from then on.
	n.serve(program{service: "empty"}, "127.0.0.1", 8010, "4")
	answers(t, clients["go"], []any{"tcp", "4", n.vip["empty"].v4, 80}, "empty")
}
