package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane"
	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

// devFlags are what `inlay dev` was asked for; demo and tests start it with their own.
type devFlags struct {
	config, data, runDir            string
	trustDomain                     string
	xdsAddr, xdsMTLSAddr, adminAddr string
	svidTTL                         time.Duration
	virtual                         virtualFlags
	agent                           agentFlags
	users                           []string // with the agent: who else may run what
}

func devCommand() *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Start a mesh for this machine: one control plane and one node",
		Long: `Start a mesh for this machine, without root and without Kubernetes: one control plane and one
node, each a process of its own that is started again when it ends. Changes of the YAML files are
live at once; each is shown with its revision and how many clients acknowledged it.

With --ebpf, as root, the node runs the eBPF agent too, and ` + "`sudo inlay run --ebpf`" + ` puts programs that do
not link the SDK into the mesh. Root and whoever called sudo may then run services; --allow adds others.`,
		Example: "  inlay dev\n  inlay dev --config ./mesh --data /var/tmp/mesh\n  sudo inlay dev --ebpf --config ./mesh",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := f.check(c); err != nil {
				return err
			}
			if f.config == "" {
				f.config = "mesh"
				if err := os.MkdirAll(f.config, 0o755); err != nil {
					return fmt.Errorf("configuration: %w; pass --config DIR", err)
				}
			}
			if st, err := os.Stat(f.config); err != nil || !st.IsDir() {
				return fmt.Errorf("--config %s: want a directory of YAML files (it may be empty)", f.config)
			}
			d, err := newDev(f, c.OutOrStdout(), c.ErrOrStderr())
			if err != nil {
				return err
			}
			return d.run(c.Context(), func() { d.announce() })
		},
	}
	cmd.Flags().StringVar(&f.config, "config", "", "directory of YAML files, read recursively (default ./mesh, made when missing)")
	cmd.Flags().StringVar(&f.data, "data", "", "directory of what outlives a restart (default $XDG_DATA_HOME/inlay, else ~/.local/share/inlay)")
	cmd.Flags().StringVar(&f.runDir, "run-dir", "", "directory of sockets (default $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run; with --ebpf "+systemRun+")")
	cmd.Flags().StringVar(&f.trustDomain, "trust-domain", "inlay.local", "SPIFFE trust domain")
	cmd.Flags().StringVar(&f.xdsAddr, "xds-addr", "127.0.0.1:15010", "plaintext xDS, loopback only; empty: off")
	cmd.Flags().StringVar(&f.xdsMTLSAddr, "xds-mtls-addr", "127.0.0.1:15012", "xDS with mutual TLS; empty: off")
	cmd.Flags().StringVar(&f.adminAddr, "admin-addr", "127.0.0.1:15080", "admin API, loopback only")
	cmd.Flags().DurationVar(&f.svidTTL, "svid-ttl", time.Hour, "lifetime of certificates")
	cmd.Flags().StringArrayVar(&f.users, "allow", nil, "with --ebpf: UID=SERVICE[,SERVICE...] that another user may run; may be repeated")
	f.virtual.flags(cmd)
	f.agent.flags(cmd)
	return cmd
}

// check refuses what cannot start, before anything does.
func (f *devFlags) check(c *cobra.Command) error {
	if err := f.agent.check(c); err != nil {
		return err
	}
	if _, err := f.agent.addresses(); err != nil {
		return err
	}
	if _, err := f.agent.sizes(); err != nil {
		return err
	}
	if _, err := parseUsers(f.users, -1); err != nil {
		return err
	}
	switch {
	case f.agent.ebpf && !f.agent.allowUnmanaged:
		err := load.Check() // capabilities do as well as root
		if err != nil && os.Geteuid() != 0 {
			return needRoot("the node agent loads programs into the kernel, which is root's to do")
		}
		return coded(err)
	case !f.agent.ebpf && len(f.users) > 0:
		return usageError(errors.New("--allow is for a mesh of several users: pass --ebpf too"))
	}
	return nil
}

// nodeArgs is the command line of the node.
func (d *dev) nodeArgs() []string {
	args := []string{"--run-dir", d.places.run, "--trust-domain", d.flags.trustDomain}
	if !d.flags.agent.ebpf {
		return append(args, "--dev-user", fmt.Sprint(os.Getuid()))
	}
	args = append(args, "--allow", fmt.Sprintf("%d=*", os.Getuid()), "--state-dir", filepath.Join(d.flags.data, "node"))
	if sudo := os.Getenv("SUDO_UID"); sudo != "" {
		args = append(args, "--dev-user", sudo)
	}
	for _, u := range d.flags.users {
		args = append(args, "--allow", u)
	}
	return append(args, d.flags.agent.args()...)
}

// dev is one running pair of daemons.
type dev struct {
	flags    devFlags
	places   places
	out, err io.Writer
	self     string

	mu        sync.Mutex
	addresses map[string]string // of the control plane
	agent     map[string]string // of the node with its agent
	pids      map[string]int
}

