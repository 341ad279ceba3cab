package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

func demoCommand() *cobra.Command {
	var length time.Duration
	var out format
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run five services in a mesh of their own and watch them",
		Long: `Run five small services, gRPC and HTTP mixed, in a mesh of their own: a control plane, a node and
six processes below ` + "`inlay run`" + `, all in a temporary directory and on ports that are free. Every call
is mutually authenticated; calls to orders are split 90/10 over two versions. It ends by itself,
with a summary that the services' own counts make up.`,
		Example: "  inlay demo\n  inlay demo --for 5m\n  inlay demo --for 20s -o json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if length <= 0 {
				return usageError(fmt.Errorf("--for %v: want more than 0, as 20s", length))
			}
			return runDemo(c.Context(), length, out, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	cmd.Flags().DurationVar(&length, "for", 20*time.Second, "how long the traffic lasts")
	outputFlag(cmd, &out)
	return cmd
}

// demoSummary is what the demo ends with. Field names are part of the interface.
type demoSummary struct {
	// Calls that clients finished, and those of them that failed, by the callers' final status.
	Calls  uint64 `json:"calls"`
	Failed uint64 `json:"failed"`
	// Handled is what the servers counted: the other end of the same calls.
	Handled uint64 `json:"handled"`
	// MTLSShare of Calls whose connection was mutually authenticated, 0 to 1.
	MTLSShare float64 `json:"mtls_share"`
	// Split maps each version of orders to its percent of the calls.
	Split map[string]float64 `json:"split"`
	P50   float64            `json:"p50_ms"`
	P99   float64            `json:"p99_ms"`
	// Uncounted calls are in no figure, for want of room in a report.
	Uncounted uint64 `json:"uncounted"`
}

func runDemo(ctx context.Context, length time.Duration, out format, stdout, stderr io.Writer) error {
	dir, err := os.MkdirTemp("", "inlay-demo-")
	if err != nil {
		return fmt.Errorf("demo: %w; set TMPDIR to a directory that can be written", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	config := filepath.Join(dir, "mesh")
	if err := errors.Join(os.Mkdir(config, 0o755), os.WriteFile(filepath.Join(config, "demo.yaml"), []byte(demoMesh), 0o644)); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	d, err := newDev(devFlags{
		config: config, data: filepath.Join(dir, "data"), runDir: filepath.Join(dir, "run"), trustDomain: "inlay.local",
		xdsMTLSAddr: "127.0.0.1:0", adminAddr: "127.0.0.1:0", svidTTL: time.Hour,
	}, stdout, stderr)
	if err != nil {
		return err
	}
	devCtx, stopDev := context.WithCancel(context.WithoutCancel(ctx))
	up, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- d.run(devCtx, func() { close(up) }) }()
	defer func() {
		stopDev()
		if err := <-done; err != nil {
			fmt.Fprintln(stderr, "demo:", err)
		}
	}()
	select {
	case <-up:
	case err := <-done:
		done <- nil
		return fmt.Errorf("demo: %w", err)
	case <-ctx.Done():
		return nil
	}
	p := demoPrograms{self: d.self, runDir: d.places.run, dir: dir, stderr: stderr, died: make(chan error, len(demoProcesses))}
	defer p.kill()
	for _, s := range demoProcesses {
		if err := p.start(s.service, s.version); err != nil {
			return err
		}
	}
	t := &target{runDir: d.places.run}
	ended := watchDemo(ctx, t, length, &p, out, stdout)
	if err := p.stop(); err != nil {
		ended = errors.Join(ended, err)
	}
	counters, err := ask(context.WithoutCancel(ctx), t, &adminpb.GetCountersRequest{}, adminconnect.AdminClient.GetCounters)
	if err != nil {
		return errors.Join(ended, err)
	}
	s := summarize(counters)
	if err := printSummary(stdout, out, s); err != nil {
		return err
	}
	if ended != nil {
		return ended
	}
	if s.Calls == 0 {
		return errors.New("demo: no call was made; the programs' own words are above")
	}
	if s.Failed > 0 {
		return &exitError{exitFailed, fmt.Errorf("demo: %d of %d calls failed", s.Failed, s.Calls)}
	}
	return nil
}

func printSummary(w io.Writer, out format, s demoSummary) error {
	if out != formatTable {
		return out.printValue(w, s)
	}
	var split []string
	for _, v := range sortedKeys(s.Split) {
		split = append(split, fmt.Sprintf("%s %.1f %%", v, s.Split[v]))
	}
	_, err := fmt.Fprintf(w, "\n%d calls, %d failed, handled %d; %.0f %% with mutual TLS; orders: %s; p50 %.2f ms, p99 %.2f ms\n",
		s.Calls, s.Failed, s.Handled, 100*s.MTLSShare, strings.Join(split, ", "), s.P50, s.P99)
	return err
}

// watchDemo shows the traffic until length has passed since the first call, ctx is done, or a
// program ended by itself.
func watchDemo(ctx context.Context, t *target, length time.Duration, p *demoPrograms, out format, w io.Writer) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	screen := screen{w: w, quiet: out != formatTable}
	if f, ok := w.(*os.File); ok {
		screen.redraw = term.IsTerminal(int(f.Fd()))
	}
	patience := time.After(30 * time.Second)
	var end <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-end:
			return nil
		case <-patience:
			if end == nil {
				return errors.New("demo: no call within 30 s; the programs' own words are above")
			}
		case err := <-p.died:
			return err
		case <-tick.C:
			c, err := ask(ctx, t, &adminpb.GetCountersRequest{}, adminconnect.AdminClient.GetCounters)
			if err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return err
			}
			if end == nil && summarize(c).Calls > 0 {
				end = time.After(length)
			}
			screen.show(c)
		}
	}
}

// demoPrograms are the processes of the demo's services.
type demoPrograms struct {
	self, runDir, dir string
	stderr            io.Writer

	all  []*demoProgram
	died chan error // one for each program that ended
}

type demoProgram struct {
	name  string
	cmd   *exec.Cmd
	done  chan struct{} // closed when it ended
	err   error         // set before done is closed
	plain bool          // it ends by SIGTERM itself
}

// failed says how it ended, where that was not as it should.
func (d *demoProgram) failed() error {
	if d.plain && d.cmd.ProcessState.ExitCode() == 128+int(syscall.SIGTERM) {
		return nil
	}
	return d.err
}

func (p *demoPrograms) start(service, version string) error {
	args := []string{"run", "--run-dir", p.runDir, "--service", service}
	name := service
	if version != "" {
		args = append(args, "--version", version)
		name += "-" + version
	}
	return p.launch(name, false, append(args, "--", p.self, "demo-service", service), nil, p.stderr)
}

// launch starts this binary with a command line of its own; plain says that the program below knows
// no other way to end than a signal, stdin may be nil.
func (p *demoPrograms) launch(name string, plain bool, args []string, stdin *os.File, stdout io.Writer) error {
	cmd := exec.Command(p.self, args...)
	cmd.Stdout, cmd.Stderr = stdout, p.stderr
	if stdin != nil {
		cmd.Stdin = stdin
	}
	cmd.Env = append(os.Environ(), "INLAY_STATE_DIR="+filepath.Join(p.dir, "state", name))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // keys at the terminal are ours to hand on
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("demo: service %s: %w", name, err)
	}
	d := &demoProgram{name: name, plain: plain, cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
		p.died <- fmt.Errorf("demo: service %s ended by itself (%s)", name, cmd.ProcessState)
	}()
	p.all = append(p.all, d)
	return nil
}

// stop ends the programs, callers first, and waits for each: what it still has in flight is
// finished and its last counts are sent.
func (p *demoPrograms) stop() error {
	var errs []error
	for _, d := range slices.Backward(p.all) {
		_ = d.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.done:
			if err := d.failed(); err != nil {
				errs = append(errs, fmt.Errorf("demo: service %s: %w", d.name, err))
			}
		case <-time.After(15 * time.Second):
			_ = d.cmd.Process.Kill()
			errs = append(errs, fmt.Errorf("demo: service %s did not drain within 15 s", d.name))
		}
	}
	return errors.Join(errs...)
}

// kill ends what is still there.
func (p *demoPrograms) kill() {
	for _, d := range p.all {
		select {
		case <-d.done:
		default:
			_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL) // the group: `inlay run` and what is below it
			<-d.done
		}
	}
}
