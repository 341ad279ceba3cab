package bpftest

import (
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

const (
	billing = 1001
	orders  = 1002
	other   = 1003
)

var (
	vip4 = netip.MustParseAddr("198.18.0.7")
	vip6 = netip.MustParseAddr("fd69:6e6c:6179::7")
)

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// family is one way to reach a service: the socket's domain, the address asked, the listener.
type family struct {
	domain int
	vip    netip.AddrPort
	listen string
	ldom   int
}

var families = map[string]family{
	"IPv4":               {unix.AF_INET, at(vip4, 80), "127.0.0.1:0", unix.AF_INET},
	"IPv6":               {unix.AF_INET6, at(vip6, 80), "[::1]:0", unix.AF_INET6},
	"mapped":             {unix.AF_INET6, at(netip.AddrFrom16(vip4.As16()), 80), "127.0.0.1:0", unix.AF_INET},
	"IPv6 to IPv4":       {unix.AF_INET6, at(vip6, 80), "127.0.0.1:0", unix.AF_INET},
	"IPv4 to dual-stack": {unix.AF_INET, at(vip4, 80), "[::]:0", unix.AF_INET6},
}

// reached is where an endpoint at a wildcard address is dialled.
func reached(f family, a netip.AddrPort) netip.AddrPort {
	if a.Addr().IsUnspecified() {
		return at(netip.MustParseAddr("127.0.0.1"), a.Port())
	}
	return a
}

func TestServiceAddressTCP(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			l, where := server.listen(f.ldom, f.listen)
			where = reached(f, where)
			k.service(f.vip, where, unix.IPPROTO_TCP, orders)
			fd, errno := client.dial(f.domain, unix.SOCK_STREAM, f.vip)
			if errno != 0 {
				t.Fatalf("connect %v: %v", f.vip, errno)
			}
			if got := client.must(order{Op: "peername", FD: fd}).Addr; got != f.vip {
				t.Errorf("getpeername: %v, want the service address %v", got, f.vip)
			}
			conn := server.must(order{Op: "accept", FD: l})
			client.must(order{Op: "send", FD: fd, Data: []byte("hello")})
			if got := server.must(order{Op: "recv", FD: conn.FD}).Data; string(got) != "hello" {
				t.Errorf("received %q", got)
			}
			server.must(order{Op: "send", FD: conn.FD, Data: []byte("hi")})
			client.must(order{Op: "recv", FD: fd})
			client.must(order{Op: "close", FD: fd})
			server.must(order{Op: "recv", FD: conn.FD})
			server.must(order{Op: "close", FD: conn.FD})
			server.must(order{Op: "close", FD: l})

			mine := k.event("the client's close", func(e bpfobj.InlayEvent) bool {
				return e.Kind == closeKind && e.Identity == billing
			})
			if mine.Peer != orders || mine.Verdict != allow || mine.Dir != egress || mine.TxBytes != 5 ||
				mine.Vip != addr(f.vip.Addr()) || mine.VipPort != be16(80) || mine.RemotePort != be16(where.Port()) ||
				mine.Remote != addr(where.Addr()) || mine.Start == 0 || mine.Time < mine.Start || mine.Err != 0 || mine.Flags != 0 {
				t.Errorf("the client's record: %+v", mine)
			}
		})
	}
}

func TestBothEndsAreTold(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	l, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	fd, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, where)
	if errno != 0 {
		t.Fatal(errno)
	}
	conn := server.must(order{Op: "accept", FD: l})
	client.must(order{Op: "send", FD: fd, Data: make([]byte, 1000)})
	server.must(order{Op: "recv", FD: conn.FD})
	server.must(order{Op: "send", FD: conn.FD, Data: make([]byte, 300)})
	client.must(order{Op: "recv", FD: fd})
	server.must(order{Op: "close", FD: conn.FD})
	client.must(order{Op: "recv", FD: fd}) // the end of it
	client.must(order{Op: "close", FD: fd})
	at := map[uint64]bpfobj.InlayEvent{}
	for len(at) < 2 {
		e := k.event("both closes", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind })
		at[e.Identity] = e
	}
	if e := at[billing]; e.Peer != orders || e.Dir != egress || e.TxBytes != 1000 || e.RxBytes != 300 || e.SrttUs == 0 {
		t.Errorf("the client's record: %+v", e)
	}
	if e := at[orders]; e.Peer != billing || e.Dir != ingress || e.TxBytes != 300 || e.RxBytes != 1000 {
		t.Errorf("the server's record: %+v", e)
	}
	if n := k.counter(bpfobj.InlayCounterCOUNT_MADE); n != 2 {
		t.Errorf("records made: %d, want 2", n)
	}
	// Nothing is left of what the connection wrote.
	var key bpfobj.InlayTuple
	var value bpfobj.InlayPeer
	if it := k.maps["peers"].Iterate(); it.Next(&key, &value) {
		t.Errorf("peers still holds %+v", key)
	}
}

