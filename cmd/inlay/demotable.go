package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// edge is one line of the live table: calls of one service to one version of another.
type edge struct{ from, to, version string }

// tally sums calls.
type tally struct {
	calls, failed, mtls uint64
	buckets             []uint64
}

func (t *tally) add(c *reportpb.CallCounter) {
	t.calls += c.Calls
	t.failed += c.Failed
	t.mtls += c.Mtls
	t.buckets = addBuckets(t.buckets, c.Buckets)
}

func addBuckets(sum, more []uint64) []uint64 {
	for len(sum) < len(more) {
		sum = append(sum, 0)
	}
	for i, n := range more {
		sum[i] += n
	}
	return sum
}

// minus is what came since an older tally of the same edge. Sums that shrank began anew with a
// control plane that was started again: everything in them is since.
func (t tally) minus(old tally) tally {
	if t.calls < old.calls || len(t.buckets) < len(old.buckets) {
		return t
	}
	out := tally{t.calls - old.calls, t.failed - old.failed, t.mtls - old.mtls, slices.Clone(t.buckets)}
	for i, n := range old.buckets {
		out.buckets[i] -= n
	}
	return out
}

// quantile estimates from the buckets of report.proto: bucket i ends at 2^i * 100 microseconds.
// Within a bucket calls are taken to lie evenly on a logarithmic scale. The result is in
// milliseconds; 0 when there were no calls.
func quantile(buckets []uint64, q float64) float64 {
	var total uint64
	for _, n := range buckets {
		total += n
	}
	if total == 0 {
		return 0
	}
	rank, below := q*float64(total), 0.0
	for i, n := range buckets {
		if n > 0 && below+float64(n) >= rank {
			within := (rank - below) / float64(n)
			return 0.1 * math.Exp2(float64(i)-1+within)
		}
		below += float64(n)
	}
	return 0.1 * math.Exp2(float64(len(buckets)-1))
}

// edges sums what clients reported, by edge.
func edges(c *adminpb.GetCountersResponse) map[edge]tally {
	out := map[edge]tally{}
	for _, s := range c.Services {
		for _, n := range s.Calls {
			if n.Direction != "client" {
				continue
			}
			e := edge{s.Service, n.Service, n.Version}
			t := out[e]
			t.add(n)
			out[e] = t
		}
	}
	return out
}

func summarize(c *adminpb.GetCountersResponse) demoSummary {
	var all tally
	s := demoSummary{Split: map[string]float64{}}
	split := map[string]uint64{}
	var placed uint64
	for e, t := range edges(c) {
		all.calls += t.calls
		all.failed += t.failed
		all.mtls += t.mtls
		all.buckets = addBuckets(all.buckets, t.buckets)
		if e.to == "orders" && e.version != "" {
			split[e.version] += t.calls
			placed += t.calls
		}
	}
	for _, svc := range c.Services {
		s.Uncounted += svc.Dropped
		for _, n := range svc.Calls {
			if n.Direction == "server" {
				s.Handled += n.Calls
			}
		}
	}
	s.Calls, s.Failed = all.calls, all.failed
	if all.calls > 0 {
		s.MTLSShare = float64(all.mtls) / float64(all.calls)
	}
	for v, n := range split {
		s.Split[v] = round(100*float64(n)/float64(placed), 2)
	}
	s.P50, s.P99 = round(quantile(all.buckets, 0.5), 3), round(quantile(all.buckets, 0.99), 3)
	return s
}

func round(x float64, digits int) float64 {
	p := math.Pow10(digits)
	return math.Round(x*p) / p
}

// screen draws the live table: in place on a terminal, below each other elsewhere.
type screen struct {
	w             io.Writer
	quiet, redraw bool
	last          map[edge]tally
	when          time.Time
	lines         int
}

func (s *screen) show(c *adminpb.GetCountersResponse) {
	now, at := edges(c), time.Now()
	if s.last == nil {
		s.last, s.when = now, at
		return
	}
	seconds := at.Sub(s.when).Seconds()
	if s.quiet || (!s.redraw && seconds < 4.5) {
		return
	}
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "from\tto\tversion\tcalls/s\terrors\tmTLS\tp50 ms\tp99 ms\tshare\t\n")
	since := map[edge]tally{}
	total := map[[2]string]uint64{}
	for e, t := range now {
		d := t.minus(s.last[e])
		since[e] = d
		total[[2]string{e.from, e.to}] += d.calls
	}
	for _, e := range slices.SortedFunc(maps.Keys(since), compareEdges) {
		t := since[e]
		if t.calls == 0 {
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%.0f\t%d\t%.0f %%\t%.2f\t%.2f\t%.1f %%\t\n", e.from, e.to, dash(e.version), float64(t.calls)/seconds, t.failed,
			100*float64(t.mtls)/float64(t.calls), quantile(t.buckets, 0.5), quantile(t.buckets, 0.99),
			100*float64(t.calls)/float64(total[[2]string{e.from, e.to}]))
	}
	_ = w.Flush() // into memory
	if s.redraw && s.lines > 0 {
		fmt.Fprintf(s.w, "\x1b[%dA\x1b[J", s.lines)
	} else {
		fmt.Fprintln(s.w)
	}
	s.lines = bytes.Count(b.Bytes(), []byte("\n"))
	_, _ = s.w.Write(b.Bytes())
	s.last, s.when = now, at
}

func compareEdges(a, b edge) int {
	return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to), cmp.Compare(a.version, b.version))
}

func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
