package meshsdk

import (
	"context"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/apply"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/report"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/telemetry"
	"github.com/inlay-mesh/inlay/xds"
)

// Mesh is one membership of the mesh: an identity, a configuration kept current, clients and
// servers. Open makes it; it is safe for concurrent use and ends with Shutdown or Close.
type Mesh struct {
	set        *settings
	log        *slog.Logger
	clock      Clock
	instanceID string
	source     identity.Source
	snapshot   *xds.Snapshot // of WithConfig; nil with a control plane

	engine    *call.Engine
	applier   *apply.Applier
	observer  *telemetry.Telemetry
	counters  *telemetry.Counters
	config    *config
	control   *control
	registrar *registrar
	reporter  *report.Reporter
	reporting atomic.Bool // reporter runs
	names     *names
	clients   *grpcmesh.Client
	http      *httpClients
	plain     *http.Transport // of HTTPClient in a disabled Mesh

	gate    *tcpmesh.Gate
	inbound tcpmesh.Stats
	skins   atomic.Int32
	stage   atomic.Int32
	ended   chan struct{}   // closed when the stage is no longer open
	closed  chan struct{}   // closed when nothing runs any more
	cut     context.Context // ends when Close is called
	cutNow  context.CancelFunc
	cancel  context.CancelFunc
	// stopNames stops the timer that ends waiting for namespaces; nil in a disabled Mesh.
	stopNames func() bool
	wg        sync.WaitGroup

	known   chan struct{}          // closed when who and failure are decided
	whoName atomic.Pointer[string] // who, for each call

	mu        sync.Mutex
	who       self
	failure   error // why there will be no configuration; nil when there may be
	loaded    bool  // configuration came once: from a file, the cache or the control plane
	loadedCh  chan struct{}
	xds       *xds.Client // nil before it is known who we are
	cache     *xds.Cache
	cacheErr  error // why the stored configuration was refused
	servers   []stoppable
	listeners map[*tcpmesh.Listener]*inbound
}

// Open reads options and environment and starts a Mesh. It never waits for the node or the control
// plane: clients and servers can be made at once, calls wait for what they need. Errors are those
// of wrong input: an option, a variable, a bootstrap, a snapshot file, or an identity that is here
// already and is another than the service said. ctx is for what Open itself does; the Mesh lives
// until Shutdown or Close.
func Open(ctx context.Context, opts ...Option) (*Mesh, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("mesh: %w", err)
	}
	var o options
	for _, opt := range opts {
		if opt != nil {
			opt.apply(&o)
		}
	}
	set, err := resolve(o, os.ReadFile)
	if err != nil {
		return nil, fmt.Errorf("mesh: %w", err)
	}
	m := &Mesh{
		set:        set,
		log:        set.log,
		clock:      set.clock,
		instanceID: strings.ToLower(crand.Text()),
		gate:       tcpmesh.NewGate(),
		ended:      make(chan struct{}),
		closed:     make(chan struct{}),
		known:      make(chan struct{}),
		loadedCh:   make(chan struct{}),
		listeners:  make(map[*tcpmesh.Listener]*inbound),
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	m.cancel = cancel
	m.cut, m.cutNow = context.WithCancel(context.Background())
	if set.disabled {
		m.who = self{namespace: orDefault(set.namespace), service: set.service}
		m.plain = m.plainTransport(nil)
		close(m.known)
		return m, nil
	}
	if err := m.prepare(); err != nil {
		cancel()
		return nil, fmt.Errorf("mesh: %w", err)
	}
	m.start(run)
	return m, nil
}

func orDefault(namespace string) string {
	if namespace == "" {
		return "default"
	}
	return namespace
}

