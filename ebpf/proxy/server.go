package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// server is one running proxy.
type server struct {
	cfg     Config
	socks   *sockets
	ups     *upstreams
	fwd     *forwarder
	beat    *heartbeat
	count   counters
	started time.Time
	mapID   uint32

	// work ends when answers under way are given up.
	work    context.Context
	abandon context.CancelFunc
	// end is closed by finish, with how.
	end     chan struct{}
	ending  sync.Once
	how     ending
	gone    chan struct{} // closed when nothing of this server works any more
	handing atomic.Bool   // a hand-over is under way

	readers   sync.WaitGroup // of the DNS sockets
	conns     sync.WaitGroup // accepted TCP connections
	datagrams sync.WaitGroup // queries at resolvers that came by UDP
	streams   sync.WaitGroup // those that came by TCP
	control   sync.WaitGroup // conversations on the control socket
	accepting sync.WaitGroup // of conversations

	passing sync.Mutex // held while a hand-over is past its middle
	given   bool       // the sockets are another's; guarded by passing

	mu      sync.Mutex
	leaving bool                    // no hand-over may pass its middle
	open    map[*net.TCPConn]uint64 // to the cgroup
	talks   map[*net.UnixConn]struct{}
	closing bool
}

// ending is why a server stops.
type ending string

const (
	byContext  ending = "its context ended"
	byRequest  ending = "asked to stop"
	superseded ending = "another process took over"
)

// Run serves until ctx is done, Stop is called, or another process takes its sockets over; then it
// answers what it has read and returns nil, after every goroutine it started has ended. Where a
// proxy with the same control socket runs already, Run takes its place without losing a query; if
// that fails, Run returns the reason and the other serves on.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.withDefaults(); err != nil {
		return fmt.Errorf("dns proxy: %w", err)
	}
	if err := run(ctx, cfg); err != nil {
		return fmt.Errorf("dns proxy: %w", err)
	}
	return nil
}

func run(ctx context.Context, cfg Config) error {
	socks, old, err := acquire(ctx, cfg)
	if err != nil {
		return err
	}
	defer socks.close()
	if old != nil {
		defer old.close()
	}
	s, err := newServer(cfg, socks)
	if err != nil {
		return err
	}
	defer s.abandon()
	if err := s.beat.start(); err != nil {
		return err
	}
	defer s.beat.stop()
	s.listen()
	defer s.quiesce(time.Unix(1, 0))
	if old != nil {
		if err := old.finish(ctx); err != nil {
			s.quiesce(time.Unix(1, 0))
			s.settle(idleTime, drainTime)
			return err
		}
	}
	st := s.status()
	cfg.Log.Info("DNS proxy serves", "version", cfg.Version, "addresses", st.Addresses, "suffix", cfg.Suffix, "netns", st.Netns, "took over", old != nil)
	s.answerControl()
	if cfg.Ready != nil {
		cfg.Ready(st)
	}
	select {
	case <-ctx.Done():
		s.finish(byContext)
	case <-s.end:
	}
	s.leave(ctx)
	return nil
}

func newServer(cfg Config, socks *sockets) (*server, error) {
	cookie, err := socks.cookie()
	if err != nil {
		return nil, err
	}
	s := &server{
		cfg: cfg, socks: socks, started: cfg.Clock.Now(),
		ups:   &upstreams{fixed: cfg.Upstreams, path: cfg.ResolvConf, clock: cfg.Clock, log: cfg.Log},
		end:   make(chan struct{}),
		gone:  make(chan struct{}),
		open:  map[*net.TCPConn]uint64{},
		talks: map[*net.UnixConn]struct{}{},
	}
	if cfg.Maps != nil {
		if s.mapID, err = MapID(cfg.Maps); err != nil {
			return nil, err
		}
	}
	s.fwd = newForwarder(cfg, s.ups.list, socks.addresses())
	s.beat = &heartbeat{tables: cfg.Tables, netns: cookie, v4: socks.v4, v6: socks.v6, clock: cfg.Clock, log: cfg.Log, failed: &s.count.beatsFailed}
	s.work, s.abandon = context.WithCancel(context.Background())
	return s, nil
}

// finish makes Run return; the first reason counts.
func (s *server) finish(how ending) {
	s.ending.Do(func() {
		s.how = how
		close(s.end)
	})
}

// leave ends the server in the order that loses nothing.
func (s *server) leave(ctx context.Context) {
	given := s.resolve()
	s.cfg.Log.Info("DNS proxy leaves", "version", s.cfg.Version, "reason", string(s.how), "sockets given away", given)
	s.beat.stop()
	grace := time.Duration(0)
	if given {
		// All that is in the sockets is the other's; what this process has read it answers.
		s.quiesce(time.Unix(1, 0))
		s.quiesceControl()
		s.socks.closeShared()
		grace = leaveTime
		defer context.AfterFunc(ctx, s.closeIdle)() // who ends it now does not want to wait for that
	} else {
		// First no new query is sent here, then those that are in the sockets are read.
		if err := s.cfg.Tables.Leave(s.beat.netns); err != nil {
			s.cfg.Log.Warn("entry of the proxy stays; it is ignored when it is two seconds old", "err", err)
		}
		s.quiesce(s.cfg.Clock.Now().Add(lingerTime))
		s.quiesceControl()
	}
	s.settle(grace, drainTime)
	if !given {
		if err := os.Remove(s.cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.cfg.Log.Warn("control socket stays", "path", s.cfg.Socket, "err", err)
		}
	}
	s.socks.close()
	close(s.gone)
	s.hangUp()
	s.control.Wait()
}

// resolve waits for a hand-over that is past its middle, where the other process may already be the
// only one that reads, and reports whether it came to its end. None begins after.
func (s *server) resolve() (given bool) {
	s.mu.Lock()
	s.leaving = true
	for c := range s.talks {
		_ = c.SetReadDeadline(s.cfg.Clock.Now().Add(talkTime))
	}
	s.mu.Unlock()
	s.passing.Lock()
	defer s.passing.Unlock()
	return s.given
}

// status is what the control socket tells.
func (s *server) status() Status {
	st := Status{
		Version: s.cfg.Version, PID: os.Getpid(), Started: s.started, Suffix: s.cfg.Suffix,
		Netns: s.beat.netns, MapID: s.mapID, Addresses: s.socks.addresses(), Upstreams: s.ups.list(),
	}
	s.count.fill(&st)
	return st
}
