package meshsdk

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
)

const (
	// maxConfigBytes bounds one message of the control plane. gRPC's own 4 MiB is too little for the
	// endpoints of a large service.
	maxConfigBytes = 64 << 20
	// pingAfter is the silence after which a control plane is asked whether it is there, pingTimeout
	// how long it has to answer: one that vanished without a word is noticed within 25 s.
	pingAfter, pingTimeout = 15 * time.Second, 10 * time.Second
	// pingSeldom is pingAfter for a server that sent us away for asking too often: the least time that
	// gRPC's servers admit where nobody chose another (keepalive.EnforcementPolicy.MinTime).
	pingSeldom = 5 * time.Minute
)

// control makes the connections to the control plane. ADS owns them; registry and report share the
// one that ADS uses.
type control struct {
	dialer func(ctx context.Context, network, addr string) (net.Conn, error)
	source identity.Source
	now    func() time.Time

	mu      sync.Mutex
	current *grpc.ClientConn
	changed chan struct{}   // closed and replaced when current is replaced
	local   netip.Addr      // of the newest TCP connection
	seldom  map[string]bool // servers, by URI, that want few pings
}

func newControl(dialer func(ctx context.Context, network, addr string) (net.Conn, error), source identity.Source, now func() time.Time) *control {
	return &control{dialer: dialer, source: source, now: now, changed: make(chan struct{}), seldom: make(map[string]bool)}
}

// dial makes a channel to a server; ADS closes it. Nothing is sent yet.
func (c *control) dial(_ context.Context, server bootstrap.Server) (*grpc.ClientConn, error) {
	network, addr, err := serverAddress(server.URI)
	if err != nil {
		return nil, err
	}
	creds, err := c.credentials(server, network, addr)
	if err != nil {
		return nil, err
	}
	cc, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := c.dialer(ctx, network, addr)
			if err == nil && network == "tcp" {
				c.noteLocal(conn.LocalAddr())
			}
			return conn, err
		}),
		grpc.WithAuthority(authority(network, addr)),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0),
		// gRPC waits up to two minutes between attempts of one channel; ADS has its own back-off.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 10 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: c.pingAfter(server.URI), Timeout: pingTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxConfigBytes), grpc.OnFinish(func(err error) { c.ended(server.URI, err) })),
	)
	if err != nil {
		return nil, fmt.Errorf("control plane %s: %w", server.URI, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.current = cc
	close(c.changed)
	c.changed = make(chan struct{})
	return cc, nil
}

// pingAfter is for how long a server may be silent before it is asked whether it is there.
func (c *control) pingAfter(uri string) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seldom[uri] {
		return pingSeldom
	}
	return pingAfter
}

// ended hears how each stream ended. gRFC A8: a server that is pinged too often "will send a GOAWAY
// with ENHANCE_YOUR_CALM and additional debug data of ASCII 'too_many_pings'". gRPC slows down then,
// but for the channel only, and ADS makes a new one.
func (c *control) ended(uri string, err error) {
	if err == nil || !strings.Contains(err.Error(), "too_many_pings") {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seldom[uri] = true
}

// ready waits until the channel that ADS uses is connected, and returns it.
func (c *control) ready(ctx context.Context) (grpc.ClientConnInterface, error) {
	for {
		c.mu.Lock()
		cc, changed := c.current, c.changed
		c.mu.Unlock()
		state := connectivity.Shutdown
		if cc != nil {
			state = cc.GetState()
		}
		switch state {
		case connectivity.Ready:
			return cc, nil
		case connectivity.Shutdown:
			select {
			case <-changed:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		default:
			// ADS connects it or closes it; both change its state.
			if !cc.WaitForStateChange(ctx, state) {
				return nil, context.Cause(ctx)
			}
		}
	}
}

// credentials are what the bootstrap says: plaintext, mutual TLS with the control plane's own
// SPIFFE ID, or server-authenticated TLS.
func (c *control) credentials(server bootstrap.Server, network, addr string) (credentials.TransportCredentials, error) {
	switch server.Creds.Type {
	case bootstrap.CredsInsecure:
		return insecure.NewCredentials(), nil
	case bootstrap.CredsSVID:
		if network == "unix" {
			return nil, fmt.Errorf("control plane %s: channel_creds inlay_svid over a unix socket: want insecure, the kernel vouches for both ends", server.URI)
		}
		return credentials.NewTLS(identity.ClientTLS(c.source, c.peers, []string{"h2"}, c.now)), nil
	case bootstrap.CredsTLS:
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, fmt.Errorf("control plane %s: %w", server.URI, err)
		}
		return credentials.NewTLS(&tls.Config{ServerName: host, Time: c.now}), nil
	}
	return nil, fmt.Errorf("control plane %s: channel_creds %q: want insecure, inlay_svid or tls", server.URI, server.Creds.Type)
}

// peers is the one identity that a control plane may have: that of the own trust domain.
func (c *control) peers() []spiffeid.ID {
	svid, err := c.source.Current()
	if err != nil {
		return nil
	}
	return []spiffeid.ID{identity.ControlPlaneID(svid.ID.TrustDomain())}
}

func (c *control) noteLocal(a net.Addr) {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.local = ap.Addr().Unmap().WithZone("")
}

// localAddr is the own address on the way to the control plane; ok is false without one that other
// machines may reach.
func (c *control) localAddr() (netip.Addr, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.local, c.local.IsValid() && c.local.IsGlobalUnicast()
}

// serverAddress reads a server_uri: host:port, dns:///host:port, or a unix socket.
func serverAddress(uri string) (network, addr string, err error) {
	if path, ok := strings.CutPrefix(uri, "unix:"); ok {
		// gRPC naming: "unix:path, unix://absolute_path".
		if rest, ok := strings.CutPrefix(path, "//"); ok {
			path = rest
		}
		if path == "" {
			return "", "", fmt.Errorf("server_uri %q: want unix:PATH", uri)
		}
		return "unix", path, nil
	}
	addr = strings.TrimPrefix(strings.TrimPrefix(uri, "passthrough:///"), "dns:///")
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return "", "", fmt.Errorf("server_uri %q: %w: want host:port, dns:///host:port or unix:PATH", uri, errors.Unwrap(err))
	}
	return "tcp", addr, nil
}

// authority is what the :authority header says; a path is none.
func authority(network, addr string) string {
	if network == "unix" {
		return "localhost" // what gRPC says of its own accord
	}
	return addr
}
