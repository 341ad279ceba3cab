package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/ebpf/load"
)

// nodeFlags are what `inlay node` was asked for.
type nodeFlags struct {
	runDir, controlPlane, trustDomain string
	stateDir                          string
	users                             []string
	devUser, readyFD                  int
	log                               logFlags
	agent                             agentFlags
}

// agentFlags are what the node agent is asked for; `inlay dev` hands them on.
type agentFlags struct {
	ebpf           bool
	cgroup         string
	nodeAddresses  []string
	metrics        string
	suffix         string
	noDNS          bool
	allowUnmanaged bool
	mapSizes       []string
	stats          bool
}

func (f *agentFlags) flags(c *cobra.Command) {
	c.Flags().BoolVar(&f.ebpf, "ebpf", false, "run the node agent too: programs in the kernel for what inlay run --ebpf starts (root)")
	c.Flags().StringVar(&f.cgroup, "cgroup", "", "with --ebpf: the managed cgroup, a path below the cgroup2 mount or a name relative to it (default inlay)")
	c.Flags().StringArrayVar(&f.nodeAddresses, "node-address", nil, "with --ebpf: IP that other nodes know this machine by; may be repeated, the first is called (default: loopback only)")
	c.Flags().StringVar(&f.metrics, "metrics-addr", "127.0.0.1:15090", "with --ebpf: Prometheus metrics, loopback only; off: none")
	c.Flags().StringVar(&f.suffix, "dns-suffix", "mesh", "with --ebpf: the suffix in which NAME.NAMESPACE resolves")
	c.Flags().BoolVar(&f.noDNS, "no-dns", false, "with --ebpf: leave port 53 alone; services are reached by address only")
	c.Flags().BoolVar(&f.stats, "program-stats", true, "with --ebpf: have the kernel count runs and run time of programs, about 20 ns a run, of all programs of the machine")
	c.Flags().StringArrayVar(&f.mapSizes, "map-size", nil, "with --ebpf: NAME=ENTRIES of a map that is made, as policies=2097152; one that is pinned keeps its size until inlay node cleanup; may be repeated")
	c.Flags().BoolVar(&f.allowUnmanaged, "allow-unmanaged", false, "with --ebpf: where programs cannot be loaded say so and run on without them")
}

// args are the flags as a command line.
func (f agentFlags) args() []string {
	if !f.ebpf {
		return nil
	}
	out := []string{"--ebpf", "--metrics-addr", f.metrics, "--dns-suffix", f.suffix, fmt.Sprintf("--program-stats=%t", f.stats)}
	if f.cgroup != "" {
		out = append(out, "--cgroup", f.cgroup)
	}
	for _, a := range f.nodeAddresses {
		out = append(out, "--node-address", a)
	}
	for _, m := range f.mapSizes {
		out = append(out, "--map-size", m)
	}
	if f.noDNS {
		out = append(out, "--no-dns")
	}
	if f.allowUnmanaged {
		out = append(out, "--allow-unmanaged")
	}
	return out
}

// addresses reads --node-address.
func (f agentFlags) addresses() ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range f.nodeAddresses {
		a, err := netip.ParseAddr(s)
		if a = a.Unmap(); err != nil || a.IsUnspecified() || a.IsMulticast() || a.Zone() != "" {
			return nil, usageError(fmt.Errorf("--node-address %q: want an IP that other machines reach this one by", s))
		}
		out = append(out, a)
	}
	return out, nil
}

// sizes reads --map-size.
func (f agentFlags) sizes() (map[string]uint32, error) {
	var out map[string]uint32
	for _, s := range f.mapSizes {
		name, text, ok := strings.Cut(s, "=")
		n, err := strconv.ParseUint(text, 10, 32)
		if !ok || name == "" || err != nil || n == 0 {
			return nil, usageError(fmt.Errorf("--map-size %q: want NAME=ENTRIES, as policies=2097152", s))
		}
		if out == nil {
			out = map[string]uint32{}
		}
		out[name] = uint32(n)
	}
	if err := load.CheckMapSizes(out); err != nil {
		return nil, usageError(fmt.Errorf("--map-size: %w", err))
	}
	return out, nil
}

// check refuses flags of the agent where there is none.
func (f agentFlags) check(c *cobra.Command) error {
	if f.ebpf {
		return nil
	}
	for _, name := range []string{"cgroup", "node-address", "metrics-addr", "dns-suffix", "no-dns", "allow-unmanaged", "map-size", "program-stats", "state-dir"} {
		if c.Flags().Changed(name) {
			return usageError(fmt.Errorf("--%s is the node agent's: pass --ebpf too", name))
		}
	}
	return nil
}

