package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// legacyMesh is the configuration of the demo with programs that link no SDK.
const legacyMesh = `# The mesh of ` + "`inlay demo-legacy`" + `.
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: legacy}          # python3 -m http.server
spec:
  mtls: permissive
  ports: [{port: 80, protocol: HTTP}]
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: payments}        # Go with the SDK, plaintext allowed
spec:
  mtls: permissive
  ports: [{port: 8080, protocol: HTTP}]
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: visitors}        # curl; it serves nobody, so nobody declares it
spec:
  workloads: {labels: {role: visitor}}
  egress:
  - name: not-to-legacy
    action: deny
    to: [{service: legacy}]
`

func demoLegacyCommand() *cobra.Command {
	var length time.Duration
	var out format
	cmd := &cobra.Command{
		Use:   "demo-legacy",
		Short: "Put curl and a Python server into a mesh of their own and watch them (root)",
		Long: `Run a mesh of its own with the node agent, and in it two programs that know nothing of a mesh: a Python
http.server that a Go service with the SDK calls by its name, and curl, which calls a permissive Go
service by its name, through DNS and a virtual address, and is denied the Python server by a policy. It
shows the flows as ` + "`inlay observe`" + ` does, and the metrics by curl; it ends by itself, with a summary, and
takes every pin, cgroup and process of its own away. It makes no network namespace.`,
		Example: "  sudo inlay demo-legacy\n  sudo inlay demo-legacy --for 20s -o json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if length <= 0 {
				return usageError(fmt.Errorf("--for %v: want more than 0, as 20s", length))
			}
			if err := needRoot("the demo loads programs into the kernel, which is root's to do"); err != nil {
				return err
			}
			if err := load.Check(); err != nil {
				return coded(err)
			}
			return runLegacyDemo(c.Context(), length, out, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	cmd.Flags().DurationVar(&length, "for", 20*time.Second, "how long the traffic lasts")
	outputFlag(cmd, &out)
	return cmd
}

// legacySummary is what the demo ends with. Field names are part of the interface.
type legacySummary struct {
	// Calls that were made: by the SDK to the Python server, and by curl to the Go service.
	Calls uint64 `json:"calls"`
	// Failed of Calls, and calls that should have been denied and were not.
	Failed uint64 `json:"failed"`
	// Denied are curl's calls that the policy refused.
	Denied uint64 `json:"denied"`
	// Flows that the node recorded, and records that were lost for want of room.
	Flows uint64 `json:"flows"`
	Lost  uint64 `json:"lost"`
}

// legacyDemo is one run of it.
type legacyDemo struct {
	dir, cgroup, user string
	out               format
	stdout, stderr    io.Writer
	dev               *dev
	programs          demoPrograms
	served            uint16 // port of the Python server
}

func runLegacyDemo(ctx context.Context, length time.Duration, out format, stdout, stderr io.Writer) (err error) {
	d := &legacyDemo{out: out, stdout: stdout, stderr: stderr, cgroup: fmt.Sprintf("inlay-demo-%d", os.Getpid()), user: "nobody"}
	if sudo := os.Getenv("SUDO_UID"); sudo != "" && sudo != "0" {
		d.user = sudo
	}
	account, err := lookupAccount(d.user)
	if err != nil {
		return err
	}
	tools, err := findTools("python3", "curl", "sh")
	if err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "inlay-demo-"); err != nil {
		return fmt.Errorf("demo: %w; set TMPDIR to a directory that can be written", err)
	}
	// Whatever happens, nothing stays: the programs, then the mesh, then what they left in the kernel.
	defer func() {
		err = errors.Join(err, d.clean())
		_ = os.RemoveAll(d.dir)
	}()
	config, site := filepath.Join(d.dir, "mesh"), filepath.Join(d.dir, "site")
	if err := errors.Join(
		os.Chmod(d.dir, 0o755), // the programs' user reaches the sockets in it
		os.Mkdir(config, 0o755), os.WriteFile(filepath.Join(config, "demo.yaml"), []byte(legacyMesh), 0o644),
		os.Mkdir(site, 0o755), os.WriteFile(filepath.Join(site, "index.html"), []byte("from a program that knows no mesh\n"), 0o644),
	); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if d.served, err = freePort(); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	if d.dev, err = newDev(devFlags{
		config: config, data: filepath.Join(d.dir, "data"), runDir: filepath.Join(d.dir, "run"), trustDomain: "inlay.local",
		xdsMTLSAddr: "127.0.0.1:0", adminAddr: "127.0.0.1:0", svidTTL: time.Hour,
		agent: agentFlags{ebpf: true, cgroup: d.cgroup, metrics: "127.0.0.1:0", suffix: "mesh", stats: true},
		users: []string{fmt.Sprintf("%d=*", account.uid)},
	}, stdout, stderr); err != nil {
		return err
	}
	stopDev, err := d.startDev(ctx)
	if err != nil || stopDev == nil {
		return err
	}
	defer stopDev()
	return d.play(ctx, length, tools, site)
}