func TestServiceWithoutEndpointRefuses(t *testing.T) {
	k := newKit(t, settings{})
	client := k.workload("client", billing, false)
	for name, f := range families {
		for proto, kind := range map[uint8]int{unix.IPPROTO_TCP: unix.SOCK_STREAM, unix.IPPROTO_UDP: unix.SOCK_DGRAM} {
			t.Run(name, func(t *testing.T) {
				k.put("services", svcKey(f.vip, proto), bpfobj.InlaySvc{Id: 1, Gen: 1})
				_, errno := client.dial(f.domain, kind, f.vip)
				if errno != syscall.ECONNREFUSED {
					t.Errorf("connect: %v, want ECONNREFUSED", errno)
				}
				e := k.event("the refusal", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
				if e.Err != uint16(syscall.ECONNREFUSED) || e.Vip != addr(f.vip.Addr()) || e.Verdict != 0 || e.Proto != proto {
					t.Errorf("record: %+v", e)
				}
			})
		}
	}
}

func TestEgressPolicy(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	stranger := k.stranger("stranger", false)
	l, where := server.listen(unix.AF_INET6, "[::]:0")
	where = at(netip.MustParseAddr("127.0.0.1"), where.Port())
	_ = l
	k.service(at(vip4, 80), where, unix.IPPROTO_TCP, orders)
	k.policy(billing, egress, orders, unix.IPPROTO_TCP, 80, 80, bpfobj.InlaySeg{Action: allow, Rule: 7})

	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, at(vip4, 80)); errno != 0 {
		t.Errorf("the dialled port is allowed: %v", errno)
	}
	for name, to := range map[string]netip.AddrPort{
		"the endpoint's own port is not the one that the rule names": where,
		"another loopback address is no way round":                   at(netip.MustParseAddr("127.0.0.2"), where.Port()),
		"nor is the unspecified one":                                 at(netip.MustParseAddr("0.0.0.0"), where.Port()),
		"nobody is there":                                            at(netip.MustParseAddr("127.0.0.1"), 9),
	} {
		if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, to); errno != syscall.EPERM {
			t.Errorf("%s: %v, want EPERM", name, errno)
		}
		e := k.event(name, func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
		want := uint64(orders)
		if to.Port() == 9 {
			want = host
		}
		if e.Rule != 900 || e.Verdict != deny || e.Err != uint16(syscall.EPERM) || e.Peer != want || e.Dir != egress {
			t.Errorf("%s: record %+v, want peer %d", name, e, want)
		}
	}
	if _, errno := client.dial(unix.AF_INET6, unix.SOCK_STREAM, at(netip.MustParseAddr("::ffff:127.0.0.1"), where.Port())); errno != syscall.EPERM {
		t.Errorf("a mapped address is the same address: %v, want EPERM", errno)
	}
	if _, errno := stranger.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != 0 {
		t.Errorf("an unmanaged process is not judged: %v", errno)
	}
	k.policy(billing, egress, orders, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: deny, Rule: 8, Err: uint16(syscall.EHOSTUNREACH)})
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, at(vip4, 80)); errno != syscall.EHOSTUNREACH {
		t.Errorf("the rule's own errno: %v, want EHOSTUNREACH", errno)
	}
	k.put("settings_map", uint32(0), bpfobj.InlaySettings{AllowAll: 1})
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, at(vip4, 80)); errno != 0 {
		t.Errorf("breakglass: %v", errno)
	}
	k.put("settings_map", uint32(0), bpfobj.InlaySettings{})
	var sub bpfobj.InlaySubject
	if err := k.maps["subjects"].Lookup(uint64(billing), &sub); err != nil {
		t.Fatal(err)
	}
	sub.Flags = uint32(bpfobj.InlaySubjectFlagSUBJECT_CLOSED)
	k.put("subjects", uint64(billing), sub)
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, at(vip4, 80)); errno != syscall.EPERM {
		t.Errorf("a closed subject: %v, want EPERM", errno)
	}
	e := k.event("the closed subject", func(e bpfobj.InlayEvent) bool { return e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_CLOSED) != 0 })
	if e.Kind != deniedKind {
		t.Errorf("record: %+v", e)
	}
}

func TestAuditedPolicyLetsPassAndTells(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	_, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	k.put("endpoints", svcKey(where, unix.IPPROTO_TCP), uint64(orders))
	k.policy(billing, egress, orders, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow, Rule: 3, Audit: deny, AuditRule: 4})
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != 0 {
		t.Fatal(errno)
	}
	e := k.event("the audited denial", func(e bpfobj.InlayEvent) bool { return e.Kind == auditKind })
	if e.Rule != 4 || e.Identity != billing || e.Peer != orders || e.Err != 0 {
		t.Errorf("record: %+v", e)
	}
	if n := k.counter(bpfobj.InlayCounterCOUNT_AUDITED); n != 1 {
		t.Errorf("audited: %d, want 1", n)
	}
}