func newDev(f devFlags, out, errw io.Writer) (*dev, error) {
	p, err := placesFor(f.runDir, f.agent.ebpf)
	if err != nil {
		return nil, err
	}
	if f.data == "" {
		if f.data, err = defaultData(); err != nil {
			return nil, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("this binary: %w", err)
	}
	// Absolute, since it is shown to people who are in another directory.
	if f.config, err = filepath.Abs(f.config); err != nil {
		return nil, err
	}
	if f.data, err = filepath.Abs(f.data); err != nil {
		return nil, err
	}
	return &dev{flags: f, places: p, out: out, err: errw, self: self, pids: map[string]int{}}, nil
}

// run starts both daemons, calls ready once both are, and returns when ctx is done and both have
// ended, or when one cannot start at all.
func (d *dev) run(ctx context.Context, ready func()) error {
	if d.flags.agent.ebpf { // other users' programs must reach what is in it
		if err := makeRunDir(d.places.run); err != nil {
			return err
		}
	}
	unlock, err := lock(d.places.devLock(), holder{PID: os.Getpid(), Started: time.Now(), Config: d.flags.config})
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	// The control plane first: the node's first words are to it.
	daemons := []struct {
		name string
		args func() []string
	}{
		{"controlplane", func() []string {
			return append([]string{
				"--config", d.flags.config, "--data", d.flags.data, "--run-dir", d.places.run, "--trust-domain", d.flags.trustDomain,
				"--xds-addr", d.bound(controlplane.AddressXDS, d.flags.xdsAddr),
				"--xds-mtls-addr", d.bound(controlplane.AddressXDSMTLS, d.flags.xdsMTLSAddr),
				"--admin-addr", d.bound(controlplane.AddressAdmin, d.flags.adminAddr), "--svid-ttl", d.flags.svidTTL.String(),
			}, d.flags.virtual.args()...)
		}},
		{"node", func() []string {
			return d.nodeArgs()
		}},
	}
	for _, daemon := range daemons {
		up := make(chan struct{})
		wg.Go(func() {
			if err := d.watch(ctx, daemon.name, daemon.args, func() { close(up) }); err != nil {
				cancel(err)
			}
		})
		select {
		case <-up:
		case <-ctx.Done():
			wg.Wait()
			return ended(ctx)
		}
	}
	ready()
	<-ctx.Done()
	wg.Wait()
	return ended(ctx)
}

// ended is nil when a signal or the caller ended us.
func ended(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// watch runs one daemon until ctx is done, and again whenever it ends by itself. A daemon that
// ends before it was ever ready is an error: starting it again would not mend a taken port.
// up is called when it is ready for the first time.
func (d *dev) watch(ctx context.Context, name string, args func() []string, up func()) error {
	wasReady := false
	wait := 50 * time.Millisecond
	for {
		began := time.Now()
		err := d.once(ctx, name, args(), func() {
			if !wasReady {
				wasReady = true
				up()
				return
			}
			fmt.Fprintf(d.err, "%s is back after %v\n", name, time.Since(began).Round(time.Millisecond))
		})
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it ended because it was told to
		}
		if !wasReady {
			return fmt.Errorf("%s did not start: %w", name, err)
		}
		if time.Since(began) > 10*time.Second {
			wait = 50 * time.Millisecond
		}
		fmt.Fprintf(d.err, "%s ended (%v); starting it again\n", name, err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, 2*time.Second)
	}
}

// once runs a daemon to its end.
func (d *dev) once(ctx context.Context, name string, args []string, ready func()) error {
	// The kernel sends Pdeathsig when the thread that forked ends, so it must stay until Wait returns.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	text := last{to: d.err}
	cmd := exec.Command(d.self, append([]string{name, "--ready-fd", "3"}, args...)...)
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stdout, cmd.Stderr = d.err, &text
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return err
	}
	d.note(name, cmd.Process.Pid, nil)
	var readers sync.WaitGroup
	defer readers.Wait()
	readers.Go(func() {
		line, err := bufio.NewReader(r).ReadBytes('\n')
		if err != nil {
			return // it ended before it was ready; Wait says how
		}
		var s readyLine
		if json.Unmarshal(line, &s) == nil {
			d.note(name, cmd.Process.Pid, s.Addresses)
		}
		ready()
	})
	done := make(chan struct{})
	defer close(done)
	readers.Go(func() {
		select {
		case <-done:
			return
		case <-ctx.Done():
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(8 * time.Second):
			_ = cmd.Process.Kill()
		}
	})
	err = cmd.Wait()
	switch why := text.words(); {
	case why != "" && cmd.ProcessState.ExitCode() == exitUnsupported:
		return &exitError{exitUnsupported, errors.New(why)}
	case why != "":
		return errors.New(why)
	case err != nil:
		return err
	}
	return errors.New("exit status 0")
}