// startDev starts the mesh and returns what stops it and waits; nil when ctx ended before.
func (d *legacyDemo) startDev(ctx context.Context) (stop func(), err error) {
	devCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	up, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- d.dev.run(devCtx, func() { close(up) }) }()
	select {
	case <-up:
		return sync.OnceFunc(func() {
			cancel()
			if err := <-done; err != nil {
				fmt.Fprintln(d.stderr, "demo:", err)
			}
		}), nil
	case err := <-done:
		cancel()
		return nil, fmt.Errorf("demo: %w", err)
	case <-ctx.Done():
		cancel()
		return nil, <-done
	}
}

// play starts the programs, has them call each other for length, and prints the summary.
func (d *legacyDemo) play(ctx context.Context, length time.Duration, tools map[string]string, site string) (err error) {
	run := d.dev.places.run
	d.programs = demoPrograms{self: d.dev.self, runDir: run, dir: d.dir, stderr: d.stderr, died: make(chan error, 8)}
	defer d.programs.kill()
	p := &d.programs
	p.stderr = &lineFilter{to: d.stderr, drop: []byte(`"GET / HTTP/1.1" 200 -`)} // the Python server's log of what went well
	managed := func(service string, flags ...string) []string {
		return append([]string{"run", "--run-dir", run, "--ebpf", "--user", d.user, "--service", service}, flags...)
	}
	port := fmt.Sprint(d.served)
	if err := p.start("payments", ""); err != nil {
		return err
	}
	if err := p.launch("legacy", true, append(managed("legacy", "--port", "80:"+port, "--"),
		tools["python3"], "-m", "http.server", port, "--bind", "127.0.0.1", "--directory", site), nil, io.Discard); err != nil {
		return err
	}
	if err := p.start("clerk", ""); err != nil {
		return err
	}
	asks, tells, err := d.startVisitor(managed("visitor", "--label", "role=visitor", "--"), tools)
	if err != nil {
		return err
	}
	seen := newFlowCount()
	stopWatching := d.watch(ctx, seen)
	defer stopWatching()
	v := &visitorLog{asks: asks, tells: tells}
	if err := v.warmUp(ctx, seen); err != nil {
		return err
	}
	ended := d.traffic(ctx, length, v, seen)
	// Callers first; what they have in flight is finished and told.
	ended = errors.Join(ended, asks.Close(), p.stop())
	d.showMetrics(ctx, tools["curl"])
	agent, err := d.agentState(ctx)
	stopWatching()
	if err != nil {
		return errors.Join(ended, err)
	}
	counters, err := ask(context.WithoutCancel(ctx), &target{runDir: run}, &adminpb.GetCountersRequest{}, adminconnect.AdminClient.GetCounters)
	if err != nil {
		return errors.Join(ended, err)
	}
	sdk := summarize(counters)
	s := legacySummary{
		Calls: sdk.Calls + v.calls, Failed: sdk.Failed + v.failed, Denied: v.denied,
		Flows: seen.all(), Lost: agent.GetLost(),
	}
	return errors.Join(ended, d.conclude(s, sdk.Calls, seen))
}

// traffic has the visitor call until length has passed.
func (d *legacyDemo) traffic(ctx context.Context, length time.Duration, v *visitorLog, seen *flowCount) error {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	end := time.After(length)
	for {
		if err := v.once(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-end:
			return nil
		case err := <-d.programs.died:
			return err
		case err := <-seen.broken:
			return err
		case <-tick.C:
		}
	}
}

// flowCount counts flows that an observer was sent.
type flowCount struct {
	mu     sync.Mutex
	n      uint64
	denied *nodepb.Flow // the newest that names its rule
	broken chan error
}

func newFlowCount() *flowCount { return &flowCount{broken: make(chan error, 1)} }

func (c *flowCount) add(f *nodepb.Flow) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	if f.GetVerdict() == "denied" && f.GetSource() != "" {
		c.denied = f
	}
}

func (c *flowCount) all() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *flowCount) rule() *nodepb.Flow {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.denied
}

