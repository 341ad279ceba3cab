package continuity

import (
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/load"
)

// A ring of one page overflows while nobody reads: each record that should have been in it is counted, and
// those that are not.
func TestRingOverflow(t *testing.T) {
	w := newWorld(t, "--map-size", "events=4096")
	const allowed, denied = 150, 250
	w.startClient([]probe{{Name: "allowed", Kind: "tcp", Target: []string{w.guardedAt}, Word: "client", Rate: 100, Count: allowed}})
	w.startStranger([]probe{{Name: "egress", Kind: "tcp", Target: []string{w.forbiddenAt}, Word: "stranger", Rate: 100, Count: denied, Refused: true}})
	before := w.settled()
	w.node.signal(syscall.SIGSTOP)
	w.tell(w.client, "go")
	w.tell(w.stranger, "go")
	// Both ends of a connection are workloads of this node: two records at its close.
	const due = 2*allowed + denied
	made := func() uint64 { return w.counters()[uint32(bpfobj.InlayCounterCOUNT_MADE)] - before.Made }
	w.eventually(fmt.Sprintf("%d records", due), func() bool { return made() >= due })
	client, stranger := w.finish(w.client).Probes["allowed"], w.finish(w.stranger).Probes["egress"]
	if client.OK != allowed || stranger.Errors["operation not permitted"] != denied {
		t.Errorf("%d of %d connections went well (%v), %d of %d were refused (%v)", client.OK, allowed, client.Errors, stranger.failed(), denied, stranger.Errors)
	}
	if got := made(); got != due {
		t.Errorf("made %d records, want %d: two of each of %d connections, one of each of %d refusals", got, due, allowed, denied)
	}
	lost := w.counters()[uint32(bpfobj.InlayCounterCOUNT_LOST)] - before.Lost
	w.node.signal(syscall.SIGCONT)
	a := w.settled()
	t.Logf("while nobody read: made %d, lost %d; then kept %d", due, lost, a.Kept-before.Kept)
	if lost == 0 || lost >= due {
		t.Errorf("lost %d of %d, want some and not all", lost, due)
	}
	if a.Lost-before.Lost != lost || a.Kept-before.Kept != due-lost {
		t.Errorf("afterwards: kept %d, lost %d: want %d and %d", a.Kept-before.Kept, a.Lost-before.Lost, due-lost, lost)
	}
	// What was kept is what can be read, all of it: the agent had one life.
	if got := uint64(len(w.flows("protocol=tcp"))); got != a.Kept {
		t.Errorf("%d flows can be read, %d were kept", got, a.Kept)
	}
	for state, want := range map[string]uint64{"made": a.Made, "kept": a.Kept, "lost": a.Lost} {
		if got, ok := w.metric("inlay_records_total", `inlay_state="`+state+`"`); !ok || uint64(got) != want {
			t.Errorf("metric of records %s: %v, %v: want %d", state, got, ok, want)
		}
	}
}

// dropper drops every n-th segment of 500 bytes and more that enters a cgroup, until the test ends.
func dropper(t *testing.T, cgroup string, n int32) {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetIngress, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R6, asm.R1, 0, asm.Word), // __sk_buff.len
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
	t.Cleanup(func() { _ = p.Close() })
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInetIngress, Program: p})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
}

// Every seventh segment to a server is dropped: what the agent says was sent again is what the kernel
// says of the sender's socket, as a flow and as a metric.
func TestRetransmits(t *testing.T) {
	w := newWorld(t)
	mnt, err := load.FindCgroup2()
	if err != nil {
		t.Fatal(err)
	}
	leaves, err := filepath.Glob(filepath.Join(mnt, w.cgroup, "guarded.default-*"))
	if err != nil || len(leaves) != 1 {
		t.Fatalf("cgroups of guarded: %v, %v", leaves, err)
	}
	const segments, size, each = 300, 1000, 7
	dropper(t, leaves[0], each)
	sender := w.program("client", "sender", senderSettings{Target: w.guardedAt, Segments: segments, Size: size}, "--label", "role=client")
	got := w.tell(sender, "go").Numbers
	if got["failed"] != 0 || got["received"] != segments*size {
		t.Fatalf("sent %d bytes, the server read %v", segments*size, got)
	}
	var retransmits, tx uint64
	w.eventually("the flow of the sender", func() bool {
		for _, f := range w.flows("from=client and to=guarded and direction=egress and kind=close") {
			retransmits, tx = uint64(f.Retransmits), f.BytesSent
			return true
		}
		return false
	})
	counted := w.counters()[uint32(bpfobj.InlayCounterCOUNT_RETRANSMITS)]
	told, _ := w.metric("inlay_flow_retransmits_total", `inlay_source="client.default"`, `inlay_direction="egress"`)
	t.Logf("%d segments, every %d. dropped: TCP_INFO of the sender says %d were sent again, the flow %d, the metric %v; the tracepoint saw %d (of all sockets)",
		segments, each, got["retransmits"], retransmits, told, counted)
	if retransmits != uint64(got["retransmits"]) || int64(told) != got["retransmits"] {
		t.Errorf("retransmits: flow %d, metric %v, TCP_INFO %d: want one number", retransmits, told, got["retransmits"])
	}
	if got["retransmits"] < segments/each {
		t.Errorf("%d retransmits, %d segments were dropped", got["retransmits"], segments/each)
	}
	if want := uint64(len("count\n") + segments*size); tx != want {
		t.Errorf("the flow tells %d bytes, want %d: each counts once", tx, want)
	}
}
