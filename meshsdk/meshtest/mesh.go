package meshtest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/controlplane"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/source"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk"
)

// The first signal.Notify of a process starts a goroutine of the runtime that never ends. It must
// not be born inside the bubble of synctest.Test, which would wait for it; fx, which wires the
// control plane, asks for signals when it starts.
var _ = func() bool {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGCONT)
	signal.Stop(c)
	return true
}()

// Option changes what New makes.
type Option func(*Mesh)

// Loopback uses TCP of this machine in place of connections in memory: for benchmarks, and for
// programs of other processes. It does not work under testing/synctest.
func Loopback() Option { return func(m *Mesh) { m.loopback = true } }

// Plaintext also serves plain xDS, as on port 15010 of `inlay dev`, for clients that do not use the
// SDK: its address is PlaintextXDS. It goes with Loopback only.
func Plaintext() Option { return func(m *Mesh) { m.plaintext = true } }

// SVIDTTL is the lifetime of certificates; without it an hour.
func SVIDTTL(d time.Duration) Option { return func(m *Mesh) { m.ttl = d } }

// Log takes what the control plane and the services log; without it, the log of the test when it
// is verbose.
func Log(log *slog.Logger) Option { return func(m *Mesh) { m.log = log } }

// Mesh is one mesh of one test. Its methods fail the test when they cannot do what they say. They
// are safe for concurrent use, but for the goroutine rules of testing.TB.
type Mesh struct {
	t         testing.TB
	loopback  bool
	plaintext bool
	ttl       time.Duration
	log       *slog.Logger
	dir       string
	net       *network
	address   string // of the control plane
	plain     string // its plaintext port; empty without Plaintext

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	cp    *controlplane.ControlPlane // nil while it is stopped
	files []source.File
	ids   map[string]*identity.Var
	n     int
}

// controlPlaneHost is where the control plane listens in memory.
var controlPlaneHost = netip.AddrFrom4([4]byte{10, 255, 0, 1})

// New starts a control plane with an empty configuration.
func New(t testing.TB, opts ...Option) *Mesh {
	t.Helper()
	m := &Mesh{t: t, ttl: time.Hour, dir: t.TempDir(), net: newNetwork(), ids: map[string]*identity.Var{}}
	for _, o := range opts {
		o(m)
	}
	if m.plaintext && !m.loopback {
		t.Fatal("meshtest: Plaintext without Loopback: a client that does not use the SDK has no connections in memory")
	}
	if m.log == nil {
		m.log = slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	t.Cleanup(func() {
		m.cancel()
		m.wg.Wait()
	})
	m.StartControlPlane()
	t.Cleanup(func() {
		if m.running() != nil {
			m.StopControlPlane()
		}
	})
	return m
}

// testLog writes to the log of a test, which drops it unless the test is verbose or fails.
type testLog struct{ t testing.TB }

func (w testLog) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}

func (m *Mesh) running() *controlplane.ControlPlane {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cp
}

// StartControlPlane starts the control plane again after StopControlPlane: with the same
// authority, the instances it knew, and the configuration last applied.
func (m *Mesh) StartControlPlane() {
	m.t.Helper()
	if m.running() != nil {
		m.t.Fatal("meshtest: the control plane runs already")
	}
	listen := func(_, addr string) (net.Listener, error) { return m.net.listen(controlPlaneHost, addr) }
	address := net.JoinHostPort(controlPlaneHost.String(), "15012")
	if m.loopback {
		listen, address = net.Listen, "127.0.0.1:0"
		if m.address != "" {
			address = m.address
		}
	}
	plain := m.plain
	if m.plaintext && plain == "" {
		plain = "127.0.0.1:0"
	}
	cp, err := controlplane.New(controlplane.Config{
		DataDir: m.dir, MTLS: address, Plaintext: plain, Listen: listen, SVIDTTL: m.ttl, Version: "meshtest", Log: m.log,
	})
	if err != nil {
		m.t.Fatalf("meshtest: control plane: %v", err)
	}
	if err := cp.Start(m.ctx); err != nil {
		m.t.Fatalf("meshtest: control plane: %v", err)
	}
	m.mu.Lock()
	m.cp, m.address, m.plain = cp, cp.Addresses()[controlplane.AddressXDSMTLS], cp.Addresses()[controlplane.AddressXDS]
	files := m.files
	m.mu.Unlock()
	if _, err := cp.Apply(m.ctx, files); err != nil {
		m.t.Fatalf("meshtest: %v", err)
	}
}

