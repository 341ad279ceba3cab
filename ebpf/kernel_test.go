package ebpf

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	ossignal "os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/fx"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// role names what a process of this test binary does instead of running tests.
const role = "INLAY_AGENT_ROLE"

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(role) {
	case "":
		os.Exit(m.Run())
	case "agent":
		err = beAgent()
	case "program":
		err = beProgram()
	case "proxy":
		err = beProxy()
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

// beAgent runs an agent that its standard input commands.
func beAgent() error {
	var cfg Config
	var plain struct {
		Cgroup, Pin, RunDir, StateDir, ControlPlane string
		ProxyCommand                                []string
	}
	if err := json.Unmarshal([]byte(os.Getenv("INLAY_AGENT_CONFIG")), &plain); err != nil {
		return err
	}
	cfg = Config{Cgroup: plain.Cgroup, Pin: plain.Pin, RunDir: plain.RunDir, StateDir: plain.StateDir, ControlPlane: plain.ControlPlane,
		ProxyCommand: plain.ProxyCommand,
		Metrics:      "127.0.0.1:0", Grace: 100 * time.Millisecond, Stats: true, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	a, err := New(cfg)
	if err != nil {
		return err
	}
	ctx, cancel := ossignal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	select {
	case <-a.Ready():
		fmt.Println("ready", a.MetricsAddr())
	case err := <-ended:
		return err
	}
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			w := strings.Fields(in.Text())
			switch w[0] {
			case "admit": // RUN SERVICE [CGROUP]
				adm := Admission{RunID: w[1], Namespace: "default", Service: w[2]}
				if len(w) > 3 {
					adm.Cgroup = w[3]
				}
				path, err := a.Admit(ctx, adm)
				fmt.Println(path, err)
			case "leave":
				a.Leave(w[1])
				fmt.Println("left")
			case "find":
				pid, _ := strconv.Atoi(w[1])
				fmt.Println(a.Find(pid))
			}
		}
	}()
	return <-ended
}

// beProxy is the DNS proxy: its arguments are the pins and the control socket.
func beProxy() error {
	maps, err := load.OpenMaps(os.Args[1])
	if err != nil {
		return err
	}
	defer maps.Close()
	return proxy.Run(context.Background(), proxy.Config{Maps: maps, Socket: os.Args[2], Version: "dev"})
}

// beProgram is a managed program: it dials as its standard input says.
func beProgram() error {
	var held net.Conn
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("ready")
	for in.Scan() {
		w := strings.Fields(in.Text())
		switch w[0] {
		case "dial":
			c, err := net.DialTimeout("tcp", w[1], 5*time.Second)
			if err != nil {
				fmt.Println("failed:", err)
				continue
			}
			fmt.Println("ok", c.RemoteAddr())
			c.Close()
		case "hold":
			var err error
			held, err = net.DialTimeout("tcp", w[1], 5*time.Second)
			fmt.Println("held", err)
		case "ping": // over the held connection
			held.SetDeadline(time.Now().Add(5 * time.Second))
			_, err := held.Write([]byte("x"))
			if err == nil {
				_, err = io.ReadFull(held, make([]byte, 1))
			}
			fmt.Println("pong", err)
		case "probe": // ALLOWED DENIED, until the next line
			stop, wrong, n := make(chan struct{}), "", 0
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					select {
					case <-stop:
						return
					default:
					}
					n++
					if c, err := net.DialTimeout("tcp", w[1], 5*time.Second); err == nil {
						c.Close()
					} else if wrong == "" {
						wrong = "allowed one failed: " + err.Error()
					}
					if c, err := net.DialTimeout("tcp", w[2], 5*time.Second); err == nil {
						c.Close()
						wrong = "denied one passed"
					} else if !errors.Is(err, syscall.EPERM) && wrong == "" {
						wrong = "denied one: " + err.Error()
					}
				}
			}()
			in.Scan()
			close(stop)
			<-done
			fmt.Println("probed", n, wrong)
		}
	}
	return in.Err()
}

