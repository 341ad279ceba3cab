package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// goHands is a Go program that makes the calls it is told to: those of clients_test.go, and more that
// one program is enough for.
type goHands struct{ open map[string]net.Conn }

func goClient() error {
	h := &goHands{map[string]net.Conn{}}
	return orders(func(ctx context.Context, words []string) answer {
		a, err := h.do(ctx, words)
		if err != nil {
			nanos := a.Nanos
			a = refused(err)
			a.Nanos = nanos
		}
		return a
	})
}

// answerWait is how long the program waits for anything.
const answerWait = 2 * time.Second

func (h *goHands) do(ctx context.Context, words []string) (answer, error) {
	op, args := words[0], words[1:]
	switch op {
	case "tcp": // NET HOST PORT
		c, a, err := dial(ctx, "tcp", args, nil)
		if err != nil {
			return a, err
		}
		defer c.Close()
		return get(c, a)
	case "from": // LOCAL NET HOST PORT: bound to an address of its own choice
		local, err := net.ResolveTCPAddr("tcp", args[0])
		if err != nil {
			return answer{}, err
		}
		c, a, err := dial(ctx, "tcp", args[1:], local)
		if err != nil {
			return a, err
		}
		defer c.Close()
		return get(c, a)
	case "udp", "udpc":
		return datagram(ctx, op == "udpc", args)
	case "open": // ID NET HOST PORT: a connection that stays, to be echoed
		c, a, err := dial(ctx, "tcp", args[1:], nil)
		if err != nil {
			return a, err
		}
		if _, err := io.WriteString(c, "ECHO\n"); err != nil {
			return a, err
		}
		h.open[args[0]] = c
		return a, nil
	case "hold": // ID NET HOST PORT: a connected datagram socket that stays
		c, a, err := dial(ctx, "udp", args[1:], nil)
		if err != nil {
			return a, err
		}
		h.open[args[0]] = c
		return a, nil
	case "ping": // ID: a line, or a datagram, there and back
		return h.ping(args[0])
	case "pump": // ID BYTES: there and back
		n, err := strconv.ParseInt(args[1], 10, 64)
		if err != nil {
			return answer{}, err
		}
		return h.pump(args[0], n)
	case "ended": // ID: waits until the connection is ended from outside, at most 20 s
		c := h.open[args[0]]
		began := time.Now()
		if err := c.SetReadDeadline(began.Add(20 * time.Second)); err != nil {
			return answer{}, err
		}
		_, err := c.Read(make([]byte, 1))
		a := answer{Nanos: int64(time.Since(began))}
		if err == nil {
			err = errors.New("read: something came: want the connection ended by an error")
		}
		return a, err
	case "close":
		err := h.open[args[0]].Close()
		delete(h.open, args[0])
		return answer{}, err
	case "fetch": // NET HOST PORT BYTES: a file that the server sends
		return fetch(ctx, args)
	case "lookup": // NET NAME: every address
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip"+strings.TrimPrefix(args[0], "any"), args[1])
		if err != nil {
			return answer{}, err
		}
		var text []string
		for _, ip := range ips {
			text = append(text, ip.Unmap().String())
		}
		return answer{Text: strings.Join(text, " ")}, nil
	case "socket": // DOMAIN TYPE PROTOCOL, as numbers
		var n [3]int
		for i := range n {
			var err error
			if n[i], err = strconv.Atoi(args[i]); err != nil {
				return answer{}, err
			}
		}
		fd, err := unix.Socket(n[0], n[1]|unix.SOCK_CLOEXEC, n[2])
		if err != nil {
			return answer{}, err
		}
		return answer{}, unix.Close(fd)
	case "echo": // HOST: a ping by a socket that needs no privilege
		return echo(args[0])
	case "nest": // moves into a cgroup below its own
		return nest(args[0])
	}
	return answer{}, fmt.Errorf("order %q: unknown", op)
}

// dial connects and says where both ends are. Nanos is how long connect() took, names resolved before.
func dial(ctx context.Context, network string, args []string, local net.Addr) (net.Conn, answer, error) {
	family, host, port := args[0], args[1], args[2]
	ip, err := resolve(ctx, family, host)
	if err != nil {
		return nil, answer{}, err
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, answer{}, err
	}
	to := netip.AddrPortFrom(ip, uint16(p))
	began := time.Now()
	var c net.Conn
	if family == "mapped" {
		c, err = dialMapped(network, to)
	} else {
		d := net.Dialer{Timeout: answerWait, LocalAddr: local}
		c, err = d.DialContext(ctx, network, to.String())
	}
	a := answer{Nanos: int64(time.Since(began))}
	if err != nil {
		return nil, a, err
	}
	if err := c.SetDeadline(time.Now().Add(answerWait)); err != nil {
		return nil, a, err
	}
	a.Peer, a.Local = c.RemoteAddr().String(), c.LocalAddr().String()
	return c, a, nil
}

