package meshtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// network is the connections of one test process: addresses map to listeners, connections are
// bytes in memory. Blocking on it is durable in the sense of testing/synctest. It is safe for
// concurrent use.
type network struct {
	mu        sync.Mutex
	listeners map[string]*listener
	cut       map[string]error // by address: why a dial fails
	conns     map[*conn]struct{}
	next      uint16
	host      byte
}

func newNetwork() *network {
	return &network{listeners: map[string]*listener{}, cut: map[string]error{}, conns: map[*conn]struct{}{}}
}

// newHost returns an address of its own for one instance.
func (n *network) newHost() netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.host++
	return netip.AddrFrom4([4]byte{10, 0, 0, n.host})
}

// listen opens a listener; port 0 is one that is free, an unspecified host is host.
func (n *network) listen(host netip.Addr, addr string) (net.Listener, error) {
	h, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", addr, err)
	}
	if ip, err := netip.ParseAddr(h); err == nil && !ip.IsUnspecified() && !ip.IsLoopback() {
		host = ip
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if port == "0" {
		n.next++
		port = fmt.Sprint(30000 + int(n.next))
	}
	ap, err := netip.ParseAddrPort(net.JoinHostPort(host.String(), port))
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", addr, err)
	}
	key := ap.String()
	if n.listeners[key] != nil {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Addr: net.TCPAddrFromAddrPort(ap), Err: errors.New("address already in use")}
	}
	l := &listener{network: n, key: key, addr: net.TCPAddrFromAddrPort(ap), accept: make(chan *conn), done: make(chan struct{})}
	n.listeners[key] = l
	return l, nil
}

// dial connects to a listener.
func (n *network) dial(ctx context.Context, from netip.Addr, addr string) (net.Conn, error) {
	refused := func(err error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: fmt.Errorf("%s: %w", addr, err)}
	}
	n.mu.Lock()
	l, cut := n.listeners[addr], n.cut[addr]
	n.next++
	local := net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 40000+n.next%20000))
	n.mu.Unlock()
	if cut != nil {
		return nil, refused(cut)
	}
	if l == nil {
		return nil, refused(errors.New("connection refused"))
	}
	client, server := pair(n, local, l.addr)
	client.peer, server.peer = addr, addr
	select {
	case l.accept <- server:
		n.mu.Lock()
		n.conns[client], n.conns[server] = struct{}{}, struct{}{}
		n.mu.Unlock()
		return client, nil
	case <-l.done:
		return nil, refused(errors.New("connection refused"))
	case <-ctx.Done():
		return nil, refused(ctx.Err())
	}
}

// fail makes dials of an address fail, and breaks the connections that lead there; nil mends it.
func (n *network) fail(addr string, why error) {
	n.mu.Lock()
	if why == nil {
		delete(n.cut, addr)
	} else {
		n.cut[addr] = why
	}
	var broken []*conn
	for c := range n.conns {
		if why != nil && c.peer == addr {
			broken = append(broken, c)
		}
	}
	n.mu.Unlock()
	for _, c := range broken {
		c.out.fail(why)
		c.in.fail(why)
	}
}

func (n *network) forget(c *conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, c)
}

type listener struct {
	network *network
	key     string
	addr    *net.TCPAddr
	accept  chan *conn
	done    chan struct{}
	once    sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.network.mu.Lock()
		delete(l.network.listeners, l.key)
		l.network.mu.Unlock()
		close(l.done)
	})
	return nil
}

func (l *listener) Addr() net.Addr { return l.addr }

// conn is one end of a connection.
type conn struct {
	network       *network
	in, out       *half
	local, remote net.Addr
	peer          string // the address that was dialled
	read, write   deadline
}

func pair(n *network, client, server net.Addr) (*conn, *conn) {
	up, down := newHalf(), newHalf()
	return &conn{network: n, in: down, out: up, local: client, remote: server, read: newDeadline(), write: newDeadline()},
		&conn{network: n, in: up, out: down, local: server, remote: client, read: newDeadline(), write: newDeadline()}
}

