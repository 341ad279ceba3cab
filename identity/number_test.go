package identity_test

import (
	"testing"

	"github.com/inlay-mesh/inlay/identity"
)

func TestNumberIsPinned(t *testing.T) {
	// Kernel maps and logs of other releases hold these numbers: they never change.
	for name, tc := range map[string]struct {
		namespace, service string
		labels             map[string]string
		want               uint64
	}{
		"without labels": {"default", "orders", nil, 4927324550543876838},
		"with labels":    {"default", "orders", map[string]string{"version": "v2", "tier": "gold"}, 16242640989502658049},
	} {
		t.Run(name, func(t *testing.T) {
			if got := identity.Number(tc.namespace, tc.service, tc.labels); got != tc.want {
				t.Errorf("Number = %d, want %d", got, tc.want)
			}
		})
	}
}

func TestNumberTellsWorkloadsApart(t *testing.T) {
	seen := map[uint64]string{}
	for name, n := range map[string]uint64{
		"plain":              identity.Number("default", "orders", nil),
		"other namespace":    identity.Number("shop", "orders", nil),
		"other service":      identity.Number("default", "stock", nil),
		"shifted boundary":   identity.Number("defaul", "torders", nil),
		"label":              identity.Number("default", "orders", map[string]string{"a": "b"}),
		"label as key":       identity.Number("default", "orders", map[string]string{"ab": ""}),
		"two labels":         identity.Number("default", "orders", map[string]string{"a": "b", "c": "d"}),
		"two labels swapped": identity.Number("default", "orders", map[string]string{"a": "d", "c": "b"}),
	} {
		if n < 256 {
			t.Errorf("%s: %d is reserved", name, n)
		}
		if other, ok := seen[n]; ok {
			t.Errorf("%s and %s have the same number", name, other)
		}
		seen[n] = name
	}
	if identity.Number("a", "b", nil) != identity.Number("a", "b", map[string]string{}) {
		t.Error("nil and empty labels differ")
	}
}
