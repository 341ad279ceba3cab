package bpftest

import (
	"net/netip"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// veth joins the namespaces of two children by addresses of their own.
func veth(t *testing.T, a, b *child) (atA, atB netip.Addr) {
	t.Helper()
	name, peer := "iv"+random(), "iv"+random()
	v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: peer, PeerNamespace: netlink.NsPid(b.cmd.Process.Pid)}
	v.Name, v.Namespace = name, netlink.NsPid(a.cmd.Process.Pid)
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"10.99.0.1/24", "fd99::1/64"} {
		a.must(order{Op: "address", Name: name, Prefix: netip.MustParsePrefix(p)})
	}
	for _, p := range []string{"10.99.0.2/24", "fd99::2/64"} {
		b.must(order{Op: "address", Name: peer, Prefix: netip.MustParsePrefix(p)})
	}
	return netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("10.99.0.2")
}

func TestIngressIsDecidedOnTheSYN(t *testing.T) {
	for name, sklookup := range map[string]bool{"with sk_lookup it is refused": true, "without it times out": false} {
		t.Run(name, func(t *testing.T) {
			s := settings{}
			if !sklookup {
				s.without = []string{"sklookup"}
			}
			k := newKit(t, s)
			good, bad := k.workload("good", billing, false), k.workload("bad", other, false)
			server := k.workload("server", orders, false)
			for family, listen := range map[int]string{unix.AF_INET: "127.0.0.1:0", unix.AF_INET6: "[::]:0"} {
				l, where := server.listen(family, listen)
				where = reached(families["IPv4"], where)
				k.policy(orders, ingress, billing, unix.IPPROTO_TCP, where.Port(), where.Port(), bpfobj.InlaySeg{Action: allow, Rule: 5})
				if _, errno := good.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != 0 {
					t.Fatalf("the allowed client: %v", errno)
				}
				server.must(order{Op: "accept", FD: l})
				fd, errno := bad.dial(unix.AF_INET, unix.SOCK_STREAM, where)
				if sklookup && errno != syscall.ECONNREFUSED || !sklookup && errno != syscall.EINPROGRESS {
					t.Errorf("the denied client: %v", errno)
				}
				bad.must(order{Op: "close", FD: fd})
				e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
				if e.Identity != orders || e.Peer != other || e.Rule != 901 || e.Dir != ingress || e.LocalPort != be16(where.Port()) || e.Verdict != deny {
					t.Errorf("record: %+v", e)
				}
				// Its SYN went out again after a second, and is the same denial.
				k.none("the SYN sent again", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
				// A process that nobody manages is the host.
				k.policy(orders, ingress, host, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow, Rule: 6})
				if _, errno := k.stranger("stranger-"+random(), false).dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != 0 {
					t.Errorf("the host: %v", errno)
				}
				server.must(order{Op: "accept", FD: l})
				server.must(order{Op: "close", FD: l})
				k.put("subjects", uint64(orders), bpfobj.InlaySubject{Gen: 100})
			}
			var key bpfobj.InlayListenKey
			var value bpfobj.InlayListener
			if it := k.maps["listeners"].Iterate(); it.Next(&key, &value) {
				t.Errorf("listeners still holds %+v %+v", key, value)
			}
		})
	}
}