func (c *conn) Read(b []byte) (int, error)  { return c.in.read(b, &c.read) }
func (c *conn) Write(b []byte) (int, error) { return c.out.write(b, &c.write) }
func (c *conn) LocalAddr() net.Addr         { return c.local }
func (c *conn) RemoteAddr() net.Addr        { return c.remote }

// Close ends both directions: the other end reads what was written, then EOF.
func (c *conn) Close() error {
	c.out.fail(io.EOF)
	c.in.fail(net.ErrClosed)
	c.read.set(time.Time{})
	c.write.set(time.Time{})
	c.network.forget(c)
	return nil
}

func (c *conn) SetDeadline(t time.Time) error {
	c.read.set(t)
	c.write.set(t)
	return nil
}

func (c *conn) SetReadDeadline(t time.Time) error  { c.read.set(t); return nil }
func (c *conn) SetWriteDeadline(t time.Time) error { c.write.set(t); return nil }

// half is one direction: a bounded buffer that is written at one end and read at the other.
type half struct {
	mu      sync.Mutex
	buf     []byte
	err     error         // after the buffer is empty; writers see it at once
	changed chan struct{} // closed and replaced when buf or err changes
}

const halfSize = 64 << 10

func newHalf() *half { return &half{changed: make(chan struct{})} }

func (h *half) tell() {
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *half) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.err = err
		if !errors.Is(err, io.EOF) {
			h.buf = nil
		}
		h.tell()
	}
}

func (h *half) read(b []byte, d *deadline) (int, error) {
	for {
		if d.passed() {
			return 0, os.ErrDeadlineExceeded
		}
		h.mu.Lock()
		if len(h.buf) > 0 {
			n := copy(b, h.buf)
			h.buf = h.buf[n:]
			h.tell()
			h.mu.Unlock()
			return n, nil
		}
		err, changed := h.err, h.changed
		h.mu.Unlock()
		if err != nil {
			return 0, err
		}
		select {
		case <-changed:
		case <-d.wait():
		}
	}
}

func (h *half) write(b []byte, d *deadline) (int, error) {
	sent := 0
	for {
		if d.passed() {
			return sent, os.ErrDeadlineExceeded
		}
		h.mu.Lock()
		if h.err != nil {
			h.mu.Unlock()
			return sent, io.ErrClosedPipe
		}
		if n := min(len(b)-sent, halfSize-len(h.buf)); n > 0 {
			h.buf = append(h.buf, b[sent:sent+n]...)
			sent += n
			h.tell()
		}
		changed := h.changed
		h.mu.Unlock()
		if sent == len(b) {
			return sent, nil
		}
		select {
		case <-changed:
		case <-d.wait():
		}
	}
}

// deadline is a point in time that can be moved while somebody waits for it.
type deadline struct {
	mu    *sync.Mutex
	state *deadlineState
}

type deadlineState struct {
	timer *time.Timer
	done  chan struct{} // closed when the deadline has passed
	moved chan struct{} // closed and replaced when it moves
}

func newDeadline() deadline {
	return deadline{new(sync.Mutex), &deadlineState{done: make(chan struct{}), moved: make(chan struct{})}}
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.state
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	done := make(chan struct{})
	s.done = done
	close(s.moved)
	s.moved = make(chan struct{})
	switch {
	case t.IsZero():
	case time.Until(t) <= 0:
		close(done)
	default:
		s.timer = time.AfterFunc(time.Until(t), func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.state.done == done {
				close(done)
				close(d.state.moved)
				d.state.moved = make(chan struct{})
			}
		})
	}
}

func (d *deadline) passed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.state.done:
		return true
	default:
		return false
	}
}

// wait returns a channel that is closed when the deadline passes or moves.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state.moved
}
