package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// TestYAMLOf: whatever strings and numbers the JSON holds, its YAML says the same.
func TestYAMLOf(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	words := []string{"", "true", "no", "~", "null", "12", "0x1f", "1e3", "0o7", "2026-01-02", ":", "- a", "a: b", "#x", " lead", "trail ", "a\nb", "\n", "tab\tin", "\t", "é☃", "\u2028", "%", "@", "`", "{", "[", "&a", "*a", "!t", "|", ">", "<<", "=", "'", `"`, `\`, "a\n  b\n", "...", "---"}
	text := func() string { return words[r.IntN(len(words))] + words[r.IntN(len(words))] }
	var value func(depth int) any
	value = func(depth int) any {
		switch k := r.IntN(7); {
		case k == 0 && depth > 0:
			list := []any{}
			for range r.IntN(4) {
				list = append(list, value(depth-1))
			}
			return list
		case k <= 2 && depth > 0:
			m := map[string]any{}
			for range r.IntN(4) {
				m[text()] = value(depth - 1)
			}
			return m
		case k == 3:
			return r.IntN(2) == 0
		case k == 4:
			return float64(r.IntN(1e6)) / 8
		case k == 5:
			return nil
		}
		return text()
	}
	for range 2000 {
		want := value(4)
		raw, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		out, err := yamlOf(raw)
		if err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		var got any
		if err := yaml.Unmarshal(out, &got); err != nil {
			t.Fatalf("%s\nbecame\n%s: %v", raw, out, err)
		}
		if again, err := json.Marshal(got); err != nil || !sameJSON(again, raw) {
			t.Fatalf("%s\nbecame\n%s\nwhich is %s (%v)", raw, out, again, err)
		}
	}
}

func sameJSON(a, b []byte) bool {
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}

// TestPrint: JSON has the names of the .proto, every field, and the same bytes each time; YAML is
// the same in block style.
func TestPrint(t *testing.T) {
	m := &adminpb.ListEndpointsResponse{Endpoints: []*adminpb.Endpoint{{Service: "a", InstanceId: "i-1", Labels: map[string]string{"b": "2", "a": "true"}}}}
	table := func(w *tabwriter.Writer) { fmt.Fprintln(w, "a\ttable") }
	outputs := map[format]string{}
	for _, f := range []format{formatTable, formatJSON, formatYAML} {
		for range 20 {
			var b bytes.Buffer
			if err := f.print(&b, m, table); err != nil {
				t.Fatal(err)
			}
			if before, ok := outputs[f]; ok && before != b.String() {
				t.Fatalf("%q: printed\n%s\nthen\n%s", f, before, b.String())
			}
			outputs[f] = b.String()
		}
	}
	if outputs[formatTable] != "a  table\n" {
		t.Errorf("table %q", outputs[formatTable])
	}
	for _, want := range []string{`"instance_id": "i-1"`, `"unreachable": ""`, `"lease_expires": null`} {
		if !strings.Contains(outputs[formatJSON], want) {
			t.Errorf("no %s in\n%s", want, outputs[formatJSON])
		}
	}
	for _, want := range []string{"instance_id: i-1\n", "unreachable: \"\"\n", `a: "true"`} {
		if !strings.Contains(outputs[formatYAML], want) {
			t.Errorf("no %s in\n%s", want, outputs[formatYAML])
		}
	}
}

func TestFormat(t *testing.T) {
	var f format
	if err := f.Set("yaml"); err != nil || f != formatYAML {
		t.Errorf("yaml: %q, %v", f, err)
	}
	for _, wrong := range []string{"", "table", "JSON", "xml"} {
		if err := f.Set(wrong); err == nil {
			t.Errorf("%q is taken", wrong)
		}
	}
}

func TestQuantile(t *testing.T) {
	for name, tc := range map[string]struct {
		buckets []uint64
		q, want float64
	}{
		"no calls":                       {nil, 0.99, 0},
		"no calls in any bucket":         {[]uint64{0, 0}, 0.5, 0},
		"all of one bucket, its end":     {[]uint64{0, 0, 8}, 1, 0.4},
		"all of one bucket, its middle":  {[]uint64{0, 0, 8}, 0.5, 0.2 * math.Sqrt2},
		"the median between two buckets": {[]uint64{5, 5}, 0.5, 0.1},
		"one slow call of a hundred":     {[]uint64{99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, 0.99, 0.1},
		"and the slowest":                {[]uint64{99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, 1, 102.4},
	} {
		t.Run(name, func(t *testing.T) {
			if got := quantile(tc.buckets, tc.q); math.Abs(got-tc.want) > 1e-9 {
				t.Errorf("quantile %v is %v ms, want %v", tc.q, got, tc.want)
			}
		})
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	for range 500 { // never falls as q grows, never leaves the buckets
		b := make([]uint64, 1+r.IntN(20))
		for i := range b {
			b[i] = uint64(r.IntN(4))
		}
		before := 0.0
		for q := 0.0; q <= 1; q += 0.05 {
			got := quantile(b, q)
			if got < before || got > 0.1*math.Exp2(float64(len(b)-1)) {
				t.Fatalf("quantile %v of %v is %v after %v", q, b, got, before)
			}
			before = got
		}
	}
}

func counters() *adminpb.GetCountersResponse {
	call := func(direction, service, version string, calls, failed, mtls uint64, buckets ...uint64) *reportpb.CallCounter {
		return &reportpb.CallCounter{Direction: direction, Service: service, Version: version, Calls: calls, Failed: failed, Mtls: mtls, Buckets: buckets}
	}
	return &adminpb.GetCountersResponse{Services: []*adminpb.ServiceCounters{
		{Service: "web", Dropped: 2, Calls: []*reportpb.CallCounter{
			call("client", "orders", "v1", 80, 0, 80, 0, 80), call("client", "orders", "v1", 10, 1, 9, 0, 10), call("client", "orders", "v2", 10, 0, 10, 10),
			call("client", "orders", "", 1, 1, 0), call("client", "cart", "", 99, 0, 99, 0, 0, 99),
		}},
		{Service: "orders", Calls: []*reportpb.CallCounter{call("server", "orders", "v1", 100, 0, 100), call("server", "orders", "v2", 10, 0, 10)}},
		{Service: "cart", Dropped: 1, Calls: []*reportpb.CallCounter{call("server", "cart", "", 99, 0, 99)}},
	}}
}

func TestSummarize(t *testing.T) {
	s := summarize(counters())
	if s.Calls != 200 || s.Failed != 2 || s.Handled != 209 || s.Uncounted != 3 {
		t.Errorf("%+v, want 200 calls, 2 failed, 209 handled, 3 uncounted", s)
	}
	if s.MTLSShare != 0.99 {
		t.Errorf("mtls_share %v, want 0.99", s.MTLSShare)
	}
	if len(s.Split) != 2 || s.Split["v1"] != 90 || s.Split["v2"] != 10 {
		t.Errorf("split %v, want 90/10 of the calls that reached a version", s.Split)
	}
	if s.P50 <= 0.1 || s.P50 > 0.2 || s.P99 <= 0.2 || s.P99 > 0.4 {
		t.Errorf("p50 %v ms, p99 %v ms", s.P50, s.P99)
	}
	if none := summarize(&adminpb.GetCountersResponse{}); none.Calls != 0 || none.MTLSShare != 0 || none.Split == nil {
		t.Errorf("of nothing: %+v", none)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{"calls", "failed", "mtls_share", "split", "p50_ms", "p99_ms"} { // the issue's
		if !bytes.Contains(raw, []byte(`"`+field+`":`)) {
			t.Errorf("no field %s in %s", field, raw)
		}
	}
}

func TestEdges(t *testing.T) {
	got := edges(counters())
	if len(got) != 4 {
		t.Fatalf("%d edges, want 4: servers' counts are not edges", len(got))
	}
	v1 := got[edge{"web", "orders", "v1"}]
	if v1.calls != 90 || v1.failed != 1 || v1.mtls != 89 || v1.buckets[1] != 90 {
		t.Errorf("web to orders v1: %+v", v1)
	}
	more := v1.minus(tally{calls: 50, failed: 1, mtls: 50, buckets: []uint64{0, 50}})
	if more.calls != 40 || more.failed != 0 || more.mtls != 39 || more.buckets[1] != 40 || v1.buckets[1] != 90 {
		t.Errorf("since 50 of them: %+v; before %+v", more, v1)
	}
	again := v1.minus(tally{calls: 1000, buckets: []uint64{500, 400, 100}})
	if again.calls != 90 || again.buckets[1] != 90 {
		t.Errorf("after the counts began anew: %+v, want all of them", again)
	}
}

// TestScreen: the live table shows what came since the last one, edges in order.
func TestScreen(t *testing.T) {
	var b bytes.Buffer
	s := screen{w: &b, redraw: true}
	s.show(&adminpb.GetCountersResponse{})
	s.when = s.when.Add(-time.Second)
	s.show(counters())
	text := b.String()
	cart, orders := strings.Index(text, "cart"), strings.Index(text, "orders")
	if cart < 0 || orders < cart || !strings.Contains(text, "v2") {
		t.Errorf("the table is\n%s", text)
	}
	b.Reset()
	s.when = s.when.Add(-time.Second)
	s.show(counters())
	if text := b.String(); strings.Contains(text, "orders") || !strings.HasPrefix(text, "\x1b[") {
		t.Errorf("nothing came since, and it is drawn in place; it is\n%q", text)
	}
}
