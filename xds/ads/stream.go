package ads

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// Clock tells time and runs timers; nil in a Config means the real one.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// Config of a Stream. Fields without a word on their zero are required.
type Config struct {
	// Servers in order of preference (gRFC A71); names are for logs and Status.
	Servers []string
	// Dial makes a channel to Servers[i] with the credentials that are right for it. The stream
	// closes it. It is called for every attempt, so that an attempt never waits for the back-off
	// of the attempt before; it should set keepalive parameters, or a server that vanishes
	// without a word is noticed late.
	Dial func(ctx context.Context, i int) (*grpc.ClientConn, error)
	Node *xdspb.Node
	// Check decides on the bytes of a resource. The name is returned also with an error when the
	// bytes tell it. It is called from several goroutines.
	Check func(typeURL string, value []byte) (name string, decoded any, err error)
	// Deliver hands over news, in order and one at a time. It is called with a lock held: it must
	// neither block nor call the Stream.
	Deliver func(Update)
	// ResourceTimeout is how long a connected server has to answer for a name; zero means 15 s
	// (gRFC A57).
	ResourceTimeout time.Duration
	// ConnectTimeout bounds an attempt to connect; zero means 10 s.
	ConnectTimeout time.Duration
	Log            *slog.Logger   // nil discards
	Clock          Clock          // nil means the real one
	Rand           func() float64 // in [0,1), for jitter; nil means math/rand/v2
}

// Back-off between attempts, and between answers to a server that repeats what was rejected: doubling from base, each wait a random half to whole of the step. The
// cap keeps recovery within 5 s of the server's return.
const (
	backoffBase = 250 * time.Millisecond
	backoffCap  = 4 * time.Second
)

// Stream keeps one ADS stream up, to the best server it reaches, and the subscriptions on it. It
// is safe for concurrent use.
type Stream struct {
	cfg Config

	mu      sync.Mutex
	held    map[Name]*holding
	links   []*link
	active  int // the link whose news count; -1 before the first
	tried   int // links up to this one are to run
	running bool
	changed chan struct{} // tried has changed; capacity 1
}

// holding is what the caller has of a subscribed name.
type holding struct {
	known, absent bool
}

// link is one server.
type link struct {
	index    int
	machine  *Machine
	next     Mode // of the next stream; touched by keep's goroutine only
	mode     Mode
	wake     chan struct{} // subscriptions have changed; capacity 1
	send     func(Request) // nil while not connected
	timers   map[Name]*timer
	holds    map[string]*timer // NACKs that wait, by type URL
	failed   bool              // the last attempt brought nothing
	since    time.Time
	lastErr  error
	attempts int
}

// timer is one run of a resource's timer; its address tells it from the next run.
type timer struct{ stop func() bool }

// Status is how a Stream stands.
type Status struct {
	// Server in use: connected, or the one that was last; empty before the first connection.
	Server    string
	Connected bool
	// Since is when the present connection was made; zero when there is none.
	Since time.Time
	Mode  Mode
	// Err is why the last attempt failed; nil while connected.
	Err error
}

// New checks cfg and returns a stream at rest; nothing runs until Run.
func New(cfg Config) (*Stream, error) {
	switch {
	case len(cfg.Servers) == 0:
		return nil, errors.New("ads: no servers: want at least one")
	case cfg.Dial == nil || cfg.Check == nil || cfg.Deliver == nil:
		return nil, errors.New("ads: Dial, Check and Deliver are required")
	}
	if cfg.Node == nil {
		cfg.Node = &xdspb.Node{}
	}
	if cfg.ResourceTimeout == 0 {
		cfg.ResourceTimeout = 15 * time.Second
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Float64
	}
	s := &Stream{cfg: cfg, held: map[Name]*holding{}, active: -1, changed: make(chan struct{}, 1)}
	for i := range cfg.Servers {
		s.links = append(s.links, &link{index: i, machine: NewMachine(), wake: make(chan struct{}, 1), timers: map[Name]*timer{}, holds: map[string]*timer{}})
	}
	return s, nil
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }
func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}

// Subscribe asks for a resource. known and version tell what the caller holds already, from a
// cache; version is sent to the server so that it need not send the same again.
func (s *Stream) Subscribe(n Name, known bool, version string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[n] != nil {
		return
	}
	s.held[n] = &holding{known: known}
	for _, l := range s.links {
		v := version
		if l.index != max(s.active, 0) {
			v = "" // another server's versions say nothing to this one
		}
		s.do(l, l.machine.Step(Subscribe{Name: n, Known: known, Version: v}))
		signal(l.wake)
	}
	s.fallBack()
}

// Unsubscribe ends a subscription.
func (s *Stream) Unsubscribe(n Name) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[n] == nil {
		return
	}
	delete(s.held, n)
	for _, l := range s.links {
		s.do(l, l.machine.Step(Unsubscribe{n}))
		signal(l.wake)
	}
}

// Status tells how the stream stands.
func (s *Stream) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.links[max(s.active, 0)]
	if l.send == nil {
		for _, other := range s.links { // connected and silent so far is better than gone
			if other.send != nil {
				l = other
				break
			}
		}
	}
	st := Status{Server: s.cfg.Servers[l.index], Connected: l.send != nil, Mode: l.mode, Err: l.lastErr}
	if st.Connected {
		st.Since, st.Err = l.since, nil
	} else if s.active < 0 {
		st.Server = ""
	}
	return st
}

