package bpftest

import (
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// TestRunTimes prints what each program costs a run by the kernel's own statistics, with every
// policy map in use. The budgets (address lookup 500 ns, connect 1 µs, cgroup_skb 250 ns) are held
// by interop/bench on a quiet machine; here four times as much fails, which a neighbour's load
// alone does not explain.
func TestRunTimes(t *testing.T) {
	k := newKit(t, settings{without: []string{"sklookup"}})
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	l, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	k.service(at(vip4, 80), where, unix.IPPROTO_TCP, orders)
	k.policy(billing, egress, orders, unix.IPPROTO_TCP, 80, 80, bpfobj.InlaySeg{Action: allow, Rule: 1})
	k.policy(orders, ingress, billing, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow, Rule: 2})
	k.put("cidrs", bpfobj.InlayCidrKey{Prefixlen: 160 + 104, Gen: 1, Subject: billing, Dir: uint32(egress), Addr: addr(netip.MustParseAddr("10.0.0.0"))}, uint32(1))
	for range 50 {
		fd, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, at(vip4, 80))
		if errno != 0 {
			t.Fatal(errno)
		}
		conn := server.must(order{Op: "accept", FD: l}).FD
		for range 5 {
			client.must(order{Op: "send", FD: fd, Data: []byte("hello")})
			server.must(order{Op: "recv", FD: conn})
		}
		client.must(order{Op: "peernames", FD: fd, Millis: 200})
		client.must(order{Op: "close", FD: fd})
		server.must(order{Op: "close", FD: conn})
	}
	k.service(at(vip4, 80), netip.MustParseAddrPort("127.0.0.1:9"), unix.IPPROTO_TCP, orders)
	client.must(order{Op: "dials", Addr: at(vip4, 80), Millis: 20000})
	u := server.socket(unix.AF_INET, unix.SOCK_DGRAM)
	server.must(order{Op: "bind", FD: u, Addr: where})
	k.service(at(vip4, 81), where, unix.IPPROTO_UDP, orders)
	k.put("subjects", uint64(billing), bpfobj.InlaySubject{Gen: 9})
	k.put("subjects", uint64(orders), bpfobj.InlaySubject{Gen: 9})
	tcp := map[string]time.Duration{}
	for _, name := range []string{"skb/skb_ingress", "skb/skb_egress"} {
		tcp[name] = k.perRun(t, name)
	}
	fd := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	for range 50 {
		client.must(order{Op: "sendto", FD: fd, Addr: at(vip4, 81), Data: []byte("hello")})
		got := server.must(order{Op: "recvfrom", FD: u})
		server.must(order{Op: "sendto", FD: u, Addr: got.Addr, Data: []byte("hi")})
		client.must(order{Op: "recvfrom", FD: fd})
	}
	client.must(order{Op: "datagrams", FD: fd, Addr: at(vip4, 81), Millis: 20000})
	own := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	client.must(order{Op: "bind", FD: own, Addr: at(local, 0)})
	client.must(order{Op: "to-itself", FD: own, Addr: client.must(order{Op: "sockname", FD: own}).Addr, Millis: 20000})
	for name, budget := range map[string]time.Duration{
		"connect/connect4": time.Microsecond, "sendmsg/sendmsg4": time.Microsecond,
		"skb/skb_ingress": 250, "skb/skb_egress": 250, "recvmsg/recvmsg4": 250,
		"getpeername/getpeername4": 250, "sockops/tcp_events": time.Microsecond,
		"sock/sock_create": time.Microsecond, // most of it is the kernel's allocation of the state
	} {
		got := k.perRun(t, name)
		if d := tcp[name]; d != 0 {
			t.Logf("%-26s %6v a run, TCP alone %v (budget %v)", name, got, d, budget)
		} else {
			t.Logf("%-26s %6v a run (budget %v)", name, got, budget)
		}
		if got > 4*budget {
			t.Errorf("%s: %v a run, budget %v", name, got, budget)
		}
	}

	// The address lookup alone, and a decision alone, by Program.Run in a loop of the kernel.
	for name, budget := range map[string]time.Duration{"pick_test": 500, "decide_test": 500} {
		in := make([]byte, 64)
		if name == "pick_test" {
			k0 := svcKey(at(vip4, 80), unix.IPPROTO_TCP)
			copy(in, k0.Addr.B[:])
			in[16], in[17], in[18] = byte(k0.Port), byte(k0.Port>>8), k0.Proto
		}
		_, d, err := k.prog("decide/"+name).Benchmark(in, 100000, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%-26s %6v a run (budget %v)", name, d, budget)
		if d > 4*budget {
			t.Errorf("%s: %v a run, budget %v", name, d, budget)
		}
	}
}

// perRun gives the mean time of a program's runs.
func (k *kit) perRun(t *testing.T, name string) time.Duration {
	t.Helper()
	s, err := k.prog(name).Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.RunCount < 5000 { // one interruption would be much of the mean
		t.Fatalf("%s ran %d times: want 5000 at least", name, s.RunCount)
	}
	return s.Runtime / time.Duration(s.RunCount)
}
