package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// drainEndpoint: one of two endpoints is told to end and does not: it gets no new connection, the
// one it has goes on for the grace, and is then ended.
func drainEndpoint(t *testing.T, n *oneNode) {
	server := func(name string, port int, env ...string) *proc {
		return n.server(program{service: "shift", flags: []string{"--port", fmt.Sprintf("80:%d", port)}}, name, append(env, fmt.Sprintf("NODE_TCP=127.0.0.1:%d", port))...)
	}
	old := server("old", 8041, "NODE_STUBBORN=1")
	c := n.client("go", program{service: "another"})
	answers(t, c, []any{"tcp", "4", n.vip["shift"].v4, 80}, "old")
	if a := c.ask("open", "a", "4", n.vip["shift"].v4, 80); a.failed() != "" {
		t.Fatalf("open: %+v", a)
	}
	server("new", 8042)
	answers(t, c, []any{"tcp", "4", n.vip["shift"].v4, 80}, "new")
	answers(t, c, []any{"tcp", "4", n.vip["shift"].v4, 80}, "old") // both are called

	if err := old.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	const row = 40 // of two endpoints one is missed so often once in 10^12
	eventually(t, "new connections to the other endpoint only", func() bool {
		for range row {
			switch a := c.ask("tcp", "4", n.vip["shift"].v4, 80); {
			case a.failed() != "":
				t.Fatalf("a call while an endpoint drains: %+v", a)
			case !strings.HasPrefix(a.Text, "new "):
				return false
			}
		}
		return true
	})
	drained := time.Since(began)
	if a := c.ask("ping", "a"); a.Text != "ping" {
		t.Errorf("the connection to the drained endpoint within the grace: %+v", a)
	}
	a := c.ask("ended", "a")
	if a.Errno != syscall.ECONNRESET && a.Errno != syscall.ECONNABORTED {
		t.Errorf("the connection after the grace: %+v, want it ended", a)
	}
	t.Logf("no new connection %v after SIGTERM; the old one ended after %v", drained, time.Since(began))
	if took := time.Since(began); took < 4*time.Second {
		t.Errorf("the connection ended after %v: want the grace of 5 s", took)
	}
	f := n.flow("of the ended connection", func(f *nodepb.Flow) bool {
		return f.Kind == "close" && f.Direction == "egress" && f.To.Address == "127.0.0.1:8041" && f.To.Name == "shift.default" &&
			f.From.Name == "another.default" && f.Duration.AsDuration() > 3*time.Second
	})
	if f.BytesSent == 0 {
		t.Errorf("flow %v", f)
	}
}

// countBytes moves many bytes both ways; the flows of both ends agree with the programs.
func countBytes(t *testing.T, n *oneNode) {
	n.serve(program{service: "bulk"}, home4, 8043, "4")
	for _, at := range []*space{n.home, n.away} {
		c := n.client("go", program{service: "bulk-caller", at: at})
		answers(t, c, []any{"tcp", "4", n.vip["bulk"].v4, 80}, "bulk")

		const file = 24 << 20
		a := c.ask("fetch", "4", n.vip["bulk"].v4, 80, file)
		if a.failed() != "" || a.Count != file {
			t.Errorf("fetch: %+v", a)
		}
		n.moved(a, uint64(len("FILE \n")+len(fmt.Sprint(file))), file)

		const pump = 8 << 20
		a = c.ask("open", "a", "6", n.vip["bulk"].v6, 80)
		if b := c.ask("pump", "a", pump); b.failed() != "" || b.Count != pump {
			t.Errorf("pump: %+v", b)
		}
		if b := c.ask("close", "a"); b.failed() != "" {
			t.Errorf("close: %+v", b)
		}
		n.moved(a, pump+uint64(len("ECHO\n")), pump)
	}
}

// moved checks what the flows of both ends say of a call's bytes, as the client sent and received.
func (n *oneNode) moved(a answer, sent, received uint64) {
	n.t.Helper()
	for direction, want := range map[string][2]uint64{"egress": {sent, received}, "ingress": {received, sent}} {
		f := n.flow("of "+a.Local, func(f *nodepb.Flow) bool {
			return f.Kind == "close" && f.Direction == direction && address(f.From.Address) == a.local() && f.To.Name == "bulk.default"
		})
		if f.BytesSent != want[0] || f.BytesReceived != want[1] {
			n.t.Errorf("%s flow: %d bytes sent, %d received; want %d and %d", direction, f.BytesSent, f.BytesReceived, want[0], want[1])
		}
	}
}