// Run keeps the stream up until ctx is done, and returns when every goroutine it started has
// ended. It may be called once.
func (s *Stream) Run(ctx context.Context) error {
	s.mu.Lock()
	if s.running {
		s.mu.Unlock()
		return errors.New("ads: Run was called twice")
	}
	s.running = true
	s.mu.Unlock()

	type worker struct {
		cancel context.CancelFunc
		done   chan struct{}
	}
	var workers []worker
	for ended := false; ; {
		s.mu.Lock()
		want := s.tried + 1
		s.mu.Unlock()
		if ended {
			want = 0
		}
		for len(workers) > want {
			last := workers[len(workers)-1]
			last.cancel()
			<-last.done
			workers = workers[:len(workers)-1]
		}
		if ended {
			return nil
		}
		for len(workers) < want {
			wctx, cancel := context.WithCancel(ctx)
			w := worker{cancel, make(chan struct{})}
			l := s.links[len(workers)]
			go func() {
				defer close(w.done)
				s.keep(wctx, l)
			}()
			workers = append(workers, w)
		}
		select {
		case <-s.changed:
		case <-ctx.Done():
			ended = true
		}
	}
}

// fallBack starts the next server when the last one tried is out of reach and something is wanted
// that nobody has sent (gRFC A71). The lock is held.
func (s *Stream) fallBack() {
	if !s.links[s.tried].failed || s.tried+1 == len(s.links) {
		return
	}
	for _, h := range s.held {
		if !h.known && !h.absent {
			s.tried++
			s.links[s.tried].failed = false
			s.cfg.Log.Warn("control plane out of reach, trying the next", "server", s.cfg.Servers[s.tried-1], "next", s.cfg.Servers[s.tried])
			signal(s.changed)
			return
		}
	}
}

// heard says that a response came from l: the servers after it are not needed. It reports whether
// l's news count. The lock is held.
func (s *Stream) heard(l *link) bool {
	if l.index > s.tried {
		return false // being stopped
	}
	if s.active != l.index {
		s.inherit(s.links[max(s.active, 0)], l)
		s.active = l.index
		for _, other := range s.links {
			if other != l {
				s.do(other, other.machine.Step(Forget{}))
			}
		}
	}
	l.failed, l.attempts = false, 0
	if s.tried > l.index {
		s.tried = l.index
		signal(s.changed)
	}
	return true
}

// do carries actions out. The lock is held.
func (s *Stream) do(l *link, actions []Action) {
	for _, a := range actions {
		switch a := a.(type) {
		case Send:
			if l.send != nil {
				l.send(a.Request)
			}
		case Deliver:
			if h := s.held[a.Update.Name]; h != nil && a.Err == nil {
				h.known, h.absent = !a.NotExist, a.NotExist
			}
			s.cfg.Deliver(a.Update)
		case StartTimer:
			t := &timer{}
			l.timers[a.Name] = t
			t.stop = s.cfg.Clock.AfterFunc(s.cfg.ResourceTimeout, func() { s.timedOut(l, a.Name, t) })
		case StopTimer:
			if t := l.timers[a.Name]; t != nil {
				t.stop()
				delete(l.timers, a.Name)
			}
		case Hold:
			t := &timer{}
			l.holds[a.Type] = t
			t.stop = s.cfg.Clock.AfterFunc(backoff(a.Again, s.cfg.Rand()), func() { s.due(l, a.Type, t) })
		case EndHold:
			if t := l.holds[a.Type]; t != nil {
				t.stop()
				delete(l.holds, a.Type)
			}
		}
	}
}

// timedOut ends the wait for a name, unless it was answered or asked for anew while the timer
// fired, or l is not the server whose news count.
func (s *Stream) timedOut(l *link, n Name, t *timer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.timers[n] != t {
		return
	}
	delete(l.timers, n)
	if s.active < 0 || s.active == l.index {
		s.do(l, l.machine.Step(TimedOut{n}))
	}
}

// due ends the wait of a NACK, unless it was sent or taken back while the timer fired.
func (s *Stream) due(l *link, typeURL string, t *timer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.holds[typeURL] != t {
		return
	}
	delete(l.holds, typeURL)
	s.do(l, l.machine.Step(Due{typeURL}))
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// wait sleeps by the clock; false means that ctx ended first.
func (s *Stream) wait(ctx context.Context, d time.Duration) bool {
	done := make(chan struct{})
	stop := s.cfg.Clock.AfterFunc(d, func() { close(done) })
	defer stop()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// backoff is the wait before attempt n (from 1), with r in [0,1).
func backoff(n int, r float64) time.Duration {
	d := backoffCap
	if n < 5 {
		d = min(backoffCap, backoffBase<<max(n-1, 0))
	}
	return d/2 + time.Duration(r*float64(d/2))
}

func (s *Stream) fail(l *link, heard bool, err error) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.do(l, l.machine.Step(Disconnected{}))
	l.send, l.since, l.lastErr = nil, time.Time{}, err
	l.failed = !heard
	l.attempts++
	s.fallBack()
	return backoff(l.attempts, s.cfg.Rand())
}

// keep holds one link up until ctx is done.
func (s *Stream) keep(ctx context.Context, l *link) {
	for ctx.Err() == nil {
		heard, err := s.session(ctx, l)
		if ctx.Err() != nil {
			s.fail(l, true, ctx.Err())
			return
		}
		if l.nextMode(heard, err) {
			s.fail(l, true, err)
			continue // the other variant at once: the server is there
		}
		d := s.fail(l, heard, err)
		s.cfg.Log.Info("control plane stream ended", "server", s.cfg.Servers[l.index], "err", err, "retry_in", d)
		if !s.wait(ctx, d) {
			return
		}
	}
}

func serverError(server string, err error) error {
	return fmt.Errorf("control plane %s: %w", server, err)
}
