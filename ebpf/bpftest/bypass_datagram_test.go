package bpftest

import (
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// TestFormerClientsAddress: who takes the address of a former client does not become it.
func TestFormerClientsAddress(t *testing.T) {
	k := newKit(t, settings{})
	good, bad, server := k.workload("good", billing, false), k.workload("bad", other, false), k.workload("server", orders, false)
	host := k.stranger("host", false)
	u, where := server.udp(unix.AF_INET, at(local, 0))
	k.policy(orders, ingress, billing, unix.IPPROTO_UDP, 1, 65535, bpfobj.InlaySeg{Action: allow, Rule: 5})
	fd, from := good.udp(unix.AF_INET, at(local, 0))
	good.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("1")})
	if !server.got(u) {
		t.Fatal("the allowed client is not heard")
	}
	good.must(order{Op: "close", FD: fd})
	for name, c := range map[string]*child{"another workload": bad, "a process of the host": host} {
		if c == host { // what a workload claimed is true for as long as it may still be in flight
			k.age("udp_peers")
		}
		fd, _ := c.udp(unix.AF_INET, from)
		c.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("2")})
		if server.got(u) {
			t.Errorf("%s is heard as the former client", name)
		}
		c.must(order{Op: "close", FD: fd})
	}
	// The true one again.
	fd, _ = good.udp(unix.AF_INET, from)
	good.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("3")})
	if !server.got(u) {
		t.Error("the allowed client is not heard any more")
	}
}

// age makes what senders claimed old.
func (k *kit) age(name string) {
	k.t.Helper()
	var keys []bpfobj.InlayTuple
	var key bpfobj.InlayTuple
	var value bpfobj.InlayPeer
	for it := k.maps[name].Iterate(); it.Next(&key, &value); {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if err := k.maps[name].Lookup(key, &value); err != nil {
			k.t.Fatal(err)
		}
		value.Cookie -= min(value.Cookie, 60e9)
		k.put(name, key, value)
	}
}

// TestClaimIsKept: who floods the table of senders to lose its own entry is not taken for the host.
func TestClaimIsKept(t *testing.T) {
	k := newKit(t, settings{entries: map[string]uint32{"udp_peers": 128}})
	bad, server := k.workload("bad", other, false), k.workload("server", orders, false)
	u, where := server.udp(unix.AF_INET, at(local, 0))
	k.policy(orders, ingress, host, unix.IPPROTO_UDP, 1, 65535, bpfobj.InlaySeg{Action: allow, Rule: 5})
	fd, _ := bad.udp(unix.AF_INET, at(local, 0))
	sink, to := bad.udp(unix.AF_INET, at(local, 0))
	_ = sink
	bad.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("1")})
	if server.got(u) {
		t.Fatal("the denied client is heard")
	}
	bad.must(order{Op: "many", Addr: to, Millis: 4000, FD: fd})
	k.clearFlows(orders) // as a flood would
	bad.must(order{Op: "sendto", FD: fd, Addr: where, Data: []byte("2")})
	if server.got(u) {
		t.Error("the denied client is heard as the host")
	}
}

func (k *kit) clearFlows(id uint64) {
	var keys []bpfobj.InlayUdpKey
	var key bpfobj.InlayUdpKey
	var value bpfobj.InlayUdpFlow
	for it := k.maps["udp_flows"].Iterate(); it.Next(&key, &value); {
		if value.Identity == id {
			keys = append(keys, key)
		}
	}
	for _, key := range keys {
		k.maps["udp_flows"].Delete(key)
	}
}

// TestOtherLocalAddress: a denied service that takes datagrams at every address is denied at every one.
func TestOtherLocalAddress(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	u, where := server.udp(unix.AF_INET6, at(netip.IPv6Unspecified(), 0))
	k.put("endpoints", svcKey(at(local, where.Port()), unix.IPPROTO_UDP), uint64(orders))
	k.denies(billing, egress, orders)
	for _, to := range []string{"127.0.0.1", "127.0.0.2", "0.0.0.0", "127.255.255.255", "::1"} {
		a := netip.MustParseAddr(to)
		domain := unix.AF_INET
		if a.Is6() {
			domain = unix.AF_INET6
		}
		for _, connected := range []bool{true, false} {
			fd := client.must(order{Op: "socket", Domain: domain, Type: unix.SOCK_DGRAM}).FD
			client.must(order{Op: "set", FD: fd, Proto: unix.SOL_SOCKET, Type: unix.SO_BROADCAST, Millis: 1})
			var errno syscall.Errno
			if connected {
				if errno = client.try(order{Op: "connect", FD: fd, Addr: at(a, where.Port())}).Errno; errno == 0 {
					client.try(order{Op: "send", FD: fd, Data: []byte("!")})
				}
			} else {
				errno = client.try(order{Op: "sendto", FD: fd, Addr: at(a, where.Port()), Data: []byte("!")}).Errno
			}
			if server.got(u) {
				t.Errorf("%s, connected %v: the denied service is reached", to, connected)
			} else if errno != syscall.EPERM {
				t.Errorf("%s, connected %v: %v, want EPERM", to, connected, errno)
			}
			client.must(order{Op: "close", FD: fd})
		}
	}
}

