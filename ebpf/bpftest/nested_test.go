package bpftest

import (
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

func TestNestedCgroupsAreTheirWorkload(t *testing.T) {
	k := newKit(t, settings{})
	k.workload("client", billing, false)
	dir := filepath.Join(k.root, "client", "deeper", "still")
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { removeCgroup(t, d) })
	}
	inner := startChild(t, dir, false)
	server := k.workload("server", orders, false)
	_, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	k.policy(orders, ingress, billing, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow, Rule: 5})
	if _, errno := inner.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != 0 {
		t.Errorf("a process further down is its workload: %v", errno)
	}
	k.policy(billing, egress, other, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow})
	if _, errno := inner.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != syscall.EPERM {
		t.Errorf("and is judged like it: %v, want EPERM", errno)
	}
}

func TestServiceAddressBetweenNamespaces(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, true), k.workload("server", orders, true)
	veth(t, client, server)
	k.policy(orders, ingress, billing, unix.IPPROTO_TCP, 7000, 7000, bpfobj.InlaySeg{Action: allow, Rule: 1})
	var sub bpfobj.InlaySubject
	if err := k.maps["subjects"].Lookup(uint64(orders), &sub); err != nil {
		t.Fatal(err)
	}
	set := uint32(77)
	ps := bpfobj.InlayPortSet{N: 1}
	ps.Segs[0] = bpfobj.InlaySeg{Lo: 7000, Hi: 7000, Action: allow, Audit: allow, Rule: 2}
	k.put("port_sets", set, ps)
	k.put("policies", bpfobj.InlayPolKey{Subject: orders, Peer: billing, Gen: sub.Gen, Dir: ingress, Proto: unix.IPPROTO_UDP}, set)
	for name, tc := range map[string]struct {
		domain      int
		vip, listen netip.AddrPort
	}{
		"IPv4":   {unix.AF_INET, at(vip4, 80), netip.MustParseAddrPort("10.99.0.2:7000")},
		"mapped": {unix.AF_INET6, at(netip.AddrFrom16(vip4.As16()), 80), netip.MustParseAddrPort("10.99.0.2:7000")},
		"IPv6":   {unix.AF_INET6, at(vip6, 80), netip.MustParseAddrPort("[fd99::2]:7000")},
	} {
		domain := unix.AF_INET
		if tc.listen.Addr().Is6() {
			domain = unix.AF_INET6
		}
		t.Run(name+", TCP", func(t *testing.T) {
			k.service(tc.vip, tc.listen, unix.IPPROTO_TCP, orders)
			l := server.socket(domain, unix.SOCK_STREAM)
			server.must(order{Op: "reuse", FD: l})
			server.must(order{Op: "bind", FD: l, Addr: tc.listen})
			server.must(order{Op: "listen", FD: l})
			fd, errno := client.dial(tc.domain, unix.SOCK_STREAM, tc.vip)
			if errno != 0 {
				t.Fatal(errno)
			}
			if got := client.must(order{Op: "peername", FD: fd}).Addr; got != tc.vip {
				t.Errorf("getpeername: %v, want %v", got, tc.vip)
			}
			conn := server.must(order{Op: "accept", FD: l}).FD
			client.must(order{Op: "send", FD: fd, Data: []byte("hello")})
			if got := server.must(order{Op: "recv", FD: conn}).Data; string(got) != "hello" {
				t.Errorf("received %q", got)
			}
			client.must(order{Op: "abort", FD: fd})
			server.must(order{Op: "close", FD: conn})
			server.must(order{Op: "close", FD: l})
			e := k.event("the server's close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind && e.Identity == orders })
			if e.Peer != billing || e.Rule != 1 || e.RxBytes != 5 {
				t.Errorf("record: %+v", e)
			}
		})
		for _, connected := range []bool{true, false} {
			t.Run(name+", UDP", func(t *testing.T) {
				k.service(tc.vip, tc.listen, unix.IPPROTO_UDP, orders)
				l := server.socket(domain, unix.SOCK_DGRAM)
				server.must(order{Op: "bind", FD: l, Addr: tc.listen})
				fd := client.socket(tc.domain, unix.SOCK_DGRAM)
				if connected {
					client.must(order{Op: "connect", FD: fd, Addr: tc.vip})
					client.must(order{Op: "send", FD: fd, Data: []byte("hello")})
				} else {
					client.must(order{Op: "sendto", FD: fd, Addr: tc.vip, Data: []byte("hello")})
				}
				got := server.must(order{Op: "recvfrom", FD: l})
				server.must(order{Op: "sendto", FD: l, Addr: got.Addr, Data: []byte("hi")})
				if back := client.must(order{Op: "recvfrom", FD: fd}); back.Addr != tc.vip || string(back.Data) != "hi" {
					t.Errorf("received %q from %v", back.Data, back.Addr)
				}
				client.must(order{Op: "close", FD: fd})
				server.must(order{Op: "close", FD: l})
			})
		}
	}
}

// TestThePortIsTheOneDialled: one endpoint under two ports is two questions to the policy.
func TestThePortIsTheOneDialled(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	l := server.socket(unix.AF_INET, unix.SOCK_DGRAM)
	server.must(order{Op: "bind", FD: l, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	where := server.must(order{Op: "sockname", FD: l}).Addr
	k.service(at(vip4, 80), where, unix.IPPROTO_UDP, orders)
	k.policy(billing, egress, orders, unix.IPPROTO_UDP, 80, 80, bpfobj.InlaySeg{Action: allow, Rule: 1})
	fd := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	for range 3 {
		client.must(order{Op: "sendto", FD: fd, Addr: at(vip4, 80), Data: []byte("x")})
		server.must(order{Op: "recvfrom", FD: l})
		if a := client.try(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("x")}); a.Errno != syscall.EPERM {
			t.Errorf("sendto the endpoint itself: %v, want EPERM", a.Errno)
		}
	}
}

// TestAHintIsMarked: a peer that is known by a registered address only.
func TestAHintIsMarked(t *testing.T) {
	k := newKit(t, settings{})
	server := k.workload("server", orders, true)
	stranger := k.stranger("stranger", true)
	veth(t, stranger, server)
	k.put("addresses", addr(netip.MustParseAddr("10.99.0.1")), uint64(billing))
	where := netip.MustParseAddrPort("10.99.0.2:7000")
	l, _ := server.listen(unix.AF_INET, where.String())
	k.policy(orders, ingress, billing, unix.IPPROTO_TCP, 7000, 7000, bpfobj.InlaySeg{Action: allow, Rule: 1})
	fd, errno := stranger.dial(unix.AF_INET, unix.SOCK_STREAM, where)
	if errno != 0 {
		t.Fatal(errno)
	}
	conn := server.must(order{Op: "accept", FD: l}).FD
	stranger.must(order{Op: "close", FD: fd})
	server.must(order{Op: "recv", FD: conn})
	server.must(order{Op: "close", FD: conn})
	e := k.event("the close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind })
	if e.Peer != billing || e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_HINT) == 0 {
		t.Errorf("record: %+v", e)
	}
	if err := k.maps["addresses"].Delete(addr(netip.MustParseAddr("10.99.0.1"))); err != nil {
		t.Fatal(err)
	}
	if _, errno := stranger.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != syscall.EINPROGRESS {
		t.Errorf("an address that nobody registered is the world: %v", errno)
	}
	if e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind }); e.Peer != world {
		t.Errorf("record: %+v", e)
	}
}