func nodeCommand() *cobra.Command {
	f := nodeFlags{}
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Attest the programs of this machine and hand them their identities",
		Long: `Run the node: it attests the programs below ` + "`inlay run`" + `, makes their keys, has their
certificates signed by the control plane and serves the SPIFFE Workload API. It needs no privilege.
Without --allow only its own user may run services.

With --ebpf, as root, it runs the node agent too: programs in the kernel that give what is started by
` + "`inlay run --ebpf`" + ` the mesh's names, addresses, policies and flow log, without the SDK. They are pinned:
they go on when the node ends, and the next one takes them over. ` + "`inlay node cleanup`" + ` takes them away.`,
		Example: `  inlay node --allow 1000=cart,orders --allow 1001=*
  inlay node --ebpf --allow 1000=* --node-address 10.0.0.7`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := f.agent.check(c); err != nil {
				return err
			}
			return f.run(c)
		},
	}
	cmd.Flags().StringVar(&f.runDir, "run-dir", "", "directory of the sockets (default $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run; with --ebpf "+systemRun+")")
	cmd.Flags().StringVar(&f.controlPlane, "control-plane", "", "unix socket of the control plane (default: in the run directory)")
	cmd.Flags().StringVar(&f.trustDomain, "trust-domain", "inlay.local", "SPIFFE trust domain")
	cmd.Flags().StringVar(&f.stateDir, "state-dir", "", "with --ebpf: directory of what outlives the agent (default /var/lib/inlay/node, or in --run-dir)")
	cmd.Flags().StringArrayVar(&f.users, "allow", nil, "UID=SERVICE[,SERVICE...] that a user may run: NAME, NAMESPACE/NAME or *; may be repeated")
	cmd.Flags().IntVar(&f.devUser, "dev-user", -1, "uid of the user who started `inlay dev`: may run every service")
	cmd.Flags().IntVar(&f.readyFD, "ready-fd", 0, "descriptor to write one line of JSON to when ready")
	_ = cmd.Flags().MarkHidden("dev-user")
	_ = cmd.Flags().MarkHidden("ready-fd")
	f.agent.flags(cmd)
	f.log.flags(cmd)
	cmd.AddCommand(nodeProbeCommand(), nodeCleanupCommand(), nodeBreakglassCommand(), nodeProxyCommand())
	return cmd
}

func (f *nodeFlags) run(c *cobra.Command) error {
	p, err := placesFor(f.runDir, f.agent.ebpf)
	if err != nil {
		return err
	}
	if f.controlPlane == "" {
		f.controlPlane = p.xdsSocket()
	}
	allowed, err := parseUsers(f.users, f.devUser)
	if err != nil {
		return err
	}
	cfg := workload.Config{
		RunDir: p.run, ControlPlane: f.controlPlane, TrustDomain: f.trustDomain, Users: allowed,
		Log: f.log.logger(c.ErrOrStderr()).With("daemon", "node"),
	}
	if cfg.NodeAddresses, err = f.agent.addresses(); err != nil {
		return err
	}
	if _, err = f.agent.sizes(); err != nil {
		return err
	}
	ready := func(n *workload.Node) error {
		return tellReady(f.readyFD, map[string]string{"workload": n.WorkloadSocket(), "node": n.NodeSocket()})
	}
	if !f.agent.ebpf {
		return workload.Run(c.Context(), cfg, ready)
	}
	a, err := f.newAgent(p, cfg, c.ErrOrStderr())
	if err != nil {
		return err
	}
	if a == nil { // --allow-unmanaged, and none can run
		return workload.Run(c.Context(), cfg, ready)
	}
	return coded(workload.Run(c.Context(), cfg, func(n *workload.Node) error {
		close(a.up)
		cgroup, pin := a.managed()
		return tellReady(f.readyFD, map[string]string{
			"workload": n.WorkloadSocket(), "node": n.NodeSocket(), "flows": p.flowsSocket(),
			"cgroup": cgroup, "pin": pin, "metrics": a.metrics(),
		})
	}, a.module()))
}

// makeRunDir creates the run directory as the node wants it: what is listened on in it must be within
// reach of every user.
func makeRunDir(path string) error {
	if isDir(path) {
		return nil
	}
	if err := errors.Join(os.MkdirAll(path, 0o755), os.Chmod(path, 0o755)); err != nil {
		return fmt.Errorf("run directory: %w: choose another --run-dir", err)
	}
	return nil
}

// defaultState is where the node agent remembers what outlives it. A mesh in a directory of its own
// keeps it there: two must not share a memory.
func defaultState(p places) string {
	if p.run == systemRun {
		return "/var/lib/inlay/node"
	}
	return filepath.Join(p.run, "node")
}

// parseUsers reads --allow. Nothing given leaves the node's default: its own user, every service.
func parseUsers(flags []string, devUser int) (map[uint32][]string, error) {
	var out map[uint32][]string
	add := func(uid uint32, services ...string) {
		if out == nil {
			out = map[uint32][]string{}
		}
		out[uid] = append(out[uid], services...)
	}
	for _, f := range flags {
		uid, services, ok := strings.Cut(f, "=")
		n, err := strconv.ParseUint(uid, 10, 32)
		if !ok || err != nil || services == "" {
			return nil, usageError(fmt.Errorf("--allow %q: want UID=SERVICE[,SERVICE...], as 1000=cart,orders", f))
		}
		add(uint32(n), strings.Split(services, ",")...)
	}
	if devUser >= 0 {
		add(uint32(devUser), "*")
	}
	return out, nil
}

// logFlags choose how a daemon logs.
type logFlags struct {
	level slog.Level
	json  bool
}

func (l *logFlags) flags(c *cobra.Command) {
	c.Flags().TextVar(&l.level, "log-level", slog.LevelWarn, "debug, info, warn or error")
	c.Flags().BoolVar(&l.json, "log-json", false, "log as JSON")
}

func (l *logFlags) logger(w interface{ Write([]byte) (int, error) }) *slog.Logger {
	o := &slog.HandlerOptions{Level: l.level}
	if l.json {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
