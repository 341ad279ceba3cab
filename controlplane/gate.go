package controlplane

import (
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// gate knows every connection of the gRPC servers from its first byte on. It says which ones were
// refused, and closes those that are left when the control plane stops: gRPC itself waits for the
// ones that never said a word.
type gate struct {
	log   *slog.Logger
	clock Clock

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
	last   time.Time // of the last refusal that was logged
	silent int       // refusals since
}

var errClosed = errors.New("the control plane is stopping")

func (g *gate) enter(conn net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.conns[conn] = struct{}{}
	return true
}

func (g *gate) leave(conn net.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, conn)
}

func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	conns := g.conns
	g.conns = make(map[net.Conn]struct{})
	g.mu.Unlock()
	for c := range conns {
		_ = c.Close()
	}
}

// refused logs at most once a second: anybody can cause it.
func (g *gate) refused(from net.Addr, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.clock.Now()
	if !g.last.IsZero() && now.Sub(g.last) < time.Second {
		g.silent++
		return
	}
	g.log.Warn("connection refused", "from", from, "err", err, "unlogged", g.silent)
	g.last, g.silent = now, 0
}

// gated are credentials whose connections pass a gate.
type gated struct {
	credentials.TransportCredentials
	gate *gate
}

// ServerHandshake implements credentials.TransportCredentials.
func (c gated) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if !c.gate.enter(conn) {
		return nil, nil, errClosed
	}
	out, info, err := c.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		c.gate.leave(conn)
		c.gate.refused(conn.RemoteAddr(), err)
		return nil, nil, err
	}
	return &keptConn{Conn: out, forget: func() { c.gate.leave(conn) }}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (c gated) Clone() credentials.TransportCredentials {
	return gated{c.TransportCredentials.Clone(), c.gate}
}
