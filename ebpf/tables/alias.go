package tables

import (
	"math"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// share is a backend with its part of the connections.
type share struct {
	backend bpfobj.InlayBackend
	weight  float64 // of any unit; above 0
}

// always is the cut of a slot that only ever gives its first backend.
const always = math.MaxUint32

// alias makes a table of as many slots as there are shares: a slot chosen evenly, then its first
// backend below the cut and the other above, gives each backend its weight (Vose, "A linear
// algorithm for generating random numbers with a given distribution", 1991). The same shares give
// the same table.
func alias(shares []share) []bpfobj.InlaySlot {
	n := len(shares)
	if n == 1 {
		return single(shares[0].backend)
	}
	slots := make([]bpfobj.InlaySlot, n)
	total := 0.0
	for i := range shares {
		total += shares[i].weight
	}
	part := make([]float64, n) // 1 is the even part
	var small, large []int
	for i := range shares {
		part[i] = shares[i].weight * float64(n) / total
		slots[i] = bpfobj.InlaySlot{Cut: always, A: shares[i].backend, B: shares[i].backend}
		if part[i] < 1 {
			small = append(small, i)
		} else {
			large = append(large, i)
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small, large = small[:len(small)-1], large[:len(large)-1]
		slots[s].Cut = cut(part[s])
		slots[s].B = shares[l].backend
		part[l] -= 1 - part[s]
		if part[l] < 1 {
			small = append(small, l)
		} else {
			large = append(large, l)
		}
	}
	return slots // what is left is 1 but for rounding
}

// single is the table of one backend.
func single(b bpfobj.InlayBackend) []bpfobj.InlaySlot {
	return []bpfobj.InlaySlot{{Cut: always, A: b, B: b}}
}

// cut is a probability below 1 as a part of 2^32.
func cut(p float64) uint32 {
	c := math.Round(p * (1 << 32))
	if c >= always {
		return always - 1 // always is a promise, this is not
	}
	return uint32(max(c, 0))
}
