package meshsdk

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/inlay-mesh/inlay/identity"
)

// Option changes how Open sets up a Mesh. The set is closed: options come from this package.
// Where an option has a twin in the environment, the option wins.
type Option interface{ apply(*options) }

type optionFunc func(*options)

func (f optionFunc) apply(o *options) { f(o) }

// Clock tells time. A nil Clock is the real one, which is also right under testing/synctest.
type Clock interface {
	Now() time.Time
	// AfterFunc runs f in its own goroutine once d has passed, unless stop was called before.
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// Fallback says what happens to a host that is no name of the mesh.
type Fallback int

const (
	// Allow lets hosts outside through, over the base transport with its own TLS; they are counted
	// as peer "external". It is the default.
	Allow Fallback = iota
	// Deny refuses hosts outside with an *Error of Reason denied.
	Deny
)

// options is what the options said; the zero value of each field means "not said".
type options struct {
	service        string
	bootstrap      []byte
	identity       identity.Source
	stateDir       string
	configFile     string
	controlPlane   string
	listen         string
	labels         map[string]string
	workloadSocket string
	disabled       *bool
	fallback       Fallback
	log            *slog.Logger
	tracerProvider trace.TracerProvider
	meterProvider  metric.MeterProvider
	propagator     propagation.TextMapPropagator
	accessLog      func(AccessRecord)
	dial           func(ctx context.Context, network, addr string) (net.Conn, error)
	listener       func(ctx context.Context, network, addr string) (net.Listener, error)
	clock          Clock
	getenv         func(string) string
}

// WithService says which service this process is: "orders", or "orders.shop" with its namespace.
// It must agree with the SPIFFE ID the node gives; where that is all there is, the service is
// taken from it and the option is not needed. Twin of INLAY_SERVICE.
func WithService(name string) Option { return optionFunc(func(o *options) { o.service = name }) }

// WithBootstrap gives the gRPC xDS bootstrap JSON itself. Twin of GRPC_XDS_BOOTSTRAP_CONFIG, and
// of GRPC_XDS_BOOTSTRAP, which names a file.
func WithBootstrap(json []byte) Option {
	return optionFunc(func(o *options) { o.bootstrap = append([]byte(nil), json...) })
}

// WithIdentity gives the identity instead of the node's SPIFFE Workload API. The source stays its
// owner's: the Mesh does not close it.
func WithIdentity(src identity.Source) Option {
	return optionFunc(func(o *options) { o.identity = src })
}

// WithStateDir says where the last known good configuration is kept; the directory is made with
// mode 0700. Without it: $XDG_STATE_HOME/inlay/NAMESPACE.SERVICE, else
// ~/.local/state/inlay/NAMESPACE.SERVICE. Twin of INLAY_STATE_DIR.
func WithStateDir(dir string) Option { return optionFunc(func(o *options) { o.stateDir = dir }) }

// WithConfig names a snapshot that `inlay compile DIR --for SERVICE -o FILE` wrote. The Mesh then
// asks no control plane and registers nowhere. Twin of INLAY_CONFIG.
func WithConfig(file string) Option { return optionFunc(func(o *options) { o.configFile = file }) }

// WithControlPlane is where the control plane is: host:port (mutual TLS) or unix:PATH. Twin of
// INLAY_ADDR, before the bootstrap.
func WithControlPlane(addr string) Option {
	return optionFunc(func(o *options) { o.controlPlane = addr })
}

// WithListen is the host:port that Listen binds in place of the service's port on all addresses;
// port 0 takes a free one. Twin of INLAY_LISTEN.
func WithListen(addr string) Option { return optionFunc(func(o *options) { o.listen = addr }) }

// WithLabels are the labels of this instance; "version" is its version. They are added to those
// of INLAY_LABELS and win over them.
func WithLabels(labels map[string]string) Option {
	labels = maps.Clone(labels)
	return optionFunc(func(o *options) {
		if o.labels == nil {
			o.labels = make(map[string]string, len(labels))
		}
		maps.Copy(o.labels, labels)
	})
}

// WithWorkloadSocket is where the SPIFFE Workload API listens: unix:///PATH, tcp://IP:PORT or an
// absolute path. Twin of SPIFFE_ENDPOINT_SOCKET.
func WithWorkloadSocket(addr string) Option {
	return optionFunc(func(o *options) { o.workloadSocket = addr })
}

// WithDisabled(true) takes the process out of the mesh: plain clients (INLAY_ADDR_<SERVICE>=host:port,
// else DNS), plain listeners on the port, no identity, no control plane. Twin of INLAY_DISABLED=1.
func WithDisabled(disabled bool) Option {
	return optionFunc(func(o *options) { o.disabled = &disabled })
}

// WithFallback says what happens to hosts that are no names of the mesh; without it they pass.
func WithFallback(f Fallback) Option { return optionFunc(func(o *options) { o.fallback = f }) }

// WithLogger takes log records: Info when a state changes, Warn when something was rejected and
// the old still serves. Nothing per call is above Debug. Without it slog.Default is used.
func WithLogger(log *slog.Logger) Option { return optionFunc(func(o *options) { o.log = log }) }

// WithTelemetry gives the OpenTelemetry providers and the propagator. A nil one, like the absence
// of the option, means OpenTelemetry's global one at the time of Open.
func WithTelemetry(tp trace.TracerProvider, mp metric.MeterProvider, propagator propagation.TextMapPropagator) Option {
	return optionFunc(func(o *options) {
		o.tracerProvider, o.meterProvider, o.propagator = tp, mp, propagator
	})
}

// WithAccessLog calls f at the end of each call, on the goroutine that ends it: f must not block.
func WithAccessLog(f func(AccessRecord)) Option {
	return optionFunc(func(o *options) { o.accessLog = f })
}

// WithDialer opens every connection of the Mesh: to the control plane, the Workload API, and the
// endpoints of services. network is "tcp" or "unix". f is called by many goroutines at once.
func WithDialer(f func(ctx context.Context, network, addr string) (net.Conn, error)) Option {
	return optionFunc(func(o *options) { o.dial = f })
}

// WithListener binds for Listen in place of net.ListenConfig. The address of the listener it
// returns must read ip:port: it is what callers are given.
func WithListener(f func(ctx context.Context, network, addr string) (net.Listener, error)) Option {
	return optionFunc(func(o *options) { o.listener = f })
}

// WithClock replaces the clock; tests under testing/synctest do not need it.
func WithClock(c Clock) Option { return optionFunc(func(o *options) { o.clock = c }) }

// WithEnvironment replaces the process environment, of which only the variables of the mesh and
// the XDG directories are read, and those only by Open. func(string) string { return "" } is an
// empty one: what a Mesh in a test wants.
func WithEnvironment(getenv func(string) string) Option {
	return optionFunc(func(o *options) { o.getenv = getenv })
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}
