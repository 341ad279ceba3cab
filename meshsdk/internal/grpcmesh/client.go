package grpcmesh

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// Clock tells time; nil is the real one.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// ExternalPolicy says what becomes of calls to names that are not of the mesh.
type ExternalPolicy int

// Policies for the outside.
const (
	// Allow sends them at once, the way they would go without the mesh, and counts them.
	Allow ExternalPolicy = iota
	// Deny refuses them.
	Deny
)

// Config of a Client.
type Config struct {
	// Engine runs the calls. Required.
	Engine *call.Engine
	// Identity proves who we are. Nil: endpoints that want mesh TLS are not reached.
	Identity identity.Source
	// Dial makes connections, to endpoints and to the outside alike; network is "tcp" or "unix". Nil
	// means net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// InMesh gives the listener of a name of the mesh; ok is false for the outside. It is asked by the
	// first call or connect of a target, until it has answered, and may wait; err says that ctx ended
	// first. Parse is what it is made of. Nil: every name is outside.
	InMesh func(ctx context.Context, target string) (listener string, ok bool, err error)
	// External is for the names that are not.
	External ExternalPolicy
	// Inject writes the trace context of ctx into what an attempt sends; nil injects nothing.
	Inject func(ctx context.Context, to call.Carrier)
	Log    *slog.Logger // nil discards
	Clock  Clock
}

// Client makes gRPC channels that go through the mesh. It is safe for concurrent use and holds
// nothing open itself: what a channel holds goes with the channel.
type Client struct {
	cfg      Config
	ownDial  bool     // Config.Dial was given: it is for the outside too
	channels sync.Map // name -> *channel
	targets  sync.Map // target of a grpc.ClientConn -> the same *channel: what each call looks up
}

// New returns a Client of cfg.
func New(cfg Config) *Client {
	c := &Client{ownDial: cfg.Dial != nil}
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	if cfg.InMesh == nil {
		cfg.InMesh = func(context.Context, string) (string, bool, error) { return "", false, nil }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	c.cfg = cfg
	return c
}

// connectParams wait less than gRPC's own after a failed connect: an endpoint is on the next rack,
// it is one of several, and the mesh promises to be back within 5 s.
var connectParams = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
	MinConnectTimeout: 20 * time.Second, // the cluster's own timeout bounds it first
}

// defaults are the options that a user's own win over.
func (c *Client) defaults(dialer bool) []grpc.DialOption {
	opts := []grpc.DialOption{grpc.WithConnectParams(connectParams)}
	if dialer {
		// A dialer of its own also keeps gRPC from asking the environment for a proxy, which would
		// be asked for "orders" too.
		opts = append(opts, grpc.WithContextDialer(c.dial))
	}
	return opts
}

// fixed are the options that make a channel one of the mesh.
func (c *Client) fixed() []grpc.DialOption {
	// Nothing has to switch off the channel's own retry: it comes from method configurations, and
	// the service configuration of our resolver has none. To the outside the user's stay in force.
	schemes := []resolver.Builder{builder{c, "dns"}, builder{c, "passthrough"}, builder{c, "xds"}}
	if s := resolver.GetDefaultScheme(); s != "dns" && s != "passthrough" && s != "xds" {
		// What gRPC makes of "orders" where a program has set its own default.
		schemes = append(schemes, builder{c, s})
	}
	return []grpc.DialOption{
		grpc.WithResolvers(schemes...),
		grpc.WithChainUnaryInterceptor(c.unary),
		grpc.WithChainStreamInterceptor(c.stream),
	}
}

// outsideCredentials are those of a channel to the outside for which the user gives none.
func outsideCredentials() grpc.DialOption {
	return grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12}))
}

// DialOptions makes a channel of grpc.NewClient, for any target, one of the mesh. Put them before
// other options: interceptors given before then see one call, those given after see each attempt.
//
// To endpoints of the mesh the endpoint decides between mesh TLS and plaintext, whatever transport
// credentials the channel has; call credentials (grpc.WithPerRPCCredentials) apply everywhere.
// Targets outside go by gRPC's own resolver with the channel's credentials, by default TLS with the
// roots of the system, but not through a proxy of the environment; NewClient keeps that.
func (c *Client) DialOptions() []grpc.DialOption {
	return append(append(c.defaults(true), outsideCredentials()), c.fixed()...)
}

