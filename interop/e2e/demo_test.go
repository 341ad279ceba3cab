package e2e

import (
	"bytes"
	"encoding/json"
	"math"
	"os/exec"
	"testing"
)

// TestDemo: the demo's summary holds what it promises, counted at both ends.
func TestDemo(t *testing.T) {
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "demo", "--for", "20s", "-o", "json")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.Bytes())
	}
	var s struct {
		Calls     uint64
		Failed    uint64
		Handled   uint64
		MTLSShare float64 `json:"mtls_share"`
		Split     map[string]float64
		P50       float64 `json:"p50_ms"`
		P99       float64 `json:"p99_ms"`
	}
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	t.Logf("%s", out)
	if s.Calls == 0 || s.Failed != 0 || s.Handled != s.Calls || s.MTLSShare != 1 {
		t.Errorf("want calls, none failed, all handled, all with mutual TLS")
	}
	if len(s.Split) != 2 || math.Abs(s.Split["v1"]-90) > 3 || math.Abs(s.Split["v2"]-10) > 3 {
		t.Errorf("split %v, want 90/10 within 3 points", s.Split)
	}
	if s.P50 <= 0 || s.P99 < s.P50 {
		t.Errorf("p50 %v ms, p99 %v ms", s.P50, s.P99)
	}
}
