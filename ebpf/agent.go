// Package ebpf is the node agent: it gives programs that do not link the SDK the mesh's addresses,
// names, policies and metrics. It wires its rooms (load attaches the programs, tables fills their
// maps, flow reads their records, export counts, proxy answers DNS), keeps them in step with the
// control plane, and knows which cgroup is which workload.
//
// cmd/inlay runs it beside the node (controlplane/workload), which asks it to admit the programs
// that it attested. The agent itself attests nobody, starts no workload, decides about no connection
// (the programs in the kernel do, also while the agent is dead), and takes no part in any packet.
package ebpf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/flow"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
	"github.com/inlay-mesh/inlay/ebpf/tables"
	"github.com/inlay-mesh/inlay/xds"
)

// Clock tells time and runs timers; nil in a Config means the real one.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// Names of the files in the run directory.
const (
	// FlowsSocket serves inlay.node.v1.Flows.
	FlowsSocket = "flows.sock"
	// ProxySocket is the control socket of the DNS proxy.
	ProxySocket = "dns.sock"
)

// Names of the files in the state directory.
const (
	workloadsFile = "workloads.json"
	cacheFile     = "node.xds"
	confirmedFile = "confirmed"
)

// DefaultMetrics is where metrics are served unless Config says otherwise.
const DefaultMetrics = "127.0.0.1:15090"

// Config of an agent. Fields without a word on their zero are required.
type Config struct {
	// Cgroup is the managed cgroup: a name relative to the cgroup2 mount, or a path below it. Empty
	// means the default, load.DefaultRoot.
	Cgroup string
	// Pin is the directory of the pins on a bpf file system. Empty means load.PinDir(Cgroup).
	Pin string
	// RunDir holds the sockets; it must exist and belong to the agent's user.
	RunDir string
	// StateDir holds what outlives the agent: who runs in which cgroup, and the last known
	// configuration. It is created, for the owner only, when missing.
	StateDir string
	// ControlPlane is the path of the control plane's unix socket.
	ControlPlane string
	// Dial opens a connection to the control plane; nil dials ControlPlane.
	Dial func(ctx context.Context) (net.Conn, error)
	// TrustDomain that the configuration on disk is bound to; empty means inlay.local.
	TrustDomain string
	// NodeAddresses are this node's own, as other nodes know it; they count as local beside those
	// of its interfaces. Empty means that there are no others.
	NodeAddresses []netip.Addr
	// Metrics is where Prometheus metrics are served, a loopback host:port. Empty means
	// DefaultMetrics, "off" nowhere.
	Metrics string
	// OTLP is the endpoint of an OpenTelemetry collector; empty means OTEL_EXPORTER_OTLP_ENDPOINT,
	// and none without it.
	OTLP string
	// ProxyCommand is how the DNS proxy is started, program and arguments. Empty: the agent starts
	// none, and managed workloads keep the resolvers that they have.
	ProxyCommand []string
	// Suffix is the mesh's own in names, which ProxyCommand must serve; empty means any.
	Suffix string
	// ProxyLog is the file that a started proxy writes its log to; empty means dns.log in RunDir.
	ProxyLog string
	// FlowsUID is a user who may read flows beside root, such as the one who started `inlay dev`.
	// Zero means nobody else.
	FlowsUID uint32
	// AllowUnmanaged lets Run go on without programs on a machine that cannot load them. Admit then
	// refuses everybody, with the reason.
	AllowUnmanaged bool
	// Grace is how long connections to an endpoint that is gone may go on. Zero means 5 s.
	Grace time.Duration
	// MapSizes sets how many entries a map has, by name; nil leaves the defaults.
	MapSizes map[string]uint32
	// Stats has the kernel count the run time of the programs, which costs about 20 ns a run.
	Stats   bool
	Version string       // of this program; empty means "dev"
	Clock   Clock        // nil means the real one
	Log     *slog.Logger // nil discards
}

// Agent is a node agent. Make it with New; it works while Run runs. Its methods are safe for
// concurrent use.
type Agent struct {
	cfg   Config
	rooms rooms
	log   *slog.Logger
	ready chan struct{}

	started time.Time
	dirty   chan struct{} // the table has changed; capacity 1
	sweep   chan struct{} // sockets are to be decided again; capacity 1
	reap    chan struct{} // a cgroup may have become empty; capacity 1

	// Set by Run before ready is closed, and only read after.
	set         programs // nil when the agent runs without programs
	table       table
	client      *xds.Client
	cgroups     *cgroups
	flows       *flow.Log
	unsupported error // why there are no programs
	metrics     string

	// writing is held from a commit until what follows from it is done, so that nobody takes the
	// refusals of an older one for those of its own. It comes before mu.
	writing sync.Mutex

	mu        sync.Mutex
	running   bool
	workloads map[string]*workload // by run id
	hosted    map[string]*hosted   // by NAMESPACE/SERVICE
	synced    bool                 // the control plane has told all services
	pruned    bool
	confirmed time.Time // when the control plane last stood by the configuration; zero: never
	gone      []departed
	open      bool // breakglass
	proxyUp   bool
	proxy     proxy.Status      // what the DNS proxy said last; zero: it never did
	told      map[string]string // failures that the log was told of
}

// departed are endpoints whose connections end at due.
type departed struct {
	due time.Time
	eps []tables.Endpoint
}

// New checks cfg and returns an agent at rest; nothing is opened until Run.
func New(cfg Config) (*Agent, error) { return newAgent(cfg, realRooms()) }

func newAgent(cfg Config, r rooms) (*Agent, error) {
	for _, need := range []struct{ field, value, want string }{
		{"RunDir", cfg.RunDir, "a directory for its sockets (--run-dir)"},
		{"StateDir", cfg.StateDir, "a directory for its state (--state-dir)"},
		{"ControlPlane", cfg.ControlPlane, "the path of the control plane's unix socket"},
	} {
		if need.value == "" && (need.field != "ControlPlane" || cfg.Dial == nil) {
			return nil, fmt.Errorf("node agent: %s is empty: want %s", need.field, need.want)
		}
	}
	if cfg.Grace < 0 {
		return nil, fmt.Errorf("node agent: grace %v: want at least 0", cfg.Grace)
	}
	if cfg.Grace == 0 {
		cfg.Grace = 5 * time.Second
	}
	switch cfg.Metrics {
	case "":
		cfg.Metrics = DefaultMetrics
	case "off":
	default:
		if err := checkLoopback(cfg.Metrics); err != nil {
			return nil, fmt.Errorf("node agent: metrics: %w", err)
		}
	}
	if cfg.Dial == nil {
		path := cfg.ControlPlane
		cfg.Dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}
	}
	if cfg.TrustDomain == "" {
		cfg.TrustDomain = "inlay.local"
	}
	if cfg.Version == "" {
		cfg.Version = "dev"
	}
	if cfg.ProxyLog == "" {
		cfg.ProxyLog = filepath.Join(cfg.RunDir, "dns.log")
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Agent{
		cfg: cfg, rooms: r, log: cfg.Log,
		ready: make(chan struct{}), dirty: make(chan struct{}, 1), sweep: make(chan struct{}, 1), reap: make(chan struct{}, 1),
		workloads: make(map[string]*workload), hosted: make(map[string]*hosted), told: make(map[string]string),
	}, nil
}

// checkLoopback refuses an address that other machines could reach.
func checkLoopback(hostport string) error {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		return fmt.Errorf("%q: %w: want HOST:PORT on loopback, as %s, or off", hostport, err, DefaultMetrics)
	}
	if a, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !a.Unmap().IsLoopback()) {
		return fmt.Errorf("%q: not an address of loopback: metrics have no access control: want HOST:PORT on loopback, as %s, or off", hostport, DefaultMetrics)
	}
	return nil
}

// Ready is closed once the programs are attached, filled with the last known state, and the sockets
// accept connections. It does not wait for the control plane.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Managed returns the absolute path of the managed cgroup and the directory of the pins; empty
// before Ready, and when the agent runs without programs.
func (a *Agent) Managed() (cgroup, pin string) {
	select {
	case <-a.ready:
	default:
		return "", ""
	}
	if a.set == nil {
		return "", ""
	}
	return a.set.Cgroup(), a.set.Pin()
}