// child is a process of this binary that answers lines with lines.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startChild(t *testing.T, what string, attr *syscall.SysProcAttr, env ...string) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command("/proc/self/exe")}
	c.cmd.Env = append(append(os.Environ(), role+"="+what), env...)
	c.cmd.SysProcAttr = attr
	c.cmd.Stderr = testWriter{t, what}
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	if line := c.read(); !strings.HasPrefix(line, "ready") {
		t.Fatalf("%s: %s", what, line)
	}
	return c
}

type testWriter struct {
	t    *testing.T
	what string
}

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s: %s", w.what, strings.TrimSpace(string(b)))
	return len(b), nil
}

func (c *child) read() string {
	c.t.Helper()
	timer := time.AfterFunc(2*patience, func() { c.cmd.Process.Kill() })
	defer timer.Stop()
	line, err := c.out.ReadString('\n')
	if err != nil {
		c.t.Fatalf("child: %v after %q", err, line)
	}
	return strings.TrimSpace(line)
}

func (c *child) ask(format string, args ...any) string {
	c.t.Helper()
	if _, err := fmt.Fprintf(c.in, format+"\n", args...); err != nil {
		c.t.Fatal(err)
	}
	return c.read()
}

// kill is SIGKILL; it waits, and may be called twice.
func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		c.cmd.Process.Kill()
		c.cmd.Wait()
	}
}

func needKernel(t *testing.T) {
	t.Helper()
	if err := load.Check(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI must run this: %v", err)
		}
		t.Skipf("SKIPPED, this proves nothing: %v", err)
	}
}

// echo answers each byte, on loopback.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

func endpointService(name, vip, endpoint string) *nodepb.Service {
	s := &nodepb.Service{Namespace: "default", Name: name, VirtualAddresses: []string{vip}, Workloads: []*nodepb.Workload{{Addresses: []string{"127.0.0.1"}}},
		Ports: []*nodepb.ServicePort{{Port: 80}}}
	if endpoint != "" {
		s.Ports[0].Endpoints = []*nodepb.Endpoint{{Address: endpoint, Weight: 1}}
	}
	return s
}

func denyTo(client string, services ...string) *nodepb.Policies {
	p := &nodepb.Policies{Namespace: "default", Service: client}
	for _, s := range services {
		p.Policies = append(p.Policies, &nodepb.Policy{
			Namespace: "default", Name: "no-" + s, Source: "mesh.yaml:7",
			Subjects: []*nodepb.Selector{{Namespace: "default", Service: client}},
			Egress: []*nodepb.PolicyRule{{Name: "keep-out", Source: "mesh.yaml:9", Deny: true,
				Peers: []*nodepb.Peer{{Kind: &nodepb.Peer_Workloads{Workloads: &nodepb.Selector{Namespace: "default", Service: s}}}}}},
		})
	}
	return p
}

// place makes names of a managed cgroup and its pins, which are removed at the end of the test.
func place(t *testing.T) (name, root, pin string) {
	t.Helper()
	needKernel(t)
	name = fmt.Sprintf("inlay-test-%08x", rand.Uint32())
	root, err := load.ResolveCgroup(name)
	if err != nil {
		t.Fatal(err)
	}
	pin = filepath.Join(load.BPFFS, name)
	t.Cleanup(func() {
		if _, err := load.Cleanup(pin); err != nil {
			t.Errorf("pins left: %v", err)
		}
		os.Remove(pin)
		if leaves, err := (&cgroups{root: root}).leaves(); err == nil {
			for _, leaf := range leaves {
				os.Remove(leaf)
			}
		}
		if err := os.Remove(root); err != nil && !os.IsNotExist(err) {
			t.Errorf("cgroup left: %v", err)
		}
	})
	return name, root, pin
}

