package bpftest

import (
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

func TestServiceAddressUDP(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	for name, f := range families {
		for _, connected := range []bool{true, false} {
			kind := map[bool]string{true: ", connected", false: ", unconnected"}[connected]
			t.Run(name+kind, func(t *testing.T) {
				l := server.socket(f.ldom, unix.SOCK_DGRAM)
				server.must(order{Op: "bind", FD: l, Addr: netip.MustParseAddrPort(f.listen)})
				where := reached(f, server.must(order{Op: "sockname", FD: l}).Addr)
				k.service(f.vip, where, unix.IPPROTO_UDP, orders)
				fd := client.socket(f.domain, unix.SOCK_DGRAM)
				if connected {
					client.must(order{Op: "connect", FD: fd, Addr: f.vip})
					if got := client.must(order{Op: "peername", FD: fd}).Addr; got != f.vip {
						t.Errorf("getpeername: %v, want %v", got, f.vip)
					}
					client.must(order{Op: "send", FD: fd, Data: []byte("hello")})
				} else {
					a := client.try(order{Op: "sendto", FD: fd, Addr: f.vip, Data: []byte("hello")})
					if name == "IPv6 to IPv4" {
						// The kernel cannot send from IPv6 to a mapped address here; it is said at once.
						if a.Errno != syscall.ENETUNREACH {
							t.Errorf("sendto: %v, want ENETUNREACH", a.Errno)
						}
						return
					}
					if a.Errno != 0 {
						t.Fatal(a.Errno)
					}
				}
				got := server.must(order{Op: "recvfrom", FD: l})
				if string(got.Data) != "hello" {
					t.Errorf("received %q", got.Data)
				}
				server.must(order{Op: "sendto", FD: l, Addr: got.Addr, Data: []byte("hi")})
				back := client.must(order{Op: "recvfrom", FD: fd})
				if string(back.Data) != "hi" || back.Addr != f.vip {
					t.Errorf("received %q from %v, want it from %v", back.Data, back.Addr, f.vip)
				}
				flow := k.flow(t, billing)
				if flow.TxBytes != 5 || flow.RxBytes != 2 || flow.TxPackets != 1 || flow.Dir != egress || flow.Peer != orders || flow.Verdict != allow {
					t.Errorf("the client's exchange: %+v", flow)
				}
				client.must(order{Op: "close", FD: fd})
				if flow := k.flow(t, billing); flow.Flags&uint8(bpfobj.InlayFlowFlagFLOW_ENDED) == 0 {
					t.Errorf("the exchange of a closed socket: %+v", flow)
				}
				theirs := k.flow(t, orders)
				if theirs.RxBytes != 5 || theirs.TxBytes != 2 || theirs.Dir != ingress || theirs.Peer != billing {
					t.Errorf("the server's exchange: %+v", theirs)
				}
				server.must(order{Op: "close", FD: l})
				k.clear("udp_flows")
			})
		}
	}
}

// flow gives the only exchange of a workload.
func (k *kit) flow(t *testing.T, id uint64) bpfobj.InlayUdpFlow {
	t.Helper()
	var key bpfobj.InlayUdpKey
	var value, found bpfobj.InlayUdpFlow
	n := 0
	for it := k.maps["udp_flows"].Iterate(); it.Next(&key, &value); {
		if value.Identity == id {
			found = value
			n++
		}
	}
	if n != 1 {
		t.Fatalf("%d exchanges of %d, want 1", n, id)
	}
	return found
}

func (k *kit) clear(name string) {
	var keys []bpfobj.InlayUdpKey
	var key bpfobj.InlayUdpKey
	var value bpfobj.InlayUdpFlow
	for it := k.maps[name].Iterate(); it.Next(&key, &value); {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if err := k.maps[name].Delete(key); err != nil {
			k.t.Fatal(err)
		}
	}
}

func TestDatagramsStayWithOneEndpoint(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	const n = 8
	vip := at(vip4, 53000)
	for i := range n {
		l := server.socket(unix.AF_INET, unix.SOCK_DGRAM)
		server.must(order{Op: "bind", FD: l, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
		where := server.must(order{Op: "sockname", FD: l}).Addr
		b := bpfobj.InlayBackend{Addr: addr(where.Addr()), Port: be16(where.Port()), Identity: orders}
		k.put("slots", bpfobj.InlaySlotKey{Svc: 5, Gen: 1, Index: uint32(i)}, bpfobj.InlaySlot{Cut: 1<<32 - 1, A: b, B: b})
	}
	k.put("services", svcKey(vip, unix.IPPROTO_UDP), bpfobj.InlaySvc{Id: 5, Gen: 1, Slots: n})
	used := map[uint16]bool{}
	for range 40 {
		fd := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
		for range 5 {
			client.must(order{Op: "sendto", FD: fd, Addr: vip, Data: []byte("x")})
		}
		client.must(order{Op: "close", FD: fd})
	}
	var key bpfobj.InlayUdpKey
	var value bpfobj.InlayUdpFlow
	flows := 0
	for it := k.maps["udp_flows"].Iterate(); it.Next(&key, &value); {
		if value.Identity == billing {
			flows++
			used[key.Port] = true
			if value.TxPackets != 5 {
				t.Errorf("a socket sent %d of its 5 datagrams to one endpoint", value.TxPackets)
			}
		}
	}
	if flows != 40 || len(used) < 4 {
		t.Errorf("40 sockets made %d exchanges with %d of %d endpoints", flows, len(used), n)
	}
}

func TestDatagramPolicy(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	l := server.socket(unix.AF_INET, unix.SOCK_DGRAM)
	server.must(order{Op: "bind", FD: l, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	where := server.must(order{Op: "sockname", FD: l}).Addr
	denials := func() uint64 {
		return k.counter(bpfobj.InlayCounterCOUNT_DENIED_EGRESS) + k.counter(bpfobj.InlayCounterCOUNT_DENIED_INGRESS)
	}

	// Denied at the receiver: the first datagram is told, none arrives.
	k.policy(orders, ingress, other, unix.IPPROTO_UDP, 1, 65535, bpfobj.InlaySeg{Action: allow})
	fd := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	for range 3 {
		client.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("denied")})
	}
	e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
	if e.Identity != orders || e.Peer != billing || e.Dir != ingress || e.Proto != unix.IPPROTO_UDP || e.LocalPort != be16(where.Port()) {
		t.Errorf("record: %+v", e)
	}
	if n := denials(); n != 1 {
		t.Errorf("3 datagrams of one exchange were told %d times, want once", n)
	}
	// Allowed by a new policy: the same exchange goes on, and nothing of before was queued.
	k.policy(orders, ingress, billing, unix.IPPROTO_UDP, where.Port(), where.Port(), bpfobj.InlaySeg{Action: allow, Rule: 4})
	client.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("allowed")})
	got := server.must(order{Op: "recvfrom", FD: l})
	if string(got.Data) != "allowed" {
		t.Fatalf("received %q", got.Data)
	}
	// The answer belongs to that exchange, although the server may begin none.
	k.policy(orders, egress, other, unix.IPPROTO_UDP, 1, 65535, bpfobj.InlaySeg{Action: allow})
	k.policy(orders, ingress, billing, unix.IPPROTO_UDP, where.Port(), where.Port(), bpfobj.InlaySeg{Action: allow, Rule: 4})
	var sub bpfobj.InlaySubject
	if err := k.maps["subjects"].Lookup(uint64(orders), &sub); err != nil {
		t.Fatal(err)
	}
	sub.Flags |= uint32(bpfobj.InlaySubjectFlagSUBJECT_DENY_EGRESS | bpfobj.InlaySubjectFlagSUBJECT_AUDIT_DENY_EGRESS)
	k.put("subjects", uint64(orders), sub)
	server.must(order{Op: "sendto", FD: l, Addr: got.Addr, Data: []byte("answer")})
	if back := client.must(order{Op: "recvfrom", FD: fd}); string(back.Data) != "answer" {
		t.Errorf("received %q", back.Data)
	}
	fresh := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	client.must(order{Op: "bind", FD: fresh, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	if a := server.try(order{Op: "sendto", FD: l, Addr: client.must(order{Op: "sockname", FD: fresh}).Addr, Data: []byte("x")}); a.Errno != syscall.EPERM {
		t.Errorf("a datagram that answers nothing: %v, want EPERM", a.Errno)
	}
	// Denied at the sender, by the errno of the rule, connected or not.
	k.policy(billing, egress, orders, unix.IPPROTO_UDP, 1, 65535, bpfobj.InlaySeg{Action: deny, Rule: 6, Err: uint16(syscall.EACCES)})
	k.put("endpoints", svcKey(where, unix.IPPROTO_UDP), uint64(orders))
	sock := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	before := denials()
	for range 3 {
		if a := client.try(order{Op: "sendto", FD: sock, Addr: where, Data: []byte("x")}); a.Errno != syscall.EACCES {
			t.Errorf("sendto: %v, want EACCES", a.Errno)
		}
	}
	if n := denials() - before; n != 1 {
		t.Errorf("3 refusals of one exchange were told %d times, want once", n)
	}
	if a := client.try(order{Op: "connect", FD: sock, Addr: where}); a.Errno != syscall.EACCES {
		t.Errorf("connect: %v, want EACCES", a.Errno)
	}
}

func TestICMPPolicy(t *testing.T) {
	k := newKit(t, settings{})
	client := k.workload("client", billing, true)
	for domain, to := range map[int]string{unix.AF_INET: "127.0.0.1", unix.AF_INET6: "::1"} {
		proto, request := unix.IPPROTO_ICMP, byte(8)
		if domain == unix.AF_INET6 {
			proto, request = unix.IPPROTO_ICMPV6, 128
		}
		k.put("workloads", client.cgroup, bpfobj.InlayWorkload{Identity: billing, Flags: uint32(bpfobj.InlayWorkloadFlagWORKLOAD_RAW)})
		fd := client.must(order{Op: "socket", Domain: domain, Type: unix.SOCK_RAW, Proto: proto}).FD
		echo := order{Op: "sendto", FD: fd, Addr: netip.AddrPortFrom(netip.MustParseAddr(to), 0), Data: []byte{request, 0, 0xf7, 0xff, 0, 0, 0, 0}}
		k.policy(billing, egress, other, unix.IPPROTO_ICMP, 0, 65535, bpfobj.InlaySeg{Action: allow})
		if a := client.try(echo); a.Errno != syscall.EPERM {
			t.Errorf("echo to %s: %v, want EPERM", to, a.Errno)
		}
		e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
		if e.Proto != unix.IPPROTO_ICMP || e.Peer != host || e.Dir != egress {
			t.Errorf("record: %+v", e)
		}
		k.policy(billing, egress, host, unix.IPPROTO_ICMP, 0, 65535, bpfobj.InlaySeg{Action: allow})
		if a := client.try(echo); a.Errno != 0 {
			t.Errorf("an allowed echo to %s: %v", to, a.Errno)
		}
		k.put("subjects", uint64(billing), bpfobj.InlaySubject{Gen: 50})
	}
}

// A port that somebody else takes over does not bring his predecessor's rights with it.
func TestDatagramsOfATakenOverPort(t *testing.T) {
	k := newKit(t, settings{})
	good, bad, nobody := k.workload("good", billing, false), k.workload("bad", other, false), k.stranger("nobody", false)
	server := k.workload("server", orders, false)
	l := server.socket(unix.AF_INET, unix.SOCK_DGRAM)
	server.must(order{Op: "bind", FD: l, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	where := server.must(order{Op: "sockname", FD: l}).Addr
	k.policy(orders, ingress, billing, unix.IPPROTO_UDP, where.Port(), where.Port(), bpfobj.InlaySeg{Action: allow, Rule: 4})
	from := netip.MustParseAddrPort("127.0.0.1:0")
	say := func(c *child, text string) {
		t.Helper()
		fd := c.socket(unix.AF_INET, unix.SOCK_DGRAM)
		c.must(order{Op: "bind", FD: fd, Addr: from})
		from = c.must(order{Op: "sockname", FD: fd}).Addr
		c.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte(text)})
		c.must(order{Op: "close", FD: fd})
	}
	say(good, "good")
	say(bad, "bad")
	e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
	if e.Peer != other {
		t.Errorf("record: %+v", e)
	}
	say(good, "good again")
	// What good wrote has grown old when a process that nobody manages takes the port.
	var key bpfobj.InlayTuple
	var value bpfobj.InlayPeer
	n := 0
	for it := k.maps["udp_peers"].Iterate(); it.Next(&key, &value); n++ {
		value.Cookie -= 2_100_000_000
		k.put("udp_peers", key, value)
	}
	if n == 0 {
		t.Fatal("udp_peers is empty")
	}
	say(nobody, "nobody")
	if e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind }); e.Peer != host {
		t.Errorf("record: %+v", e)
	}
	say(good, "the last")
	for _, want := range []string{"good", "good again", "the last"} {
		if got := server.must(order{Op: "recvfrom", FD: l}); string(got.Data) != want {
			t.Errorf("received %q, want %q", got.Data, want)
		}
	}
}

// A sender goes on being known, however long it sends.
func TestALongExchangeStaysKnown(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	l := server.socket(unix.AF_INET, unix.SOCK_DGRAM)
	server.must(order{Op: "bind", FD: l, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	where := server.must(order{Op: "sockname", FD: l}).Addr
	k.policy(orders, ingress, billing, unix.IPPROTO_UDP, where.Port(), where.Port(), bpfobj.InlaySeg{Action: allow, Rule: 4})
	fd := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	for range 3 {
		client.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("x")})
		got := server.must(order{Op: "recvfrom", FD: l})
		server.must(order{Op: "sendto", FD: l, Addr: got.Addr, Data: []byte("y")})
		client.must(order{Op: "recvfrom", FD: fd})
		// Two seconds pass, for all that the programs can tell; the answer was the last datagram.
		var tuple bpfobj.InlayTuple
		var peer bpfobj.InlayPeer
		for it := k.maps["udp_peers"].Iterate(); it.Next(&tuple, &peer); {
			peer.Cookie -= 2_200_000_000
			k.put("udp_peers", tuple, peer)
		}
		var key bpfobj.InlayUdpKey
		var flow bpfobj.InlayUdpFlow
		for it := k.maps["udp_flows"].Iterate(); it.Next(&key, &flow); {
			if flow.Claimed == 0 {
				t.Errorf("nobody told who sends: %+v", flow)
			}
			flow.Claimed -= 2
			k.put("udp_flows", key, flow)
		}
	}
}
