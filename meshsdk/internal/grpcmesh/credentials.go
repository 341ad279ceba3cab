package grpcmesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/credentials"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

// link is one way of connecting: what the dialer and the credentials of a SubConn need, and what
// its handshake proved. It travels in the attributes of the address.
type link struct {
	client  *Client
	tls     *endpoint.TLS // nil: plaintext
	timeout atomic.Int64  // of one connect with its handshake; a time.Duration
	began   atomic.Int64  // when the current connect began; Unix nanoseconds
	// hosts are the authorities of a plaintext connection. They follow the clusters that have the
	// endpoint; those of a TLS connection follow from the SPIFFE IDs.
	hosts atomic.Pointer[[]string]
	// peer is who the newest handshake proved: a SPIFFE ID, or "plaintext".
	peer atomic.Pointer[string]
}

// plaintext is the peer of a connection without TLS, as records say it.
const plaintext = "plaintext"

type linkKey struct{}

func (l *link) attributes() *attributes.Attributes { return attributes.New(linkKey{}, l) }

// String keeps texts of gRPC short.
func (l *link) String() string { return "inlay" }

func linkFrom(ctx context.Context) *link {
	l, _ := credentials.ClientHandshakeInfoFromContext(ctx).Attributes.Value(linkKey{}).(*link)
	return l
}

// within bounds ctx by what is left of the connect timeout.
func (l *link) within(ctx context.Context) (context.Context, context.CancelFunc) {
	d, began := time.Duration(l.timeout.Load()), l.began.Load()
	if d <= 0 || began == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, time.Unix(0, began).Add(d))
}

// dial makes the connections of all SubConns of a channel; those of an address outside the mesh
// have no link and go as gRPC itself would have dialled them.
func (c *Client) dial(ctx context.Context, addr string) (net.Conn, error) {
	l := linkFrom(ctx)
	if l == nil {
		network, addr := DialTarget(addr)
		return c.cfg.Dial(ctx, network, addr)
	}
	l.began.Store(time.Now().UnixNano())
	ctx, cancel := l.within(ctx)
	defer cancel()
	return c.cfg.Dial(ctx, "tcp", addr)
}

// DialTarget is the reverse of what gRPC gives a custom dialer: unix sockets come as a target
// ("unix:///run/x", "unix:x") or, abstract ones, with a leading NUL.
func DialTarget(addr string) (network, address string) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		return "unix", path
	}
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", path
	}
	if strings.HasPrefix(addr, "\x00") {
		return "unix", "@" + addr[1:]
	}
	return "tcp", addr
}

// AuthInfo is what the connection to an endpoint of the mesh proved. grpc.Peer and peer.FromContext
// give it to the caller of an RPC.
type AuthInfo struct {
	credentials.CommonAuthInfo
	// Peer is the SPIFFE ID of the server; zero for plaintext.
	Peer spiffeid.ID
	// State is the zero value for plaintext.
	State tls.ConnectionState

	hosts func() []string
}

// AuthType says which of the two ways it is.
func (a AuthInfo) AuthType() string {
	if a.Peer.IsZero() {
		return "inlay-plaintext"
	}
	return "inlay-mtls"
}

// ValidateAuthority implements credentials.AuthorityValidator. gRFC A81 lets a picker or the
// application rewrite the authority of a call; accepted are exactly the hosts of the services whose
// SPIFFE IDs the connection is bound to, with any port: an authority never names a service that
// the other end has not proved to be. A plaintext connection proves nothing, and carries the hosts
// of the service it was made for.
func (a AuthInfo) ValidateAuthority(authority string) error {
	var hosts []string
	if a.hosts != nil {
		hosts = a.hosts()
	}
	if slices.Contains(hosts, bareHost(authority)) {
		return nil
	}
	if len(hosts) == 0 {
		return fmt.Errorf("authority %q: no host is bound to this connection", authority)
	}
	return fmt.Errorf("authority %q is not of the service at the other end: want one of %s", authority, strings.Join(hosts, ", "))
}

// bundle is the credentials of one SubConn. A bundle given to NewSubConn wins over whatever
// credentials the channel has, so that a user's own can neither weaken mesh TLS nor get in its way.
type bundle struct {
	link *link
	own  credentials.PerRPCCredentials // of the channel's bundle; nil for none
}

