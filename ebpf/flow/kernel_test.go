package flow_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/flow"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// realMaps makes the maps that a log uses, as the programs have them, but for a ring of ringSize
// bytes. Without privileges the test is skipped, and fails where CI says that it must not be.
func realMaps(t testing.TB, ringSize uint32) *bpfobj.InlayMaps {
	t.Helper()
	spec, err := bpfobj.LoadInlay()
	if err != nil {
		t.Fatal(err)
	}
	var maps bpfobj.InlayMaps
	for name, into := range pinned(&maps) {
		s := spec.Maps[name]
		if name == bpfobj.InlayMapEvents {
			s.MaxEntries = ringSize
		}
		m, err := ebpf.NewMap(s)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSYS) {
			if os.Getenv("CI") == "true" {
				t.Fatalf("no privilege to make BPF maps, and CI=true allows no skip: %v", err)
			}
			t.Skipf("SKIPPED: needs root or CAP_BPF to make BPF maps: %v", err)
		}
		if err != nil {
			t.Fatalf("map %s: %v", name, err)
		}
		t.Cleanup(func() { m.Close() })
		*into = m
	}
	return &maps
}

// maker is a program that makes one record at each run, in the way of the hooks: COUNT_MADE, then
// a reservation, and COUNT_LOST where there is no room. Its bytes_sent is the number of the CPU.
func maker(t testing.TB, maps *bpfobj.InlayMaps) (run func(times int)) {
	t.Helper()
	e := flow.Encode(with(call(), func(e *bpfobj.InlayEvent) { e.Cookie = 0 }))
	count := func(i bpfobj.InlayCounter, end string) asm.Instructions {
		return asm.Instructions{
			asm.StoreImm(asm.RFP, -4, int64(i), asm.Word),
			asm.LoadMapPtr(asm.R1, maps.Counters.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, end),
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		}
	}
	insns := slices.Concat(
		count(bpfobj.InlayCounterCOUNT_MADE, "exit"),
		asm.Instructions{
			asm.LoadMapPtr(asm.R1, maps.Events.FD()),
			asm.Mov.Imm(asm.R2, int32(flow.RecordSize)),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnRingbufReserve.Call(),
			asm.JEq.Imm(asm.R0, 0, "lost"),
		},
	)
	for at := 0; at < len(e); at += 8 {
		insns = append(insns,
			asm.LoadImm(asm.R1, int64(binary.NativeEndian.Uint64(e[at:])), asm.DWord),
			asm.StoreMem(asm.R0, int16(at), asm.R1, asm.DWord))
	}
	insns = append(insns,
		asm.Mov.Reg(asm.R1, asm.R0),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRingbufSubmit.Call(),
		asm.Ja.Label("exit"),
	)
	lost := count(bpfobj.InlayCounterCOUNT_LOST, "exit")
	lost[0] = lost[0].WithSymbol("lost")
	insns = append(insns, lost...)
	insns = append(insns, asm.Mov.Imm(asm.R0, 0).WithSymbol("exit"), asm.Return())
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: insns})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { p.Close() })
	// Not by Repeat: the kernel breaks off repetitions at a signal, and the library begins them anew.
	return func(times int) {
		for range times {
			if _, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64)}); err != nil {
				t.Error(err)
			}
		}
	}
}

