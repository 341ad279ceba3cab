package proxy

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// sockets are what a proxy hands to its successor: all that somebody outside holds on to.
type sockets struct {
	// lock is the open Socket.lock with a flock(2) on it, which lives until the last process that
	// was given the file has closed it.
	lock    *os.File
	control *net.UnixListener
	udp     []*net.UDPConn
	tcp     []*net.TCPListener
	// process is a pidfd of who gave the sockets; nil when they are this process's own. The kernel
	// cannot be asked for it: SO_PEERCRED of a connection is who called listen(2) once, which may be
	// a process that is long gone.
	process *os.File
	// v4 and v6 are where they listen; not valid for a family that is missing.
	v4, v6 netip.AddrPort
}

// Roles of sockets on the wire of a hand-over.
const (
	roleLock    = "lock"
	roleControl = "control"
	roleUDP4    = "udp4"
	roleTCP4    = "tcp4"
	roleUDP6    = "udp6"
	roleTCP6    = "tcp6"
	roleProcess = "process" // a pidfd of who gives
)

func (s *sockets) close() {
	s.closeShared()
	s.closeUDP()
}

// closeShared closes all but what answers to datagrams are still written to. It may be called twice.
func (s *sockets) closeShared() {
	if s.control != nil {
		_ = s.control.Close()
	}
	for _, l := range s.tcp {
		_ = l.Close()
	}
	for _, f := range []*os.File{s.lock, s.process} {
		_ = f.Close() // refused for nil
	}
}

func (s *sockets) closeUDP() {
	for _, c := range s.udp {
		_ = c.Close()
	}
}

func (s *sockets) addresses() []netip.AddrPort {
	var all []netip.AddrPort
	for _, a := range []netip.AddrPort{s.v4, s.v6} {
		if a.IsValid() {
			all = append(all, a)
		}
	}
	return all
}

// cookie of the network namespace that the sockets live in.
func (s *sockets) cookie() (uint64, error) { return netnsCookie(s.udp[0]) }

func netnsCookie(c syscall.Conn) (uint64, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("network namespace: %w", err)
	}
	var cookie uint64
	var opt error
	if err := rc.Control(func(fd uintptr) {
		cookie, opt = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	}); err != nil {
		return 0, fmt.Errorf("network namespace: %w", err)
	}
	if opt != nil {
		return 0, fmt.Errorf("network namespace: its cookie (SO_NETNS_COOKIE): %w: want Linux 5.14 or newer", opt)
	}
	return cookie, nil
}

// bind opens new sockets under a lock that this process holds; on failure the lock is the caller's.
func bind(lock *os.File, path, listen4, listen6 string, log *slog.Logger) (*sockets, error) {
	s := &sockets{}
	if err := s.bindFamily("4", listen4); err != nil {
		s.close()
		return nil, err
	}
	if err := s.bindFamily("6", listen6); err != nil {
		if !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EAFNOSUPPORT) {
			s.close()
			return nil, err
		}
		log.Warn("no IPv6 on the loopback interface: sockets of that family ask their own resolvers", "err", err)
	}
	// Whoever holds the lock may put a socket here: what lies there belongs to a dead process.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		s.close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // a successor may listen on it
	s.control = l
	if err := os.Chmod(path, 0o600); err != nil {
		s.close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	s.lock = lock
	return s, nil
}

// bindFamily opens the two sockets of a family on one port, since the hooks know one a family.
func (s *sockets) bindFamily(family, addr string) error {
	want, err := netip.ParseAddrPort(addr)
	if err != nil {
		return fmt.Errorf("listen address %q: %w", addr, err)
	}
	const tries = 16 // another program may have the port that the kernel gave, for UDP
	for i := range tries {
		tcp, err := net.ListenTCP("tcp"+family, net.TCPAddrFromAddrPort(want))
		if err != nil {
			return fmt.Errorf("listen on %s: %w", addr, err)
		}
		got, _ := addrPort(tcp.Addr())
		udp, err := net.ListenUDP("udp"+family, net.UDPAddrFromAddrPort(got))
		if err == nil {
			s.add(tcp, udp, got)
			return nil
		}
		_ = tcp.Close()
		if want.Port() != 0 || !errors.Is(err, unix.EADDRINUSE) || i == tries-1 {
			return fmt.Errorf("listen on %s: %w", got, err)
		}
	}
	return nil
}

func (s *sockets) add(tcp *net.TCPListener, udp *net.UDPConn, at netip.AddrPort) {
	s.tcp, s.udp = append(s.tcp, tcp), append(s.udp, udp)
	if at.Addr().Is4() {
		s.v4 = at
	} else {
		s.v6 = at
	}
}