func TestRawSocketsNeedAGrant(t *testing.T) {
	k := newKit(t, settings{})
	client := k.workload("client", billing, false)
	for domain, proto := range map[int]int{unix.AF_INET: unix.IPPROTO_ICMP, unix.AF_INET6: unix.IPPROTO_ICMPV6} {
		raw := order{Op: "socket", Domain: domain, Type: unix.SOCK_RAW, Proto: proto}
		k.put("workloads", client.cgroup, bpfobj.InlayWorkload{Identity: billing})
		if a := client.try(raw); a.Errno != syscall.EPERM {
			t.Errorf("domain %d: %v, want EPERM", domain, a.Errno)
		}
		k.put("workloads", client.cgroup, bpfobj.InlayWorkload{Identity: billing, Flags: uint32(bpfobj.InlayWorkloadFlagWORKLOAD_RAW)})
		client.must(raw)
	}
	if n := k.counter(bpfobj.InlayCounterCOUNT_RAW_REFUSED); n != 2 {
		t.Errorf("refused: %d, want 2", n)
	}
	k.stranger("stranger", false).must(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_RAW, Proto: unix.IPPROTO_ICMP})
}

// TestPortThatNoServiceHas: a virtual address leads nowhere but to the ports of its service.
func TestPortThatNoServiceHas(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	_, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	k.service(at(vip4, 80), where, unix.IPPROTO_TCP, orders)
	for _, a := range []netip.Addr{vip4, vip6} {
		k.put("services", svcKey(at(a, 0), 0), bpfobj.InlaySvc{})
	}
	for name, tc := range map[string]struct {
		domain, kind int
		to           netip.AddrPort
	}{
		"another port":               {unix.AF_INET, unix.SOCK_STREAM, at(vip4, 81)},
		"another port, IPv6":         {unix.AF_INET6, unix.SOCK_STREAM, at(vip6, 81)},
		"another port, mapped":       {unix.AF_INET6, unix.SOCK_STREAM, at(v6(vip4), 81)},
		"the port, by datagrams":     {unix.AF_INET, unix.SOCK_DGRAM, at(vip4, 80)},
		"another port, by datagrams": {unix.AF_INET6, unix.SOCK_DGRAM, at(vip6, 9)},
		"port 0":                     {unix.AF_INET, unix.SOCK_STREAM, at(vip4, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			fd := client.socket(tc.domain, tc.kind)
			call := order{Op: "connect", FD: fd, Addr: tc.to}
			if tc.kind == unix.SOCK_DGRAM {
				call.Op, call.Data = "sendto", []byte("?")
			}
			if errno := client.try(call).Errno; errno != syscall.ECONNREFUSED {
				t.Errorf("%v, want ECONNREFUSED", errno)
			}
			e := k.event("the refusal", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
			if e.Err != uint16(syscall.ECONNREFUSED) || bpfobj.InlayFlowFlag(e.Flags) != bpfobj.InlayFlowFlagFLOW_NO_PORT || e.Vip != addr(tc.to.Addr()) {
				t.Errorf("record: %+v", e)
			}
			client.must(order{Op: "close", FD: fd})
		})
	}
	if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, at(vip4, 80)); errno != 0 {
		t.Errorf("the port it has: %v", errno)
	}
	// getaddrinfo connects datagram sockets to what it found, to sort it, and sends nothing: that is no
	// refusal, in whatever order its one socket goes through them.
	fd := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	host := k.stranger("host", false)
	u, elsewhere := host.udp(unix.AF_INET, at(local, 0))
	for _, to := range []netip.AddrPort{at(vip4, 80), elsewhere, at(vip4, 9)} {
		client.must(order{Op: "connect", FD: fd, Addr: to})
	}
	for range 2 {
		if errno := client.try(order{Op: "send", FD: fd, Data: []byte("?")}).Errno; errno != syscall.EPERM {
			t.Errorf("what is sent to a port that is not: %v, want EPERM", errno)
		}
	}
	var told []uint16
	k.event("the datagram that was sent", func(e bpfobj.InlayEvent) bool {
		if bpfobj.InlayFlowFlag(e.Flags) == bpfobj.InlayFlowFlagFLOW_NO_PORT {
			told = append(told, be16(e.VipPort))
		}
		return len(told) > 0
	})
	client.must(order{Op: "connect", FD: fd, Addr: elsewhere})
	client.must(order{Op: "send", FD: fd, Data: []byte("?")})
	host.must(order{Op: "recvfrom", FD: u})
	if n := k.counter(bpfobj.InlayCounterCOUNT_NO_PORT); len(told) != 1 || told[0] != 9 || n != 7 {
		t.Errorf("told of ports %v, want 9; counted %d, want the 6 calls and the 1 that was sent", told, n)
	}
}
