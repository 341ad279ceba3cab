package flow

import "github.com/inlay-mesh/inlay/ebpf/bpfobj"

// totals adds up the samples of living TCP connections, whose records count since the sample
// before, so that a flow shows its whole connection. Two generations bound it: when the young one
// is full the old one goes, with the connections that had no sample for longest; such a
// connection counts anew, as do all when the agent starts.
type totals struct{ young, old map[uint64]total }

type total struct {
	tx, rx  uint64
	retrans uint32
}

// maxTotals bounds each generation.
const maxTotals = 32768

// add returns e with the counts of its connection so far. A close forgets the connection.
func (t *totals) add(e bpfobj.InlayEvent) bpfobj.InlayEvent {
	if e.Cookie == 0 {
		return e
	}
	sum, young := t.young[e.Cookie]
	if !young {
		sum = t.old[e.Cookie]
	}
	sum.tx += e.TxBytes
	sum.rx += e.RxBytes
	sum.retrans += e.Retrans
	e.TxBytes, e.RxBytes, e.Retrans = sum.tx, sum.rx, sum.retrans
	if e.Kind == kindClose {
		delete(t.young, e.Cookie)
		delete(t.old, e.Cookie)
		return e
	}
	if len(t.young) >= maxTotals && !young {
		t.old, t.young = t.young, nil
	}
	if t.young == nil {
		t.young = map[uint64]total{}
	}
	t.young[e.Cookie] = sum
	return e
}
