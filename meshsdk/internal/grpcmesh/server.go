package grpcmesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
)

// ServerConfig is what the server side of a Mesh needs.
type ServerConfig struct {
	// Observer hears of each call. Required.
	Observer call.ServerObserver
	// Service that answers, "name.namespace"; called at each call, it returns at once.
	Service func() string
	// Gate counts calls and refuses them once it is closed. Required.
	Gate *tcpmesh.Gate
}

// ServerOptions are what makes a grpc.Server one of the mesh. The interceptors come before those
// that the user chains, the credentials must come after the user's.
func ServerOptions(cfg ServerConfig) (interceptors []grpc.ServerOption, creds grpc.ServerOption) {
	s := &server{cfg}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.stream),
	}, grpc.Creds(serverCreds{})
}

type server struct{ cfg ServerConfig }

// serverCall is what a call needs here, in one piece.
type serverCall struct {
	call.ServerCall
	incoming incoming
}

func (s *server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	sc := new(serverCall)
	ctx, err := s.begin(ctx, sc, info.FullMethod)
	if err != nil {
		return nil, err
	}
	// Until the handler has returned it counts as one that panicked.
	res := call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: int(codes.Internal)}
	defer func() {
		s.cfg.Observer.EndServer(ctx, &sc.ServerCall, res)
		s.cfg.Gate.Leave()
	}()
	resp, err := handler(ctx, req)
	res = serverResult(ctx, err)
	return resp, err
}

func (s *server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	sc := new(serverCall)
	ctx, err := s.begin(ss.Context(), sc, info.FullMethod)
	if err != nil {
		return err
	}
	res := call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: int(codes.Internal)}
	defer func() {
		s.cfg.Observer.EndServer(ctx, &sc.ServerCall, res)
		s.cfg.Gate.Leave()
	}()
	err = handler(srv, &serverStream{ss, ctx})
	res = serverResult(ctx, err)
	return err
}

// begin lets a call in, or returns the status that it is refused with. After a nil error the gate
// must be left.
func (s *server) begin(ctx context.Context, sc *serverCall, method string) (context.Context, error) {
	sc.Service, sc.Method, sc.Path, sc.GRPC = s.cfg.Service(), "POST", method, true
	sc.Peer = "plaintext"
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := tcpmesh.FromAddr(p.LocalAddr); ok {
			sc.Peer, sc.MTLS = c.PeerName()
		}
	}
	ctx = stripIdentity(ctx)
	sc.incoming.ctx = ctx
	ctx = s.cfg.Observer.BeginServer(ctx, &sc.ServerCall, &sc.incoming)
	if !s.cfg.Gate.Enter() {
		// gRPC, doc/statuscodes.md: UNAVAILABLE is "most likely a transient condition, which can be
		// corrected by retrying with a backoff"; nothing of this call was processed.
		s.cfg.Observer.EndServer(ctx, &sc.ServerCall, call.Result{Reason: call.ReasonDraining, GRPCCode: int(codes.Unavailable), Refused: true})
		return nil, status.Error(codes.Unavailable, "mesh: the server is draining; call another instance")
	}
	return ctx, nil
}

// stripIdentity takes the headers off by which somebody could claim to be somebody.
func stripIdentity(ctx context.Context) context.Context {
	for _, h := range tcpmesh.IdentityHeaders {
		if metadata.ValueFromIncomingContext(ctx, h) == nil {
			continue
		}
		md, _ := metadata.FromIncomingContext(ctx) // a copy
		for _, h := range tcpmesh.IdentityHeaders {
			delete(md, h)
		}
		return metadata.NewIncomingContext(ctx, md)
	}
	return ctx
}

// serverResult is how a handler's end is recorded.
func serverResult(ctx context.Context, err error) call.Result {
	if err == nil {
		return call.Result{Reason: call.ReasonOK, GRPCCode: int(codes.OK)}
	}
	// As grpc-go's server does with what a handler returns.
	st, ok := status.FromError(err)
	if !ok {
		st = status.FromContextError(err)
	}
	res := call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: int(st.Code()), Err: err}
	switch {
	case ctx.Err() == nil:
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		res.Reason = call.ReasonTimeout
	default:
		res.Reason = call.ReasonCancelled
	}
	return res
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *serverStream) Context() context.Context { return s.ctx }

// incoming reads trace context from the metadata of a call, one header at a time: copying all of
// them for each call would cost more than the rest of the interceptor.
type incoming struct{ ctx context.Context }

func (c *incoming) Get(key string) string {
	if v := metadata.ValueFromIncomingContext(c.ctx, key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// Set does nothing: what came in is not changed.
func (*incoming) Set(string, string) {}

func (c *incoming) Keys() []string {
	md, _ := metadata.FromIncomingContext(c.ctx)
	keys := make([]string, 0, len(md))
	for k := range md {
		keys = append(keys, k)
	}
	return keys
}

// serverCreds take what a tcpmesh.Listener accepted, where the handshake is already done, and say
// who is there. A connection of any other listener passes without TLS and without identity.
type serverCreds struct{}

func (serverCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	own, ok := tcpmesh.FromConn(raw)
	t, isTLS := raw.(*tls.Conn)
	if !ok || !isTLS {
		return raw, plaintextInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}, nil
	}
	state := t.ConnectionState()
	// HTTP/2 over TLS is negotiated by ALPN (RFC 9113, section 3.2); without it the client would
	// speak something else after this.
	if p := state.NegotiatedProtocol; p != "h2" {
		return nil, nil, fmt.Errorf("client negotiated ALPN %q: want h2, which gRPC speaks", p)
	}
	info := credentials.TLSInfo{State: state, CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	if id, ok := own.Peer(); ok {
		info.SPIFFEID = id.URL()
	}
	return raw, info, nil
}

func (serverCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("credentials of a mesh server cannot make connections: use Mesh.DialOptions")
}

func (serverCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (c serverCreds) Clone() credentials.TransportCredentials { return c }

func (serverCreds) OverrideServerName(string) error { return nil }

type plaintextInfo struct{ credentials.CommonAuthInfo }

func (plaintextInfo) AuthType() string { return "plaintext" }