// takeLock takes the lock of a control socket; nil without error when another process has it.
func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w: want a directory that exists and that user %d may write", err, os.Geteuid())
	}
	err = flock(f)
	if err == nil {
		return f, nil
	}
	_ = f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("lock %s.lock: %w", path, err)
}

// flock locks without (*os.File).Fd, which would make the file blocking for every process that has it.
func flock(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var locked error
	if err := rc.Control(func(fd uintptr) { locked = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		return err
	}
	return locked
}

// export returns copies of the descriptors with their roles. The caller closes them.
func (s *sockets) export() (roles []string, fds []int, err error) {
	defer func() {
		if err != nil {
			closeAll(fds)
			fds = nil
		}
	}()
	type named struct {
		role string
		c    syscall.Conn
	}
	all := []named{{roleLock, s.lock}, {roleControl, s.control}}
	for i, c := range s.udp {
		udp, tcp := roleUDP4, roleTCP4
		if a, _ := addrPort(c.LocalAddr()); a.Addr().Is6() {
			udp, tcp = roleUDP6, roleTCP6
		}
		all = append(all, named{udp, c}, named{tcp, s.tcp[i]})
	}
	for _, n := range all {
		rc, err := n.c.SyscallConn()
		if err != nil {
			return nil, fds, fmt.Errorf("%s: %w", n.role, err)
		}
		copied, dup := -1, error(nil)
		if err := rc.Control(func(fd uintptr) { copied, dup = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
			return nil, fds, fmt.Errorf("%s: %w", n.role, err)
		}
		if dup != nil {
			return nil, fds, fmt.Errorf("%s: %w", n.role, dup)
		}
		roles, fds = append(roles, n.role), append(fds, copied)
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return nil, fds, fmt.Errorf("%s: %w", roleProcess, err)
	}
	return append(roles, roleProcess), append(fds, self), nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// imported makes sockets of descriptors that were received, and closes the descriptors.
func imported(roles []string, fds []int) (s *sockets, err error) {
	files := make([]*os.File, len(fds))
	for i, fd := range fds {
		files[i] = os.NewFile(uintptr(fd), "received")
	}
	s = &sockets{}
	defer func() {
		for _, f := range files {
			if f != nil {
				_ = f.Close()
			}
		}
		if err != nil {
			s.close()
			s = nil
		}
	}()
	if len(roles) != len(fds) {
		return s, fmt.Errorf("%d sockets came for %d roles %v", len(fds), len(roles), roles)
	}
	udp, tcp := map[string]*net.UDPConn{}, map[string]*net.TCPListener{}
	for i, role := range roles {
		if slices.Contains(roles[:i], role) {
			return s, fmt.Errorf("roles %v: want each once", roles)
		}
		switch role {
		case roleLock:
			s.lock, files[i] = files[i], nil
		case roleProcess:
			s.process, files[i] = files[i], nil
		case roleControl:
			err = importAs(files[i], net.FileListener, func(l *net.UnixListener) {
				l.SetUnlinkOnClose(false)
				s.control = l
			})
		case roleUDP4, roleUDP6:
			err = importAs(files[i], net.FilePacketConn, func(c *net.UDPConn) {
				s.udp = append(s.udp, c)
				udp[role[3:]] = c
			})
		case roleTCP4, roleTCP6:
			err = importAs(files[i], net.FileListener, func(l *net.TCPListener) {
				s.tcp = append(s.tcp, l)
				tcp[role[3:]] = l
			})
		default:
			err = errors.New("this version does not know it, and would lose it")
		}
		if err != nil {
			return s, fmt.Errorf("socket %q: %w", role, err)
		}
	}
	paired := (udp["4"] == nil) == (tcp["4"] == nil) && (udp["6"] == nil) == (tcp["6"] == nil)
	if s.lock == nil || s.control == nil || s.process == nil || len(udp) == 0 || !paired {
		return s, fmt.Errorf("roles %v: want lock, control, process, and udp and tcp of one family or both", roles)
	}
	s.udp, s.tcp = nil, nil
	for _, family := range []string{"4", "6"} { // the order of Status.Addresses
		if u, l := udp[family], tcp[family]; u != nil {
			at, _ := addrPort(u.LocalAddr())
			s.add(l, u, at)
		}
	}
	return s, nil
}

// importAs makes a T of a received descriptor by one of the functions of package net.
func importAs[T io.Closer, I io.Closer](f *os.File, from func(*os.File) (I, error), keep func(T)) error {
	c, err := from(f)
	if err != nil {
		return err
	}
	t, ok := any(c).(T)
	if !ok {
		_ = c.Close()
		return fmt.Errorf("it is a %T", c)
	}
	keep(t)
	return nil
}
