package bpftest

import (
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// established connects a client and a server, and gives both ends.
func established(t *testing.T, client, server *child, vip netip.AddrPort, k *kit) (fd, conn int, where netip.AddrPort) {
	t.Helper()
	l, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	to := where
	if vip.IsValid() {
		k.service(vip, where, unix.IPPROTO_TCP, orders)
		to = vip
	}
	fd, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, to)
	if errno != 0 {
		t.Fatal(errno)
	}
	conn = server.must(order{Op: "accept", FD: l}).FD
	server.must(order{Op: "close", FD: l})
	client.must(order{Op: "send", FD: fd, Data: []byte("hello")})
	server.must(order{Op: "recv", FD: conn})
	return fd, conn, where
}

func TestRoundEndsWhatIsDeniedNow(t *testing.T) {
	for variant, destroys := range map[string]bool{"iter": true, "iterdrop": false} {
		t.Run(variant, func(t *testing.T) {
			k := newKit(t, settings{})
			client, server := k.workload("client", billing, false), k.workload("server", orders, false)
			fd, conn, _ := established(t, client, server, at(vip4, 80), k)
			kept, keptConn, _ := established(t, client, server, at(vip4, 81), k)
			k.policy(billing, egress, orders, unix.IPPROTO_TCP, 81, 81, bpfobj.InlaySeg{Action: allow, Rule: 5})
			k.sweep(variant + "/iter_tcp")
			k.sweep(variant + "/iter_tcp")
			e := k.event("the denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
			if e.Identity != billing || e.Peer != orders || e.Rule != 900 || e.Vip != addr(vip4) || e.VipPort != be16(80) || e.Start == 0 {
				t.Errorf("record: %+v", e)
			}
			k.none("a second denial", func(e bpfobj.InlayEvent) bool { return e.Kind == deniedKind })
			if n := k.counter(bpfobj.InlayCounterCOUNT_DESTROYED); n != 1 {
				t.Errorf("ended: %d, want 1", n)
			}
			a := client.try(order{Op: "send", FD: fd, Data: []byte("more")})
			if destroys && a.Errno != syscall.ECONNABORTED && a.Errno != syscall.EPIPE {
				t.Errorf("the denied connection is told %v, want ECONNABORTED", a.Errno)
			}
			if !destroys {
				if a := server.try(order{Op: "recv", FD: conn}); a.Errno != syscall.EAGAIN {
					t.Errorf("the denied connection delivers %q, %v", a.Data, a.Errno)
				}
			} else if a := server.try(order{Op: "recv", FD: conn}); a.Errno != syscall.ECONNRESET {
				t.Errorf("the other end is told %v %q, want ECONNRESET", a.Errno, a.Data)
			}
			client.must(order{Op: "send", FD: kept, Data: []byte("more")})
			if got := server.must(order{Op: "recv", FD: keptConn}); string(got.Data) != "more" {
				t.Errorf("the allowed connection delivers %q", got.Data)
			}
		})
	}
}

func TestRoundEndsConnectionsToEndpointsThatAreGone(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	fd, _, where := established(t, client, server, at(vip4, 80), k)
	direct, directConn, _ := established(t, client, server, netip.AddrPort{}, k)
	udp := client.socket(unix.AF_INET, unix.SOCK_DGRAM)
	k.service(at(vip4, 53000), where, unix.IPPROTO_UDP, orders)
	client.must(order{Op: "connect", FD: udp, Addr: at(vip4, 53000)})
	k.sweep("iter/iter_tcp")
	client.must(order{Op: "send", FD: fd, Data: []byte("more")})
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		k.put("gone", bpfobj.InlayGoneKey{Addr: addr(where.Addr()), Port: be16(where.Port()), Proto: proto}, uint8(1))
	}
	k.sweep("iter/iter_tcp")
	k.sweep("iter/iter_udp")
	if a := client.try(order{Op: "recv", FD: fd}); a.Errno != syscall.ECONNABORTED {
		t.Errorf("a connection to an endpoint that is gone: %v, want ECONNABORTED", a.Errno)
	}
	if a := client.try(order{Op: "send", FD: udp, Data: []byte("x")}); a.Errno == 0 {
		t.Error("a connected datagram socket still sends to an endpoint that is gone")
	}
	e := k.event("its close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind && e.Identity == billing })
	if e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_RESET) == 0 || e.Err != uint16(syscall.ECONNABORTED) || e.Verdict != allow {
		t.Errorf("record: %+v", e)
	}
	client.must(order{Op: "send", FD: direct, Data: []byte("more")})
	server.must(order{Op: "recv", FD: directConn})
}

