package bpftest

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

func monotonic(t *testing.T) uint64 {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		t.Fatal(err)
	}
	return uint64(ts.Nano())
}

func TestNamesAreAskedOfTheProxy(t *testing.T) {
	k := newKit(t, settings{})
	client, proxy := k.workload("client", billing, false), k.stranger("proxy", false)
	// One port for both protocols, which another test may hold for one of them.
	var udp, tcp int
	var port uint16
	for {
		udp = proxy.socket(unix.AF_INET6, unix.SOCK_DGRAM)
		proxy.must(order{Op: "bind", FD: udp, Addr: netip.MustParseAddrPort("[::]:0")})
		port = proxy.must(order{Op: "sockname", FD: udp}).Addr.Port()
		tcp = proxy.socket(unix.AF_INET6, unix.SOCK_STREAM)
		if proxy.try(order{Op: "bind", FD: tcp, Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), port)}).Errno == 0 {
			break
		}
		proxy.must(order{Op: "close", FD: udp})
		proxy.must(order{Op: "close", FD: tcp})
	}
	proxy.must(order{Op: "listen", FD: tcp})
	beat := func(age uint64) {
		k.put("dns_proxies", netnsCookie(t), bpfobj.InlayDnsProxy{
			Addr4: addr(netip.MustParseAddr("127.0.0.1")), Port4: be16(port),
			Addr6: addr(netip.MustParseAddr("::1")), Port6: be16(port), Heartbeat: monotonic(t) - age,
		})
	}
	forgotten := func(t *testing.T, proto uint8, from netip.AddrPort) {
		t.Helper()
		if from.Addr().Is4In6() {
			from = at(from.Addr().Unmap(), from.Port())
		}
		var c bpfobj.InlayDnsClient
		if err := k.maps["dns_clients"].Lookup(svcKey(from, proto), &c); !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Errorf("%v is still known after its socket was closed: %+v, %v", from, c, err)
		}
	}
	run := func(name string, domain int, resolver netip.AddrPort, told netip.AddrPort) {
		asker := func(t *testing.T, proto uint8, from netip.AddrPort) {
			t.Helper()
			if from.Addr().Is4In6() {
				from = at(from.Addr().Unmap(), from.Port())
			}
			var c bpfobj.InlayDnsClient
			if err := k.maps["dns_clients"].Lookup(svcKey(from, proto), &c); err != nil {
				t.Fatalf("who asks from %v: %v", from, err)
			}
			want := bpfobj.InlayDnsClient{Cgroup: client.cgroup}
			if told.IsValid() {
				want.Addr, want.Port = addr(told.Addr()), be16(told.Port())
			}
			if c != want {
				t.Errorf("who asks from %v: %+v, want %+v", from, c, want)
			}
		}
		for _, connected := range []bool{true, false} {
			t.Run(name+", UDP", func(t *testing.T) {
				beat(0)
				fd := client.socket(domain, unix.SOCK_DGRAM)
				if connected {
					client.must(order{Op: "connect", FD: fd, Addr: resolver})
					client.must(order{Op: "send", FD: fd, Data: []byte("?")})
				} else {
					client.must(order{Op: "sendto", FD: fd, Addr: resolver, Data: []byte("?")})
				}
				got := proxy.must(order{Op: "recvfrom", FD: udp})
				asker(t, unix.IPPROTO_UDP, got.Addr)
				proxy.must(order{Op: "sendto", FD: udp, Addr: got.Addr, Data: []byte("!")})
				if back := client.must(order{Op: "recvfrom", FD: fd}); back.Addr != resolver {
					t.Errorf("the answer is from %v, want the resolver that was asked, %v", back.Addr, resolver)
				}
				client.must(order{Op: "close", FD: fd})
				forgotten(t, unix.IPPROTO_UDP, got.Addr)
			})
		}
		t.Run(name+", TCP", func(t *testing.T) {
			beat(0)
			fd, errno := client.dial(domain, unix.SOCK_STREAM, resolver)
			if errno != 0 {
				t.Fatal(errno)
			}
			if got := client.must(order{Op: "peername", FD: fd}).Addr; got != resolver {
				t.Errorf("getpeername: %v, want %v", got, resolver)
			}
			conn := proxy.must(order{Op: "accept", FD: tcp})
			asker(t, unix.IPPROTO_TCP, conn.Addr)
			client.must(order{Op: "close", FD: fd})
			proxy.must(order{Op: "close", FD: conn.FD})
			forgotten(t, unix.IPPROTO_TCP, conn.Addr)
		})
	}
	for name, tc := range map[string]struct {
		domain   int
		resolver string
	}{
		"IPv4": {unix.AF_INET, "192.0.2.53:53"}, "IPv6": {unix.AF_INET6, "[2001:db8::53]:53"},
		"mapped": {unix.AF_INET6, "[::ffff:192.0.2.53]:53"}, "the resolver of systemd": {unix.AF_INET, "127.0.0.53:53"},
	} {
		resolver := netip.MustParseAddrPort(tc.resolver)
		run(name, tc.domain, resolver, resolver)
	}
	// No policy stands between a workload and its names; but the proxy, which has the rights of the node,
	// does not go for it where it may not go itself.
	k.policy(billing, egress, other, unix.IPPROTO_TCP, 1, 1, bpfobj.InlaySeg{Action: allow})
	run("denied, IPv4", unix.AF_INET, netip.MustParseAddrPort("192.0.2.53:53"), netip.AddrPort{})
	run("denied, IPv6", unix.AF_INET6, netip.MustParseAddrPort("[2001:db8::53]:53"), netip.AddrPort{})

	t.Run("a service on port 53 is a service", func(t *testing.T) {
		fd := proxy.socket(unix.AF_INET, unix.SOCK_DGRAM)
		proxy.must(order{Op: "bind", FD: fd, Addr: netip.MustParseAddrPort("127.0.0.1:0")})
		where := proxy.must(order{Op: "sockname", FD: fd}).Addr
		k.put("subjects", uint64(billing), bpfobj.InlaySubject{Gen: 78})
		k.service(at(vip4, 53), where, unix.IPPROTO_UDP, orders)
		beat(0)
		ask := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
		client.must(order{Op: "sendto", FD: ask, Addr: at(vip4, 53), Data: []byte("?")})
		proxy.must(order{Op: "recvfrom", FD: fd})
	})
	t.Run("a proxy that died is passed by", func(t *testing.T) {
		k.put("subjects", uint64(billing), bpfobj.InlaySubject{Gen: 77})
		real := proxy.socket(unix.AF_INET, unix.SOCK_DGRAM)
		proxy.must(order{Op: "bind", FD: real, Addr: netip.MustParseAddrPort("127.0.0.77:53")})
		beat(2_100_000_000)
		before := k.counter(bpfobj.InlayCounterCOUNT_DNS_PASSED)
		fd := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
		client.must(order{Op: "sendto", FD: fd, Addr: netip.MustParseAddrPort("127.0.0.77:53"), Data: []byte("?")})
		proxy.must(order{Op: "recvfrom", FD: real})
		if n := k.counter(bpfobj.InlayCounterCOUNT_DNS_PASSED) - before; n != 1 {
			t.Errorf("passed: %d, want 1", n)
		}
		beat(0)
		client.must(order{Op: "sendto", FD: fd, Addr: netip.MustParseAddrPort("127.0.0.77:53"), Data: []byte("?")})
		proxy.must(order{Op: "recvfrom", FD: udp})
	})
}
