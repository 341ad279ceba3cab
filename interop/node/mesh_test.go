package node

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// cgroup is one that a test made for the managed root of an agent to be in, so that somebody else
// has a cgroup above it, too.
type cgroup struct {
	t      *testing.T
	parent string // absolute
	name   string // of the managed one, relative to the mount, as --cgroup takes it
	root   string // the same, absolute
	pin    string
}

// newCgroup makes the parent, and at the end of the test looks whether cleanup, which the caller has
// done then, left anything.
func newCgroup(t *testing.T) *cgroup {
	t.Helper()
	mount, err := load.FindCgroup2()
	if err != nil {
		t.Fatal(err)
	}
	c := &cgroup{t: t, name: "inlay-test-" + random()}
	c.parent = filepath.Join(mount, c.name)
	c.name += "/managed"
	c.root = filepath.Join(mount, c.name)
	if err := os.Mkdir(c.parent, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(c.parent); err != nil {
			t.Errorf("a cgroup is left: %v", err)
		}
	})
	if c.pin, err = load.PinDir(c.name); err != nil {
		t.Fatal(err)
	}
	return c
}

// clean runs `inlay node cleanup` and fails the test when anything is left.
func (c *cgroup) clean(b built, runDir string) {
	c.t.Helper()
	stdout, stderr, code := run(c.t, exec.Command(b.inlay, "node", "cleanup", "--cgroup", c.name, "--run-dir", runDir))
	if code != 0 || strings.Contains(stderr, "left") {
		c.t.Errorf("node cleanup: exit code %d: %s%s", code, stdout, stderr)
	}
	for _, path := range []string{c.root, c.pin} {
		if _, err := os.Lstat(path); err == nil {
			c.t.Errorf("%s is left after cleanup", path)
		}
	}
	nobodyLeft(c.t, func() []string { return processesNaming(c.t, runDir) })
}

// nobodyLeft fails the test when processes are left. One that has been stopped closes its sockets, by
// which others know its end, a moment before it is gone.
func nobodyLeft(t *testing.T, find func() []string) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(20 * time.Millisecond) {
		if left = find(); len(left) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, line := range left {
		t.Errorf("a process is left: %s", line)
	}
}

// processesNaming are the command lines of processes, this one aside, that name a directory.
func processesNaming(t *testing.T, dir string) (out []string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range dirs {
		raw, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(raw), dir) {
			out = append(out, path+" "+strings.ReplaceAll(string(raw), "\x00", " "))
		}
	}
	return out
}

// mesh is one `inlay dev --ebpf` in a namespace of the test's own.
type mesh struct {
	t           *testing.T
	bin         built
	home        *space
	cgroup      *cgroup
	dir         string
	config, run string // directories
	dev         *proc
	log         *flowLog
}

// newMesh writes the files and starts a mesh at home in a cgroup, whose node is called at addresses.
func newMesh(t *testing.T, home *space, c *cgroup, files map[string]string, addresses ...string) *mesh {
	t.Helper()
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	// Socket paths are bounded (108 bytes), so not below t.TempDir.
	dir, err := os.MkdirTemp("", "inlay-node-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m := &mesh{t: t, bin: b, home: home, cgroup: c, dir: dir, config: filepath.Join(dir, "mesh"), run: filepath.Join(dir, "run")}
	if err := os.Mkdir(m.config, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		m.write(name, text)
	}
	t.Cleanup(func() {
		if m.dev != nil {
			m.dev.end()
		}
		m.cgroup.clean(b, m.run)
	})
	args := []string{b.inlay, "dev", "--ebpf", "--cgroup", m.cgroup.name, "--config", m.config, "--data", filepath.Join(dir, "data"),
		"--run-dir", m.run, "--xds-addr", "127.0.0.1:0", "--xds-mtls-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0", "--metrics-addr", "127.0.0.1:0"}
	for _, a := range addresses {
		args = append(args, "--node-address", a)
	}
	m.dev = startProc(t, "dev", home.command(args...))
	m.dev.line("Next: ")
	m.log = observe(t, b, m.run)
	return m
}

// flowLog is what `inlay observe -f -o json` has shown. Subtests share one.
type flowLog struct {
	p      *proc
	flows  []*nodepb.Flow // guarded by p.mu, as parsed
	parsed int            // lines of p that are in flows
}

// observe follows the flows of a node from now on.
func observe(t *testing.T, b built, runDir string) *flowLog {
	t.Helper()
	return &flowLog{p: startProc(t, "observe", exec.Command(b.inlay, "observe", "-f", "-o", "json", "--last", "0", "--run-dir", runDir))}
}

// await waits for a flow of which holds is true.
func (l *flowLog) await(t *testing.T, what string, holds func(*nodepb.Flow) bool) *nodepb.Flow {
	t.Helper()
	var found *nodepb.Flow
	looked := 0
	l.p.await(t, "flow "+what, func() bool {
		for ; l.parsed < len(l.p.lines); l.parsed++ {
			f := &nodepb.Flow{}
			if err := protojson.Unmarshal([]byte(l.p.lines[l.parsed]), f); err != nil {
				t.Errorf("observe: %v in %s", err, l.p.lines[l.parsed])
			}
			l.flows = append(l.flows, f)
		}
		for ; looked < len(l.flows); looked++ {
			if found = l.flows[looked]; holds(found) {
				return true
			}
		}
		return false
	})
	return found
}

// flow waits for a flow of this mesh.
func (m *mesh) flow(what string, holds func(*nodepb.Flow) bool) *nodepb.Flow {
	m.t.Helper()
	return m.log.await(m.t, what, holds)
}

// write puts a file in place by rename, as editors and deployments do.
func (m *mesh) write(name, text string) {
	m.t.Helper()
	tmp := filepath.Join(m.config, "."+name+".new")
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(m.config, name)); err != nil {
		m.t.Fatal(err)
	}
}

