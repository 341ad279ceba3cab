package continuity

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// mesh is one control plane and one node with its agent, each a process of the test, as two units of an
// init system would be.
type mesh struct {
	t           *testing.T
	dir, config string
	run         string   // run directory
	state       string   // of the agent
	cgroup      string   // name of the managed cgroup
	number      int64    // of the mesh: its ports and its resolver are its own
	nodeFlags   []string // beside the usual ones
	cp, node    *proc
	daemons     []*proc // all that were started, dead ones too
	programs    []*proc
	starts      int // of the node
	reports     int // asked for
}

var meshes atomic.Int64

// need leaves a test out where the machine cannot run it; in CI, which can, that is a failure.
func need(t *testing.T) {
	t.Helper()
	var why string
	switch err := load.Check(); {
	case os.Geteuid() != 0:
		why = "programs are loaded into the kernel by root: run the test as root"
	case err != nil:
		why = err.Error()
	default:
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// newMesh writes the files, and starts the control plane and a node of version A.
func newMesh(t *testing.T, files map[string]string, nodeFlags ...string) *mesh {
	t.Helper()
	need(t)
	inlay(t, versionA)
	// Socket paths are bounded (108 bytes), so not below t.TempDir.
	dir, err := os.MkdirTemp("", "cont-")
	if err != nil {
		t.Fatal(err)
	}
	number := meshes.Add(1)
	m := &mesh{
		t: t, dir: dir, number: number, config: filepath.Join(dir, "mesh"), run: filepath.Join(dir, "run"), state: filepath.Join(dir, "state"),
		cgroup: fmt.Sprintf("%s-%d", os.Getenv(prefixVariable), number), nodeFlags: nodeFlags,
	}
	t.Cleanup(func() {
		if t.Failed() {
			raw, _ := os.ReadFile(filepath.Join(m.run, "dns.log"))
			t.Logf("--- dns.log:\n%s", raw[max(0, len(raw)-3000):])
		}
		_ = os.RemoveAll(dir)
	})
	for _, d := range []string{m.config, m.run} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		m.write(name, text)
	}
	t.Cleanup(m.clean)
	m.startControlPlane()
	m.startNode(versionA).ready()
	return m
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

func (m *mesh) startControlPlane() {
	m.t.Helper()
	m.cp = start(m.t, "control plane", exec.Command(inlay(m.t, versionA), "controlplane", "--config", m.config, "--data", filepath.Join(m.dir, "data"),
		"--run-dir", m.run, "--xds-mtls-addr", "", "--admin-addr", "127.0.0.1:0", "--ready-fd", "3"), true, false)
	m.daemons = append(m.daemons, m.cp)
	m.cp.ready()
}

// startNode starts a node of a version. It does not wait until it is ready.
func (m *mesh) startNode(version string) *proc {
	m.t.Helper()
	m.starts++
	args := append([]string{
		"node", "--ebpf", "--cgroup", m.cgroup, "--run-dir", m.run, "--state-dir", m.state, "--allow", "0=*",
		"--metrics-addr", "127.0.0.1:0", "--log-level", "info", "--ready-fd", "3",
	}, m.nodeFlags...)
	m.node = start(m.t, fmt.Sprintf("node %d (version %s)", m.starts, version), exec.Command(inlay(m.t, version), args...), true, false)
	m.daemons = append(m.daemons, m.node)
	return m.node
}

// clean ends what runs, the daemons last, removes what the mesh left in the kernel, and sees that all of
// it is gone.
func (m *mesh) clean() {
	all := append(slices.Clone(m.daemons), m.programs...)
	for _, p := range slices.Backward(all) {
		p.end()
	}
	for _, p := range all {
		p.check()
	}
	stdout, stderr, code := m.cli("node", "cleanup", "--cgroup", m.cgroup, "--run-dir", m.run)
	if code != 0 || strings.Contains(stderr, "left ") {
		m.t.Errorf("inlay node cleanup: exit code %d: %s%s", code, stdout, stderr)
	}
	mnt, err := load.FindCgroup2()
	if err != nil {
		m.t.Error(err)
	}
	for _, path := range []string{filepath.Join(mnt, m.cgroup), filepath.Join(load.BPFFS, "inlay-"+m.cgroup)} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			m.t.Errorf("%s is left after cleanup (%v)", path, err)
		}
	}
}

