package controlplane

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

// secondLook is how long a process without identity keeps a connection on which it was refused.
const secondLook = time.Second

// reattesting are the credentials of the unix socket. Whose a process is, is asked once a
// connection; the answer may be out of date when the node was away just then, or when `inlay run`
// had not yet come back to a restarted node. So when a caller without identity is refused, its
// connections are closed a moment later: it comes back, and is asked about again.
type reattesting struct {
	inner credentials.TransportCredentials
	clock Clock

	mu     sync.Mutex
	conns  map[attest.Process]map[net.Conn]struct{}
	timers map[attest.Process]func() bool // stops
	closed bool
}

func newReattesting(inner credentials.TransportCredentials, clock Clock) *reattesting {
	return &reattesting{inner: inner, clock: clock,
		conns:  make(map[attest.Process]map[net.Conn]struct{}),
		timers: make(map[attest.Process]func() bool),
	}
}

// ServerHandshake implements credentials.TransportCredentials.
func (r *reattesting) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := r.inner.ServerHandshake(conn)
	if err != nil {
		return out, info, err
	}
	if i, ok := info.(attest.Info); ok && i.Caller.ID.IsZero() {
		out = r.keep(i.Caller.Process, out)
	}
	return out, info, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (r *reattesting) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return r.inner.ClientHandshake(ctx, authority, conn)
}

// Info implements credentials.TransportCredentials.
func (r *reattesting) Info() credentials.ProtocolInfo { return r.inner.Info() }

// Clone implements credentials.TransportCredentials; the copy is the same, as it has no settings.
func (r *reattesting) Clone() credentials.TransportCredentials { return r }

// OverrideServerName implements credentials.TransportCredentials: a socket has no server name.
func (r *reattesting) OverrideServerName(string) error { return nil }

// options watch the answers of every call.
func (r *reattesting) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			resp, err := h(ctx, req)
			r.look(ctx, err)
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			err := h(srv, ss)
			r.look(ss.Context(), err)
			return err
		}),
	}
}

func (r *reattesting) look(ctx context.Context, err error) {
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
	default:
		return
	}
	caller := attest.CallerFrom(ctx)
	if !caller.ID.IsZero() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := caller.Process
	if r.closed || r.timers[p] != nil || len(r.conns[p]) == 0 {
		return
	}
	r.timers[p] = r.clock.AfterFunc(secondLook, func() {
		r.mu.Lock()
		delete(r.timers, p)
		conns := r.conns[p]
		delete(r.conns, p)
		r.mu.Unlock()
		for c := range conns {
			_ = c.Close()
		}
	})
}

func (r *reattesting) keep(p attest.Process, conn net.Conn) net.Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns[p] == nil {
		r.conns[p] = make(map[net.Conn]struct{})
	}
	r.conns[p][conn] = struct{}{}
	return &keptConn{Conn: conn, forget: func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.conns[p], conn)
		if len(r.conns[p]) == 0 {
			delete(r.conns, p)
		}
	}}
}

// close stops what is planned. The connections are the server's to close.
func (r *reattesting) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for p, stop := range r.timers {
		stop()
		delete(r.timers, p)
	}
}

type keptConn struct {
	net.Conn
	once   sync.Once
	forget func()
}

// Close implements net.Conn.
func (c *keptConn) Close() error {
	c.once.Do(c.forget)
	return c.Conn.Close()
}