// prepare makes the parts, at rest.
func (m *Mesh) prepare() error {
	set := m.set
	dial := set.dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	if err := m.prepareIdentity(dial); err != nil {
		return err
	}
	if set.configFile != "" {
		snap, err := xds.LoadSnapshot(set.configFile, "", "")
		if err != nil {
			return err
		}
		m.snapshot = snap
	}
	// What can be said about who this is now must be right: a mistake in the service's name should
	// not wait for a log to be read.
	if svid, err := m.source.Current(); err == nil {
		who, err := set.selfOf(svid)
		if err != nil {
			return err
		}
		if err := m.checkSnapshot(who); err != nil {
			return err
		}
	} else if !m.expectsIdentity() && m.snapshot == nil {
		if _, err := set.selfOf(nil); err != nil {
			return err
		}
	}

	m.counters = telemetry.NewCounters(0, m.clock.Now())
	observer, err := telemetry.New(telemetry.Config{
		TracerProvider: set.tracerProvider,
		MeterProvider:  set.meterProvider,
		Propagator:     set.propagator,
		AccessLog:      set.accessLog,
		Logger:         m.log,
		Counters:       m.counters,
		Now:            m.clock.Now,
	})
	if err != nil {
		return fmt.Errorf("WithTelemetry: %w", err)
	}
	m.observer = observer
	m.config = newConfig()
	m.names = newNames()
	if m.snapshot != nil {
		m.names.announce(m.snapshot.Meta.Namespaces)
		m.names.settle() // nothing more will be announced
	}
	m.engine = call.New(call.Config{
		Subscribe: m.subscribe,
		Observer:  observer,
		Clock:     set.callClock(),
		Log:       m.log,
		Missing:   m.missingHint,
	})
	m.applier = apply.New(apply.Config{
		Publish: m.engine.Publish,
		Now:     m.clock.Now,
		Log:     m.log,
	})
	m.control = newControl(dial, m.source, m.clock.Now)
	m.registrar = newRegistrar(m.clock, m.log)
	m.registrar.conn = m.control.ready
	m.registrar.instance = m.instance
	m.registrar.reachable = m.reachable
	m.reporter = report.New(report.Config{
		Conn:     m.control.ready,
		Hello:    m.hello,
		Status:   m.reportStatus,
		Counters: m.reportCounters,
		Explain:  m.answer,
		Announce: m.announced,
		Clock:    m.clock,
		Log:      m.log,
	})
	m.prepareClients(dial)
	return nil
}

// callClock is nil for the real one: the engine then leaves deadlines to package context.
func (s *settings) callClock() call.Clock {
	if _, real := s.clock.(realClock); real {
		return nil
	}
	return s.clock
}

// prepareIdentity makes the source: the caller's, the Workload API's, or one that says that there
// is none and what to do.
func (m *Mesh) prepareIdentity(dial func(ctx context.Context, network, addr string) (net.Conn, error)) error {
	switch {
	case m.set.identity != nil:
		m.source = m.set.identity
		return nil
	case m.set.workload != "":
		network, addr, err := identity.ParseSocket(m.set.workload)
		if err != nil {
			return err
		}
		c, err := identity.NewClient(identity.ClientConfig{
			Socket: m.set.workload,
			Dial:   func(ctx context.Context) (net.Conn, error) { return dial(ctx, network, addr) },
			Clock:  m.clock,
			Log:    m.log,
		})
		if err != nil {
			return err
		}
		m.source = c
		return nil
	}
	v := identity.NewVarClock(m.clock)
	v.Fail(errNoNode)
	m.source = v
	return nil
}

var errNoNode = errors.New("no node runs here and no identity was given: start the program with: inlay run --service NAME -- CMD, or set SPIFFE_ENDPOINT_SOCKET")

// expectsIdentity reports whether an SVID is there or can still come.
func (m *Mesh) expectsIdentity() bool { return m.set.identity != nil || m.set.workload != "" }

