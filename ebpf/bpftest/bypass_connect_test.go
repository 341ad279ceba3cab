package bpftest

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

var local = netip.MustParseAddr("127.0.0.1")

func v6(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

// denies makes a workload refuse one peer and nothing else: what is no peer of a rule is allowed.
func (k *kit) denies(subject uint64, dir uint8, peer uint64) {
	k.t.Helper()
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP} {
		k.policy(subject, dir, peer, proto, 0, 65535, bpfobj.InlaySeg{Action: deny, Rule: 66})
		var sub bpfobj.InlaySubject
		if err := k.maps["subjects"].Lookup(subject, &sub); err != nil {
			k.t.Fatal(err)
		}
		sub.Flags = 0
		k.put("subjects", subject, sub)
		var again []bpfobj.InlayPolKey // of the protocols before, under the new generation
		var key bpfobj.InlayPolKey
		var set uint32
		for it := k.maps["policies"].Iterate(); it.Next(&key, &set); {
			if key.Subject == subject && key.Gen == sub.Gen-1 {
				again = append(again, key)
			}
		}
		for _, key := range again {
			if err := k.maps["policies"].Lookup(key, &set); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				k.t.Fatal(err)
			}
			key.Gen = sub.Gen
			k.put("policies", key, set)
		}
	}
}

// udp opens a socket at an address.
func (c *child) udp(domain int, addr netip.AddrPort) (int, netip.AddrPort) {
	c.t.Helper()
	fd := c.must(order{Op: "socket", Domain: domain, Type: unix.SOCK_DGRAM, Millis: 300}).FD
	c.must(order{Op: "reuse", FD: fd})
	c.must(order{Op: "bind", FD: fd, Addr: addr})
	return fd, c.must(order{Op: "sockname", FD: fd}).Addr
}

// got reports whether a datagram arrives within the socket's patience.
func (c *child) got(fd int) bool {
	c.t.Helper()
	a := c.try(order{Op: "recvfrom", FD: fd})
	if a.Errno != 0 && a.Errno != syscall.EAGAIN {
		c.t.Fatal(a.Errno)
	}
	return a.Errno == 0
}

// TestOtherWaysToConnect: whichever call makes the connection, the one policy holds.
func TestOtherWaysToConnect(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	l, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	_ = l
	k.service(at(vip4, 80), where, unix.IPPROTO_TCP, orders)
	free := k.stranger("free", false)
	_, allowed := free.listen(unix.AF_INET, "127.0.0.1:0")
	k.denies(billing, egress, orders)

	for name, how := range map[string]func(fd int, to netip.AddrPort) syscall.Errno{
		"connect": func(fd int, to netip.AddrPort) syscall.Errno {
			return client.try(order{Op: "connect", FD: fd, Addr: to}).Errno
		},
		"TCP fast open": func(fd int, to netip.AddrPort) syscall.Errno {
			return client.try(order{Op: "fastopen", FD: fd, Addr: to, Data: []byte("hello")}).Errno
		},
		"TCP_FASTOPEN_CONNECT": func(fd int, to netip.AddrPort) syscall.Errno {
			client.must(order{Op: "set", FD: fd, Proto: unix.IPPROTO_TCP, Type: unix.TCP_FASTOPEN_CONNECT, Millis: 1})
			if errno := client.try(order{Op: "connect", FD: fd, Addr: to}).Errno; errno != 0 {
				return errno
			}
			return client.try(order{Op: "send", FD: fd, Data: []byte("hello")}).Errno
		},
		"io_uring": func(fd int, to netip.AddrPort) syscall.Errno {
			return client.try(order{Op: "uring", FD: fd, Addr: to}).Errno
		},
		"io_uring by the kernel's thread": func(fd int, to netip.AddrPort) syscall.Errno {
			return client.try(order{Op: "uring", FD: fd, Addr: to, Proto: 1}).Errno
		},
		"after another connection": func(fd int, to netip.AddrPort) syscall.Errno {
			client.must(order{Op: "connect", FD: fd, Addr: allowed})
			client.must(order{Op: "disconnect", FD: fd})
			return client.try(order{Op: "connect", FD: fd, Addr: to}).Errno
		},
		"after a listen": func(fd int, to netip.AddrPort) syscall.Errno {
			client.must(order{Op: "bind", FD: fd, Addr: at(local, 0)})
			client.must(order{Op: "listen", FD: fd})
			client.must(order{Op: "disconnect", FD: fd})
			return client.try(order{Op: "connect", FD: fd, Addr: to}).Errno
		},
	} {
		t.Run(name, func(t *testing.T) {
			for what, to := range map[string]netip.AddrPort{"its address": where, "the service": at(vip4, 80)} {
				fd := client.must(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Millis: 1200}).FD
				if errno := how(fd, to); errno != syscall.EPERM {
					t.Errorf("%s: %v, want EPERM", what, errno)
				}
				client.must(order{Op: "close", FD: fd})
			}
			fd := client.must(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Millis: 1200}).FD
			if errno := how(fd, allowed); errno != 0 {
				t.Errorf("what is allowed: %v", errno)
			}
			client.must(order{Op: "close", FD: fd})
		})
	}
}