func (d *dev) note(name string, pid int, addresses map[string]string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pids[name] = pid
	if addresses["admin"] != "" {
		d.addresses = addresses
	}
	if addresses["cgroup"] != "" {
		d.agent = addresses
	}
}

// agentAt is what the node agent said when it was ready last: "cgroup", "pin", "metrics", "flows".
func (d *dev) agentAt(what string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.agent[what]
}

// bound is the address that a listener had when it was ready last, so that a control plane that is
// started again is found where it was; before that, the one asked for.
func (d *dev) bound(name, asked string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.addresses[name]; a != "" {
		return a
	}
	return asked
}

// admin is the address of the control plane's admin API, once it is ready.
func (d *dev) admin() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.addresses["admin"]
}

// announce says where things are, and goes on to say what changes.
func (d *dev) announce() {
	d.mu.Lock()
	a, pids := d.addresses, d.pids
	fmt.Fprintf(d.out, `The mesh runs: trust domain %s
  configuration  %s
  data           %s
  control plane  pid %d; xDS %s (plaintext, this machine), %s (mutual TLS), %s
  node           pid %d; Workload API %s
  admin          http://%s
%sNext: %s --service NAME -- PROGRAM     inlay get services     inlay status
`, d.flags.trustDomain, d.flags.config, d.flags.data, pids["controlplane"], dash(a["xds"]), dash(a["xds-mtls"]), a["unix"],
		pids["node"], d.places.workloadSocket(), a["admin"], agentLine(d.agent), d.verb())
	d.mu.Unlock()
	go d.revisions()
}

// agentLine says where the node agent is, with the line's end; nothing without one.
func agentLine(a map[string]string) string {
	if a == nil {
		return ""
	}
	line := "  node agent     cgroup " + a["cgroup"]
	if a["metrics"] != "" {
		line += "; metrics http://" + a["metrics"] + "/metrics"
	}
	return line + "; flows: inlay observe -f\n"
}

// verb is how programs are run in this mesh.
func (d *dev) verb() string {
	if d.agent != nil {
		return "sudo inlay run --ebpf"
	}
	return "inlay run"
}

// revisions prints each revision when it runs and when every client has it, and what stands in the
// way, until the process ends.
func (d *dev) revisions() {
	var last revisionNews
	for {
		c := adminconnect.NewAdminClient(http.DefaultClient, "http://"+d.admin())
		s, err := c.WatchRevisions(context.Background(), connect.NewRequest(&adminpb.WatchRevisionsRequest{}))
		if err == nil {
			for s.Receive() {
				r := s.Msg()
				news := newsOf(r, last)
				if news != last {
					fmt.Fprintln(d.out, "revision", revisionLine(r))
					for _, f := range r.Faults {
						fmt.Fprintf(d.err, "  %s %s %s\n", f.Source, f.Code, f.Message)
					}
				}
				last = news
			}
			_ = s.Close()
		}
		time.Sleep(500 * time.Millisecond) // the control plane is being started again
	}
}

// revisionNews is what is worth a line: clients that come and go are not.
type revisionNews struct {
	id, fault string
	nacked    uint32
	complete  bool // every client acknowledged it, at one time or another
}

func newsOf(r *adminpb.Revision, last revisionNews) revisionNews {
	n := revisionNews{id: r.Id, nacked: r.Nacked, complete: r.Subscribed > 0 && r.Acked == r.Subscribed}
	for _, f := range r.Faults {
		n.fault += f.Source + f.Code + f.Message
	}
	if n.id == last.id {
		n.complete = n.complete || last.complete
	}
	return n
}

// last passes on what a daemon logs, and keeps back its last words: what report writes before the
// end. Who started the daemon says them itself, once.
type last struct {
	to io.Writer

	mu   sync.Mutex
	line []byte // the beginning of a line
	said []byte // the last words; everything after their beginning is theirs
}

func (l *last) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for rest := b; len(rest) > 0; {
		end := bytes.IndexByte(rest, '\n') + 1
		if end == 0 {
			l.line = append(l.line, rest...)
			break
		}
		l.line = append(l.line, rest[:end]...)
		rest = rest[end:]
		switch {
		case l.said != nil:
			l.said = append(l.said, l.line...)
		case bytes.HasPrefix(l.line, []byte(reportPrefix)):
			l.said = append(l.said, l.line[len(reportPrefix):]...)
		default:
			if _, err := l.to.Write(l.line); err != nil {
				return 0, err
			}
		}
		l.line = l.line[:0]
	}
	return len(b), nil
}

// words returns the last words without the prefix and the line's end; a line that never ended
// counts as one.
func (l *last) words() string {
	if len(l.line) > 0 {
		_, _ = l.Write([]byte{'\n'})
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(bytes.TrimSpace(l.said))
}
