// Package controlplane is the control plane of the mesh in one process. It writes the pipeline out
// once (a directory of YAML, or files given to Apply, is parsed, compiled with the live instances,
// and served as xDS), holds the registry and the certificate authority, and answers the CLI.
//
// `inlay controlplane` and meshtest run it with New, Start and Stop; Run is all three. Whoever has an
// fx application takes Module, which the others are made of. It never makes a workload's key, and
// it never imports the SDK: they meet on the wire.
package controlplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/dig"
	"go.uber.org/fx"

	"github.com/inlay-mesh/inlay/controlplane/admin"
	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/source"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// Clock tells the time and calls back later.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// Names of the listeners, in Addresses and in the state file.
const (
	AddressXDS     = "xds"      // plaintext
	AddressXDSMTLS = "xds-mtls" // mutual TLS
	AddressUnix    = "unix"
	AddressAdmin   = "admin"
)

// Config is what a control plane is made of.
type Config struct {
	// ConfigDir is watched for YAML. Empty means that configuration comes by Apply, and is empty
	// until then.
	ConfigDir string
	// DataDir remembers revisions, instances and the authority over a restart. Empty means that
	// nothing is remembered.
	DataDir string
	// RunDir gets the state file by which the CLI finds this process. Empty writes none.
	RunDir string
	// TrustDomain of every identity. Empty means inlay.local.
	TrustDomain string

	// Plaintext, MTLS and Admin are host:port, UnixSocket is a path; empty is off, port 0 any.
	// Plaintext and Admin must be loopback.
	Plaintext  string
	MTLS       string
	Admin      string
	UnixSocket string

	// NodeSocket is that of the node, which says whose a local process is. Empty means that nobody
	// on UnixSocket has an identity.
	NodeSocket string
	// NodeUIDs are the users as which nodes run. Nil means this process's own user and root.
	NodeUIDs []uint32
	// SVIDTTL is how long an SVID lives. Zero means 1 h.
	SVIDTTL time.Duration
	// LeaseTTL is how long an instance lives without renewal. Zero means 15 s.
	LeaseTTL time.Duration

	// VirtualIPv4 and VirtualIPv6 are the ranges that services get their virtual addresses from, one
	// of each for every service. The lowest address and the highest of IPv4 are not given. Zero means
	// 198.18.0.0/15 (RFC 2544) and fd69:6e6c:6179::/64.
	VirtualIPv4, VirtualIPv6 netip.Prefix

	// Version of the program, for texts.
	Version string
	// EncodeSnapshot writes the file that an SDK reads as its cache. Nil: GetSnapshot is refused.
	EncodeSnapshot func(Snapshot) ([]byte, error)
	// Listen opens a listener. Nil means net.Listen; tests give listeners in memory.
	Listen func(network, address string) (net.Listener, error)
	Clock  Clock        // nil means the real one
	Log    *slog.Logger // nil discards
}

// Snapshot is all that one service may ask for, as served at one moment.
type Snapshot struct {
	TrustDomain string
	// SPIFFEID of the service.
	SPIFFEID string
	// Revision of the configuration.
	Revision string
	// Namespaces that hold services, sorted.
	Namespaces []string
	// Written is when the snapshot was taken.
	Written   time.Time
	Resources []*xdsgen.Resource
}

// withDefaults fills in and checks what can be checked without touching anything; all faults come
// together.
func (cfg Config) withDefaults() (Config, error) {
	cfg.TrustDomain = cmp.Or(cfg.TrustDomain, "inlay.local")
	if cfg.Listen == nil {
		cfg.Listen = net.Listen
	}
	if cfg.Clock == nil {
		cfg.Clock = systemClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var faults []error
	if _, err := spiffeid.TrustDomainFromString(cfg.TrustDomain); err != nil {
		faults = append(faults, fmt.Errorf("--trust-domain %q: %w: want a name such as inlay.local", cfg.TrustDomain, err))
	}
	if cfg.Plaintext != "" {
		if err := requireLoopback(cfg.Plaintext); err != nil {
			faults = append(faults, fmt.Errorf("--xds-addr %s: %w: the plaintext port asks nobody who they are; other machines use mutual TLS (--xds-mtls-addr)", cfg.Plaintext, err))
		}
	}
	if cfg.Admin != "" {
		if err := requireLoopback(cfg.Admin); err != nil {
			faults = append(faults, fmt.Errorf("--admin-addr %s: %w: the admin API asks nobody who they are", cfg.Admin, err))
		}
	}
	if cfg.MTLS != "" {
		if _, _, err := net.SplitHostPort(cfg.MTLS); err != nil {
			faults = append(faults, fmt.Errorf("--xds-mtls-addr %q: %w: want host:port, as 0.0.0.0:15012", cfg.MTLS, err))
		}
	}
	if err := vip.Check(cfg.VirtualIPv4, "--virtual-ipv4", cfg.VirtualIPv6, "--virtual-ipv6"); err != nil {
		faults = append(faults, err)
	}
	return cfg, errors.Join(faults...)
}

// ControlPlane is a whole control plane. Make it with New.
type ControlPlane struct {
	cfg      Config
	app      *fx.App // of New; nil inside somebody else's application
	disk     *disk
	ca       *ca.CA
	registry *registry.Registry
	serve    *serve.Server
	reports  *admin.Reports
	pipeline *pipeline
	servers  *servers
}

// New makes a control plane in this process: it opens the data directory and its authority.
// Nothing listens or runs until Start. After an error there is nothing to close.
func New(cfg Config) (*ControlPlane, error) {
	var cp *ControlPlane
	app := fx.New(Module(cfg), fx.Populate(&cp), quiet(cfg.Log))
	if err := app.Err(); err != nil {
		return nil, dig.RootCause(err)
	}
	cp.app = app
	return cp, nil
}

// Start binds every address and runs. When it returns without error the addresses accept; Ready
// says when configuration is served. After an error everything is closed again. It waits for
// nothing, so that ctx matters only when it is done before.
func (cp *ControlPlane) Start(ctx context.Context) error {
	err := ctx.Err()
	if err == nil {
		// fx undoes the stages before the one that failed, but not under a context that is done.
		err = cp.app.Start(context.WithoutCancel(ctx))
	}
	if err != nil {
		return errors.Join(err, cp.disk.Close())
	}
	return nil
}

// Stop ends streams, closes the addresses and the data directory, and returns when every goroutine
// has ended, whether ctx is done or not: within a second as a rule, and within five in any case. It may be called without Start.
func (cp *ControlPlane) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return errors.Join(cp.app.Stop(ctx), cp.disk.Close())
}

// Ready is closed when the first revision is served. With a configuration that is refused and no
// earlier revision to fall back on it stays open, and clients wait: serving an empty mesh instead
// would tell them that their services are gone.
func (cp *ControlPlane) Ready() <-chan struct{} { return cp.pipeline.ready }

// Failed is closed when a part of the running control plane ended by itself; Err then says why.
func (cp *ControlPlane) Failed() <-chan struct{} { return cp.servers.failed }

// Err says why a part ended by itself; nil when none did.
func (cp *ControlPlane) Err() error { return cp.servers.err() }

// Addresses maps the names of the listeners to what was bound; empty before Start.
func (cp *ControlPlane) Addresses() map[string]string { return cp.servers.addresses() }

// CA is the certificate authority, for who makes identities in the same process.
func (cp *ControlPlane) CA() *ca.CA { return cp.ca }

// Registry holds the live instances.
func (cp *ControlPlane) Registry() *registry.Registry { return cp.registry }

// Server is the ADS server with its clients.
func (cp *ControlPlane) Server() *serve.Server { return cp.serve }

// Applied is what Apply did.
type Applied struct {
	Revision string
	Warnings []config.Finding
}

// RefusedError says that configuration was refused; the running revision stays.
type RefusedError struct{ Faults []config.Finding }

// Error lists every fault on a line of its own, as file:line:col CODE message.
func (e *RefusedError) Error() string {
	lines := make([]string, 0, len(e.Faults))
	for _, f := range e.Faults {
		lines = append(lines, f.String())
	}
	return "configuration refused:\n" + strings.Join(lines, "\n")
}

// Apply makes files the configuration, as if they were the whole directory, and returns when it is
// served: *RefusedError when it has faults. It blocks until the control plane runs, or ctx is done.
func (cp *ControlPlane) Apply(ctx context.Context, files []source.File) (Applied, error) {
	return cp.pipeline.apply(ctx, source.NewRevision(slices.Clone(files)))
}