// TestMPTCP: the kernel makes the subflows of MPTCP without connect(); the SYN is judged when it leaves.
func TestMPTCP(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	_, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	k.put("endpoints", svcKey(where, unix.IPPROTO_TCP), uint64(orders))
	dial := func() syscall.Errno {
		fd := client.must(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Proto: unix.IPPROTO_MPTCP, Millis: 1200}).FD
		defer client.must(order{Op: "close", FD: fd})
		return client.try(order{Op: "connect", FD: fd, Addr: where}).Errno
	}
	if errno := dial(); errno != 0 {
		t.Fatalf("without a policy: %v", errno)
	}
	k.denies(billing, egress, orders)
	if errno := dial(); errno == 0 {
		t.Error("a denied connection by MPTCP was made")
	}
	e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
	if e.Identity != billing || e.Peer != orders || e.Dir != egress {
		t.Errorf("record: %+v", e)
	}
}

// TestUnspecifiedAddress: connecting to the address of zeros reaches this machine; on an IPv6 socket that is
// bound to IPv4 it reaches 127.0.0.1.
func TestUnspecifiedAddress(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	_, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	u, uwhere := server.udp(unix.AF_INET, at(local, 0))
	k.put("endpoints", svcKey(where, unix.IPPROTO_TCP), uint64(orders))
	k.put("endpoints", svcKey(uwhere, unix.IPPROTO_UDP), uint64(orders))
	k.denies(billing, egress, orders)
	for name, tc := range map[string]struct {
		domain int
		bind   netip.Addr
		to     netip.Addr
	}{
		"0.0.0.0":                       {unix.AF_INET, netip.Addr{}, netip.IPv4Unspecified()},
		"mapped 0.0.0.0":                {unix.AF_INET6, netip.Addr{}, v6(netip.IPv4Unspecified())},
		":: from a socket at 127.0.0.1": {unix.AF_INET6, v6(local), netip.IPv6Unspecified()},
		":: from a socket at 0.0.0.0":   {unix.AF_INET6, v6(netip.IPv4Unspecified()), netip.IPv6Unspecified()},
	} {
		t.Run(name, func(t *testing.T) {
			fd := client.must(order{Op: "socket", Domain: tc.domain, Type: unix.SOCK_STREAM, Millis: 1200}).FD
			if tc.bind.IsValid() {
				client.must(order{Op: "bind", FD: fd, Addr: at(tc.bind, 0)})
			}
			if errno := client.try(order{Op: "connect", FD: fd, Addr: at(tc.to, where.Port())}).Errno; errno != syscall.EPERM {
				t.Errorf("connect: %v, want EPERM", errno)
			}
			client.must(order{Op: "close", FD: fd})
			for _, connected := range []bool{true, false} {
				fd := client.must(order{Op: "socket", Domain: tc.domain, Type: unix.SOCK_DGRAM}).FD
				if tc.bind.IsValid() {
					client.must(order{Op: "bind", FD: fd, Addr: at(tc.bind, 0)})
				}
				to := at(tc.to, uwhere.Port())
				if connected {
					if errno := client.try(order{Op: "connect", FD: fd, Addr: to}).Errno; errno == 0 {
						client.try(order{Op: "send", FD: fd, Data: []byte("!")})
					}
				} else {
					client.try(order{Op: "sendto", FD: fd, Addr: to, Data: []byte("!")})
				}
				if server.got(u) {
					t.Errorf("a datagram arrived; connected: %v", connected)
				}
				client.must(order{Op: "close", FD: fd})
			}
		})
	}
}

// TestOneTupleTwice: sockets that are bound to different devices may have one 4-tuple. Who made the SYN is
// told of the one that claimed it first, as long as it lives; the other one makes none.
func TestOneTupleTwice(t *testing.T) {
	k := newKit(t, settings{without: []string{"sklookup"}}) // which would end a denied one at once
	bad, server := k.workload("bad", other, false), k.workload("server", orders, false)
	l, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	// Everybody may but bad.
	k.denies(orders, ingress, other)

	first := bad.must(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Millis: 100}).FD
	bad.must(order{Op: "reuse", FD: first})
	bad.must(order{Op: "device", FD: first, Name: "lo"})
	bad.must(order{Op: "bind", FD: first, Addr: at(local, 0)})
	from := bad.must(order{Op: "sockname", FD: first}).Addr
	if errno := bad.try(order{Op: "connect", FD: first, Addr: where}).Errno; errno != syscall.EINPROGRESS {
		t.Fatal(errno)
	}
	second := bad.must(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Millis: 100}).FD
	bad.must(order{Op: "reuse", FD: second})
	bad.must(order{Op: "bind", FD: second, Addr: from})
	if errno := bad.try(order{Op: "connect", FD: second, Addr: where}).Errno; errno != syscall.EINPROGRESS {
		t.Errorf("the second one: %v", errno)
	}
	k.event("the refusal", func(e bpfobj.InlayEvent) bool {
		return e.Identity == other && bpfobj.InlayFlowFlag(e.Flags) == bpfobj.InlayFlowFlagFLOW_CLASH
	})
	bad.must(order{Op: "close", FD: second})
	// The SYN of the first one goes out again after a second.
	if a := server.try(order{Op: "accept", FD: l}); a.Errno == 0 {
		t.Error("the denied workload passed for the host")
	}
	bad.must(order{Op: "close", FD: first})
	var key bpfobj.InlayTuple
	var value bpfobj.InlayPeer
	for it := k.maps["peers"].Iterate(); it.Next(&key, &value); {
		t.Errorf("left: %+v %+v", key, value)
	}
	// An address that is free again belongs to nobody.
	third := k.stranger("host", false)
	fd := third.socket(unix.AF_INET, unix.SOCK_STREAM)
	third.must(order{Op: "reuse", FD: fd})
	third.must(order{Op: "bind", FD: fd, Addr: from})
	third.must(order{Op: "connect", FD: fd, Addr: where})
}
