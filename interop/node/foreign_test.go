package node

import (
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// foreign is a program of somebody else on a cgroup above the managed root: it counts calls of
// connect() and lets them pass.
type foreign struct {
	dir     string
	program *ebpf.Program
	counts  *ebpf.Map
}

// bpfAllowMulti is BPF_F_ALLOW_MULTI of linux/bpf.h: others may attach in cgroups below, and here.
const bpfAllowMulti = 1 << 1

func attachForeign(t *testing.T, dir string) *foreign {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, m.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "pass"),
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	f := &foreign{dir, p, m}
	// By the older of the two calls, so that both ways are beside ours.
	cg, err := openDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cg.Close()
	err = link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(cg.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect, Flags: bpfAllowMulti})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after the mesh was cleaned up
		if n := attachedPrograms(t, dir); n != 1 {
			t.Errorf("%d programs are attached to the foreign cgroup after cleanup: want its own", n)
		}
	})
	return f
}

func attachedPrograms(t *testing.T, dir string) int {
	t.Helper()
	cg, err := openDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cg.Close()
	got, err := link.QueryPrograms(link.QueryOptions{Target: int(cg.Fd()), Attach: ebpf.AttachCGroupInet4Connect})
	if err != nil {
		t.Fatal(err)
	}
	return len(got.Programs)
}

func (f *foreign) count(t *testing.T) uint64 {
	t.Helper()
	var n uint64
	if err := f.counts.Lookup(uint32(0), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// countsOn: it sees every connect() of managed programs, allowed and denied ones.
func (f *foreign) countsOn(t *testing.T, n *oneNode) {
	if got := attachedPrograms(t, f.dir); got != 1 {
		t.Errorf("%d programs are attached above the managed root: want the foreign one", got)
	}
	c := n.client("glibc", program{service: "another"})
	answers(t, c, []any{"tcp", "4", n.vip["open"].v4, 80}, "open")
	tight := n.client("glibc", program{service: "tight"})
	before := f.count(t)
	const calls = 20
	for range calls {
		if a := c.ask("tcp", "4", n.vip["open"].v4, 80); a.failed() != "" {
			t.Errorf("call: %+v", a)
		}
		if a := tight.ask("tcp", "4", n.vip["open"].v4, 80); a.Errno != syscall.EPERM {
			t.Errorf("denied call: %+v, want EPERM", a)
		}
	}
	if got := f.count(t) - before; got < 2*calls { // others call at the same time
		t.Errorf("the foreign program counted %d calls of %d", got, 2*calls)
	}
}