func TestModuleOnTheKernel(t *testing.T) {
	name, root, pin := place(t)
	cp := newFakeControlPlane(t)
	cp.start()
	defer cp.stop()
	cfg := testConfig(t, cp, nil)
	cfg.Cgroup, cfg.Pin, cfg.Metrics = name, pin, "127.0.0.1:0"
	var agent *Agent
	app := fx.New(Module(cfg), fx.Populate(&agent), fx.NopLogger)
	if err := app.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c, p := agent.Managed(); c != root || p != pin {
		t.Errorf("manages %s with pins %s, want %s, %s", c, p, root, pin)
	}
	res, err := http.Get("http://" + agent.MetricsAddr() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	page, err := io.ReadAll(res.Body)
	res.Body.Close()
	if err != nil || res.StatusCode != http.StatusOK || !strings.Contains(string(page), "inlay_") {
		t.Errorf("metrics: %s, %v\n%s", res.Status, err, page)
	}
	// Nobody else may manage the cgroup meanwhile.
	other := testConfig(t, cp, nil)
	other.Cgroup, other.Pin, other.Metrics = name, pin, "off"
	second, err := New(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); !errors.Is(err, load.ErrBusy) {
		t.Errorf("a second agent: %v, want load.ErrBusy", err)
	}
	if err := app.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestOnTheKernel(t *testing.T) {
	name, root, pin := place(t)
	cp := newFakeControlPlane(t)
	open, secret := echo(t), echo(t)
	cp.set(endpointService("open", "198.18.77.1", open), endpointService("secret", "198.18.77.2", secret), denyTo("legacy", "secret"))
	cp.start()
	defer cp.stop()
	cfg := testConfig(t, cp, nil)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dns := filepath.Join(cfg.RunDir, ProxySocket)
	t.Cleanup(func() {
		if err := proxy.Stop(context.Background(), dns); err != nil {
			t.Errorf("DNS proxy left: %v", err)
		}
	})
	raw, err := json.Marshal(map[string]any{"Cgroup": name, "Pin": pin, "RunDir": cfg.RunDir, "StateDir": cfg.StateDir, "ControlPlane": cp.path,
		"ProxyCommand": []string{"env", role + "=proxy", self, pin, dns}})
	if err != nil {
		t.Fatal(err)
	}
	start := func() *child { return startChild(t, "agent", nil, "INLAY_AGENT_CONFIG="+string(raw)) }
	agent := start()

	answer := agent.ask("admit run1 legacy")
	leaf, rest, _ := strings.Cut(answer, " ")
	if rest != "<nil>" || filepath.Dir(leaf) != root {
		t.Fatalf("admit: %s", answer)
	}
	fd, err := os.Open(leaf)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	program := startChild(t, "program", &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd())})
	pid := program.cmd.Process.Pid

	expect := func(what, got, want string) {
		t.Helper()
		if !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	const allowed, denied = "198.18.77.1:80", "198.18.77.2:80"
	expect("service address", program.ask("dial %s", allowed), "ok "+allowed)
	expect("denied by policy", program.ask("dial %s", denied), "operation not permitted")
	expect("denied by its own address", program.ask("dial %s", secret), "operation not permitted")
	expect("a long connection", program.ask("hold %s", allowed), "held <nil>")
	expect("Find", agent.ask("find %d", pid), "run1 true <nil>")
	expect("Find of another", agent.ask("find %d", os.Getpid()), "false <nil>")

	// Names, whatever resolver the program uses.
	awaitAnswer(t, "the DNS proxy", func() bool { _, err := proxy.Ask(t.Context(), dns); return err == nil })
	for _, host := range []string{"open.default.mesh", "open.default", "open"} {
		expect("by name "+host, program.ask("dial %s:80", host), "ok "+allowed)
	}
	before, err := proxy.Ask(t.Context(), dns)
	if err != nil {
		t.Fatal(err)
	}

	// The agent dies, three times. Addresses, policy and connections go on; the next one knows all.
	if _, err := fmt.Fprintf(program.in, "probe %s %s\n", allowed, denied); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		agent.kill()
		agent = start()
	}
	got := program.ask("stop")
	if w := strings.Fields(got); len(w) != 2 || w[0] != "probed" || w[1] == "0" {
		t.Errorf("while the agent died and came back: %s", got)
	}
	t.Logf("%s times, nothing wrong", got)
	expect("the long connection", program.ask("ping"), "pong <nil>")
	expect("a name after the agent's deaths", program.ask("dial open.default.mesh:80"), "ok "+allowed)
	if after, err := proxy.Ask(t.Context(), dns); err != nil || after.PID != before.PID {
		t.Errorf("DNS proxy: process %d, %v, want the one of before, %d", after.PID, err, before.PID)
	}
	if p, err := os.FindProcess(before.PID); err != nil || p.Kill() != nil {
		t.Errorf("DNS proxy cannot be killed: %v", err)
	}
	awaitAnswer(t, "another DNS proxy", func() bool {
		return strings.HasPrefix(program.ask("dial open.default.mesh:80"), "ok")
	})
	expect("Find after the restart", agent.ask("find %d", pid), "run1 true <nil>")
	expect("adopting", agent.ask("admit run1 legacy %s", leaf), leaf+" <nil>")
	expect("adopting by another run", agent.ask("admit run2 legacy %s", leaf), "another's")
	expect("adopting the root's parent", agent.ask("admit run2 legacy %s", filepath.Dir(root)), "outside the managed root")

	// The flow log names the denial.
	flows := dialFlows(t, cfg.RunDir)
	expect("denied again", program.ask("dial %s", denied), "operation not permitted")
	f := awaitFlow(t, flows, "verdict=denied and to=secret")
	if f.GetPolicy() != "default/no-secret" || f.GetRule() != "keep-out" || f.GetSource() != "mesh.yaml:9" || f.GetFrom().GetName() != "legacy.default" {
		t.Errorf("flow %v", f)
	}
	state, err := flows.GetAgent(t.Context(), &nodepb.GetAgentRequest{})
	if err != nil || state.GetWorkloads() != 1 || state.GetServices() != 2 || state.GetCgroup() != root || state.GetPin() != pin || state.GetMade() < state.GetKept()+state.GetLost() {
		t.Errorf("agent %v, %v", state, err)
	}

	// A new deny ends the live connection, and the next is refused.
	cp.set(denyTo("legacy", "secret", "open"))
	awaitAnswer(t, "the new policy", func() bool {
		return strings.Contains(program.ask("dial %s", allowed), "operation not permitted")
	})
	awaitAnswer(t, "the end of the live connection", func() bool { return program.ask("ping") != "pong <nil>" })
	// And it is lifted again; then its endpoint goes, which refuses at once and ends what is open.
	cp.set(denyTo("legacy", "secret"))
	awaitAnswer(t, "the old policy", func() bool { return strings.HasPrefix(program.ask("dial %s", allowed), "ok") })
	expect("another connection", program.ask("hold %s", allowed), "held <nil>")
	cp.set(endpointService("open", "198.18.77.1", ""))
	awaitAnswer(t, "no endpoint", func() bool {
		return strings.Contains(program.ask("dial %s", allowed), "connection refused")
	})
	awaitAnswer(t, "the end of its connection", func() bool { return program.ask("ping") != "pong <nil>" })

	// Breakglass, flipped by another process.
	if changed, err := load.Breakglass(pin, true); err != nil || !changed {
		t.Errorf("breakglass: %v, %v", changed, err)
	}
	expect("with breakglass", program.ask("dial %s", denied), "ok "+denied)
	if _, err := load.Breakglass(pin, false); err != nil {
		t.Error(err)
	}
	expect("without again", program.ask("dial %s", denied), "operation not permitted")

	// The registration ends; the program runs on as the workload, and the cgroup goes with it.
	expect("leave", agent.ask("leave run1"), "left")
	expect("after the registration", program.ask("dial %s", denied), "operation not permitted")
	program.kill()
	awaitAnswer(t, "the cgroup's end", func() bool { _, err := os.Stat(leaf); return os.IsNotExist(err) })
}

func dialFlows(t *testing.T, dir string) nodepb.FlowsClient {
	t.Helper()
	cc, err := grpc.NewClient("unix:"+filepath.Join(dir, FlowsSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return nodepb.NewFlowsClient(cc)
}

func awaitFlow(t *testing.T, c nodepb.FlowsClient, query string) *nodepb.Flow {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := c.Observe(ctx, &nodepb.ObserveRequest{Query: query, Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			t.Fatalf("flow %s: %v", query, err)
		}
		if f := r.GetFlow(); f != nil {
			return f
		}
	}
}

// awaitAnswer asks until the answer is the right one: what changes is in the kernel, which tells
// nobody.
func awaitAnswer(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}