// TestOtherProtocols: what policies do not speak of is no way around them.
func TestOtherProtocols(t *testing.T) {
	k := newKit(t, settings{})
	client := k.workload("client", billing, false)
	k.workload("server", orders, false)
	for name, tc := range map[string]struct{ domain, kind, proto int }{
		"UDP-Lite":       {unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE},
		"UDP-Lite, IPv6": {unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE},
		"SCTP":           {unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP},
		"raw":            {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW},
		"raw ICMP, IPv6": {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6},
	} {
		t.Run(name, func(t *testing.T) {
			a := client.try(order{Op: "socket", Domain: tc.domain, Type: tc.kind, Proto: tc.proto})
			// A kernel without the protocol gives nobody such a socket, which is as good.
			if a.Errno != syscall.EPERM && a.Errno != syscall.EPROTONOSUPPORT && a.Errno != syscall.ESOCKTNOSUPPORT {
				t.Errorf("%v, want EPERM", a.Errno)
			}
		})
	}
	k.put("workloads", client.cgroup, bpfobj.InlayWorkload{Identity: billing, Flags: uint32(bpfobj.InlayWorkloadFlagWORKLOAD_RAW)})
	if a := client.try(order{Op: "socket", Domain: unix.AF_INET, Type: unix.SOCK_RAW, Proto: unix.IPPROTO_RAW}); a.Errno != 0 {
		t.Errorf("granted: %v", a.Errno)
	}
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
		for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
			client.must(order{Op: "socket", Domain: domain, Type: kind})
		}
	}
}

// TestHiddenByHeaders: what stands between the header of IPv6 and that of the transport hides nothing.
func TestHiddenByHeaders(t *testing.T) {
	k := newKit(t, settings{})
	server := k.workload("server", orders, false)
	u, where := server.udp(unix.AF_INET6, at(netip.IPv6Loopback(), 0))
	raw, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(raw)
	send := func(first uint8, headers ...[]byte) {
		t.Helper()
		packet := hidden(where.Port(), first, headers...)
		if err := unix.Sendto(raw, packet, 0, &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()}); err != nil {
			t.Fatal(err)
		}
	}
	// The value of each next header is that of the one after it; padding fills the options (RFC 8200, 4.2).
	options := func(next uint8) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }
	whole := []byte{unix.IPPROTO_UDP, 0, 0, 0, 0, 0, 0, 7} // the only fragment of its packet
	var many [][]byte
	for range 7 {
		many = append(many, options(unix.IPPROTO_DSTOPTS))
	}
	many[6][0] = unix.IPPROTO_UDP
	for name, try := range map[string]func(){
		"nothing":                     func() { send(unix.IPPROTO_UDP) },
		"options":                     func() { send(unix.IPPROTO_DSTOPTS, options(unix.IPPROTO_UDP)) },
		"a fragment that is no other": func() { send(unix.IPPROTO_FRAGMENT, whole) },
		"both":                        func() { send(unix.IPPROTO_DSTOPTS, options(unix.IPPROTO_FRAGMENT), whole) },
		"more than are read":          func() { send(unix.IPPROTO_DSTOPTS, many...) },
	} {
		t.Run(name, func(t *testing.T) {
			k.put("subjects", uint64(orders), bpfobj.InlaySubject{Gen: 1000})
			try()
			if got := server.got(u); got != (name != "more than are read") {
				t.Errorf("without a policy: arrived %v", got)
			}
			k.denies(orders, ingress, host)
			try()
			if server.got(u) {
				t.Error("a denied datagram arrived")
			}
		})
	}
}

// hidden is a datagram from and to ::1 behind headers, the first of which has that number.
func hidden(port uint16, first uint8, headers ...[]byte) []byte {
	const payload = 1
	udp := []byte{0x30, 0x39, byte(port >> 8), byte(port), 0, 8 + payload, 0, 0, '!', 0}
	sum := uint32(unix.IPPROTO_UDP) + 8 + payload + 1 + 1 // the pseudo-header: both addresses are ::1
	for i := 0; i < len(udp); i += 2 {
		sum += uint32(udp[i])<<8 | uint32(udp[i+1])
	}
	sum = ^(sum&0xffff + sum>>16)
	udp[6], udp[7] = byte(sum>>8), byte(sum)
	packet := make([]byte, 40)
	packet[0], packet[6], packet[7] = 6<<4, first, 64
	packet[23], packet[39] = 1, 1
	for _, h := range headers {
		packet = append(packet, h...)
	}
	packet = append(packet, udp[:8+payload]...)
	packet[5] = byte(len(packet) - 40)
	return packet
}