// running runs l until the returned function is called, which waits for its end.
func running(t testing.TB, l *flow.Log) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// receive follows l until n flows came.
func receive(t testing.TB, l *flow.Log, n uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	enough := errors.New("enough")
	var got uint64
	err := l.Observe(ctx, &nodepb.ObserveRequest{Follow: true}, func(r *nodepb.ObserveResponse) error {
		if r.GetFlow() != nil {
			got++
		}
		if got == n {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Fatalf("%d of %d flows came: %v", got, n, err)
	}
}

func counts(l *flow.Log) string {
	made, kept, lost := l.Counts()
	return fmt.Sprintf("made %d kept %d lost %d", made, kept, lost)
}

// A ring of 4 KiB holds 26 records of 152 bytes; the kernel keeps one byte free.
const inPage = 4095 / 152

func TestOverflowIsCountedExactly(t *testing.T) {
	maps := realMaps(t, 4096)
	run := maker(t, maps)
	l := flow.New(flow.Config{Maps: maps, Namer: names{}})

	run(1000) // and nobody reads
	if got, want := counts(l), fmt.Sprintf("made 1000 kept 0 lost %d", 1000-inPage); got != want {
		t.Fatalf("before anybody reads: %s, want %s", got, want)
	}
	stop := running(t, l)
	receive(t, l, inPage)
	if got, want := counts(l), fmt.Sprintf("made 1000 kept %d lost %d", inPage, 1000-inPage); got != want {
		t.Fatalf("once read: %s, want %s", got, want)
	}
	stop()

	// The agent is gone; the pinned ring and counters go on, and fill.
	run(100)
	again := flow.New(flow.Config{Maps: maps, Namer: names{}})
	if got, want := counts(again), fmt.Sprintf("made 1100 kept %d lost %d", inPage, 1100-2*inPage); got != want {
		t.Fatalf("the next agent, before it reads: %s, want %s", got, want)
	}
	running(t, again)
	receive(t, again, inPage)
	if got, want := counts(again), fmt.Sprintf("made 1100 kept %d lost %d", 2*inPage, 1100-2*inPage); got != want {
		t.Fatalf("the next agent: %s, want %s", got, want)
	}
	if again.Malformed() != 0 {
		t.Errorf("%d malformed", again.Malformed())
	}
}

// Two CPUs make more than a reader can take, over several turns of the ring.
func TestCountsHoldUnderLoad(t *testing.T) {
	maps := realMaps(t, 4096)
	run := maker(t, maps)
	const makers, rounds, times = 4, 200, 50
	var sunk uint64
	l := flow.New(flow.Config{Maps: maps, Namer: names{}, Capacity: makers * rounds * times,
		Sink: func(*nodepb.Flow) { sunk++ }})
	stop := running(t, l)
	var wg sync.WaitGroup
	for range makers {
		wg.Go(func() {
			for range rounds {
				run(times)
				if made, kept, lost := l.Counts(); made < kept+lost {
					t.Errorf("made %d, kept %d, lost %d: more than were made", made, kept, lost)
				}
			}
		})
	}
	wg.Wait()
	made, _, lost := l.Counts()
	if made != makers*rounds*times {
		t.Fatalf("%d records made, want %d", made, makers*rounds*times)
	}
	receive(t, l, made-lost) // at rest
	made, kept, lost := l.Counts()
	if made != kept+lost {
		t.Errorf("made %d, kept %d, lost %d: %d missing", made, kept, lost, made-kept-lost)
	}
	stop()
	if sunk != kept {
		t.Errorf("the sink got %d of %d kept", sunk, kept)
	}
	if lost == 0 {
		t.Log("nothing was lost in this run") // the other test loses for certain
	}
}

// The ring and the counters outlive every process that holds them, by their pins: readers are
// killed while they read, and not one record is counted twice or forgotten.
func TestCountsSurviveSIGKILL(t *testing.T) {
	maps := realMaps(t, 4096)
	run := maker(t, maps)
	dir := filepath.Join(bpffs(t), fmt.Sprintf("inlay-test-%08x", rand.Uint32()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	for name, m := range pinned(maps) {
		path := filepath.Join(dir, name)
		if err := (*m).Pin(path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(path) })
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l := flow.New(flow.Config{Maps: maps, Namer: names{}})
	for range 5 {
		_, before, _ := l.Counts()
		reader := exec.CommandContext(t.Context(), exe)
		reader.Env = append(os.Environ(), role+"=reader "+dir+" 0")
		reader.Stderr = os.Stderr
		if err := reader.Start(); err != nil {
			t.Fatal(err)
		}
		for kept := before; kept < before+500 && t.Context().Err() == nil && !t.Failed(); _, kept, _ = l.Counts() {
			run(10)
		}
		reader.Process.Kill()
		reader.Wait() // it was killed, and says so
		run(10)
	}
	made, kept, lost := l.Counts()
	running(t, l)
	receive(t, l, made-kept-lost) // what the last one left, and no more: the ring is empty after it
	if again, kept, lost := l.Counts(); again != made || made != kept+lost {
		t.Errorf("made %d, kept %d, lost %d: %d missing", again, kept, lost, again-kept-lost)
	}
	if l.Malformed() != 0 {
		t.Errorf("%d malformed", l.Malformed())
	}
}

// pinned are the maps of a log by name.
func pinned(maps *bpfobj.InlayMaps) map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		bpfobj.InlayMapEvents: &maps.Events, bpfobj.InlayMapCounters: &maps.Counters,
		bpfobj.InlayMapUdpFlows: &maps.UdpFlows, bpfobj.InlayMapUdpReverse: &maps.UdpReverse,
	}
}

// readPins reads the ring that is pinned in dir until it is killed.
func readPins(dir string) error {
	var maps bpfobj.InlayMaps
	for name, into := range pinned(&maps) {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err != nil {
			return err
		}
		*into = m
	}
	return flow.New(flow.Config{Maps: &maps}).Run(context.Background())
}

// bpffs returns a mount of the BPF file system, mounting one for the test where there is none.
func bpffs(t testing.TB) string {
	t.Helper()
	const usual, magic = "/sys/fs/bpf", 0xcafe4a11
	var st unix.Statfs_t
	if err := unix.Statfs(usual, &st); err == nil && uint32(st.Type) == magic {
		return usual
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// hand is a clock whose timers fire when the test says so.
type hand struct{ timers chan func() }

func (hand) Now() time.Time { return noon }

func (h hand) AfterFunc(_ time.Duration, f func()) func() bool {
	h.timers <- f
	return func() bool { return true }
}

func TestDatagramExchangesAreSwept(t *testing.T) {
	maps := realMaps(t, 4096)
	const second = uint64(time.Second)
	now := uint64(booted)
	h := hand{make(chan func(), 1)}
	sunk := make(chan *nodepb.Flow, 16)
	l := flow.New(flow.Config{Maps: maps, Namer: names{}, Clock: h, Monotonic: func() uint64 { return now },
		Sink: func(f *nodepb.Flow) { sunk <- f }})

	key := func(cookie uint64) bpfobj.InlayUdpKey {
		return bpfobj.InlayUdpKey{Cookie: cookie, Addr: addr("10.0.0.9"), Port: be(53)}
	}
	put := func(cookie, first, last, tx uint64, change ...func(*bpfobj.InlayUdpFlow)) {
		t.Helper()
		f := bpfobj.InlayUdpFlow{First: first, Last: last, TxBytes: tx, RxBytes: 2 * tx, TxPackets: 1, RxPackets: 1, Identity: billing, Peer: orders,
			Rule: rule, LocalPort: be(5000), Verdict: uint8(bpfobj.InlayVerdictVERDICT_ALLOW), Proto: 17}
		for _, c := range change {
			c(&f)
		}
		if err := maps.UdpFlows.Put(key(cookie), f); err != nil {
			t.Fatal(err)
		}
	}
	denied := func(f *bpfobj.InlayUdpFlow) { f.Verdict = uint8(bpfobj.InlayVerdictVERDICT_DENY) }
	// Before the agent came: one that is 100 s old.
	put(1, now-100*second, now, 1000)
	running(t, l)

	// sweep fires the timer and returns what was told, by the port of nobody else: cookie order is
	// not that of the map.
	timer := <-h.timers
	sweep := func() map[string]int {
		t.Helper()
		timer()
		timer = <-h.timers // the sweep is over when the next one is set
		got := map[string]int{}
		for len(sunk) > 0 {
			f := <-sunk
			got[fmt.Sprintf("%s %s %d/%d", f.GetKind(), f.GetVerdict(), f.GetBytesSent(), f.GetBytesReceived())]++
		}
		return got
	}
	expect := func(what string, want ...string) {
		t.Helper()
		m := map[string]int{}
		for _, w := range want {
			m[w]++
		}
		if got := sweep(); fmt.Sprint(got) != fmt.Sprint(m) {
			t.Errorf("%s: told %v, want %v", what, got, m)
		}
	}

	expect("what the agent before told is not told again")
	now += 10 * second
	put(1, now-110*second, now, 1010)       // 10 more
	put(2, now-second, now, 5)              // too young for a sample
	put(3, now-40*second, now-31*second, 7) // idle
	put(4, now-second, now, 8, func(f *bpfobj.InlayUdpFlow) { f.Flags = uint8(bpfobj.InlayFlowFlagFLOW_ENDED) })
	put(5, now-40*second, now-31*second, 9, denied) // its refusals had records
	put(6, now-40*second, now, 9, denied)
	put(7, now-40*second, 0, 0, func(f *bpfobj.InlayUdpFlow) { f.TxPackets, f.RxPackets = 0, 0 }) // only connected
	if err := maps.UdpReverse.Put(key(3), bpfobj.InlayReverse{Addr: addr("198.18.0.1"), Port: be(8080)}); err != nil {
		t.Fatal(err)
	}
	expect("samples and ends", "sample allowed 10/20", "close allowed 7/14", "close allowed 8/16")
	expect("nothing is told twice")
	for cookie, want := range map[uint64]bool{1: true, 2: true, 3: false, 4: false, 5: false, 6: true, 7: false} {
		var f bpfobj.InlayUdpFlow
		if err := maps.UdpFlows.Lookup(key(cookie), &f); (err == nil) != want {
			t.Errorf("exchange %d is in the map: %v, want %v", cookie, err == nil, want)
		}
	}
	now += 10 * second
	put(2, now-11*second, now, 25)
	put(1, now-2*second, now, 4) // evicted and begun anew: another exchange, too young to tell of
	expect("a lasting exchange", "sample allowed 25/50")
	now += 40 * second
	expect("all are idle", "close allowed 4/8", "close allowed 0/0")

	whole := observe(t, l, &nodepb.ObserveRequest{Query: "kind=close and sent=25"})
	if len(whole) != 1 || whole[0].GetBytesReceived() != 50 || whole[0].GetDuration().AsDuration() != 11*time.Second {
		t.Errorf("the flow of an ended exchange shows all of it: got %v", whole)
	}
	asked := observe(t, l, &nodepb.ObserveRequest{Query: "port=8080"})
	if len(asked) != 1 || asked[0].GetServiceAddress() != "198.18.0.1:8080" || asked[0].GetTo().GetName() != "orders.default" ||
		asked[0].GetFrom().GetAddress() != ":5000" || asked[0].GetRule() != "from-billing" {
		t.Errorf("an exchange by service address: got %v", asked)
	}
	if made, kept, lost := l.Counts(); made+kept+lost != 0 {
		t.Errorf("exchanges are no records of the ring: made %d kept %d lost %d", made, kept, lost)
	}
}

func TestManyExchangesInBatches(t *testing.T) {
	maps := realMaps(t, 4096)
	const n = 5000
	keys := make([]bpfobj.InlayUdpKey, n)
	flows := make([]bpfobj.InlayUdpFlow, n)
	for i := range keys {
		keys[i] = bpfobj.InlayUdpKey{Cookie: uint64(i + 1), Addr: addr("10.0.0.9"), Port: be(53)}
		flows[i] = bpfobj.InlayUdpFlow{First: 1, Last: 1, TxBytes: 1, TxPackets: 1, Proto: 17}
	}
	if _, err := maps.UdpFlows.BatchUpdate(keys, flows, nil); err != nil {
		t.Fatal(err)
	}
	h := hand{make(chan func(), 1)}
	l := flow.New(flow.Config{Maps: maps, Clock: h, Monotonic: func() uint64 { return booted }})
	running(t, l)
	(<-h.timers)()
	<-h.timers
	if got := len(observe(t, l, &nodepb.ObserveRequest{})); got != n {
		t.Errorf("%d of %d exchanges told", got, n)
	}
	var key bpfobj.InlayUdpKey
	if err := maps.UdpFlows.NextKey(nil, &key); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("an exchange is left: %v, %v", key, err)
	}
}

func TestCountersByName(t *testing.T) {
	maps := realMaps(t, 4096)
	each := make([]uint64, ebpf.MustPossibleCPU())
	for i := range each {
		each[i] = 3
	}
	if err := maps.Counters.Put(uint32(bpfobj.InlayCounterCOUNT_DNS_PASSED), each); err != nil {
		t.Fatal(err)
	}
	got, err := flow.New(flow.Config{Maps: maps}).Counters()
	if err != nil || got["dns_passed"] != uint64(3*len(each)) || len(got) != 12 {
		t.Errorf("counters %v, %v", got, err)
	}
}
