package httpmesh

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
)

// poolKey is one way of connecting and the protocol spoken.
type poolKey struct {
	key string // endpoint.Key
	h2  bool
}

// pool is the connections to one endpoint. A request reserves a place on one of them; when none is
// free one more is made: for HTTP/1.1 one for each that waits, for HTTP/2 one at a time.
type pool struct {
	t     *Transport
	id    poolKey
	tls   *endpoint.TLS
	addrs []netip.AddrPort

	waiting atomic.Int64 // len(queue), for the hooks of connections

	mu      sync.Mutex // guards what follows; no hook runs into it (see hooked)
	timeout time.Duration
	conns   []*conn
	dialing int
	queue   []chan grant // of those that wait, in order; each has room for its grant
	retired bool         // no configuration asks for it: connections end when they are idle
}

// grant is a place on a connection, or why there is none.
type grant struct {
	conn   *conn
	reused bool // the connection has served before
	err    error
}

// conn is one connection.
type conn struct {
	pool *pool
	cc   *http.ClientConn
	wire *wire
	peer string
	tls  *tls.ConnectionState // nil: plaintext
	// uses and idle are guarded by pool.mu: how often it was taken, and since when nobody used it.
	uses int
	idle time.Time
}

// wire counts what HTTP has written and read, so that a request of which nothing left, and one that
// nothing answered, are known as such.
type wire struct {
	net.Conn
	written, read atomic.Int64
}

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.read.Add(int64(n))
	return n, err
}

func (w *wire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	w.written.Add(int64(n))
	return n, err
}

// dialing is a connect on its way through net/http, found in the context of the dial.
type dialing struct {
	pool *pool
	wire *wire
	peer string
	tls  *tls.ConnectionState
}

type dialingKey struct{}

var errClosed = errors.New("the mesh of this process is closed")

// dialFromContext is the DialContext of the inner transports.
func dialFromContext(ctx context.Context, _, _ string) (net.Conn, error) {
	d, ok := ctx.Value(dialingKey{}).(*dialing)
	if !ok {
		return nil, errors.New("mesh: connection without an endpoint")
	}
	p := d.pool
	raw, err := p.t.dial(ctx, p.addrs)
	if err != nil {
		return nil, err
	}
	d.peer = "plaintext"
	if p.tls == nil {
		d.wire = &wire{Conn: raw}
		return d.wire, nil
	}
	var id spiffeid.ID
	alpn := "http/1.1"
	if p.id.h2 {
		alpn = "h2"
	}
	secure, id, err := grpcmesh.Handshake(ctx, raw, p.t.cfg.Identity, p.tls.Peers, alpn, p.t.cfg.Clock)
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	state := secure.ConnectionState()
	d.peer, d.tls = id.String(), &state
	d.wire = &wire{Conn: secure}
	return d.wire, nil
}

// dial tries the addresses of an endpoint in order.
func (t *Transport) dial(ctx context.Context, addrs []netip.AddrPort) (net.Conn, error) {
	var all []error
	for _, a := range addrs {
		c, err := t.cfg.Dial(ctx, "tcp", a.String())
		if err == nil {
			return c, nil
		}
		all = append(all, err)
	}
	return nil, errors.Join(all...)
}