// pin is the directory of the pins.
func (m *mesh) pin() string { return filepath.Join(load.BPFFS, "inlay-"+m.cgroup) }

// cli runs a verb to its end.
func (m *mesh) cli(args ...string) (stdout, stderr string, code int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, inlay(m.t, versionA), args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		m.t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// program starts a role of this test binary below `inlay run --ebpf`.
func (m *mesh) program(service, role string, settings any, flags ...string) *proc {
	m.t.Helper()
	p := m.tryProgram(service, role, settings, flags...)
	p.reported("ready", func(r report) bool { return r.Kind == "ready" })
	return p
}

// tryProgram does not wait until the program says that it runs.
func (m *mesh) tryProgram(service, role string, settings any, flags ...string) *proc {
	m.t.Helper()
	self, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	raw, err := json.Marshal(settings)
	if err != nil {
		m.t.Fatal(err)
	}
	args := append([]string{"run", "--run-dir", m.run, "--ebpf", "--user", "root", "--service", service}, flags...)
	cmd := exec.Command(inlay(m.t, versionA), append(args, "--", self)...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role, settingsVariable+"="+string(raw))
	p := start(m.t, service+"/"+role, cmd, false, true)
	m.programs = append(m.programs, p)
	return p
}

// ask has a program report what it counted so far; finish ends what it does first.
func (m *mesh) ask(p *proc) report    { return m.tell(p, "stats") }
func (m *mesh) finish(p *proc) report { return m.tell(p, "finish") }

func (m *mesh) tell(p *proc, what string) report {
	m.t.Helper()
	m.reports++
	id := m.reports
	if _, err := fmt.Fprintf(p.stdin, "%s %d\n", what, id); err != nil {
		m.t.Fatalf("%s: %v", p.name, err)
	}
	return p.reported(what, func(r report) bool { return r.Kind == what && r.ID == id })
}

// eventually asks again, as there is nothing to wait on in another process, until it is true.
func (m *mesh) eventually(what string, holds func() bool) time.Duration {
	m.t.Helper()
	began := time.Now()
	for !holds() {
		if time.Since(began) > patience {
			m.t.Fatalf("never saw %s", what)
		}
		<-time.After(10 * time.Millisecond) // leave the processors to those who are asked
	}
	return time.Since(began)
}

// addressOf is the virtual address of IPv4 of addressesOf.
func (m *mesh) addressOf(service string, endpoints int) netip.Addr {
	m.t.Helper()
	four, _ := m.addressesOf(service, endpoints)
	return four
}

// addressesOf waits until a service has its virtual addresses and, unless endpoints is 0, so many
// endpoints, and returns the addresses.
func (m *mesh) addressesOf(service string, endpoints int) (four, six netip.Addr) {
	m.t.Helper()
	m.eventually(fmt.Sprintf("an address and %d endpoints of %s", endpoints, service), func() bool {
		stdout, stderr, code := m.cli("get", "services", "--run-dir", m.run, "-o", "json")
		if code != 0 {
			m.t.Fatalf("inlay get services: exit code %d: %s", code, stderr)
		}
		var got struct {
			Services []struct {
				Name             string
				Ready            int
				VirtualAddresses []string `json:"virtual_addresses"`
			}
		}
		if err := json.Unmarshal([]byte(stdout), &got); err != nil {
			m.t.Fatalf("inlay get services: %v in %s", err, stdout)
		}
		for _, s := range got.Services {
			if s.Name != service || s.Ready < endpoints {
				continue
			}
			for _, v := range s.VirtualAddresses {
				if a, err := netip.ParseAddr(v); err == nil && a.Is4() {
					four = a
				} else if err == nil {
					six = a
				}
			}
		}
		return four.IsValid() && six.IsValid()
	})
	return four, six
}

// dialFlows opens the flow log of the agent.
func (m *mesh) dialFlows() (nodepb.FlowsClient, func()) {
	m.t.Helper()
	conn, err := grpc.NewClient("passthrough:///flows", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(m.run, "flows.sock"))
		}))
	if err != nil {
		m.t.Fatal(err)
	}
	return nodepb.NewFlowsClient(conn), func() { _ = conn.Close() }
}

