package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// runFlags are what `inlay run` was asked for.
type runFlags struct {
	target  target
	service string
	version string
	labels  []string
	port    string

	ebpf bool   // a managed run
	user string // that its program runs as
	raw  bool   // raw sockets are granted
}

func runCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:                   "run --service NAME [--version V] [--port P] -- COMMAND [ARG...]",
		DisableFlagsInUseLine: true, // it says them, in their place
		Short:                 "Run a program as a service of the mesh",
		Long: `Run a program as a service of the mesh: every process below it gets the service's SPIFFE ID, and
the environment tells the SDK where the mesh is. No root is needed. With --port a program without
the SDK becomes an endpoint once it accepts connections there; an SDK that registers below it takes
its place. Signals are forwarded, and the exit code is the program's own.

With --ebpf the program needs no SDK to be in the mesh: it is started inside a cgroup of its own, where
the node's programs give it the mesh's names, policies and flow log. That needs root, and a node that
was started with --ebpf; the program itself runs as --user, by default whoever called sudo.`,
		Example: `  inlay run --service cart -- ./cart
  inlay run --service orders --version v2 -- go run ./cmd/orders
  inlay run --service legacy --port 8080 -- python3 -m http.server 8080
  sudo inlay run --ebpf --service billing --port 80:8080 -- ./billing
  sudo inlay run --ebpf --user nobody --service stats --port 8125/udp -- ./statsd`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(errors.New("no program: write it behind --, as in `inlay run --service cart -- ./cart`"))
			}
			return f.run(c.Context(), args)
		},
	}
	cmd.Flags().SetInterspersed(false) // what follows the command is the command's own, with or without --
	f.target.flags(cmd)
	_ = cmd.Flags().MarkHidden("admin")
	cmd.Flags().StringVar(&f.service, "service", "", "NAME or NAME.NAMESPACE of the service")
	cmd.Flags().StringVar(&f.version, "version", "", "version of this instance: its label \"version\"")
	cmd.Flags().StringArrayVar(&f.labels, "label", nil, "KEY=VALUE label of this instance; may be repeated")
	cmd.Flags().StringVar(&f.port, "port", "", "PORT of the service that a program without the SDK serves, or PORT:LOCALPORT; /udp behind it with --ebpf")
	cmd.Flags().BoolVar(&f.ebpf, "ebpf", false, "start the program in a cgroup that the node's eBPF programs manage (root)")
	cmd.Flags().StringVar(&f.user, "user", "", "with --ebpf: NAME or number that the program runs as (default: the user of SUDO_UID)")
	cmd.Flags().BoolVar(&f.raw, "raw", false, "with --ebpf: grant raw sockets, as ping needs them")
	return cmd
}

// registration is what a run announces to the node, checked.
type registration struct {
	namespace, service, version string
	labels                      map[string]string
	runID                       string
	port                        uint16 // of the service; 0: none
	local                       netip.AddrPort
	udp                         bool
	managed                     *managedRun // nil without --ebpf
}

// managedRun is what --ebpf adds to a registration.
type managedRun struct {
	account account
	raw     bool
}

func (f *runFlags) registration() (registration, error) {
	r := registration{version: f.version, labels: map[string]string{}}
	if f.service == "" {
		return r, usageError(errors.New("--service is missing: which service is this program?"))
	}
	var err error
	if r.namespace, r.service, err = splitService(f.service); err != nil {
		return r, err
	}
	for _, l := range f.labels {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return r, usageError(fmt.Errorf("--label %q: want KEY=VALUE", l))
		}
		r.labels[k] = v
	}
	if f.version != "" {
		r.labels["version"] = f.version
	}
	for k, v := range r.labels { // INLAY_LABELS separates them so
		if strings.Contains(k+v, ",") {
			return r, usageError(fmt.Errorf("--label %q: want no comma in it; --label may be repeated", k+"="+v))
		}
	}
	if !f.ebpf && (f.user != "" || f.raw) {
		return r, usageError(errors.New("--user and --raw are for programs in a cgroup of their own: pass --ebpf too"))
	}
	if f.port != "" {
		ports, udp := strings.CutSuffix(f.port, "/udp")
		if udp && !f.ebpf {
			return r, usageError(fmt.Errorf("--port %q: datagrams reach a program by its service's virtual address: pass --ebpf too", f.port))
		}
		r.udp = udp
		service, local, split := strings.Cut(ports, ":")
		if !split {
			local = service
		}
		p, err1 := strconv.ParseUint(service, 10, 16)
		l, err2 := strconv.ParseUint(local, 10, 16)
		if err1 != nil || err2 != nil || p == 0 || l == 0 {
			return r, usageError(fmt.Errorf("--port %q: want PORT or PORT:LOCALPORT, each 1 to 65535%s", f.port, udpHint(f.ebpf)))
		}
		r.port = uint16(p)
		r.local = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(l))
	}
	id := make([]byte, 8)
	_, _ = rand.Read(id) // never fails (crypto/rand)
	r.runID = hex.EncodeToString(id)
	return r, nil
}