// get reserves a place for one request; it is used up by RoundTrip or given back by Release of the
// connection.
func (p *pool) get(ctx context.Context) grant {
	p.mu.Lock()
	if len(p.queue) == 0 { // nobody is before us
		if g, ok := p.reserve(); ok {
			p.mu.Unlock()
			return g
		}
	}
	w := make(chan grant, 1)
	p.queue = append(p.queue, w)
	p.waiting.Store(int64(len(p.queue)))
	p.pump()
	p.mu.Unlock()
	select {
	case g := <-w:
		return g
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, q := range p.queue {
		if q == w {
			p.queue = append(p.queue[:i], p.queue[i+1:]...)
			p.waiting.Store(int64(len(p.queue)))
		}
	}
	select {
	case g := <-w: // granted meanwhile: give it back
		if g.conn != nil {
			g.conn.cc.Release()
			p.pump()
		}
	default:
	}
	return grant{err: ctx.Err()}
}

// reserve takes a place on a connection that has one, the last used first, so that the others fall
// idle. p.mu is held.
func (p *pool) reserve() (grant, bool) {
	for i := len(p.conns) - 1; i >= 0; i-- {
		c := p.conns[i]
		if c.cc.Available() > 0 && c.cc.Reserve() == nil {
			c.uses++
			return grant{conn: c, reused: c.uses > 1}, true
		}
	}
	return grant{}, false
}

// pump gives free places to those that wait, makes connections for the rest, and drops connections
// that are dead, or idle in a retired pool. p.mu is held.
func (p *pool) pump() {
	kept := p.conns[:0]
	for _, c := range p.conns {
		switch {
		case c.cc.Err() != nil:
		case p.retired && len(p.queue) == 0 && c.cc.InFlight() == 0:
			p.t.spawn(func() { _ = c.cc.Close() })
		default:
			kept = append(kept, c)
		}
	}
	clear(p.conns[len(kept):])
	p.conns = kept
	for len(p.queue) > 0 {
		g, ok := p.reserve()
		if !ok {
			break
		}
		p.answer(g)
	}
	want := len(p.queue)
	if p.id.h2 {
		want = min(want, 1)
	}
	most := p.t.cfg.Base.MaxConnsPerHost
	for p.dialing < want && (most <= 0 || len(p.conns)+p.dialing < most) {
		p.dialing++
		if !p.t.spawn(p.connect) {
			p.dialing--
			p.answer(grant{err: errClosed})
			want--
		}
	}
}

// answer serves the first that waits. p.mu is held.
func (p *pool) answer(g grant) {
	p.queue[0] <- g
	p.queue = p.queue[1:]
	p.waiting.Store(int64(len(p.queue)))
}

// connect makes one connection. It does not end with the request that asked for it: another one may
// use the connection.
func (p *pool) connect() {
	p.mu.Lock()
	timeout := p.timeout
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(p.t.ctx, timeout)
	defer cancel()
	d := &dialing{pool: p}
	via := p.t.h1
	if p.id.h2 {
		via = p.t.h2
	}
	cc, err := via.NewClientConn(context.WithValue(ctx, dialingKey{}, d), "http", p.addrs[0].String())
	if err != nil {
		if first := p.t.aside.add(p.id); first {
			p.t.cfg.Log.Warn("cannot connect to endpoint", "endpoint", p.id.key, "err", err)
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.dialing--
		// HTTP/2 connects once for all who wait; for HTTP/1.1 each has a connect of his own.
		for n := len(p.queue); n > 0; n-- {
			p.answer(grant{err: err})
			if !p.id.h2 {
				break
			}
		}
		p.pump()
		return
	}
	if p.t.aside.remove(p.id) {
		p.t.cfg.Log.Info("endpoint can be reached again", "endpoint", p.id.key)
	}
	c := &conn{pool: p, cc: cc, wire: d.wire, peer: d.peer, tls: d.tls}
	p.mu.Lock()
	p.dialing--
	if p.t.ctx.Err() != nil { // Close has been here
		p.mu.Unlock()
		_ = cc.Close()
		return
	}
	c.idle = p.t.cfg.Clock.Now()
	p.conns = append(p.conns, c)
	p.pump()
	p.mu.Unlock()
	cc.SetStateHook(p.hooked)
}

// hooked hears from a connection that a place is free or that it is dead. It may run inside one of
// our own calls to the connection, with the lock held, so it only looks whether somebody must act.
func (p *pool) hooked(cc *http.ClientConn) {
	if p.waiting.Load() == 0 && cc.Err() == nil {
		return
	}
	p.t.spawn(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.pump()
	})
}

// done notes that a request on c has ended.
func (p *pool) done(c *conn) {
	now := p.t.cfg.Clock.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	c.idle = now
	if p.retired || len(p.queue) > 0 {
		p.pump()
		return
	}
	if p.id.h2 {
		return
	}
	most := p.t.cfg.Base.MaxIdleConnsPerHost
	if most == 0 {
		most = 100
	}
	if len(p.conns) <= most {
		return
	}
	free := 0
	for _, other := range p.conns {
		if other.cc.InFlight() == 0 {
			free++
		}
	}
	if free > most && c.cc.InFlight() == 0 {
		p.t.spawn(func() { _ = c.cc.Close() })
	}
}

// retire ends the pool: requests in flight finish.
func (p *pool) retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.retired = true
	p.pump()
}

// expire closes what was idle for longer than most, and reports whether the pool is empty.
func (p *pool) expire(now time.Time, most time.Duration) (empty bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := p.conns[:0]
	for _, c := range p.conns {
		switch {
		case c.cc.Err() != nil:
		case c.cc.InFlight() == 0 && now.Sub(c.idle) >= most:
			p.t.spawn(func() { _ = c.cc.Close() })
		default:
			kept = append(kept, c)
		}
	}
	clear(p.conns[len(kept):])
	p.conns = kept
	return p.unused()
}

func (p *pool) unused() bool { return len(p.conns) == 0 && p.dialing == 0 && len(p.queue) == 0 }

func (p *pool) empty() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.unused()
}

// close ends every connection and whoever waits for one; nothing is spawned any more.
func (p *pool) close() {
	p.mu.Lock()
	conns := p.conns
	p.conns, p.retired = nil, true
	for len(p.queue) > 0 {
		p.answer(grant{err: errClosed})
	}
	p.mu.Unlock()
	for _, c := range conns {
		_ = c.cc.Close()
	}
}