// agent is the state of the agent as it tells it.
func (m *mesh) agent() *nodepb.Agent {
	m.t.Helper()
	c, hangUp := m.dialFlows()
	defer hangUp()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a, err := c.GetAgent(ctx, &nodepb.GetAgentRequest{})
	if err != nil {
		m.t.Fatalf("GetAgent: %v", err)
	}
	return a
}

// flows are those of the past that match a query.
func (m *mesh) flows(query string) []*nodepb.Flow {
	m.t.Helper()
	c, hangUp := m.dialFlows()
	defer hangUp()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := c.Observe(ctx, &nodepb.ObserveRequest{Query: query})
	var out []*nodepb.Flow
	for err == nil {
		var r *nodepb.ObserveResponse
		if r, err = s.Recv(); err == nil && r.Flow != nil {
			out = append(out, r.Flow)
		}
	}
	if !errors.Is(err, io.EOF) {
		m.t.Fatalf("observe %q: %v", query, err)
	}
	return out
}

// settled waits until no record is on its way to the agent, and returns what it counted: made = kept +
// lost, or it never comes to that.
func (m *mesh) settled() *nodepb.Agent {
	m.t.Helper()
	var a *nodepb.Agent
	deadline := time.Now().Add(15 * time.Second)
	for {
		if a = m.agent(); a.Made == a.Kept+a.Lost {
			return a
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("records: made %d, kept %d, lost %d: want made = kept + lost", a.Made, a.Kept, a.Lost)
		}
		<-time.After(10 * time.Millisecond) // in another process there is nothing to wait on
	}
}

// metric sums the samples of a Prometheus metric whose line has all of labels; ok is false when there
// is none.
func (m *mesh) metric(name string, labels ...string) (sum float64, ok bool) {
	m.t.Helper()
	resp, err := http.Get("http://" + m.node.at["metrics"] + "/metrics")
	if err != nil {
		m.t.Fatalf("metrics: %v", err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		m.t.Fatalf("metrics: %v", err)
	}
	for line := range strings.Lines(string(raw)) {
		at := strings.LastIndexByte(strings.TrimSpace(line), ' ')
		if at < 0 {
			continue
		}
		head, value := line[:at], strings.TrimSpace(line[at:])
		if bare, _, _ := strings.Cut(head, "{"); bare != name || !containsAll(head, labels) {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			m.t.Fatalf("metrics: %q: %v", line, err)
		}
		sum, ok = sum+v, true
	}
	return sum, ok
}

// namesState is what the DNS proxy tells on its control socket (ebpf/proxy, Status).
type namesState struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
	Queries uint64 `json:"queries"`
}

// names is the state of the DNS proxy, once one answers.
func (m *mesh) names() namesState {
	m.t.Helper()
	var st namesState
	m.eventually("a DNS proxy", func() bool {
		var err error
		st, err = askNames(filepath.Join(m.run, "dns.sock"))
		return err == nil
	})
	return st
}

// askNames asks a DNS proxy for its state: a line of JSON each way.
func askNames(socket string) (namesState, error) {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return namesState{}, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := io.WriteString(conn, `{"op":"status"}`+"\n"); err != nil {
		return namesState{}, err
	}
	var answer struct {
		Status *namesState `json:"status"`
	}
	if err := json.NewDecoder(conn).Decode(&answer); err != nil {
		return namesState{}, err
	}
	if answer.Status == nil {
		return namesState{}, errors.New("it tells no state")
	}
	return *answer.Status, nil
}

// usage of a map, as the agent tells it.
func (m *mesh) usage(name string) (entries, capacity uint64) {
	m.t.Helper()
	for _, u := range m.agent().Maps {
		if u.Name == name {
			return u.Entries, u.Capacity
		}
	}
	m.t.Fatalf("the agent does not tell of map %s", name)
	return 0, 0
}

// counters are what the programs counted, read from the pins: no agent is needed.
func (m *mesh) counters() map[uint32]uint64 {
	m.t.Helper()
	maps, err := load.OpenMaps(m.pin())
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = maps.Close() }()
	out := map[uint32]uint64{}
	for i := range maps.Counters.MaxEntries() {
		var each []uint64
		if err := maps.Counters.Lookup(i, &each); err != nil {
			m.t.Fatal(err)
		}
		for _, n := range each {
			out[i] += n
		}
	}
	return out
}