// StopControlPlane ends the control plane: services go on with what they have.
func (m *Mesh) StopControlPlane() {
	m.t.Helper()
	m.mu.Lock()
	cp := m.cp
	m.cp = nil
	m.mu.Unlock()
	if cp == nil {
		m.t.Fatal("meshtest: the control plane does not run")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := cp.Stop(ctx); err != nil {
		m.t.Errorf("meshtest: control plane: %v", err)
	}
}

// Apply makes the given YAML texts, each one or more documents, the whole configuration, and
// returns when it is served. Services have it a moment later. Faults fail the test.
func (m *Mesh) Apply(yaml ...string) {
	m.t.Helper()
	if err := m.TryApply(yaml...); err != nil {
		m.t.Fatalf("meshtest: %v", err)
	}
}

// TryApply is Apply that returns the faults, each as file:line:col CODE message on a line of its
// own; the running configuration then stays. The texts count as files 0.yaml, 1.yaml, and so on.
func (m *Mesh) TryApply(yaml ...string) error {
	m.t.Helper()
	cp := m.running()
	if cp == nil {
		m.t.Fatal("meshtest: Apply while the control plane is stopped")
	}
	var files []source.File
	for i, text := range yaml {
		files = append(files, source.File{Path: fmt.Sprintf("%d.yaml", i), Data: []byte(text)})
	}
	_, err := cp.Apply(m.ctx, files)
	if err == nil {
		m.mu.Lock()
		m.files = files
		m.mu.Unlock()
	}
	return err
}

// Open starts the SDK of one instance of a service: "orders", or "orders.shop". Further options
// come after those that place it in this mesh. It is shut down with the test.
func (m *Mesh) Open(service string, opts ...meshsdk.Option) *meshsdk.Mesh {
	m.t.Helper()
	host := m.net.newHost()
	m.mu.Lock()
	m.n++
	state := fmt.Sprintf("%s/state-%d", m.dir, m.n)
	m.mu.Unlock()
	base := []meshsdk.Option{
		meshsdk.WithEnvironment(func(string) string { return "" }),
		meshsdk.WithService(service),
		meshsdk.WithIdentity(m.Identity(service)),
		meshsdk.WithControlPlane(m.address),
		meshsdk.WithStateDir(state),
		meshsdk.WithLogger(m.log),
	}
	if m.loopback {
		base = append(base, meshsdk.WithListen("127.0.0.1:0"))
	} else {
		base = append(base,
			meshsdk.WithDialer(func(ctx context.Context, _, addr string) (net.Conn, error) { return m.net.dial(ctx, host, addr) }),
			meshsdk.WithListener(func(_ context.Context, _, addr string) (net.Listener, error) { return m.net.listen(host, addr) }),
		)
	}
	s, err := meshsdk.Open(m.ctx, append(base, opts...)...)
	if err != nil {
		m.t.Fatalf("meshtest: service %s: %v", service, err)
	}
	m.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			m.t.Errorf("meshtest: service %s: %v", service, err)
		}
	})
	return s
}

// Serve runs servers of an instance until the test ends or stop is called, which drains them as
// SIGTERM drains a program and returns when they have ended. It returns at once: callers wait for
// the endpoint as they would for any program that starts.
func (m *Mesh) Serve(s *meshsdk.Mesh, servers ...meshsdk.Server) (stop func()) {
	m.t.Helper()
	ctx, cancel := context.WithCancel(m.ctx)
	done := make(chan error, 1)
	m.wg.Go(func() { done <- s.Run(ctx, servers...) })
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Errorf("meshtest: serve: %v", err)
		}
	})
	m.t.Cleanup(stop)
	return stop
}

// Break makes connections to an address fail with why, and cuts those there are; nil mends it. The
// address is one that an endpoint, a Decision or a listener names; ControlPlane is the control
// plane's. Not with Loopback.
func (m *Mesh) Break(addr string, why error) {
	m.t.Helper()
	if m.loopback {
		m.t.Fatal("meshtest: Break with Loopback: only connections in memory can be broken")
	}
	m.net.fail(addr, why)
}

// ControlPlane is the address of the control plane.
func (m *Mesh) ControlPlane() string { return m.address }

// PlaintextXDS is the address for clients that do not use the SDK; empty without Plaintext.
func (m *Mesh) PlaintextXDS() string { return m.plain }

// Clients is what the control plane knows of its xDS clients with their resources, oldest first.
func (m *Mesh) Clients() []serve.ClientStatus {
	m.t.Helper()
	cp := m.running()
	if cp == nil {
		m.t.Fatal("meshtest: Clients while the control plane is stopped")
	}
	return cp.Server().Clients(true)
}

// ErrBroken is a reason to give to Break.
var ErrBroken = errors.New("broken by the test")
