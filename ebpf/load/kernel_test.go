package load

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// role names what a process of this test binary does instead of running tests.
const role = "INLAY_LOAD_ROLE"

func TestMain(m *testing.M) {
	if f := roles[os.Getenv(role)]; f != nil {
		if err := f(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	switch os.Getenv(role) {
	case "":
		// Under the race detector each child would sleep for a second when it ends.
		_ = os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")) // fails only for a bad name
		os.Exit(m.Run())
	case "prober":
		probeUntilTold()
	case "opener":
		openAndDie()
	case "listener":
		listenUntilTold()
	}
}

// room is the cgroup, the pins and the settings of one test; all are removed at its end.
type room struct {
	t   *testing.T
	cfg Config
}

// needKernel skips loudly where programs cannot run, and fails where CI says that they must.
func needKernel(t *testing.T) {
	t.Helper()
	if err := Check(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI must run this: %v", err)
		}
		t.Skipf("SKIPPED, not tested here: %v", err)
	}
}

func newRoom(t *testing.T) *room {
	t.Helper()
	needKernel(t)
	mnt, err := FindCgroup2()
	if err != nil {
		t.Fatal(err)
	}
	if err := EnsureBPFFS(""); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("inlay-test-%08x", rand.Uint32())
	r := &room{t: t, cfg: Config{
		Cgroup:   filepath.Join(mnt, name),
		Pin:      filepath.Join(BPFFS, name),
		Layout:   "1", // tests change it to others and back
		MapSizes: smallSizes(),
	}}
	t.Cleanup(func() {
		if _, err := Cleanup(r.cfg.Pin); err != nil {
			t.Errorf("cleanup: %v", err)
		}
		if err := os.Remove(r.cfg.Cgroup); err != nil && !os.IsNotExist(err) {
			t.Errorf("cleanup: %v", err)
		}
	})
	return r
}

// smallSizes keeps the kernel from clearing megabytes for each of many starts.
func smallSizes() map[string]uint32 {
	specs, err := mapSpecs(nil)
	if err != nil {
		panic(err)
	}
	sizes := make(map[string]uint32)
	for name, spec := range specs {
		switch spec.Type {
		case ebpf.Hash, ebpf.LRUHash, ebpf.LPMTrie:
			sizes[name] = 256
		case ebpf.RingBuf:
			sizes[name] = uint32(os.Getpagesize())
		}
	}
	return sizes
}

// with returns the settings with another layout.
func (r *room) with(layout string) Config {
	cfg := r.cfg
	cfg.Layout = layout
	return cfg
}

func (r *room) open(cfg Config, p parts) *Set {
	r.t.Helper()
	s, err := open(cfg, nil, p)
	if err != nil {
		r.t.Fatalf("open: %v", err)
	}
	r.t.Cleanup(func() { s.Close() }) // before the room is cleaned
	return s
}

// Programs of the tests, in assembly: they count what they see in counters, from key 16 on.
const (
	deniedPort  = 9
	allowedPort = 10
	sweptPort   = 47131
)

// count adds one to a counter; R6 keeps the context.
func count(key uint32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.StoreImm(asm.RFP, -4, int64(key), asm.Word),
		asm.LoadMapPtr(asm.R1, 0).WithReference("counters"),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "counted"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol("counted"),
	}
}

func returns(n int32) asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, n), asm.Return()}
}

// refusing denies connections to deniedPort. struct bpf_sock_addr holds user_port at 24, in network order.
func refusing() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 24, asm.Word),
		asm.Mov.Imm(asm.R0, 1),
		asm.JNE.Imm(asm.R2, deniedPort<<8, "out"),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return().WithSymbol("out"),
	}
}

// broken is what no verifier accepts: it returns what it never wrote.
func broken() asm.Instructions { return asm.Instructions{asm.Return()} }

