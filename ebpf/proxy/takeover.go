package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// predecessor is the process whose sockets this one took. It serves until finish.
type predecessor struct {
	conn  *net.UnixConn
	lines *bufio.Reader
	clock Clock
	// process is its pidfd; the sockets own it.
	process *os.File
}

var errBusy = errors.New("busy")

// acquire returns the sockets to serve on: new ones when no proxy runs, else those of the one that
// does. It waits a while for one that starts, ends, or hands over at this moment.
func acquire(ctx context.Context, cfg Config) (*sockets, *predecessor, error) {
	until := cfg.Clock.Now().Add(talkTime)
	for {
		lock, err := takeLock(cfg.Socket)
		if err != nil {
			return nil, nil, err
		}
		if lock != nil {
			s, err := bind(lock, cfg.Socket, cfg.Listen4, cfg.Listen6, cfg.Log)
			if err != nil {
				_ = lock.Close()
			}
			return s, nil, err
		}
		s, old, err := takeOver(ctx, cfg)
		if err == nil {
			return s, old, nil
		}
		momentary := errors.Is(err, errBusy) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNRESET)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, nil, fmt.Errorf("the proxy at %s lives and does not answer: %w: end it with `fuser -k %s.lock`", cfg.Socket, err, cfg.Socket)
		}
		if !momentary {
			return nil, nil, fmt.Errorf("taking over from the proxy at %s: %w", cfg.Socket, err)
		}
		if cfg.Clock.Now().After(until) {
			return nil, nil, fmt.Errorf("another process holds %s.lock and gives nothing at %s: %w: look for it with `fuser %s.lock` and end it", cfg.Socket, cfg.Socket, err, cfg.Socket)
		}
		if err := wait(ctx, cfg.Clock, 20*time.Millisecond); err != nil {
			return nil, nil, err
		}
	}
}

// wait returns after d, or with the cause when ctx ends first.
func wait(ctx context.Context, clock Clock, d time.Duration) error {
	wake := make(chan struct{})
	defer clock.AfterFunc(d, func() { close(wake) })()
	select {
	case <-wake:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// takeOver asks the running proxy for its sockets.
func takeOver(ctx context.Context, cfg Config) (_ *sockets, _ *predecessor, err error) {
	conn, err := dialControl(ctx, cfg.Socket)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	if err := writeLine(conn, cfg.Clock, request{Op: "takeover", Protocol: protocol}); err != nil {
		return nil, nil, err
	}
	roles, fds, err := receiveSockets(conn, cfg.Clock)
	if err != nil {
		return nil, nil, err
	}
	s, err := imported(roles, fds)
	if err != nil {
		return nil, nil, err
	}
	if err := sameNetns(s); err != nil {
		s.close()
		return nil, nil, err
	}
	return s, &predecessor{conn: conn, lines: bufio.NewReaderSize(conn, maxLine), clock: cfg.Clock, process: s.process}, nil
}

// dialControl connects to a control socket and checks who listens there.
func dialControl(ctx context.Context, path string) (*net.UnixConn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	conn := c.(*net.UnixConn)
	uid, err := peer(conn)
	if err == nil && !trusted(uid) {
		err = fmt.Errorf("user %d listens at %s: want this user or root; remove that socket", uid, path)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// receiveSockets reads the line that comes with descriptors. On an error none stays open.
func receiveSockets(conn *net.UnixConn, clock Clock) (roles []string, fds []int, err error) {
	defer func() {
		if err != nil {
			closeAll(fds)
			fds = nil
		}
	}()
	_ = conn.SetReadDeadline(clock.Now().Add(talkTime))
	line := make([]byte, 0, 4096)
	oob := make([]byte, unix.CmsgSpace(4*64))
	for !bytes.HasSuffix(line, []byte("\n")) {
		if len(line) == cap(line) {
			return nil, fds, fmt.Errorf("line longer than %d bytes", cap(line))
		}
		n, oobn, flags, _, err := conn.ReadMsgUnix(line[len(line):cap(line)], oob)
		if oobn > 0 {
			got, parseErr := rights(oob[:oobn])
			fds = append(fds, got...)
			if parseErr != nil {
				return nil, fds, parseErr
			}
		}
		if err != nil {
			return nil, fds, err
		}
		if flags&unix.MSG_CTRUNC != 0 {
			return nil, fds, errors.New("more sockets than fit: the limit of open files of this process may be too low (ulimit -n)")
		}
		if n == 0 {
			return nil, fds, fmt.Errorf("it closed the connection: %w", errBusy)
		}
		line = line[:len(line)+n]
	}
	var r response
	if err := json.Unmarshal(line, &r); err != nil {
		return nil, fds, fmt.Errorf("line is not the JSON that was expected: %w", err)
	}
	switch {
	case r.Busy:
		return nil, fds, fmt.Errorf("%s: %w", r.Error, errBusy)
	case r.Error != "":
		return nil, fds, errors.New(r.Error)
	}
	return r.Sockets, fds, nil
}

func rights(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, m := range msgs {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// sameNetns refuses sockets of another network namespace: this process could not forward for it.
func sameNetns(s *sockets) error {
	theirs, err := s.cookie()
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	own, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return fmt.Errorf("network namespace: its cookie (SO_NETNS_COOKIE): %w", err)
	}
	if own != theirs {
		return fmt.Errorf("it serves the network namespace with cookie %d, this process is in %d: want one control socket a namespace", theirs, own)
	}
	return nil
}

// finish tells the predecessor that this process serves, and returns when that one reads nothing
// more. On an error the predecessor serves on, and this process must stop.
func (p *predecessor) finish(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = p.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err := p.say("serving")
	if err == nil {
		_ = p.conn.SetReadDeadline(p.clock.Now().Add(2 * talkTime))
		var r response
		if err = readLine(p.lines, &r); err == nil && !r.Stopped {
			return fmt.Errorf("the old process does not stop: %s", or(r.Error, "it said something else"))
		}
	}
	if err == nil {
		err = p.say("done")
	}
	if err == nil || p.dead() { // the dead do not serve
		return nil
	}
	return fmt.Errorf("the old process serves on: %w", err)
}

func (p *predecessor) say(op string) error { return writeLine(p.conn, p.clock, request{Op: op}) }

// dead reports whether the predecessor has ended, or does within a second: a socket that closes is
// the first sign of it.
func (p *predecessor) dead() bool {
	rc, err := p.process.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	if err := rc.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			if n, err = unix.Poll(fds, 1000); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return false
	}
	return err == nil && n == 1
}

func (p *predecessor) close() { _ = p.conn.Close() }