// MetricsAddr is where metrics are served; empty before Ready and when they are not.
func (a *Agent) MetricsAddr() string {
	select {
	case <-a.ready:
		return a.metrics
	default:
		return ""
	}
}

// Run attaches the programs and keeps them in step with the control plane until ctx is done, then
// returns nil when everything it started has ended. Programs, maps, cgroups and the DNS proxy stay
// and go on working: the next agent takes them over, and load.Cleanup and proxy.Stop take them away.
// It may be called once. Errors: *load.Unsupported when the machine cannot run programs and
// AllowUnmanaged is not set, load.ErrBusy when another agent manages the same cgroup.
func (a *Agent) Run(ctx context.Context) error {
	a.mu.Lock()
	if a.running {
		a.mu.Unlock()
		return errors.New("node agent: Run was called twice")
	}
	a.running = true
	a.mu.Unlock()
	a.started = a.cfg.Clock.Now()

	var lacking *load.Unsupported
	err := a.attach(ctx)
	switch {
	case err == nil:
	case errors.As(err, &lacking) && a.cfg.AllowUnmanaged:
		a.unsupported = err
		a.log.WarnContext(ctx, "programs cannot be loaded: every program of this machine is unmanaged", "err", err)
		return a.runUnmanaged(ctx)
	default:
		return fmt.Errorf("node agent: %w", err)
	}
	defer a.set.Close()
	defer a.cgroups.Close()
	return a.serve(ctx)
}

// runUnmanaged serves what works without programs: the word that there are none.
func (a *Agent) runUnmanaged(ctx context.Context) error {
	a.flows = flow.New(flow.Config{Clock: a.cfg.Clock, Log: a.log})
	l, err := a.listenFlows()
	if err != nil {
		return err
	}
	close(a.ready)
	return a.serveFlows(ctx, l)
}

// serve runs everything until ctx is done or a part of it fails.
func (a *Agent) serve(ctx context.Context) (err error) {
	metrics, err := a.rooms.metrics(ctx, a)
	if err != nil {
		return fmt.Errorf("node agent: %w", err)
	}
	if a.metrics, err = metrics.Listen(); err != nil {
		return errors.Join(fmt.Errorf("node agent: %w", err), metrics.Close(ctx))
	}
	a.flows = flow.New(flow.Config{Maps: a.set.Maps(), Namer: namer{a.table}, Sink: metrics.Observe, Clock: a.cfg.Clock, Log: a.log})
	l, err := a.listenFlows()
	if err != nil {
		return errors.Join(err, metrics.Close(ctx))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel(nil) // no effect when a part has failed
		wg.Wait()
		// metrics last: they are told of flows until the log has ended
		err = errors.Join(err, metrics.Close(context.WithoutCancel(ctx)))
	}()
	part := func(name string, run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("node agent: %s: %w", name, err))
			}
		})
	}
	part("flows", func(ctx context.Context) error { return a.serveFlows(ctx, l) })
	part("flow log", a.flows.Run)
	part("metrics", metrics.Serve)
	part("control plane", a.client.Run)
	part("tables", a.applyLoop)
	part("sweeps", a.sweepLoop)
	part("cgroups", a.reapLoop)
	part("cgroup events", func(ctx context.Context) error {
		a.cgroups.events(ctx, func() { signal(a.reap) })
		return nil
	})
	part("cgroup clock", func(ctx context.Context) error {
		a.every(ctx, time.Second, func() { signal(a.reap) })
		return nil
	})
	part("addresses", a.addressLoop)
	part("state", a.watchLoop)
	part("map counts", a.countLoop)
	if len(a.cfg.ProxyCommand) > 0 {
		part("dns proxy", a.proxyLoop)
	}
	close(a.ready)
	cgroup, pin := a.Managed()
	a.log.InfoContext(ctx, "node agent runs", "cgroup", cgroup, "pin", pin, "metrics", a.metrics, "version", a.cfg.Version)
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return cause
	}
	return nil
}

// every calls f each d until ctx is done, once at once.
func (a *Agent) every(ctx context.Context, d time.Duration, f func()) {
	for ctx.Err() == nil {
		f()
		due := make(chan struct{})
		stop := a.cfg.Clock.AfterFunc(d, func() { close(due) })
		select {
		case <-due:
		case <-ctx.Done():
		}
		stop()
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