func object(programs ...*ebpf.ProgramSpec) func() (*ebpf.CollectionSpec, error) {
	return func() (*ebpf.CollectionSpec, error) {
		spec, err := bpfobj.LoadInlay()
		if err != nil {
			return nil, err
		}
		spec.Variables = nil
		for _, p := range programs {
			p = p.Copy()
			p.License = "Dual BSD/GPL"
			spec.Programs[p.Name] = p
		}
		return spec, nil
	}
}

func cat(parts ...asm.Instructions) (out asm.Instructions) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// version is a set of programs like the real one in little: writers beside, one that judges, one of tracing, one
// of a network namespace, iterators. Its connect program counts at key.
func version(key uint32) parts {
	connect := &ebpf.ProgramSpec{Name: "connect", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, Instructions: cat(count(key), refusing())}
	sockops := &ebpf.ProgramSpec{Name: "sockops", Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps, Instructions: returns(1)}
	state := &ebpf.ProgramSpec{Name: "state", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "inet_sock_set_state", Instructions: returns(0)}
	lookup := &ebpf.ProgramSpec{Name: "lookup", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, Instructions: returns(1)}
	// struct bpf_iter__tcp holds sk_common at 8; struct sock_common holds skc_num at 14.
	iter := &ebpf.ProgramSpec{Name: "iter", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "tcp", Instructions: cat(
		asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, 8, asm.DWord),
			asm.JEq.Imm(asm.R2, 0, "other"),
			asm.LoadMem(asm.R2, asm.R2, 14, asm.Half),
			asm.JNE.Imm(asm.R2, sweptPort, "other"),
		},
		count(31),
		asm.Instructions{asm.Mov.Imm(asm.R0, 0).WithSymbol("other"), asm.Return()},
	)}
	return parts{
		hooks: []hook{
			{Hook: Hook{Name: "sockops", Required: true}, object: "writers", program: "sockops", attach: ebpf.AttachCGroupSockOps, beside: true},
			{Hook: Hook{Name: "set_state", Without: "nothing"}, object: "writers", program: "state", place: atTracing, beside: true},
			{Hook: Hook{Name: "iter_tcp", Required: true}, object: "iter", fallback: "iterold", lesser: "less", program: "iter", place: atIter, beside: true},
			{Hook: Hook{Name: "sk_lookup", Without: "nothing"}, object: "judges", program: "lookup", place: atNetNS},
			{Hook: Hook{Name: "connect4", Required: true}, object: "judges", program: "connect", attach: ebpf.AttachCGroupInet4Connect},
		},
		objects: map[string]func() (*ebpf.CollectionSpec, error){
			"writers": object(sockops, state), "judges": object(connect, lookup), "iter": object(iter), "iterold": object(iter),
		},
	}
}

// counted sums one counter over all CPUs.
func counted(t *testing.T, m *ebpf.Map, key uint32) (sum uint64) {
	t.Helper()
	var per []uint64
	if err := m.Lookup(key, &per); err != nil {
		t.Fatalf("counter %d: %v", key, err)
	}
	for _, n := range per {
		sum += n
	}
	return sum
}

// pinnedCounter reads a counter through its pin.
func (r *room) pinnedCounter(layout string, key uint32) uint64 {
	r.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(r.cfg.Pin, "v"+layout, mapsDir, "counters"), nil)
	if err != nil {
		r.t.Fatal(err)
	}
	defer m.Close()
	return counted(r.t, m, key)
}

// dial connects an UDP socket to a port of the loopback: nothing is sent, only connect() is asked.
func dial(port int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
}

// prober is a process inside the managed cgroup that dials without a pause.
type prober struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Scanner
}

// inside starts a role of this binary within a cgroup, as its first instruction.
func (r *room) inside(what string, attr syscall.SysProcAttr, env ...string) *prober {
	r.t.Helper()
	dir, err := os.Open(r.cfg.Cgroup)
	if err != nil {
		r.t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), role+"="+what), env...)
	cmd.Stderr = os.Stderr
	attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	cmd.SysProcAttr = &attr
	p := &prober{t: r.t, cmd: cmd}
	if p.stdin, err = cmd.StdinPipe(); err != nil {
		r.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	p.out = bufio.NewScanner(out)
	if err := cmd.Start(); err != nil {
		r.t.Fatalf("start a process in %s: %v", r.cfg.Cgroup, err)
	}
	r.t.Cleanup(func() { p.stdin.Close(); cmd.Wait() })
	return p
}

