package bpftest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A workload of these tests is a child process, started inside its cgroup, that makes the system
// calls it is told to, one at a time: sockets keep the cgroup and the namespace of their maker.

const childEnv = "INLAY_BPFTEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(serveChild())
	}
	os.Exit(m.Run())
}

// order is one system call; answer what came of it.
type order struct {
	Op                  string
	FD                  int
	Domain, Type, Proto int
	Addr                netip.AddrPort
	Data                []byte
	Name                string
	Prefix              netip.Prefix
	Millis              int
}

type answer struct {
	FD    int
	Addr  netip.AddrPort
	Data  []byte
	Errno syscall.Errno
	Fault string
}

func serveChild() int {
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	out := json.NewEncoder(os.Stdout)
	for {
		var o order
		if in.Decode(&o) != nil {
			return 0
		}
		var a answer
		if err := o.run(&a); err != nil {
			if errno := syscall.Errno(0); errors.As(err, &errno) {
				a.Errno = errno
			} else {
				a.Fault = err.Error()
			}
		}
		if out.Encode(a) != nil {
			return 1
		}
	}
}

func (o *order) run(a *answer) (err error) {
	switch o.Op {
	case "socket":
		if a.FD, err = unix.Socket(o.Domain, o.Type|unix.SOCK_CLOEXEC, o.Proto); err != nil {
			return err
		}
		wait := o.Millis
		if wait == 0 {
			wait = 3000
		}
		tv := unix.NsecToTimeval(int64(wait) * 1e6)
		unix.SetsockoptTimeval(a.FD, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		unix.SetsockoptTimeval(a.FD, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	case "bind":
		return unix.Bind(o.FD, sockaddr(o.FD, o.Addr))
	case "connect":
		return unix.Connect(o.FD, sockaddr(o.FD, o.Addr))
	case "reuse":
		return unix.SetsockoptInt(o.FD, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	case "listen":
		return unix.Listen(o.FD, 16)
	case "accept":
		var sa unix.Sockaddr
		a.FD, sa, err = unix.Accept4(o.FD, unix.SOCK_CLOEXEC)
		a.Addr = addrPort(sa)
	case "sockname":
		var sa unix.Sockaddr
		sa, err = unix.Getsockname(o.FD)
		a.Addr = addrPort(sa)
	case "peername":
		var sa unix.Sockaddr
		sa, err = unix.Getpeername(o.FD)
		a.Addr = addrPort(sa)
	case "send":
		_, err = unix.Write(o.FD, o.Data)
	case "recv":
		b := make([]byte, 65536)
		var n int
		n, err = unix.Read(o.FD, b)
		a.Data = b[:max(n, 0)]
	case "sendto":
		return unix.Sendto(o.FD, o.Data, 0, sockaddr(o.FD, o.Addr))
	case "recvfrom":
		b := make([]byte, 65536)
		n, sa, err := unix.Recvfrom(o.FD, b, 0)
		a.Data, a.Addr = b[:max(n, 0)], addrPort(sa)
		return err
	case "get": // as a Go program does it, with Go's own resolver
		net.DefaultResolver = &net.Resolver{PreferGo: true}
		rsp, err := (&http.Client{Timeout: 5 * time.Second}).Get(o.Name)
		if err != nil {
			return err
		}
		defer rsp.Body.Close()
		a.Data, err = io.ReadAll(rsp.Body)
		return err
	case "run": // another program, in this cgroup
		var args []string
		if err := json.Unmarshal(o.Data, &args); err != nil {
			return err
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stderr = os.Stderr
		a.Data, err = cmd.Output()
		return err
	case "dials": // as many in a row as Millis says, over nothing
		for range o.Millis {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			err = unix.Connect(fd, sockaddr(fd, o.Addr))
			unix.Close(fd)
			if err != unix.ECONNREFUSED {
				return fmt.Errorf("connect: %w", err)
			}
		}
	case "datagrams":
		for range o.Millis {
			if err := unix.Sendto(o.FD, []byte("hello"), 0, sockaddr(o.FD, o.Addr)); err != nil {
				return err
			}
			if _, _, err := unix.Recvfrom(o.FD, make([]byte, 16), unix.MSG_DONTWAIT); err != unix.EAGAIN {
				return err
			}
		}
	case "peernames": // as many as Millis says
		for range o.Millis {
			if _, err := unix.Getpeername(o.FD); err != nil {
				return err
			}
		}
	case "to-itself": // as many datagrams as Millis says, to the socket's own address
		for range o.Millis {
			if err := unix.Sendto(o.FD, []byte("hello"), 0, sockaddr(o.FD, o.Addr)); err != nil {
				return err
			}
			if _, _, err := unix.Recvfrom(o.FD, make([]byte, 16), 0); err != nil {
				return err
			}
		}
	case "abort": // close by a reset
		if err := unix.SetsockoptLinger(o.FD, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
		return unix.Close(o.FD)
	case "close":
		return unix.Close(o.FD)
	case "address":
		link, err := netlink.LinkByName(o.Name)
		if err != nil {
			return err
		}
		if o.Prefix.IsValid() {
			ip, err := netlink.ParseAddr(o.Prefix.String())
			if err != nil {
				return err
			}
			ip.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, ip); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	default:
		return o.trick()
	}
	return err
}

func sockaddr(fd int, a netip.AddrPort) unix.Sockaddr {
	if domain, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); domain == unix.AF_INET6 {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().Unmap().As4()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// child is a process in a cgroup, and maybe in a network namespace of its own.
type child struct {
	t      *testing.T
	cmd    *exec.Cmd
	in     *json.Encoder
	out    *json.Decoder
	cgroup uint64
	id     uint64 // its identity
}

// startChild starts a process in the cgroup at dir.
func startChild(t *testing.T, dir string, ownNetns bool) *child {
	t.Helper()
	cg, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cg.Close()
	cmd := exec.Command("/proc/self/exe")
	// A call that has a time limit (SO_SNDTIMEO) ends with EINTR at the runtime's preemption signals.
	cmd.Env = append(os.Environ(), childEnv+"=1", "GORACE=atexit_sleep_ms=0", "GODEBUG=asyncpreemptoff=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cg.Fd()), Pdeathsig: syscall.SIGKILL}
	if ownNetns {
		cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNET
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	// Pdeathsig is the death of the thread, so this one must live as long as the child.
	started, over := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		started <- cmd.Start()
		<-over
	}()
	if err := <-started; err != nil {
		close(over)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close() // its loop ends
		cmd.Wait()
		close(over)
	})
	c := &child{t: t, cmd: cmd, in: json.NewEncoder(stdin), out: json.NewDecoder(stdout)}
	if ownNetns {
		c.must(order{Op: "address", Name: "lo"})
	}
	return c
}

// try makes the call and gives what came of it; a fault that is no errno ends the test.
func (c *child) try(o order) answer {
	c.t.Helper()
	if err := c.in.Encode(o); err != nil {
		c.t.Fatalf("%s: %v", o.Op, err)
	}
	var a answer
	if err := c.out.Decode(&a); err != nil {
		c.t.Fatalf("%s: %v", o.Op, err)
	}
	if a.Fault != "" {
		c.t.Fatalf("%s: %s", o.Op, a.Fault)
	}
	return a
}

// must is try where an errno ends the test.
func (c *child) must(o order) answer {
	c.t.Helper()
	a := c.try(o)
	if a.Errno != 0 {
		c.t.Fatalf("%s %v: %v", o.Op, o.Addr, a.Errno)
	}
	return a
}

func (c *child) socket(domain, kind int) int {
	c.t.Helper()
	return c.must(order{Op: "socket", Domain: domain, Type: kind}).FD
}

// listen opens a socket at addr and gives its descriptor and where it is.
func (c *child) listen(domain int, addr string) (int, netip.AddrPort) {
	c.t.Helper()
	fd := c.socket(domain, unix.SOCK_STREAM)
	c.must(order{Op: "bind", FD: fd, Addr: netip.MustParseAddrPort(addr)})
	c.must(order{Op: "listen", FD: fd})
	return fd, c.must(order{Op: "sockname", FD: fd}).Addr
}

// dial connects and gives the descriptor and the errno.
func (c *child) dial(domain, kind int, to netip.AddrPort) (int, syscall.Errno) {
	c.t.Helper()
	fd := c.must(order{Op: "socket", Domain: domain, Type: kind, Millis: 1200}).FD
	return fd, c.try(order{Op: "connect", FD: fd, Addr: to}).Errno
}