func TestSamplesAddUp(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	fd, conn, _ := established(t, client, server, netip.AddrPort{}, k)
	var sum uint64
	for range 3 {
		client.must(order{Op: "send", FD: fd, Data: make([]byte, 100)})
		server.must(order{Op: "recv", FD: conn})
		k.sweep("iter/iter_tcp")
		e := k.event("a sample", func(e bpfobj.InlayEvent) bool { return e.Kind == sampleKind && e.Identity == billing })
		sum += e.TxBytes
	}
	client.must(order{Op: "send", FD: fd, Data: make([]byte, 7)})
	client.must(order{Op: "close", FD: fd})
	e := k.event("the close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind && e.Identity == billing })
	if sum += e.TxBytes; sum != 5+300+7 || e.TxBytes != 7 {
		t.Errorf("samples and close tell %d bytes, the close %d; want 312 and 7", sum, e.TxBytes)
	}
	server.must(order{Op: "abort", FD: conn})
}

func TestConnectionsOlderThanTheAgent(t *testing.T) {
	k := newKit(t, settings{detached: true})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	l, where := server.listen(unix.AF_INET, "127.0.0.1:0")
	fd, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, where)
	if errno != 0 {
		t.Fatal(errno)
	}
	conn := server.must(order{Op: "accept", FD: l}).FD
	client.must(order{Op: "send", FD: fd, Data: make([]byte, 100)})
	server.must(order{Op: "recv", FD: conn})
	k.attach(nil)
	k.policy(orders, ingress, billing, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow, Rule: 5})
	for range 3 {
		k.sweep("iter/iter_tcp")
	}
	// It lives: whom the server's socket belongs to, and who made it, was learned from both ends.
	client.must(order{Op: "send", FD: fd, Data: make([]byte, 50)})
	server.must(order{Op: "recv", FD: conn})
	// And the old listener is judged like a new one.
	stranger := k.workload("stranger", other, false)
	if _, errno := stranger.dial(unix.AF_INET, unix.SOCK_STREAM, where); errno != syscall.ECONNREFUSED {
		t.Errorf("a denied client of the old listener: %v", errno)
	}
	client.must(order{Op: "close", FD: fd})
	server.must(order{Op: "recv", FD: conn})
	server.must(order{Op: "close", FD: conn})
	for range 2 {
		e := k.event("the close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind && e.Identity != other })
		if e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_OLD) == 0 {
			t.Errorf("it is not marked as old: %+v", e)
		}
		if e.Identity == billing && (e.Dir != egress || e.Peer != orders) || e.Identity == orders && (e.Dir != ingress || e.Peer != billing) {
			t.Errorf("record: %+v", e)
		}
	}
	server.must(order{Op: "close", FD: l})
	var key bpfobj.InlayListenKey
	var value bpfobj.InlayListener
	if it := k.maps["listeners"].Iterate(); it.Next(&key, &value) {
		t.Errorf("listeners still holds %+v", key)
	}
}