// NewClient is grpc.NewClient through the mesh. It never blocks and needs no credentials: those
// given are for a target outside, and insecure.NewCredentials() does not weaken the mesh. The first
// call waits for configuration.
//
// Whether a target is of the mesh is asked when it is first used, since namespaces may become known
// meanwhile. Targets that cannot be of it (addresses, localhost, three labels and more) keep gRPC's
// own dialer, and with it the proxy of the environment.
func (c *Client) NewClient(target string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	maybe := candidate(nameOf(target))
	dial := func(before, after []grpc.DialOption) (*grpc.ClientConn, error) {
		all := append(c.defaults(maybe || c.ownDial), before...)
		all = append(append(all, opts...), after...)
		return grpc.NewClient(target, append(all, c.fixed()...)...)
	}
	conn, err := dial([]grpc.DialOption{outsideCredentials()}, nil)
	if err == nil {
		return conn, nil
	}
	// gRPC takes transport credentials or a bundle, not both.
	if conn, again := dial(nil, nil); again == nil {
		return conn, nil
	}
	if maybe {
		// It refuses call credentials that want TLS beside insecure ones, before the mesh brings TLS.
		if conn, again := dial(nil, []grpc.DialOption{outsideCredentials()}); again == nil {
			return conn, nil
		}
	}
	return nil, err
}

// candidate reports whether name would be of the mesh if its namespace were.
func candidate(name string) bool {
	_, ok := Parse(name, func() []string {
		host, _, _ := strings.Cut(strings.ToLower(name), ":")
		_, namespace, _ := strings.Cut(strings.TrimSuffix(host, "."), ".")
		return []string{namespace}
	}, "")
	return ok
}

// nameOf is what of a target InMesh is asked about: "orders:8080" for itself and for
// "dns:///orders:8080", which is what gRPC makes of it; "xds:///orders" for itself. A target of
// another scheme stays whole and is no name of the mesh.
func nameOf(target string) string {
	u, err := url.Parse(target)
	if err != nil {
		return target
	}
	switch u.Scheme {
	case "xds":
	case "dns", "passthrough", resolver.GetDefaultScheme():
		if u.Host == "" { // dns://SERVER/NAME asks another server
			return resolver.Target{URL: *u}.Endpoint()
		}
	}
	return target
}

// channel is what is decided about a name, once.
type channel struct {
	name    string
	decided atomic.Pointer[decision]
}

type decision struct {
	listener string
	mesh     bool
}

func (c *Client) channel(name string) *channel {
	if ch, ok := c.channels.Load(name); ok {
		return ch.(*channel)
	}
	ch, _ := c.channels.LoadOrStore(name, &channel{name: name})
	return ch.(*channel)
}

// target is channel(nameOf(target)).
func (c *Client) target(target string) *channel {
	if ch, ok := c.targets.Load(target); ok {
		return ch.(*channel)
	}
	ch := c.channel(nameOf(target))
	c.targets.Store(target, ch)
	return ch
}

// decide says where the channel goes. The first answer decides for the life of the Client: a resolver
// that went one way and an interceptor that goes the other would send a call of the mesh outside. An
// error is that of ctx; nothing is decided then.
func (ch *channel) decide(ctx context.Context, c *Client) (listener string, mesh bool, err error) {
	d := ch.decided.Load()
	if d == nil {
		listener, mesh, err := c.cfg.InMesh(ctx, ch.name)
		if err != nil {
			return "", false, err
		}
		ch.decided.CompareAndSwap(nil, &decision{listener, mesh})
		d = ch.decided.Load()
	}
	return d.listener, d.mesh, nil
}

// undecided is the end of a call that did not learn in time where it goes.
func (c *Client) undecided(ctx context.Context, ch *channel, method string, err error) error {
	h := &headers{ctx: ctx}
	r := request(method, ch.name, h, nil)
	res := call.Result{Reason: call.ReasonTimeout, GRPCCode: int(codes.DeadlineExceeded), Unsent: true, Detail: call.DetailUndecided, Err: err}
	if errors.Is(ctx.Err(), context.Canceled) {
		res.Reason, res.GRPCCode = call.ReasonCancelled, int(codes.Canceled)
	}
	return wrap(c.cfg.Engine.Refuse(ctx, ch.name, &r, res))
}

// errDenied is why a name of the outside is not called.
var errDenied = errors.New("it is not a name of the mesh, and calls to the outside are refused (WithFallback)")