func udpHint(ebpf bool) string {
	if ebpf {
		return ", with /udp behind it for datagrams"
	}
	return ""
}

// manage adds what --ebpf needs: root, and whose the program is to be.
func (f *runFlags) manage(r *registration) error {
	if !f.ebpf {
		return nil
	}
	if err := needRoot("a program is started inside its cgroup by root alone"); err != nil {
		return err
	}
	a, err := programAccount(f.user, os.Getenv)
	if err != nil {
		return err
	}
	r.managed = &managedRun{account: a, raw: f.raw}
	return nil
}

func (f *runFlags) run(ctx context.Context, args []string) error {
	reg, err := f.registration()
	if err == nil {
		err = f.manage(&reg)
	}
	if err != nil {
		return err
	}
	find := placesOf
	if f.ebpf {
		find = func(dir string) (places, error) { return placesFor(dir, true) }
	}
	p, err := find(f.target.runDir)
	if err != nil {
		return err
	}
	path, err := exec.LookPath(args[0])
	if errors.Is(err, os.ErrPermission) {
		return &exitError{126, err}
	} else if err != nil {
		return &exitError{127, err}
	}
	// Orphans of the program become our children, so that walking up from them ends here.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("child subreaper: %w", err)
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)

	link := newNodeLink(p.nodeSocket(), reg)
	started, err := link.start(ctx)
	if err != nil {
		return err
	}
	linkCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	linkDone := make(chan struct{})
	go func() { defer close(linkDone); link.keep(linkCtx) }()
	defer func() { cancel(); <-linkDone }()

	child, err := startProgram(path, args, reg, started)
	if err != nil {
		return &exitError{126, fmt.Errorf("start %s: %w", args[0], err)}
	}
	exited := make(chan syscall.WaitStatus, 1)
	go reap(child.Pid, exited)
	if reg.port != 0 {
		go link.announceWhenListening(linkCtx, program{child.Pid, started.Cgroup})
	}
	for {
		select {
		case s := <-signals:
			if s == syscall.SIGTERM && reg.port != 0 {
				link.drain(linkCtx) // first out of everybody's endpoints, then the signal
			}
			if shared(s) {
				continue
			}
			_ = child.Signal(s) // it may have ended meanwhile
		case ws := <-exited:
			return childExit(ws)
		}
	}
}

// startProgram starts the program; a managed one inside its cgroup, as its user.
func startProgram(path string, args []string, reg registration, started *nodepb.Started) (*os.Process, error) {
	attr := &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}}
	base := os.Environ()
	if m := reg.managed; m != nil {
		if started.Cgroup == "" {
			return nil, errors.New("the node gave no cgroup: is it of another version?")
		}
		cgroup, err := os.OpenFile(started.Cgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("its cgroup: %w", err)
		}
		defer func() { _ = cgroup.Close() }()
		// Born inside: a socket that a process made before it was moved keeps the old cgroup for ever
		// (CLONE_INTO_CGROUP, clone3(2)).
		attr.Sys = &syscall.SysProcAttr{
			UseCgroupFD: true, CgroupFD: int(cgroup.Fd()),
			Credential: &syscall.Credential{Uid: m.account.uid, Gid: m.account.gid, Groups: m.account.groups},
		}
		base = m.account.environment(base)
		return startApart(path, args, attr, m.raw, environment(base, reg, started.WorkloadSocket, started.ControlPlane))
	}
	attr.Env = environment(base, reg, started.WorkloadSocket, started.ControlPlane)
	return os.StartProcess(path, args, attr)
}

// startApart starts a managed program so that it has nothing of root's but what it was given: its
// three descriptors and the environment.
func startApart(path string, args []string, attr *os.ProcAttr, raw bool, env []string) (p *os.Process, err error) {
	// A socket that a caller of `inlay run` left open would be one of outside the cgroup, for ever.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("descriptors of the caller: %w", err)
	}
	// The fork takes the capabilities of its thread. "If the UIDs change from 0 to nonzero, all
	// capabilities are cleared from the permitted, effective and ambient sets" (capabilities(7)), and
	// the inheritable ones are not: files that have them set would give them to the program.
	// The thread ends with the goroutine, which never unlocks it, so that nothing else runs with its sets.
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		attr.Env = env
		if err = dropCapabilities(attr, raw); err == nil {
			p, err = os.StartProcess(path, args, attr)
		}
	}()
	<-done
	return p, err
}

