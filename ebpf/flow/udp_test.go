package flow

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

func TestJudge(t *testing.T) {
	const second = uint64(time.Second)
	const now = 1000 * second
	ended := uint8(bpfobj.InlayFlowFlagFLOW_ENDED)
	for name, tc := range map[string]struct {
		flow   bpfobj.InlayUdpFlow
		before told
		want   action
	}{
		"young":                              {bpfobj.InlayUdpFlow{First: now - 9*second, Last: now, TxBytes: 1}, told{}, leave},
		"lasting":                            {bpfobj.InlayUdpFlow{First: now - 10*second, Last: now, TxBytes: 1}, told{}, sample},
		"lasting, all told":                  {bpfobj.InlayUdpFlow{First: now - 10*second, Last: now, TxBytes: 1}, told{tx: 1}, leave},
		"idle":                               {bpfobj.InlayUdpFlow{First: 1, Last: now - 30*second}, told{}, finish},
		"not idle yet":                       {bpfobj.InlayUdpFlow{First: 1, Last: now - 29*second}, told{}, leave},
		"closed":                             {bpfobj.InlayUdpFlow{First: now, Last: now, Flags: ended}, told{}, finish},
		"spoken in after the clock was read": {bpfobj.InlayUdpFlow{First: now + 1, Last: now + 2, TxBytes: 1}, told{}, leave},
		"connected, nobody spoke":            {bpfobj.InlayUdpFlow{First: now - 29*second}, told{}, leave},
		"connected, nobody spoke for long":   {bpfobj.InlayUdpFlow{First: now - 30*second}, told{}, finish},
		"denied":                             {bpfobj.InlayUdpFlow{First: 1, Last: now, TxBytes: 1, Verdict: verdictDeny}, told{}, leave},
	} {
		if got := judge(tc.flow, tc.before, now, 30*time.Second, 10*time.Second); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}

// "a flow seen again is deleted only if unchanged"
func TestTakeLeavesWhatChanged(t *testing.T) {
	spec, err := bpfobj.LoadInlay()
	if err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(spec.Maps[bpfobj.InlayMapUdpFlows])
	if errors.Is(err, unix.EPERM) && os.Getenv("CI") != "true" {
		t.Skipf("SKIPPED: needs root or CAP_BPF to make BPF maps: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	read := exchange{key: bpfobj.InlayUdpKey{Cookie: 1}, flow: bpfobj.InlayUdpFlow{First: 1, Last: 5, TxBytes: 10}}
	again := read.flow
	again.Last, again.TxBytes = 6, 20
	if err := m.Put(read.key, again); err != nil {
		t.Fatal(err)
	}
	if _, taken, err := take(m, read); taken || err != nil {
		t.Errorf("taken %v, %v: somebody spoke after it was read", taken, err)
	}
	last, taken, err := take(m, exchange{read.key, again})
	if !taken || err != nil || last.flow != again {
		t.Errorf("got %+v, %v, %v: want it removed", last, taken, err)
	}
	if last, taken, err := take(m, read); !taken || err != nil || last != read {
		t.Errorf("evicted: got %+v, %v, %v, want what was read", last, taken, err)
	}
}

func TestTotalsAreBounded(t *testing.T) {
	var sums totals
	for n := range uint64(5 * maxTotals) {
		sums.add(bpfobj.InlayEvent{Kind: kindSample, Cookie: n + 1, TxBytes: 1})
		if e := sums.add(bpfobj.InlayEvent{Kind: kindSample, Cookie: 1, TxBytes: 1}); n > 0 && e.TxBytes != n+2 {
			t.Fatalf("after %d others a busy connection counts %d, want %d", n, e.TxBytes, n+2)
		}
	}
	if got := len(sums.young) + len(sums.old); got > 2*maxTotals {
		t.Errorf("%d connections remembered, want at most %d", got, 2*maxTotals)
	}
}
