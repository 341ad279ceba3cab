package check_test

import (
	"strings"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

func object(t *testing.T) *check.Object {
	t.Helper()
	docs, findings := tree.Parse("f", []byte("metadata: {name: a}\nd: x\n"))
	if len(docs) != 1 || len(findings) != 0 {
		t.Fatal(findings)
	}
	return check.New(docs[0], "Thing")
}

// TestGatewayDuration takes the vectors of GEP-2257, section "Parsing".
func TestGatewayDuration(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0h": 0, "0s": 0, "0h0m0s": 0, "1h": time.Hour, "30m": 30 * time.Minute, "10s": 10 * time.Second, "500ms": 500 * time.Millisecond,
		"2h30m": 150 * time.Minute, "150m": 150 * time.Minute, "7230s": 2*time.Hour + 30*time.Second,
		"1h30m10s": time.Hour + 30*time.Minute + 10*time.Second, "10s30m1h": time.Hour + 30*time.Minute + 10*time.Second,
		"100ms200ms300ms": 600 * time.Millisecond, "99999h59m59s999ms": 100_000*time.Hour - time.Millisecond,
	} {
		o := object(t)
		if got := o.GatewayDuration(&in, "d"); got == nil || *got != want || len(o.Findings) > 0 {
			t.Errorf("%q = %v, findings %v; want %v", in, got, o.Findings, want)
		}
	}
	for _, in := range []string{"1", "1m1", "1d", "", "0", "1h30m10s20ms50h", "999999h", "1.5h", "-15m", "+15m", "1 h", "1us", "99999h99999h"} {
		o := object(t)
		if got := o.GatewayDuration(&in, "d"); got != nil || len(o.Findings) != 1 {
			t.Errorf("%q = %v, findings %v; want a fault", in, got, o.Findings)
		}
	}
	if o := object(t); o.GatewayDuration(nil, "d") != nil || len(o.Findings) > 0 {
		t.Error("a duration that was not written is judged")
	}
}

func TestDNSLabel(t *testing.T) {
	for s, want := range map[string]bool{
		"a": true, "a-b": true, "0": true, strings.Repeat("a", 63): true,
		"": false, "-a": false, "a-": false, "A": false, "a.b": false, "a_b": false, "ä": false, "a\n": false, strings.Repeat("a", 64): false,
	} {
		if got := check.IsDNSLabel(s); got != want {
			t.Errorf("IsDNSLabel(%q) = %v, want %v", s, got, want)
		}
	}
}

func TestNamespace(t *testing.T) {
	for s, want := range map[string]bool{"shop": true, "mesh": false, "localhost": false, "a.b": false} {
		o := object(t)
		if got := o.Namespace(s, "d"); got != want || (len(o.Findings) == 0) != want {
			t.Errorf("Namespace(%q) = %v, findings %v; want %v", s, got, o.Findings, want)
		}
	}
}

func TestLabelNamesTheObject(t *testing.T) {
	for text, want := range map[string]string{
		"metadata: {name: a}":                     `Thing "a"`,
		"metadata: {name: a, namespace: default}": `Thing "a"`,
		"metadata: {name: a, namespace: shop}":    `Thing "shop/a"`,
		"metadata: {name: 3}":                     `Thing`,
		"x: y":                                    `Thing`,
	} {
		docs, _ := tree.Parse("f", []byte(text))
		if got := check.New(docs[0], "Thing").Label; got != want {
			t.Errorf("%s: label %s, want %s", text, got, want)
		}
	}
}