func resolve(ctx context.Context, family, host string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return a, nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip"+strings.TrimPrefix(family, "any"), host)
	if err != nil {
		return netip.Addr{}, err
	}
	return ips[0].Unmap(), nil
}

// clientDebug is the GODEBUG of a client: names by Go's own resolver, and no signals of the runtime to
// itself, at which a call with a time limit (SO_SNDTIMEO, SO_RCVTIMEO) ends with EINTR.
const clientDebug = "netdns=go,asyncpreemptoff=1"

// dialMapped connects an IPv6 socket to an IPv4 address, which the net package never does.
func dialMapped(network string, to netip.AddrPort) (net.Conn, error) {
	kind := unix.SOCK_STREAM
	if network == "udp" {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "mapped")
	defer f.Close()
	tv := unix.NsecToTimeval(int64(answerWait))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// get asks by HTTP/1.0 and reads to the end.
func get(c net.Conn, a answer) (answer, error) {
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return a, err
	}
	raw, err := io.ReadAll(c)
	if err != nil {
		return a, err
	}
	_, body, _ := strings.Cut(string(raw), "\r\n\r\n")
	a.Text = strings.TrimSpace(body)
	return a, nil
}

// datagram sends one and waits for the answer.
func datagram(ctx context.Context, connected bool, args []string) (answer, error) {
	if connected {
		c, a, err := dial(ctx, "udp", args, nil)
		if err != nil {
			return a, err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "ask"); err != nil {
			return a, err
		}
		b := make([]byte, 4096)
		n, err := c.Read(b)
		a.Text = string(b[:n])
		return a, err
	}
	family, host := args[0], args[1]
	ip, err := resolve(ctx, family, host)
	if err != nil {
		return answer{}, err
	}
	port, err := strconv.ParseUint(args[2], 10, 16)
	if err != nil {
		return answer{}, err
	}
	network := "udp4"
	switch {
	case family == "mapped":
		network = "udp" // an IPv6 socket for both
	case ip.Is6():
		network = "udp6"
	}
	c, err := net.ListenUDP(network, nil)
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	began := time.Now()
	if err := c.SetDeadline(began.Add(answerWait)); err != nil {
		return answer{}, err
	}
	_, err = c.WriteToUDPAddrPort([]byte("ask"), netip.AddrPortFrom(ip, uint16(port)))
	if err != nil {
		return answer{Nanos: int64(time.Since(began))}, err
	}
	b := make([]byte, 4096)
	n, from, err := c.ReadFromUDPAddrPort(b)
	return answer{Text: string(b[:n]), Peer: from.String(), Local: c.LocalAddr().String(), Nanos: int64(time.Since(began))}, err
}

func (h *goHands) ping(id string) (answer, error) {
	c := h.open[id]
	if c == nil {
		return answer{}, fmt.Errorf("connection %q: none is open", id)
	}
	if err := c.SetDeadline(time.Now().Add(answerWait)); err != nil {
		return answer{}, err
	}
	if _, err := io.WriteString(c, "ping\n"); err != nil {
		return answer{}, err
	}
	if _, ok := c.(*net.UDPConn); ok {
		b := make([]byte, 4096)
		n, err := c.Read(b)
		return answer{Text: string(b[:n])}, err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return answer{Text: strings.TrimSpace(line)}, err
}

// pump writes n bytes and reads them back.
func (h *goHands) pump(id string, n int64) (answer, error) {
	c := h.open[id]
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return answer{}, err
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, zeros{}, n)
		wrote <- err
	}()
	got, err := io.CopyN(io.Discard, c, n)
	return answer{Count: got}, errors.Join(err, <-wrote)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func fetch(ctx context.Context, args []string) (answer, error) {
	c, a, err := dial(ctx, "tcp", args, nil)
	if err != nil {
		return a, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return a, err
	}
	if _, err := fmt.Fprintf(c, "FILE %s\n", args[3]); err != nil {
		return a, err
	}
	a.Count, err = io.Copy(io.Discard, c)
	return a, err
}

// nest makes a cgroup below this program's own and moves into it; sockets from now on are made there.
func nest(name string) (answer, error) {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return answer{}, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return answer{}, err
	}
	var mount, own string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.Contains(line, " - cgroup2 ") && mount == "" {
			mount = f[4]
		}
	}
	for line := range strings.Lines(string(raw)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			own = path
		}
	}
	dir := filepath.Join(mount, own, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return answer{}, err
	}
	return answer{Text: dir}, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

// echo sends an ICMP echo request and waits for the reply.
func echo(host string) (answer, error) {
	to, err := netip.ParseAddr(host)
	if err != nil {
		return answer{}, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return answer{}, err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(answerWait))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return answer{}, err
	}
	request := []byte{8, 0, 0, 0, 0, 0, 0, 1, 'a', 's', 'k'} // the kernel fills in checksum and id
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
		return answer{}, err
	}
	b := make([]byte, 64)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err == nil && (n < 1 || b[0] != 0) {
		err = fmt.Errorf("ICMP type %d: want an echo reply", b[0])
	}
	return answer{}, err
}
