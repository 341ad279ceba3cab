// Package workload is what runs on a node: it attests local processes, makes and keeps the keys of
// their services, and serves them the SPIFFE Workload API. `inlay node` runs it, as a process of
// its own that outlives the control plane.
//
// It is a client of the control plane's certificate authority and registry, over their unix
// socket: only CSRs travel. It never writes a key to disk, never sends one anywhere but to an
// attested process, and believes nothing that a process says of itself.
package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/capb"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// Clock tells time. nil is the real one.
type Clock interface {
	Now() time.Time
	// AfterFunc runs f in its own goroutine once d has passed, unless stop was called before.
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}

// Config says where the node lives and who may run what.
type Config struct {
	// RunDir holds the sockets and the lock; it is created (0755) when missing. It is required and
	// belongs to the node's user.
	RunDir string
	// ControlPlane is the path of the control plane's unix socket; programs are told of it. It is
	// required.
	ControlPlane string
	// Dial opens a connection to the control plane; nil dials ControlPlane.
	Dial func(ctx context.Context) (net.Conn, error)
	// TrustDomain of the node; empty means inlay.local. A control plane of another one is refused.
	TrustDomain string
	// Users says which user may run which services: "NAME" (in the namespace default),
	// "NAMESPACE/NAME", or "*" for every service. Nil means that the node's own user may run every
	// service and nobody else any, as in `inlay dev`.
	Users map[uint32][]string
	// Cgroups manages the cgroups of `inlay run --ebpf`; nil refuses such runs.
	Cgroups Cgroups
	// NodeAddresses are the IPs of this machine that managed workloads are known by on others. Nil
	// means none: such a workload is known on this machine only.
	NodeAddresses []netip.Addr
	// Table reads processes; nil means /proc.
	Table attest.Table
	Clock Clock
	// Rand returns jitter in [0, 1); nil means math/rand/v2.
	Rand func() float64
	Log  *slog.Logger // nil discards
}

// Node attests and serves. Make it with New; it works while Run runs.
type Node struct {
	cfg    Config
	td     spiffeid.TrustDomain
	log    *slog.Logger
	regs   *registrations
	issuer *issuer
	ready  chan struct{}

	registry registrypb.RegistryClient
	stopping chan struct{} // closed when Run begins to end
	workers  context.Context
	wg       sync.WaitGroup // everything that runs in workers

	mu        sync.Mutex
	instances map[instanceKey]*instance
	entering  map[string]bool       // run ids of managed runs that are being admitted
	managed   map[string]managedRun // by run id, as the file has them
}

// New checks cfg and returns a node at rest; nothing is opened until Run.
func New(cfg Config) (*Node, error) {
	if cfg.RunDir == "" {
		return nil, errors.New("node: RunDir is empty: want a directory for its sockets (--run-dir)")
	}
	if cfg.ControlPlane == "" {
		return nil, errors.New("node: ControlPlane is empty: want the path of the control plane's unix socket")
	}
	abs, err := filepath.Abs(cfg.RunDir)
	if err != nil {
		return nil, fmt.Errorf("node: run directory %q: %w", cfg.RunDir, err)
	}
	cfg.RunDir = abs
	// Programs are told of it, wherever their working directory is.
	if cfg.ControlPlane, err = filepath.Abs(cfg.ControlPlane); err != nil {
		return nil, fmt.Errorf("node: control plane %q: %w", cfg.ControlPlane, err)
	}
	if cfg.TrustDomain == "" {
		cfg.TrustDomain = "inlay.local"
	}
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("node: trust domain %q: %w: want a name such as inlay.local", cfg.TrustDomain, err)
	}
	if cfg.Users == nil {
		cfg.Users = map[uint32][]string{uint32(os.Geteuid()): {"*"}}
	}
	if err := checkUsers(cfg.Users); err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", cfg.ControlPlane)
		}
	}
	if cfg.Table == nil {
		cfg.Table = attest.Proc{}
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Float64
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Node{
		cfg: cfg, td: td, log: cfg.Log,
		regs:      newRegistrations(cfg.Table, cfg.Cgroups),
		ready:     make(chan struct{}),
		stopping:  make(chan struct{}),
		instances: make(map[instanceKey]*instance),
		entering:  make(map[string]bool),
		managed:   make(map[string]managedRun),
	}, nil
}

