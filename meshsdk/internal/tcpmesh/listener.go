package tcpmesh

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/identity"
)

const (
	// handshakeTimeout bounds the time from accept to the end of the handshake.
	handshakeTimeout = 10 * time.Second
	// maxPending bounds the connections of a listener that are between accept and the end of the
	// handshake; beyond it they wait in the kernel's backlog.
	maxPending = 1024
	// recordHandshake is the first byte of a TLS connection. RFC 8446, section 5.1: ContentType
	// "handshake(22)".
	recordHandshake = 22
)

// Clock tells time; nil is the real one.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// Config says what a Listener takes.
type Config struct {
	// Inner accepts the sockets; the Listener closes it. Required.
	Inner net.Listener
	// Identity proves who we are and verifies clients. Required.
	Identity identity.Source
	// Mode is asked at each connection; nil means strict.
	Mode func() Mode
	// Started is called once, by the first Accept, before it waits. Closed is called once, by
	// Close. Nil is fine.
	Started, Closed func()
	Stats           *Stats // nil counts for nobody
	Clock           Clock
	Log             *slog.Logger // nil discards
}

// Listener is a net.Listener whose connections are handshaken: Accept returns *tls.Conn with the
// handshake done, or *Conn for plaintext where the mode allows it. A slow or hostile client delays
// nobody else: handshakes run off the accepting path, bounded in time and number.
type Listener struct {
	cfg   Config
	tls   [2]*tls.Config // by Mode.Anonymous
	ready chan net.Conn
	done  chan struct{} // closed by Close
	slots chan struct{}
	wg    sync.WaitGroup
	start sync.Once
	stop  sync.Once

	broken chan struct{} // closed when accepting ended by itself; err is then set
	err    error

	mu      sync.Mutex
	pending map[net.Conn]struct{} // nil when closed
}

// New returns a listener at rest: nothing is accepted before the first Accept.
func New(cfg Config) *Listener {
	if cfg.Mode == nil {
		cfg.Mode = func() Mode { return Mode{} }
	}
	if cfg.Stats == nil {
		cfg.Stats = new(Stats)
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := &Listener{
		cfg:     cfg,
		ready:   make(chan net.Conn),
		done:    make(chan struct{}),
		broken:  make(chan struct{}),
		slots:   make(chan struct{}, maxPending),
		pending: make(map[net.Conn]struct{}),
	}
	for i := range l.tls {
		l.tls[i] = identity.ServerTLS(cfg.Identity, identity.ServerOptions{
			RequireClient: i == 0,
			ALPN:          []string{"h2", "http/1.1"},
			Now:           cfg.Clock.Now,
		})
	}
	return l
}

// Addr is the address of the inner listener.
func (l *Listener) Addr() net.Addr { return l.cfg.Inner.Addr() }

// Accept waits for a connection whose handshake is done. After Close it returns net.ErrClosed.
func (l *Listener) Accept() (net.Conn, error) {
	l.start.Do(func() {
		if l.cfg.Started != nil {
			l.cfg.Started()
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.pending != nil {
			l.wg.Go(l.run)
		}
	})
	select {
	case <-l.done: // first, so that nothing is handed out after Close
		return nil, l.closed()
	default:
	}
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.done:
		return nil, l.closed()
	case <-l.broken:
		return nil, l.err
	}
}

func (l *Listener) closed() error {
	return &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: net.ErrClosed}
}

// Close stops accepting, breaks off handshakes, and waits for both to end. Connections that Accept
// returned stay. It may be called twice.
func (l *Listener) Close() error {
	err := error(nil)
	l.stop.Do(func() {
		close(l.done)
		err = l.cfg.Inner.Close()
		l.mu.Lock()
		for c := range l.pending {
			c.Close()
		}
		l.pending = nil
		l.mu.Unlock()
		if l.cfg.Closed != nil {
			l.cfg.Closed()
		}
	})
	l.wg.Wait()
	return err
}