// leaf is a cgroup below the managed one, as a workload has it. It is removed before that one.
func (r *room) leaf(name string) *room {
	r.t.Helper()
	l := &room{t: r.t, cfg: r.cfg}
	l.cfg.Cgroup = filepath.Join(r.cfg.Cgroup, name)
	if err := os.MkdirAll(l.cfg.Cgroup, 0o755); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := os.Remove(l.cfg.Cgroup); err != nil {
			r.t.Errorf("cleanup: %v", err)
		}
	})
	return l
}

// prober starts dialling and returns when it did so once.
func (r *room) prober() *prober {
	r.t.Helper()
	p := r.inside("prober", syscall.SysProcAttr{})
	p.line()
	return p
}

func (p *prober) line() string {
	p.t.Helper()
	if !p.out.Scan() {
		p.t.Fatalf("%v ended early: %v", p.cmd.Args, p.out.Err())
	}
	return p.out.Text()
}

// stop ends the prober and returns how often it dialled each port, and how often with a wrong outcome.
func (p *prober) stop() (dials, wrong int) {
	p.t.Helper()
	p.stdin.Close()
	if _, err := fmt.Sscanf(p.line(), "%d %d", &dials, &wrong); err != nil {
		p.t.Fatal(err)
	}
	p.cmd.Wait() // it leaves its cgroup before that is removed
	return dials, wrong
}

// once dials both ports from inside and returns how many calls that were, and the wrong ones.
func (r *room) once() (dials, wrong int) {
	r.t.Helper()
	return r.prober().stop()
}

// probeUntilTold is the prober: it dials until its input ends.
func probeUntilTold() {
	end := make(chan struct{})
	go func() { io.Copy(io.Discard, os.Stdin); close(end) }()
	dials, wrong := 0, 0
	for {
		dials += 2
		if !errors.Is(dial(deniedPort), unix.EPERM) {
			wrong++
		}
		if dial(allowedPort) != nil {
			wrong++
		}
		if dials == 2 {
			fmt.Println("dialling")
		}
		select {
		case <-end:
			fmt.Println(dials, wrong)
			return
		default:
		}
	}
}

// listenUntilTold listens in its own network namespace.
func listenUntilTold() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: sweptPort})
	}
	if err == nil {
		err = unix.Listen(fd, 1)
	}
	fmt.Println(err)
	io.Copy(io.Discard, os.Stdin)
}

// openAndDie opens a Set and kills itself at a step: INLAY_LOAD_ARGS is cgroup, pins, layout, step.
func openAndDie() {
	args := strings.Split(os.Getenv("INLAY_LOAD_ARGS"), ",")
	at, err := strconv.Atoi(args[3])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	p, n := version(17), 0
	p.step = func(name string) error {
		// Of the many maps four stand for all.
		if _, m, ok := strings.Cut(name, "map "); ok && !slices.Contains([]string{"addresses", "counters", "settings_map", "workloads"}, m) {
			return nil
		}
		if n == at {
			fmt.Println(name)
			unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		n++
		return nil
	}
	cfg := Config{Cgroup: args[0], Pin: args[1], Layout: args[2], MapSizes: smallSizes(), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if _, err := open(cfg, nil, p); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	fmt.Println("whole")
}

// attached counts the programs of one kind that are attached to the managed cgroup.
func (r *room) attached(at ebpf.AttachType) int {
	r.t.Helper()
	dir, err := os.Open(r.cfg.Cgroup)
	if err != nil {
		r.t.Fatal(err)
	}
	defer dir.Close()
	res, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: at})
	if err != nil {
		r.t.Fatal(err)
	}
	return len(res.Programs)
}