func (b *bundle) TransportCredentials() credentials.TransportCredentials {
	return transportCredentials{b.link}
}

func (b *bundle) PerRPCCredentials() credentials.PerRPCCredentials { return b.own }

// NewWithMode returns the bundle itself: there is one mode.
func (b *bundle) NewWithMode(string) (credentials.Bundle, error) { return b, nil }

// transportCredentials connects as the endpoint asks: mutual TLS by SPIFFE ID, or plaintext.
type transportCredentials struct{ link *link }

// ClientHandshake ignores the authority: a server in the mesh is known by its SPIFFE ID.
func (t transportCredentials) ClientHandshake(ctx context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	l := t.link
	if l.tls == nil {
		who := plaintext
		l.peer.Store(&who)
		return conn, AuthInfo{
			CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity},
			hosts:          l.plaintextHosts,
		}, nil
	}
	ctx, cancel := l.within(ctx)
	defer cancel()
	// gRPC is HTTP/2 whatever else the endpoint offers.
	tc, id, err := l.client.handshake(ctx, conn, l.tls.Peers, "h2")
	if err != nil {
		return nil, nil, err
	}
	who := id.String()
	l.peer.Store(&who)
	return tc, AuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Peer:           id,
		State:          tc.ConnectionState(),
		hosts:          l.secureHosts,
	}, nil
}

func (l *link) plaintextHosts() []string {
	if h := l.hosts.Load(); h != nil {
		return *h
	}
	return nil
}

func (l *link) secureHosts() []string {
	var hosts []string
	own := l.client.namespace()
	for _, id := range l.tls.Peers {
		if ns, svc, ok := identity.ParseServiceID(id); ok {
			hosts = append(hosts, hostsOf(ns, svc, own)...)
		}
	}
	return hosts
}

// namespace is that of this workload's SVID; empty when there is none.
func (c *Client) namespace() string {
	if c.cfg.Identity == nil {
		return ""
	}
	svid, err := c.cfg.Identity.Current()
	if err != nil {
		return ""
	}
	ns, _, _ := identity.ParseServiceID(svid.ID)
	return ns
}

// handshake proves who we are to the other end and makes it prove to be one of peers.
func (c *Client) handshake(ctx context.Context, conn net.Conn, peers []spiffeid.ID, alpn string) (*tls.Conn, spiffeid.ID, error) {
	return Handshake(ctx, conn, c.cfg.Identity, peers, alpn, c.cfg.Clock)
}

// Handshake makes the mutual TLS of the mesh over conn: src proves who we are, and the other end
// must prove to be one of peers and choose the protocol alpn. A nil src fails closed. conn is the
// caller's to close when it fails. Both skins use it. A nil clock is the real one.
func Handshake(ctx context.Context, conn net.Conn, src identity.Source, peers []spiffeid.ID, alpn string, clock Clock) (*tls.Conn, spiffeid.ID, error) {
	if src == nil {
		return nil, spiffeid.ID{}, fmt.Errorf("%w: the endpoint wants mesh TLS and this mesh was opened without an identity", identity.ErrNoIdentity)
	}
	var now func() time.Time
	if clock != nil {
		now = clock.Now
	}
	tc := tls.Client(conn, identity.ClientTLS(src, identity.Only(peers...), []string{alpn}, now))
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, spiffeid.ID{}, err
	}
	state := tc.ConnectionState()
	if state.NegotiatedProtocol != alpn {
		return nil, spiffeid.ID{}, fmt.Errorf("the other end chose the protocol %q by ALPN, want %q", state.NegotiatedProtocol, alpn)
	}
	id, err := identity.PeerID(state)
	if err != nil {
		return nil, spiffeid.ID{}, err
	}
	return tc, id, nil
}

// ServerHandshake always fails: these credentials are a client's.
func (t transportCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("client credentials used by a server: want those of Mesh.ServerOptions")
}

func (t transportCredentials) Info() credentials.ProtocolInfo {
	if t.link.tls == nil {
		return credentials.ProtocolInfo{SecurityProtocol: "insecure"}
	}
	return credentials.ProtocolInfo{SecurityProtocol: "tls"} // makes the scheme of a call https
}

func (t transportCredentials) Clone() credentials.TransportCredentials { return t }

// OverrideServerName has no effect: the name of a server in the mesh is its SPIFFE ID.
func (t transportCredentials) OverrideServerName(string) error { return nil }