// run accepts sockets until the inner listener ends, and starts a handshake for each.
func (l *Listener) run() {
	delay := time.Duration(0)
	for {
		select {
		case l.slots <- struct{}{}:
		case <-l.done:
			return
		}
		raw, err := l.cfg.Inner.Accept()
		if err != nil {
			<-l.slots
			if isTemporary(err) {
				// Out of file descriptors, a connection that was gone already: as net/http does.
				delay = min(max(2*delay, 5*time.Millisecond), time.Second)
				l.cfg.Log.Warn("accept failed", "addr", l.Addr().String(), "err", err, "retry_in", delay)
				if l.sleep(delay) {
					continue
				}
				return
			}
			l.err = err
			close(l.broken)
			return
		}
		delay = 0
		if !l.track(raw) {
			<-l.slots
			raw.Close()
			return
		}
		l.wg.Go(func() {
			defer func() { <-l.slots }()
			l.take(raw)
		})
	}
}

// isTemporary asks for the old method only: the errors of the net package that stand for passing
// conditions of accept (ECONNABORTED, EMFILE, ENFILE) have it.
func isTemporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

// track remembers a socket under handshake; false means that the listener is closed.
func (l *Listener) track(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending == nil {
		return false
	}
	l.pending[c] = struct{}{}
	return true
}

// take brings one socket to the point where a server may see it, and hands it to Accept.
func (l *Listener) take(raw net.Conn) {
	defer func() {
		l.mu.Lock()
		delete(l.pending, raw)
		l.mu.Unlock()
	}()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stop := l.cfg.Clock.AfterFunc(handshakeTimeout, func() { cancel(); raw.Close() })
	conn, err := l.prepare(ctx, raw)
	stop()
	if err != nil {
		raw.Close()
		// One hostile client must not fill the log, so this is Debug; the number is in the status.
		l.cfg.Log.Debug("connection refused", "addr", l.Addr().String(), "remote", raw.RemoteAddr().String(), "err", err)
		return
	}
	select {
	case l.ready <- conn:
	case <-l.done:
		conn.Close()
	}
}

var (
	errPlaintext = errors.New("plaintext to a service that wants mesh TLS: call it by the SDK, or set mtls: permissive on the MeshService")
	errNoTLS     = errors.New("TLS to a listener without a chain for it")
)

// prepare reads the first byte, decides by the mode of this moment, and does the handshake.
func (l *Listener) prepare(ctx context.Context, raw net.Conn) (net.Conn, error) {
	first := make([]byte, 1)
	if _, err := raw.Read(first); err != nil {
		l.cfg.Stats.Failed.Add(1)
		return nil, err
	}
	c := &Conn{Conn: raw, first: first}
	mode := l.cfg.Mode()
	if first[0] != recordHandshake {
		if !mode.Plaintext {
			l.cfg.Stats.Refused.Add(1)
			return nil, errPlaintext
		}
		l.cfg.Stats.Plaintext.Add(1)
		return c, nil
	}
	if mode.NoTLS {
		l.cfg.Stats.Refused.Add(1)
		return nil, errNoTLS
	}
	cfg := l.tls[0]
	if mode.Anonymous {
		cfg = l.tls[1]
	}
	t := tls.Server(c, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		l.cfg.Stats.Failed.Add(1)
		return nil, err
	}
	c.secure = true
	switch id, err := identity.PeerID(t.ConnectionState()); {
	case err == nil:
		c.peer, c.name = id, id.String()
		l.cfg.Stats.MTLS.Add(1)
	case errors.Is(err, identity.ErrNoPeer) && mode.Anonymous:
		l.cfg.Stats.Anonymous.Add(1)
	default:
		l.cfg.Stats.Failed.Add(1)
		return nil, err
	}
	return t, nil
}

// sleep waits and reports whether the time has passed; false means that the listener was closed.
func (l *Listener) sleep(d time.Duration) bool {
	passed := make(chan struct{})
	stop := l.cfg.Clock.AfterFunc(d, func() { close(passed) })
	defer stop()
	select {
	case <-passed:
		return true
	case <-l.done:
		return false
	}
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}