// dropCapabilities takes from this thread what a managed program must not come to.
func dropCapabilities(attr *os.ProcAttr, raw bool) error {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	err := unix.Capget(&hdr, &data[0])
	if err == nil && data[0].Inheritable|data[1].Inheritable != 0 {
		data[0].Inheritable, data[1].Inheritable = 0, 0
		err = unix.Capset(&hdr, &data[0])
	}
	if err != nil {
		return fmt.Errorf("inheritable capabilities: %w", err)
	}
	// No hook of a cgroup sees packet sockets (packet(7)), which send what no policy judges: root's
	// programs come to them by CAP_NET_RAW alone.
	if !raw {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0); err != nil {
			return fmt.Errorf("drop CAP_NET_RAW from the bounding set: %w", err)
		}
	}
	// With these the change of user would leave it root's capabilities.
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	const kept = 1<<2 | 1<<4 // SECBIT_NO_SETUID_FIXUP, SECBIT_KEEP_CAPS
	switch {
	case err != nil:
		return fmt.Errorf("secure bits: %w", err)
	case bits&kept != 0 && attr.Sys.Credential.Uid != 0:
		return fmt.Errorf("secure bits %#x of this process keep root's capabilities over a change of user: run it without them (capsh --print shows them)", bits)
	}
	return nil
}

// forwarded are the signals a program may expect from whoever runs it.
var forwarded = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH}

// shared says that the terminal has already sent s to the program: keys signal the whole
// foreground process group.
func shared(s os.Signal) bool {
	if s != syscall.SIGINT && s != syscall.SIGQUIT && s != syscall.SIGWINCH {
		return false
	}
	if !term.IsTerminal(0) {
		return false
	}
	fg, err := unix.IoctlGetInt(0, unix.TIOCGPGRP)
	return err == nil && fg == unix.Getpgrp()
}

// reap waits for every child, adopted ones too, and reports the end of the one started.
func reap(pid int, exited chan<- syscall.WaitStatus) {
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil: // no child is left
			return
		case got == pid && (ws.Exited() || ws.Signaled()):
			exited <- ws
		}
	}
}

func childExit(ws syscall.WaitStatus) error {
	switch {
	case ws.Signaled():
		return &exitError{128 + int(ws.Signal()), nil}
	case ws.ExitStatus() != 0:
		return &exitError{ws.ExitStatus(), nil}
	}
	return nil
}

// environment is what the program sees: where its identity and the control plane are, and who it
// is. What the user set by hand is overridden only where it would contradict --service.
func environment(base []string, r registration, workloadSocket, controlPlane string) []string {
	set := map[string]string{
		"SPIFFE_ENDPOINT_SOCKET": "unix://" + workloadSocket,
		"INLAY_SERVICE":          r.service + "." + r.namespace,
		"INLAY_RUN_ID":           r.runID,
	}
	if r.namespace == "default" {
		set["INLAY_SERVICE"] = r.service
	}
	if controlPlane != "" && lookup(base, "GRPC_XDS_BOOTSTRAP") == "" && lookup(base, "GRPC_XDS_BOOTSTRAP_CONFIG") == "" {
		set["INLAY_ADDR"] = controlPlane
	}
	if lookup(base, "INLAY_LISTEN") == "" {
		set["INLAY_LISTEN"] = "127.0.0.1:0"
	}
	if len(r.labels) > 0 {
		var pairs []string
		for k, v := range r.labels {
			pairs = append(pairs, k+"="+v)
		}
		slices.Sort(pairs)
		set["INLAY_LABELS"] = strings.Join(pairs, ",")
	}
	nested := lookup(base, "INLAY_RUN_ID") != "" // below another run, whose labels are not ours
	env := slices.DeleteFunc(slices.Clone(base), func(kv string) bool {
		k, _, _ := strings.Cut(kv, "=")
		_, ours := set[k]
		return ours || nested && k == "INLAY_LABELS"
	})
	for k, v := range set {
		env = append(env, k+"="+v)
	}
	slices.Sort(env)
	return env
}

func lookup(env []string, key string) string {
	for _, kv := range env {
		if k, v, _ := strings.Cut(kv, "="); k == key {
			return v
		}
	}
	return ""
}

// listening waits until something accepts connections at addr; it asks again every 50 ms, since
// no event tells of another process's listen.
func listening(ctx context.Context, addr netip.AddrPort) bool {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	d := net.Dialer{Timeout: time.Second}
	for {
		if c, err := d.DialContext(ctx, "tcp", addr.String()); err == nil {
			_ = c.Close()
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// say writes a line of `inlay run` itself, apart from the program's own output.
func say(w io.Writer, text string, args ...any) { fmt.Fprintf(w, "inlay run: "+text+"\n", args...) }