// watch prints flows as `inlay observe -f` does, until the returned function is called.
func (d *legacyDemo) watch(ctx context.Context, seen *flowCount) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	w := d.stdout
	if d.out != formatTable {
		w = io.Discard
	}
	printer := newFlowPrinter(w, d.stderr, formatTable, true)
	go func() {
		defer close(done)
		err := d.follow(ctx, func(r *nodepb.ObserveResponse) error {
			if f := r.GetFlow(); f != nil {
				seen.add(f)
			}
			return printer.add(r)
		})
		if err != nil && ctx.Err() == nil {
			seen.broken <- err
		}
	}()
	return func() { cancel(); <-done }
}

func (d *legacyDemo) follow(ctx context.Context, each func(*nodepb.ObserveResponse) error) error {
	socket := d.dev.places.flowsSocket()
	client, hangUp, err := dialFlows(socket)
	if err != nil {
		return err
	}
	defer hangUp()
	s, err := client.Observe(ctx, &nodepb.ObserveRequest{Follow: true})
	for err == nil {
		var r *nodepb.ObserveResponse
		if r, err = s.Recv(); err == nil {
			err = each(r)
		}
	}
	return flowsError(socket, err)
}

func (d *legacyDemo) agentState(ctx context.Context) (*nodepb.Agent, error) {
	socket := d.dev.places.flowsSocket()
	client, hangUp, err := dialFlows(socket)
	if err != nil {
		return nil, err
	}
	defer hangUp()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	a, err := client.GetAgent(ctx, &nodepb.GetAgentRequest{})
	if err != nil {
		return nil, flowsError(socket, err)
	}
	return a, nil
}

// showMetrics has curl fetch what Prometheus would, and prints the lines of calls.
func (d *legacyDemo) showMetrics(ctx context.Context, curl string) {
	url := "http://" + d.dev.agentAt("metrics") + "/metrics"
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	raw, err := exec.CommandContext(ctx, curl, "--silent", "--show-error", "--fail", "--noproxy", "*", url).CombinedOutput()
	if err != nil {
		fmt.Fprintf(d.stderr, "demo: curl %s: %v: %s\n", url, err, bytes.TrimSpace(raw))
		return
	}
	if d.out != formatTable {
		return
	}
	fmt.Fprintf(d.stdout, "\ncurl %s\n", url)
	for line := range bytes.Lines(raw) {
		if bytes.Contains(line, []byte("_total{")) && (bytes.Contains(line, []byte("legacy")) || bytes.Contains(line, []byte("payments"))) {
			fmt.Fprintf(d.stdout, "  %s", line)
		}
	}
}

// conclude prints the summary and says what was not as promised.
func (d *legacyDemo) conclude(s legacySummary, sdkCalls uint64, seen *flowCount) error {
	denied := seen.rule()
	format := d.out
	if format == formatTable {
		if denied != nil {
			fmt.Fprintf(d.stdout, "\ndenied by %s, rule %s, %s\n", denied.GetPolicy(), denied.GetRule(), denied.GetSource())
		}
		format = formatJSON // what people see ends in what programs read
	}
	if err := format.printValue(d.stdout, s); err != nil {
		return err
	}
	var faults []string
	for _, f := range []struct {
		bad  bool
		text string
	}{
		{s.Failed > 0, fmt.Sprintf("%d calls failed, or were allowed and should not be", s.Failed)},
		{sdkCalls == 0, "the SDK made no call to the Python server"},
		{s.Calls == sdkCalls, "curl made no call to the Go service"},
		{s.Denied == 0, "no call was denied"},
		{denied == nil, "no flow of a denied call names its policy"},
	} {
		if f.bad {
			faults = append(faults, f.text)
		}
	}
	if len(faults) > 0 {
		return &exitError{exitFailed, errors.New("demo: " + strings.Join(faults, "; "))}
	}
	return nil
}

// findTools finds programs of this machine; those of the system first, since another user than root
// must be able to run them.
func findTools(names ...string) (map[string]string, error) {
	out := map[string]string{}
	for _, name := range names {
		for _, dir := range []string{"/usr/bin", "/bin", "/usr/local/bin"} {
			if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
				out[name] = path
				break
			}
		}
		if out[name] == "" {
			path, err := exec.LookPath(name)
			if err != nil {
				return nil, fmt.Errorf("demo: %s is not installed: it plays a program that knows no mesh: install it, as with: apt-get install %s", name, name)
			}
			out[name] = path
		}
	}
	return out, nil
}

// freePort is a port of loopback that nobody listens on now.
func freePort() (uint16, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer func() { _ = l.Close() }()
	return uint16(l.Addr().(*net.TCPAddr).Port), nil
}
