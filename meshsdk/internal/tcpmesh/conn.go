package tcpmesh

import (
	"crypto/tls"
	"net"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Conn is the transport of one accepted connection: the socket itself, with the byte that was read
// to tell TLS from plaintext put back. For TLS it lies under the *tls.Conn that Accept returned.
type Conn struct {
	net.Conn
	first  []byte // read before Conn.Read is asked again
	peer   spiffeid.ID
	name   string // peer, as text
	secure bool
}

// Peer is who the handshake proved to be at the other end; ok is false for a plaintext peer and
// for a TLS client without SVID.
func (c *Conn) Peer() (id spiffeid.ID, ok bool) { return c.peer, !c.peer.IsZero() }

// Secure reports whether the connection is encrypted.
func (c *Conn) Secure() bool { return c.secure }

// Read returns the byte that was looked at, then what follows.
func (c *Conn) Read(p []byte) (int, error) {
	if len(c.first) > 0 && len(p) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// LocalAddr returns an address by which FromAddr finds the Conn again. net/http hands it to
// handlers as http.LocalAddrContextKey, so that the middleware can ask who is there; no header and
// no connection of another listener can imitate it.
func (c *Conn) LocalAddr() net.Addr { return addr{c.Conn.LocalAddr(), c} }

// NetConn returns the socket.
func (c *Conn) NetConn() net.Conn { return c.Conn }

type addr struct {
	net.Addr
	conn *Conn
}

// FromAddr returns the accepted connection that a is the local address of.
func FromAddr(a net.Addr) (*Conn, bool) {
	own, ok := a.(addr)
	return own.conn, ok
}

// FromConn returns the accepted connection that c, as Accept returned it, is or lies upon.
func FromConn(c net.Conn) (*Conn, bool) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	own, ok := c.(*Conn)
	return own, ok
}

// PeerName is how records and metrics name the other end: its SPIFFE ID, "anonymous" for TLS
// without SVID, else "plaintext". mtls is true when both ends proved their SPIFFE IDs.
func (c *Conn) PeerName() (name string, mtls bool) {
	switch {
	case !c.peer.IsZero():
		return c.name, true
	case c.secure:
		return "anonymous", false
	}
	return "plaintext", false
}
