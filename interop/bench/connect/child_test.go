package connect

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roleEnv makes the test binary a child that connects; see child.
const roleEnv = "CONNECT_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) != "" {
		if err := child(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// backend is where every child listens, each in its own namespace.
var backend = netip.MustParseAddrPort("127.0.0.1:9000")

// order is one command to a child: connect Count times, each to one of Services virtual addresses
// from First on, or to Direct when that is valid. One that asks for nothing is answered once the
// child is up.
type order struct {
	Count, Services int
	First           netip.Addr
	Port            uint16
	Direct          netip.AddrPort
	Echo            int // instead of connecting: so many round trips over one connection
}

// answer to an order.
type answer struct {
	Median time.Duration
	Mean   time.Duration
}

// child serves orders until its input ends. It has one thread to connect on and another to accept.
func child(in io.Reader, out io.Writer) error {
	l, err := net.Listen("tcp4", backend.String())
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	enc, dec := json.NewEncoder(out), json.NewDecoder(bufio.NewReader(in))
	runtime.LockOSThread()
	for {
		var o order
		if err := dec.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var a answer
		switch {
		case o.Echo > 0:
			a.Median, err = echo(o)
		case o.Count > 0:
			a.Median, a.Mean, err = connects(o)
		}
		if err != nil {
			return err
		}
		if err := enc.Encode(a); err != nil {
			return err
		}
	}
}

// target is where the next connect of an order goes.
func (o order) target() netip.AddrPort {
	if o.Direct.IsValid() {
		return o.Direct
	}
	return netip.AddrPortFrom(address(o.First, rand.IntN(o.Services)), o.Port)
}

// address is the i-th after first.
func address(first netip.Addr, i int) netip.Addr {
	b := first.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(i))
	return netip.AddrFrom4(b)
}

// connects measures the connect system call alone.
func connects(o order) (median, mean time.Duration, err error) {
	times := make([]time.Duration, 0, o.Count)
	for range o.Count {
		d, err := connectOnce(o.target())
		if err != nil {
			return 0, 0, err
		}
		times = append(times, d)
		mean += d / time.Duration(o.Count)
	}
	slices.Sort(times)
	return times[len(times)/2], mean, nil
}

func connectOnce(to netip.AddrPort) (time.Duration, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	sa := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	begin := time.Now()
	if err := unix.Connect(fd, sa); err != nil {
		return 0, fmt.Errorf("connect %v: %w", to, err)
	}
	d := time.Since(begin)
	// A reset leaves no TIME_WAIT behind, which would fill the table of ports within seconds.
	return d, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// echo is the median round trip of one byte over an established connection.
func echo(o order) (time.Duration, error) {
	c, err := net.Dial("tcp4", o.target().String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var b [1]byte
	times := make([]time.Duration, 0, o.Echo)
	for range o.Echo {
		begin := time.Now()
		if _, err := c.Write(b[:]); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return 0, err
		}
		times = append(times, time.Since(begin))
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

// process is a child as its parent sees it.
type process struct {
	cmd *exec.Cmd
	enc *json.Encoder
	dec *json.Decoder
}

func (p *process) do(o order) (answer, error) {
	var a answer
	if err := p.enc.Encode(o); err != nil {
		return a, err
	}
	err := p.dec.Decode(&a)
	return a, err
}

// start runs a child in a new network namespace, after prepare ran in it, inside cgroup (a
// directory; empty for the test's own).
func start(t *testing.T, cgroup string, prepare func() error) *process {
	t.Helper()
	p := &process{}
	started := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and its namespace with the child.
		runtime.LockOSThread()
		started <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("new network namespace: %w", err)
			}
			if err := prepare(); err != nil {
				return err
			}
			p.cmd = exec.Command(os.Args[0])
			p.cmd.Env = append(os.Environ(), roleEnv+"=1")
			p.cmd.Stderr = os.Stderr
			if cgroup != "" {
				dir, err := os.Open(cgroup)
				if err != nil {
					return err
				}
				defer dir.Close()
				p.cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
			}
			in, err := p.cmd.StdinPipe()
			if err != nil {
				return err
			}
			out, err := p.cmd.StdoutPipe()
			if err != nil {
				return err
			}
			p.enc, p.dec = json.NewEncoder(in), json.NewDecoder(bufio.NewReader(out))
			if err := p.cmd.Start(); err != nil {
				return err
			}
			t.Cleanup(func() { _ = in.Close(); _ = p.cmd.Wait() })
			return nil
		}()
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if _, err := p.do(order{}); err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs a command in the calling thread's namespace.
func run(stdin io.Reader, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = stdin
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return nil
}