// remove takes a file out of the configuration.
func (m *mesh) remove(name string) {
	m.t.Helper()
	if err := os.Remove(filepath.Join(m.config, name)); err != nil {
		m.t.Fatal(err)
	}
}

// program is what a test starts below `inlay run --ebpf`.
type program struct {
	service string
	at      *space // nil: at home
	flags   []string
	env     []string
	args    []string
}

// start starts a program in the mesh.
func (m *mesh) start(p program) *proc {
	m.t.Helper()
	return m.startBelow(m.run, p)
}

// startBelow is start at the node of a run directory.
func (m *mesh) startBelow(runDir string, p program) *proc {
	m.t.Helper()
	if p.at == nil {
		p.at = m.home
	}
	args := append([]string{m.bin.inlay, "run", "--run-dir", runDir, "--ebpf", "--user", "root", "--service", p.service}, p.flags...)
	args = append(args, "--")
	for _, kv := range p.env {
		if strings.HasPrefix(kv, "NODE_RESOLV=") { // see underResolver
			then := ""
			p.env = slices.DeleteFunc(slices.Clone(p.env), func(kv string) bool {
				role, ok := strings.CutPrefix(kv, "NODE_ROLE=")
				if ok {
					then = role
				}
				return ok
			})
			p.env = append(p.env, "NODE_ROLE=resolv", "NODE_THEN="+then)
			args = append(args, self(m.t))
			break
		}
	}
	return startProc(m.t, p.service, p.at.command(append(args, p.args...)...), p.env...)
}

// client starts a program of one of the kinds that the table has: go, glibc, python, curl.
func (m *mesh) client(kind string, p program) *proc {
	m.t.Helper()
	client := func(name string) string {
		path, err := filepath.Abs(filepath.Join("testdata", name))
		if err != nil {
			m.t.Fatal(err)
		}
		return path
	}
	switch kind {
	case "go":
		p.args = []string{self(m.t)}
		p.env = append(p.env, "NODE_ROLE=client", "GODEBUG="+clientDebug)
	case "glibc":
		p.args = []string{m.bin.client}
	case "python":
		p.args = []string{"/usr/bin/env", "python3", client("client.py")}
	case "curl":
		p.args = []string{"/bin/sh", client("client.sh")}
		p.env = append(p.env, "CURL_OUT="+filepath.Join(m.dir, "curl-"+random()))
	default:
		m.t.Fatalf("client %q: unknown", kind)
	}
	return m.start(p)
}

// server starts a Go server whose answers begin with its name, and waits until it serves.
func (m *mesh) server(p program, name string, env ...string) *proc {
	m.t.Helper()
	p.args = []string{self(m.t)}
	p.env = append(append(p.env, env...), "NODE_ROLE=server", "NODE_NAME="+name)
	s := m.start(p)
	if line := s.reply(); line != "ready" {
		m.t.Fatalf("server %s said %q", name, line)
	}
	return s
}

// virtual is where a service is called: its IPv4 and its IPv6 address.
type virtual struct{ v4, v6 netip.Addr }

// family picks the address for one of 4, 6 and mapped.
func (v virtual) family(net string) netip.Addr {
	if net == "6" {
		return v.v6
	}
	return v.v4
}

// cli runs a verb at home.
func (m *mesh) cli(args ...string) (stdout, stderr string, code int) {
	m.t.Helper()
	return run(m.t, m.home.command(append([]string{m.bin.inlay}, append(args, "--run-dir", m.run)...)...))
}

// virtuals are the addresses of all services, by NAME, or NAME.NAMESPACE outside of the default one.
func (m *mesh) virtuals() map[string]virtual {
	m.t.Helper()
	stdout, stderr, code := m.cli("get", "services", "-o", "json")
	if code != 0 {
		m.t.Fatalf("get services: exit code %d: %s", code, stderr)
	}
	var got struct {
		Services []struct {
			Namespace        string   `json:"namespace"`
			Name             string   `json:"name"`
			VirtualAddresses []string `json:"virtual_addresses"`
		} `json:"services"`
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		m.t.Fatalf("get services: %v in %s", err, stdout)
	}
	out := map[string]virtual{}
	for _, s := range got.Services {
		var v virtual
		for _, text := range s.VirtualAddresses {
			a, err := netip.ParseAddr(text)
			switch {
			case err != nil:
				m.t.Fatalf("service %s: %v", s.Name, err)
			case a.Is4():
				v.v4 = a
			default:
				v.v6 = a
			}
		}
		if !v.v4.IsValid() || !v.v6.IsValid() {
			m.t.Fatalf("service %s has the addresses %v: want one of each family", s.Name, s.VirtualAddresses)
		}
		if s.Namespace != "default" {
			s.Name += "." + s.Namespace
		}
		out[s.Name] = v
	}
	return out
}

// answers waits until a program is answered by one of the names: registrations need a moment.
func answers(t *testing.T, p *proc, words []any, names ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%v answered by %v", words, names), func() bool {
		a := p.ask(words...)
		for _, n := range names {
			if name, _, _ := strings.Cut(a.Text, " "); a.failed() == "" && name == n {
				return true
			}
		}
		return false
	})
}

// in is the same mesh for a subtest, whose programs end with it.
func (m *mesh) in(t *testing.T) *mesh {
	sub := *m
	sub.t = t
	return &sub
}