func TestIdentityAcrossNamespaces(t *testing.T) {
	k := newKit(t, settings{})
	a, b := k.workload("a", billing, true), k.workload("b", orders, true)
	_, atB := veth(t, a, b)
	for name, listen := range map[string]string{"IPv4": "10.99.0.2:7000", "IPv6": "[fd99::2]:7000"} {
		t.Run(name, func(t *testing.T) {
			where := netip.MustParseAddrPort(listen)
			domain := unix.AF_INET
			if where.Addr().Is6() {
				domain = unix.AF_INET6
			}
			l, _ := b.listen(domain, listen)
			k.policy(orders, ingress, billing, unix.IPPROTO_TCP, 7000, 7000, bpfobj.InlaySeg{Action: allow, Rule: 5})
			fd, errno := a.dial(domain, unix.SOCK_STREAM, where)
			if errno != 0 {
				t.Fatalf("the workload of another namespace is known by its tuple: %v", errno)
			}
			conn := b.must(order{Op: "accept", FD: l})
			a.must(order{Op: "close", FD: fd})
			b.must(order{Op: "recv", FD: conn.FD})
			b.must(order{Op: "close", FD: conn.FD})
			e := k.event("the server's close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind && e.Identity == orders })
			if e.Peer != billing || e.Rule != 5 || e.Flags != 0 {
				t.Errorf("record: %+v", e)
			}
			// An unmanaged process beside it is not: its address proves nothing.
			k.put("workloads", a.cgroup, bpfobj.InlayWorkload{Identity: other})
			fd, errno = a.dial(domain, unix.SOCK_STREAM, where)
			if errno != syscall.EINPROGRESS {
				t.Errorf("another workload at the same address: %v", errno)
			}
			a.must(order{Op: "close", FD: fd})
			k.put("workloads", a.cgroup, bpfobj.InlayWorkload{Identity: billing})
			b.must(order{Op: "close", FD: l})
			k.put("subjects", uint64(orders), bpfobj.InlaySubject{Gen: 100})
		})
	}
	// The datagram's sender is known the same way.
	fd := b.socket(unix.AF_INET, unix.SOCK_DGRAM)
	b.must(order{Op: "bind", FD: fd, Addr: at(atB, 7001)})
	k.policy(orders, ingress, billing, unix.IPPROTO_UDP, 7001, 7001, bpfobj.InlaySeg{Action: allow, Rule: 9})
	from := a.socket(unix.AF_INET, unix.SOCK_DGRAM)
	a.must(order{Op: "sendto", FD: from, Addr: at(atB, 7001), Data: []byte("x")})
	if got := b.must(order{Op: "recvfrom", FD: fd}); string(got.Data) != "x" {
		t.Errorf("received %q", got.Data)
	}
}

func TestTwoNamespacesWithOneTupleAreUnknown(t *testing.T) {
	k := newKit(t, settings{})
	a, b, c := k.workload("a", billing, true), k.workload("b", other, true), k.workload("c", orders, true)
	// a and b have the same address, and each is joined to c; c answers on the link to a.
	ac, ca := "iv"+random(), "iv"+random()
	v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: ca, PeerNamespace: netlink.NsPid(c.cmd.Process.Pid)}
	v.Name, v.Namespace = ac, netlink.NsPid(a.cmd.Process.Pid)
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	a.must(order{Op: "address", Name: ac, Prefix: netip.MustParsePrefix("10.99.0.1/24")})
	c.must(order{Op: "address", Name: ca, Prefix: netip.MustParsePrefix("10.99.0.2/24")})
	bb, loose := "iv"+random(), "iv"+random() // leads nowhere
	v = &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: loose, PeerNamespace: netlink.NsPid(b.cmd.Process.Pid)}
	v.Name, v.Namespace = bb, netlink.NsPid(b.cmd.Process.Pid)
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	b.must(order{Op: "address", Name: bb, Prefix: netip.MustParsePrefix("10.99.0.1/24")})
	b.must(order{Op: "address", Name: loose})
	where := netip.MustParseAddrPort("10.99.0.2:7000")
	c.listen(unix.AF_INET, where.String())
	k.policy(orders, ingress, other, unix.IPPROTO_TCP, 7000, 7000, bpfobj.InlaySeg{Action: allow, Rule: 5})

	claim := func(w *child) (int, syscall.Errno) {
		fd := w.must(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Millis: 1200}).FD
		w.must(order{Op: "bind", FD: fd, Addr: netip.MustParseAddrPort("10.99.0.1:4000")})
		return fd, w.try(order{Op: "connect", FD: fd, Addr: where}).Errno
	}
	fd, errno := claim(b) // to nobody: it hopes to be believed later
	if errno == 0 {
		t.Fatal("b reached c")
	}
	_, errno = claim(a)
	if errno != syscall.EINPROGRESS {
		t.Errorf("a is taken for b: %v", errno)
	}
	e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
	if e.Peer != 0 {
		t.Errorf("the peer is %d, want unknown", e.Peer)
	}
	if n := k.counter(bpfobj.InlayCounterCOUNT_PEERS_CLASH); n == 0 {
		t.Error("the clash was not counted")
	}
	b.must(order{Op: "close", FD: fd})
}

func TestFullPeersMapRefusesToLie(t *testing.T) {
	k := newKit(t, settings{entries: map[string]uint32{"peers": 1}})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	_, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != syscall.EINPROGRESS {
		t.Errorf("a connection whose maker found no room: %v, want a time-out", errno)
	}
	e := k.event("the refusal", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
	if e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_FULL) == 0 || k.counter(bpfobj.InlayCounterCOUNT_PEERS_FULL) != 1 {
		t.Errorf("record: %+v", e)
	}
}

func TestMPTCPListenerIsJudged(t *testing.T) {
	k := newKit(t, settings{without: []string{"sklookup"}})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	a := server.try(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Proto: unix.IPPROTO_MPTCP})
	if a.Errno != 0 {
		lacks(t, "no MPTCP: "+a.Errno.Error())
	}
	l := a.FD
	server.must(order{Op: "bind", FD: l, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	server.must(order{Op: "listen", FD: l})
	where := server.must(order{Op: "sockname", FD: l}).Addr
	k.policy(orders, ingress, other, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow})
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != syscall.EINPROGRESS {
		t.Errorf("a denied client of an MPTCP listener: %v", errno)
	}
	k.policy(orders, ingress, billing, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow})
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != 0 {
		t.Errorf("an allowed one: %v", errno)
	}
}

func TestMPTCPClientIsJudged(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	_, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	k.policy(billing, egress, other, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow})
	a := client.try(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_STREAM, Proto: unix.IPPROTO_MPTCP, Millis: 1200})
	if a.Errno != 0 {
		lacks(t, "no MPTCP: "+a.Errno.Error())
	}
	if errno := client.try(order{Op: "connect", FD: a.FD, Addr: where}).Errno; errno == 0 {
		t.Error("a denied MPTCP client is connected")
	}
	e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
	if e.Identity != billing || e.Dir != egress || e.Peer != orders {
		t.Errorf("record: %+v", e)
	}
}