// Ready is closed once both sockets accept connections.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// WorkloadSocket is the path of the SPIFFE Workload API's socket.
func (n *Node) WorkloadSocket() string { return filepath.Join(n.cfg.RunDir, WorkloadSocket) }

// NodeSocket is the path of the socket of inlay.node.v1.Node.
func (n *Node) NodeSocket() string { return filepath.Join(n.cfg.RunDir, NodeSocket) }

// Run serves until ctx is done, then returns nil when everything it started has ended. It may be
// called once. Instances that it registered for programs keep their leases: the programs still
// run, and a node that starts again takes them over.
func (n *Node) Run(ctx context.Context) error {
	dir, err := openRunDir(n.cfg.RunDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	apiListener, err := dir.listen(WorkloadSocket)
	if err != nil {
		return err
	}
	defer apiListener.Close()
	nodeListener, err := dir.listen(NodeSocket)
	if err != nil {
		return err
	}
	defer nodeListener.Close()

	cc, err := dialControlPlane(n.cfg.Dial)
	if err != nil {
		return err
	}
	defer cc.Close()

	workers, stopWorkers := context.WithCancel(context.WithoutCancel(ctx))
	defer n.wg.Wait()
	defer stopWorkers()
	n.workers = workers
	n.registry = registrypb.NewRegistryClient(cc)
	n.issuer = newIssuer(issuerConfig{
		ctx: workers, wg: &n.wg, ca: capb.NewCAClient(cc), td: n.td,
		clock: n.cfg.Clock, random: n.cfg.Rand, log: n.log,
	})
	n.wg.Go(func() { n.issuer.followBundle(workers) })
	n.recall(ctx)

	api, local := n.servers()
	failed := make(chan error, 2)
	var serving sync.WaitGroup
	serving.Go(func() { failed <- serveError(WorkloadSocket, api.Serve(apiListener)) })
	serving.Go(func() { failed <- serveError(NodeSocket, local.Serve(nodeListener)) })
	close(n.ready)
	n.log.InfoContext(ctx, "node serves", "workload_socket", n.WorkloadSocket(), "node_socket", n.NodeSocket(), "trust_domain", n.td.Name())

	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
	}
	close(n.stopping)
	// Stop returns when the handlers have (WaitForHandlers), so that nothing starts a worker after.
	api.Stop()
	local.Stop()
	serving.Wait()
	return err
}

// servers makes the two gRPC servers. Their callers are known by the kernel's word alone.
func (n *Node) servers() (api, local *grpc.Server) {
	options := []grpc.ServerOption{
		grpc.Creds(attest.NewCredentials(nil)), // whose a process is is decided at each call
		grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(64 << 10),
		grpc.MaxConcurrentStreams(64),
		grpc.ConnectionTimeout(5 * time.Second),
	}
	api, local = grpc.NewServer(options...), grpc.NewServer(options...)
	registerWorkloadAPI(api, &workloadAPI{node: n})
	nodepb.RegisterNodeServer(local, &nodeService{node: n})
	return api, local
}

func serveError(socket string, err error) error {
	if err == nil || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return fmt.Errorf("node: serve %s: %w", socket, err)
}

// dialControlPlane makes the channel to the control plane. It connects when first used, and comes
// back within about a second after the control plane does.
func dialControlPlane(dial func(context.Context) (net.Conn, error)) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///controlplane",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket: the kernel says who calls
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }),
		grpc.WithAuthority("localhost"),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	)
}

// checkUsers refuses entries that could never match.
func checkUsers(users map[uint32][]string) error {
	var errs []error
	for uid, services := range users {
		for _, entry := range services {
			if entry == "*" {
				continue
			}
			if _, err := parseService(entry); err != nil {
				errs = append(errs, fmt.Errorf("users: %d: %q: %w: want NAME, NAMESPACE/NAME or *", uid, entry, err))
			}
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return compareText(a, b) })
	return errors.Join(errs...)
}

// allowed says whether user uid may run svc.
func allowed(users map[uint32][]string, uid uint32, svc service) bool {
	return slices.ContainsFunc(users[uid], func(entry string) bool {
		if entry == "*" {
			return true
		}
		want, err := parseService(entry)
		return err == nil && want == svc
	})
}

// id is the SPIFFE ID of a service of this node's trust domain.
func (n *Node) id(svc service) (spiffeid.ID, error) {
	return identity.ServiceID(n.td, svc.namespace, svc.name)
}