// resolveNames: names of the mesh by every resolver a program may use, in every form.
func resolveNames(t *testing.T, n *oneNode) {
	n.serve(program{service: "names.shop"}, "127.0.0.1", 8044, "4")
	resolver := startProc(t, "resolver", n.home.command(self(t)), "NODE_ROLE=dns", "NODE_UDP=127.0.0.9:53")
	if line := resolver.reply(); line != "ready" {
		t.Fatalf("resolver said %q", line)
	}
	resolv := func(text string) []string {
		path := filepath.Join(n.dir, "resolv-"+random())
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return []string{"NODE_RESOLV=" + path}
	}
	other := resolv("nameserver 127.0.0.9\noptions timeout:2 attempts:2\n")
	search := resolv("nameserver 127.0.0.9\nsearch nowhere.example shop.mesh\noptions timeout:2 attempts:2\n")
	for _, kind := range kinds {
		outsider := n.client(kind, program{service: "another", env: other})
		insider := n.client(kind, program{service: "shopper.shop", env: other})
		searcher := n.client(kind, program{service: "another", env: search})
		for _, tc := range []struct {
			p    *proc
			name string
		}{
			{outsider, "names.shop"}, {outsider, "names.shop.mesh"}, {outsider, "NAMES.Shop.MESH."},
			{insider, "names"}, {insider, "names.shop"}, {insider, "names.mesh"}, {searcher, "names"},
		} {
			for _, net := range []string{"4", "6", "any"} {
				words := []any{"tcp", net, tc.name, 80}
				answers(t, tc.p, words, "names.shop")
				a := tc.p.ask(words...)
				vip := n.vip["names.shop"]
				if got := a.peer().Addr(); got != vip.family(net) && (net != "any" || got != vip.v6) {
					t.Errorf("%s %v: called %s, want %v", kind, words, a.Peer, vip)
				}
			}
		}
		// Another namespace's names need its name; what is under the suffix exists there or nowhere.
		for _, name := range []string{"names", "names.default", "nothing.mesh", "nothing.shop.mesh"} {
			a := outsider.ask("tcp", "4", name, 80)
			if kind == "curl" && a.Curl == 6 { // curl(1): "Could not resolve host"
				continue
			}
			if a.Fault == "" {
				t.Errorf("%s: %s: %+v, want no such name", kind, name, a)
			}
		}
	}
	// A resolver of the other family, and queries over TCP.
	for what, text := range map[string]string{
		"a resolver of IPv6": "nameserver ::1\n", "one that nobody has a route to": "nameserver fd99::53\n", "queries over TCP": "nameserver 127.0.0.9\noptions use-vc\n",
	} {
		env := resolv(text)
		for _, kind := range kinds {
			c := n.client(kind, program{service: "another", env: env})
			for _, net := range []string{"4", "6"} {
				if a := c.ask("tcp", net, "names.shop", 80); a.failed() != "" || !strings.HasPrefix(a.Text, "names.shop ") {
					t.Errorf("%s, %s %s: %+v (%s)", what, kind, net, a, a.failed())
				}
			}
		}
	}
	c := n.client("go", program{service: "another", env: other})
	vip := n.vip["names.shop"]
	for net, want := range map[string]string{"4": vip.v4.String(), "6": vip.v6.String()} {
		if a := c.ask("lookup", net, "names.shop"); a.Text != want {
			t.Errorf("lookup %s: %+v, want %s", net, a, want)
		}
	}
	if a := c.ask("lookup", "any", "names.shop"); len(strings.Fields(a.Text)) != 2 {
		t.Errorf("lookup of both families: %+v", a)
	}
	// Other names are asked of the resolver that the program named.
	before := resolver.ask("count").Count
	if a := c.ask("lookup", "4", "outside.example"); a.Text != "192.0.2.7" {
		t.Errorf("a name of the outside: %+v", a)
	}
	if after := resolver.ask("count").Count; after == before {
		t.Error("the resolver that the program named was not asked")
	}
	if a := c.ask("lookup", "4", "nobody.example"); !strings.Contains(a.Fault, "no such host") {
		t.Errorf("a name that nobody has: %+v", a)
	}
}