func TestEndsAreTold(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	t.Run("reset", func(t *testing.T) {
		fd, conn, _ := established(t, client, server, netip.AddrPort{}, k)
		server.must(order{Op: "abort", FD: conn})
		client.try(order{Op: "recv", FD: fd})
		e := k.event("the close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind && e.Identity == billing })
		if e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_RESET) == 0 || e.Err != uint16(syscall.ECONNRESET) {
			t.Errorf("record: %+v", e)
		}
	})
	t.Run("refused", func(t *testing.T) {
		if _, errno := client.dial(unix.AF_INET, unix.SOCK_STREAM, netip.MustParseAddrPort("127.0.0.1:9")); errno != syscall.ECONNREFUSED {
			t.Fatal(errno)
		}
		e := k.event("the close", func(e bpfobj.InlayEvent) bool {
			return e.Kind == closeKind && e.Identity == billing && e.RemotePort == be16(9)
		})
		if e.Err != uint16(syscall.ECONNREFUSED) || e.Peer != host || e.TxBytes != 0 {
			t.Errorf("record: %+v", e)
		}
	})
}

// dropper is a program that drops every n-th segment with payload that enters a cgroup.
func dropper(t *testing.T, n int32) *ebpf.Program {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetIngress, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R6, asm.R1, 0, asm.Word), // len
			asm.JLT.Imm(asm.R6, 500, "pass"),
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, m.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "pass"),
			asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
			asm.Add.Imm(asm.R1, 1),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
			asm.Mod.Imm(asm.R1, n),
			asm.JNE.Imm(asm.R1, 0, "pass"),
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestRetransmitsAreCounted(t *testing.T) {
	k := newKit(t, settings{})
	client, server := k.workload("client", billing, false), k.workload("server", orders, false)
	fd, conn, _ := established(t, client, server, netip.AddrPort{}, k)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: k.root, Attach: ebpf.AttachCGroupInetIngress, Program: dropper(t, 5)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const each, times = 1000, 40
	for range times {
		client.must(order{Op: "send", FD: fd, Data: make([]byte, each)})
		server.must(order{Op: "recv", FD: conn})
	}
	client.must(order{Op: "close", FD: fd})
	for len(server.must(order{Op: "recv", FD: conn}).Data) > 0 {
	}
	server.must(order{Op: "close", FD: conn})
	e := k.event("the close", func(e bpfobj.InlayEvent) bool { return e.Kind == closeKind && e.Identity == billing })
	if e.Retrans < times/5 || e.TxBytes != 5+each*times {
		t.Errorf("%d retransmits and %d bytes, want at least %d and %d", e.Retrans, e.TxBytes, times/5, 5+each*times)
	}
	if n := k.counter(bpfobj.InlayCounterCOUNT_RETRANSMITS); n < uint64(e.Retrans) {
		t.Errorf("the tracepoint counted %d, the kernel %d of this connection", n, e.Retrans)
	}
}

func TestLostRecordsAreCountedExactly(t *testing.T) {
	k := newKit(t, settings{ring: 4096})
	client := k.workload("client", billing, false)
	k.policy(billing, egress, other, unix.IPPROTO_TCP, 1, 65535, bpfobj.InlaySeg{Action: allow})
	const n = 100
	fd := client.socket(unix.AF_INET, unix.SOCK_STREAM)
	for range n {
		if a := client.try(order{Op: "connect", FD: fd, Addr: netip.MustParseAddrPort("127.0.0.1:9")}); a.Errno != syscall.EPERM {
			t.Fatal(a.Errno)
		}
	}
	kept := uint64(0)
	k.ring.SetDeadline(time.Now().Add(-time.Second))
	for {
		if _, err := k.read(); err != nil {
			break
		}
		kept++
	}
	made, lost := k.counter(bpfobj.InlayCounterCOUNT_MADE), k.counter(bpfobj.InlayCounterCOUNT_LOST)
	if made != n || lost == 0 || kept+lost != made {
		t.Errorf("made %d, kept %d, lost %d", made, kept, lost)
	}
}
