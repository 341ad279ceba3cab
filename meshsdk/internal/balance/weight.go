package balance

import (
	"math/bits"
	"sync/atomic"
)

// chooser draws an index by weight in constant time: uniformly when the weights are equal, else
// with Vose's alias table.
type chooser struct {
	n     uint64
	alias []column // nil when the weights are equal
}

// column: take the column's own index when the fraction is below keep, else other.
type column struct {
	keep  uint32
	other int32
}

func newChooser(weights []uint64) chooser {
	c := chooser{n: uint64(len(weights))}
	var total float64
	equal := true
	for _, w := range weights {
		total += float64(w)
		equal = equal && w == weights[0]
	}
	if equal {
		return c
	}
	c.alias = make([]column, len(weights))
	scaled := make([]float64, len(weights))
	var small, large []int
	for i, w := range weights {
		scaled[i] = float64(w) * float64(len(weights)) / total
		if scaled[i] < 1 {
			small = append(small, i)
		} else {
			large = append(large, i)
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		c.alias[s] = column{keep: uint32(scaled[s] * (1 << 32)), other: int32(l)}
		if scaled[l] -= 1 - scaled[s]; scaled[l] < 1 {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	for _, i := range append(small, large...) { // what rounding left over keeps its column
		c.alias[i] = column{keep: 1<<32 - 1, other: int32(i)}
	}
	return c
}

func (c *chooser) even() bool { return c.alias == nil }

// choose maps a uniform 64-bit value to an index.
func (c *chooser) choose(r uint64) int {
	hi, lo := bits.Mul64(r, c.n)
	if c.alias == nil {
		return int(hi)
	}
	// lo is uniform within the column that hi names.
	col := &c.alias[hi]
	if uint32(lo>>32) < col.keep {
		return int(hi)
	}
	return int(col.other)
}

// wheel is weighted round robin by one counter, without a schedule in memory and without a lock:
// the counter passes over all endpoints again and again, and an endpoint is taken in as many of the
// passes as its weight is to the greatest, spread evenly (the static stride scheduler of gRFC A58).
type wheel struct {
	weights []uint64 // scaled so that the greatest is full
}

const full = 1<<16 - 1

func newWheel(weights []uint64) *wheel {
	var most uint64
	for _, w := range weights {
		most = max(most, w)
	}
	w := &wheel{weights: make([]uint64, len(weights))}
	for i := range weights {
		w.weights[i] = max(weights[i]*full/most, 1)
	}
	return w
}

func (w *wheel) next(mark *atomic.Uint64) int {
	n := uint64(len(w.weights))
	for {
		seq := mark.Add(1) - 1
		i, pass := seq%n, seq/n
		weight := w.weights[i]
		// Offset by place, so that endpoints of equal weight do not sit out the same passes.
		if (weight*pass+i*full/2)%full >= full-weight {
			return int(i)
		}
	}
}
