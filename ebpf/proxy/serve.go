package proxy

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// listen starts to read and accept queries. It pairs with quiesce.
func (s *server) listen() {
	for _, c := range s.socks.udp {
		_ = c.SetReadDeadline(time.Time{}) // fails on a closed socket only, as the read will
		s.readers.Go(func() { s.readUDP(c) })
	}
	for _, l := range s.socks.tcp {
		_ = l.SetDeadline(time.Time{})
		s.readers.Go(func() { s.acceptTCP(l) })
	}
}

// quiesce stops to read and accept queries from at on, and returns when that has stopped. What was
// read is still answered, and no datagram or connection is lost: what is not read stays in the
// socket, for the process that has it too.
func (s *server) quiesce(at time.Time) {
	for _, c := range s.socks.udp {
		_ = c.SetReadDeadline(at)
	}
	for _, l := range s.socks.tcp {
		_ = l.SetDeadline(at)
	}
	s.readers.Wait()
}

func (s *server) readUDP(c *net.UDPConn) {
	buf := make([]byte, 65535)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			if stopped(err) {
				return
			}
			s.cfg.Log.Warn("receiving failed", "address", c.LocalAddr(), "err", err)
			s.pause()
			continue
		}
		s.handle(buf[:n], mapped(from), false, func(resp []byte) {
			// Whoever asked may be gone; there is nobody else to tell.
			_, _ = c.WriteToUDPAddrPort(resp, from)
		})
	}
}

func (s *server) acceptTCP(l *net.TCPListener) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			if stopped(err) {
				return
			}
			s.cfg.Log.Warn("accepting failed", "address", l.Addr(), "err", err)
			s.pause() // out of files, most likely: give some time to free them
			continue
		}
		if !s.adopt(c) {
			s.count.shed.Add(1)
			_ = c.Close()
			continue
		}
		s.conns.Go(func() {
			defer s.drop(c)
			s.serveTCP(c)
		})
	}
}

func stopped(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed)
}

// pause keeps a loop whose calls fail at once from taking the machine.
func (s *server) pause() {
	wake := make(chan struct{})
	stop := s.cfg.Clock.AfterFunc(50*time.Millisecond, func() { close(wake) })
	defer stop()
	select {
	case <-wake:
	case <-s.work.Done():
	}
}

// serveTCP answers the queries of one connection, each as soon as it can be. RFC 7766, section 7:
// "It is RECOMMENDED that ... responses be sent as soon as possible, even out of order".
func (s *server) serveTCP(c *net.TCPConn) {
	var pending sync.WaitGroup
	defer pending.Wait()
	from, ok := addrPort(c.RemoteAddr())
	if !ok {
		return
	}
	var mu sync.Mutex // answers do not mix
	for {
		s.setIdle(c)
		raw, err := readFramed(c)
		if err != nil {
			return
		}
		pending.Add(1)
		var once sync.Once
		done := func() { once.Do(pending.Done) }
		kept := s.handle(raw, from, true, func(resp []byte) {
			defer done()
			mu.Lock()
			defer mu.Unlock()
			_ = c.SetWriteDeadline(s.cfg.Clock.Now().Add(tryTime))
			if _, err := c.Write(framed(resp)); err != nil {
				_ = c.Close() // half an answer may be out: nothing can follow it
			}
		})
		if !kept {
			done()
		}
	}
}

// handle answers one message, now or later; send is called at most once. It reports whether send
// was or will be called. raw is the caller's again when handle returns.
func (s *server) handle(raw []byte, from netip.AddrPort, tcp bool, send func([]byte)) bool {
	if s.fwd.sent(from, tcp) {
		s.count.looped.Add(1)
		if len(raw) < headerSize {
			return false
		}
		send(bare(raw, dns.RcodeServerFailure))
		return true
	}
	out := answer(raw, tcp, s.cfg.Suffix, func() (Client, bool, error) { return s.cfg.Tables.Client(from, tcp) }, s.cfg.Tables.Name)
	if out.kind != malformed {
		s.count.queries.Add(1)
	}
	switch out.kind {
	case malformed:
		s.count.malformed.Add(1)
	case answered:
		s.count.answered.Add(1)
	case refused:
		s.count.refused.Add(1)
	case failed:
		s.count.failed.Add(1)
		s.cfg.Log.Debug("query failed", "client", from, "err", out.err)
	case forward:
		q := out.query
		if !s.fwd.acquire(q.client.Cgroup) {
			s.count.shed.Add(1)
			send(failure(q.msg, nil, tcp).reply)
			return true
		}
		q.raw = append([]byte(nil), raw...)
		under := &s.datagrams
		if tcp {
			under = &s.streams
		}
		under.Go(func() {
			defer s.fwd.release(q.client.Cgroup)
			resp, err := s.fwd.ask(s.work, q)
			if err != nil {
				s.count.failed.Add(1)
				s.cfg.Log.Debug("query failed", "client", from, "err", err)
				resp = failure(q.msg, nil, tcp).reply
			} else {
				s.count.forwarded.Add(1)
			}
			send(resp)
		})
		return true
	}
	if out.reply == nil {
		return false
	}
	send(out.reply)
	return true
}

// adopt counts a connection in, unless there are too many, or too many of one workload: it, or somebody
// whom no hook sent, must not be able to take the names of the others away.
func (s *server) adopt(c *net.TCPConn) bool {
	var who Client // strangers are one, cgroup 0; so is one whose map cannot be read
	if from, ok := addrPort(c.RemoteAddr()); ok {
		who, _, _ = s.cfg.Tables.Client(from, true)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	mine := 0
	for _, cgroup := range s.open {
		if cgroup == who.Cgroup {
			mine++
		}
	}
	if len(s.open) >= s.cfg.MaxConns || mine >= max(1, s.cfg.MaxConns/2) {
		return false
	}
	s.open[c] = who.Cgroup
	return true
}

func (s *server) drop(c *net.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
	_ = c.Close()
}

// setIdle gives the next query of a connection its time.
func (s *server) setIdle(c *net.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	until := s.cfg.Clock.Now().Add(idleTime)
	if s.closing {
		until = time.Unix(1, 0)
	}
	_ = c.SetReadDeadline(until)
}

// closeIdle ends every connection as soon as its queries are answered.
func (s *server) closeIdle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	for c := range s.open {
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
}

// settle returns when nothing is under way any more, after quiesce. Connections live on for as long
// as their programs use them, but after grace idle ones end, and last later everything does.
func (s *server) settle(grace, last time.Duration) {
	defer s.cfg.Clock.AfterFunc(grace, s.closeIdle)()
	defer s.cfg.Clock.AfterFunc(grace+last, s.abandon)()
	s.datagrams.Wait()
	s.socks.closeUDP() // who sends there again learns at once that nobody reads
	s.conns.Wait()
	s.streams.Wait()
}
