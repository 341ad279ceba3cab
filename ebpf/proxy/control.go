package proxy

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The control socket speaks lines of JSON: a request, a response, and after "takeover" the four
// further lines of a hand-over. Fields that a version does not know it passes over.
//
//	new: {"op":"takeover","protocol":1}
//	old: {"protocol":1,"sockets":["lock","control",...,"process"]}  and the descriptors (SCM_RIGHTS)
//	     the new process serves now, beside the old one, and its heartbeat is written
//	new: {"op":"serving"}
//	old: {"stopped":true}  it reads nothing more; until "done" it would take up again
//	new: {"op":"done"}     the old process answers what it has read, and ends
//
// At each moment at least one process reads: the old one until it was told "serving", and again
// when the connection ends before "done"; the new one from before it says "serving".
const protocol = 1

type request struct {
	Op       string `json:"op"`
	Protocol int    `json:"protocol,omitempty"`
}

type response struct {
	Error string `json:"error,omitempty"`
	// Busy says that the error is one of the moment.
	Busy     bool     `json:"busy,omitempty"`
	Status   *Status  `json:"status,omitempty"`
	Protocol int      `json:"protocol,omitempty"`
	Sockets  []string `json:"sockets,omitempty"`
	Stopped  bool     `json:"stopped,omitempty"`
}

const (
	maxLine = 64 << 10 // bytes of a line
	// talkTime bounds each wait for the other side of the control socket.
	talkTime = 5 * time.Second
)

// answerControl starts to accept conversations; it pairs with quiesceControl.
func (s *server) answerControl() {
	_ = s.socks.control.SetDeadline(time.Time{})
	s.accepting.Go(func() {
		for {
			c, err := s.socks.control.AcceptUnix()
			if err != nil {
				if stopped(err) {
					return
				}
				s.cfg.Log.Warn("accepting failed", "address", s.cfg.Socket, "err", err)
				s.pause()
				continue
			}
			s.mu.Lock()
			s.talks[c] = struct{}{}
			s.mu.Unlock()
			s.control.Go(func() {
				defer func() {
					s.mu.Lock()
					defer s.mu.Unlock()
					delete(s.talks, c)
					_ = c.Close()
				}()
				s.talk(c)
			})
		}
	})
}

// quiesceControl returns when no further conversation begins.
func (s *server) quiesceControl() {
	_ = s.socks.control.SetDeadline(time.Unix(1, 0))
	s.accepting.Wait()
}

// hangUp ends every conversation.
func (s *server) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.talks {
		_ = c.Close()
	}
}

// talk has one conversation.
func (s *server) talk(c *net.UnixConn) {
	uid, err := peer(c)
	if err != nil || !trusted(uid) {
		s.cfg.Log.Warn("control refused", "uid", uid, "err", err)
		_ = s.say(c, response{Error: fmt.Sprintf("user %d may not control this proxy: want user %d or root", uid, os.Geteuid())})
		return
	}
	lines := bufio.NewReaderSize(c, maxLine)
	_ = c.SetReadDeadline(s.cfg.Clock.Now().Add(talkTime))
	req, err := readRequest(lines)
	if err != nil {
		_ = s.say(c, response{Error: err.Error()})
		return
	}
	switch req.Op {
	case "status":
		st := s.status()
		_ = s.say(c, response{Status: &st})
	case "stop":
		if s.say(c, response{}) == nil {
			s.finish(byRequest)
			<-s.gone // the end of the connection tells that the process is done
		}
	case "takeover":
		if req.Protocol != protocol {
			_ = s.say(c, response{Error: fmt.Sprintf("hand-over protocol %d: want %d; stop this proxy and start the other one", req.Protocol, protocol)})
			return
		}
		if !s.handing.CompareAndSwap(false, true) {
			_ = s.say(c, response{Busy: true, Error: "another process is taking over"})
			return
		}
		defer s.handing.Store(false)
		if err := s.handOver(c, lines); err != nil {
			s.cfg.Log.Warn("hand-over broke off, serving on", "err", err)
		}
	default:
		_ = s.say(c, response{Error: fmt.Sprintf("op %q: want status, stop or takeover", req.Op)})
	}
}

// handOver gives the sockets to the process at c. When it returns an error this server serves as
// before.
func (s *server) handOver(c *net.UnixConn, lines *bufio.Reader) error {
	roles, fds, err := s.socks.export()
	if err != nil {
		_ = s.say(c, response{Error: err.Error()})
		return err
	}
	head, err := json.Marshal(response{Protocol: protocol, Sockets: roles})
	if err != nil {
		closeAll(fds)
		return err
	}
	_ = c.SetWriteDeadline(s.cfg.Clock.Now().Add(talkTime))
	_, _, err = c.WriteMsgUnix(append(head, '\n'), unix.UnixRights(fds...), nil)
	closeAll(fds)
	if err != nil {
		return fmt.Errorf("sending the sockets: %w", err)
	}
	_ = c.SetReadDeadline(s.cfg.Clock.Now().Add(2 * talkTime))
	if err := expect(lines, "serving"); err != nil {
		return err
	}
	s.passing.Lock()
	defer s.passing.Unlock()
	if !s.quietFor(c, talkTime) {
		return errors.New("this process is about to end")
	}
	s.quiesceControl()
	s.beat.stop()
	s.quiesce(time.Unix(1, 0))
	err = s.say(c, response{Stopped: true})
	if err == nil {
		// The other process is serving and holds the connection: its word or its end comes, so that
		// no moment is left in which neither or both would serve on.
		s.quietFor(c, 0)
		err = expect(lines, "done")
	}
	if err == nil {
		s.given = true
		s.finish(superseded)
		return nil
	}
	s.listen()
	s.answerControl()
	return errors.Join(err, s.beat.start())
}

// quietFor lets c be silent for d, 0 meaning for ever, unless the server leaves, which it reports by
// false.
func (s *server) quietFor(c *net.UnixConn, d time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving {
		return false
	}
	var until time.Time
	if d > 0 {
		until = s.cfg.Clock.Now().Add(d)
	}
	_ = c.SetReadDeadline(until)
	return true
}

func expect(lines *bufio.Reader, op string) error {
	req, err := readRequest(lines)
	if err != nil {
		return fmt.Errorf("waiting for %q: %w", op, err)
	}
	if req.Op != op {
		return fmt.Errorf("waiting for %q: got %q", op, req.Op)
	}
	return nil
}

func (s *server) say(c *net.UnixConn, r response) error {
	return writeLine(c, s.cfg.Clock, r)
}

func writeLine(c *net.UnixConn, clock Clock, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_ = c.SetWriteDeadline(clock.Now().Add(talkTime))
	_, err = c.Write(append(b, '\n'))
	return err
}

func readRequest(r *bufio.Reader) (request, error) {
	var req request
	return req, readLine(r, &req)
}

// readLine decodes one line of at most maxLine bytes.
func readLine(r *bufio.Reader, v any) error {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return fmt.Errorf("line longer than %d bytes", maxLine)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, v); err != nil {
		return fmt.Errorf("line is not the JSON that was expected: %w", err)
	}
	return nil
}

// peer is the user at the other end, by the kernel's word: of who called connect(2), or listen(2).
func peer(c *net.UnixConn) (uid uint32, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var opt error
	if err := rc.Control(func(fd uintptr) {
		cred, opt = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if opt != nil {
		return 0, opt
	}
	return cred.Uid, nil
}

// trusted reports whether a user may command this process, or give it sockets.
func trusted(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }
