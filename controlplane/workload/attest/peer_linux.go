package attest

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Peer is the process at the other end of a unix socket, as the kernel wrote it down when that
// process connected.
type Peer struct {
	Process Process
	UID     uint32
	// Pinned says that a pidfd held the process while its start time was read, so that the number
	// cannot have been reused in between. It is false on kernels before 6.5, which lack
	// SO_PEERPIDFD: there a process that ended right after connecting, and whose number was given
	// out again before this read, would be mistaken for its successor.
	Pinned bool
}

// PeerProcess asks the kernel who connected to conn. It fails when that process has ended.
func PeerProcess(conn *net.UnixConn) (Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var (
		cred      *unix.Ucred
		pidfd     = -1
		credErr   error
		pidfdErr  error
		unsupport bool
	)
	if err := raw.Control(func(fd uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr != nil {
			return
		}
		pidfd, pidfdErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		unsupport = errors.Is(pidfdErr, unix.ENOPROTOOPT)
	}); err != nil {
		return Peer{}, err
	}
	if credErr != nil {
		return Peer{}, fmt.Errorf("SO_PEERCRED: %w", credErr)
	}
	if cred.Pid <= 0 {
		return Peer{}, errors.New("the caller lives in a PID namespace that is not visible from here: run the node in the parent namespace")
	}
	if pidfdErr != nil && !unsupport {
		return Peer{}, fmt.Errorf("process %d: SO_PEERPIDFD: %w: %w", cred.Pid, pidfdErr, ErrNoProcess)
	}
	p := Peer{UID: cred.Uid, Pinned: !unsupport}
	s, err := Proc{}.Stat(int(cred.Pid))
	if p.Pinned {
		defer unix.Close(pidfd)
		// The process that connected still lives now, therefore what was read is of it.
		if alive := pidfdAlive(pidfd); alive != nil {
			return Peer{}, fmt.Errorf("process %d: %w", cred.Pid, alive)
		}
	}
	if err != nil {
		return Peer{}, err
	}
	p.Process = s.Process
	return p, nil
}

// pidfdAlive polls. pidfd_open(2): "When the process that it refers to terminates, these interfaces
// indicate the file descriptor as readable."
func pidfdAlive(pidfd int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("poll of pidfd: %w", err)
		case n != 0:
			return ErrNoProcess
		}
		return nil
	}
}

// Watch tells when a process ends. Close it; that ends the waiting too.
type Watch struct {
	pidfd *os.File
	done  chan struct{} // closed when wait has returned
	ended chan struct{}
}

// NewWatch watches p; ErrNoProcess when it has ended already.
func NewWatch(p Process) (*Watch, error) {
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("process %d: %w", p.PID, ErrNoProcess)
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: pidfd_open: %w", p.PID, err)
	}
	// Only now is it known that the pidfd is of p and not of a successor of the same number.
	s, err := Proc{}.Stat(p.PID)
	if err == nil && s.Process != p {
		err = fmt.Errorf("process %d: %w", p.PID, ErrNoProcess)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	w := &Watch{pidfd: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{}), ended: make(chan struct{})}
	raw, err := w.pidfd.SyscallConn()
	if err != nil {
		_ = w.pidfd.Close()
		return nil, err
	}
	go func() {
		defer close(w.done)
		// The runtime's poller waits, not a thread.
		err := raw.Read(func(fd uintptr) bool { return pidfdAlive(int(fd)) != nil })
		if err == nil {
			close(w.ended)
		}
	}()
	return w, nil
}

// Ended is closed when the process has ended.
func (w *Watch) Ended() <-chan struct{} { return w.ended }

// Close stops watching and returns when the goroutine that waited has ended.
func (w *Watch) Close() error {
	err := w.pidfd.Close()
	<-w.done
	return err
}