func (m *Mesh) checkSnapshot(who self) error {
	if m.snapshot == nil || who.spiffeID == "" {
		return nil
	}
	meta := m.snapshot.Meta
	if meta.SPIFFEID != "" && meta.SPIFFEID != who.spiffeID || meta.TrustDomain != "" && meta.TrustDomain != who.trustDomain {
		return fmt.Errorf("configuration snapshot %s is for %s, this workload is %s: write one for it with `inlay compile DIR --for %s -o %s`",
			m.snapshot.Path, meta.SPIFFEID, who.spiffeID, who.service, m.snapshot.Path)
	}
	return nil
}

// self waits until it is known who this process is.
func (m *Mesh) self(ctx context.Context) (self, error) {
	select {
	case <-m.known:
	default:
		select {
		case <-m.known:
		case <-ctx.Done():
			return self{}, context.Cause(ctx)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.who, m.failure
}

// serviceName is "service.namespace", empty until it is known.
func (m *Mesh) serviceName() string {
	if s := m.whoName.Load(); s != nil {
		return *s
	}
	return ""
}

// subscribe is how the engine asks for a listener.
func (m *Mesh) subscribe(name string) (release func()) {
	cancel := m.config.watch(func(self) string { return name }, func(cfg *graphConfig) { m.applier.Apply(cfg) })
	return func() {
		cancel()
		m.applier.Remove(name)
	}
}

// missing says why there is no configuration at all; nil when there is some.
func (m *Mesh) missing() error {
	m.mu.Lock()
	failure, loaded, client := m.failure, m.loaded, m.xds
	m.mu.Unlock()
	if failure != nil {
		return failure
	}
	var away error // the control plane, or what it refused us for
	if client != nil {
		away = client.Status().Err
	}
	code := status.Code(away)
	denied := code == codes.PermissionDenied || code == codes.Unauthenticated
	switch _, err := m.source.Current(); {
	case err != nil && (denied || m.expectsIdentity() && !loaded):
		return errors.Join(err, away)
	case loaded:
		return nil
	case away != nil:
		return fmt.Errorf("control plane from %s: %w", m.set.boot.Source, away)
	}
	return fmt.Errorf("control plane from %s has not answered yet", m.set.boot.Source)
}

// missingHint is missing with what to do about it, where that is known.
func (m *Mesh) missingHint() (hint string, why error) {
	why = m.missing()
	switch {
	case !errors.Is(why, identity.ErrNoIdentity):
		return "", why
	case m.expectsIdentity() && !errors.Is(why, identity.ErrDenied):
		return "it has no identity, since nothing answers at its SPIFFE_ENDPOINT_SOCKET: is `inlay dev` or `inlay node` running?", why
	}
	return "it has no identity: start the program with `inlay run --service NAME -- PROGRAM`", why
}

// TLSConfig is for connections that a program makes or accepts itself, without clients or listeners
// of the mesh: TLS 1.3 with this workload's SVID at each handshake, and peers that prove to be one
// of those given; without any, every workload whose trust domain has a bundle here. It serves
// clients and servers. A program in a disabled Mesh has no identity: its handshakes fail.
func (m *Mesh) TLSConfig(peers ...spiffeid.ID) *tls.Config {
	src := m.source
	if src == nil {
		v := identity.NewVarClock(m.clock)
		v.Fail(errors.New("the mesh is disabled (INLAY_DISABLED)"))
		src = v
	}
	cfg := identity.ServerTLS(src, identity.ServerOptions{RequireClient: true, Now: m.clock.Now})
	client := identity.ClientTLS(src, nil, nil, m.clock.Now)
	cfg.InsecureSkipVerify = true // no name of DNS is asked for: VerifyConnection does it all
	cfg.GetClientCertificate = client.GetClientCertificate
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		own, err := src.Current()
		if err != nil {
			return err
		}
		// The configuration does not know which end it is, and an SVID is for both.
		id, err := identity.VerifyChain(cs.PeerCertificates, own.Roots, x509.ExtKeyUsageAny, m.clock.Now())
		if err != nil {
			return err
		}
		if len(peers) > 0 && !slices.Contains(peers, id) {
			return &identity.PeerError{Got: id, Want: peers}
		}
		return nil
	}
	return cfg
}
