package limit_test

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/inlay-mesh/inlay/meshsdk/internal/limit"
)

func TestLimiter(t *testing.T) {
	l := limit.New(2)
	for i := range 2 {
		if !l.Acquire() {
			t.Fatalf("a limit of 2 refuses number %d", i+1)
		}
	}
	if l.Acquire() {
		t.Error("a limit of 2 admits a third")
	}
	l.Release()
	if !l.Acquire() {
		t.Error("a place that was given back is not to be had")
	}
	l.SetMax(1)
	l.Release()
	if l.Acquire() {
		t.Error("a lowered limit admits one above it")
	}
	if l.InFlight() != 1 || l.Max() != 1 {
		t.Errorf("in flight %d of %d, want 1 of 1", l.InFlight(), l.Max())
	}
	if limit.New(0).Acquire() {
		t.Error("a limit of 0 admits one")
	}
}

func TestLimiterNeverAdmitsOneTooMany(t *testing.T) {
	const most = 5
	l := limit.New(most)
	var now, peak, admitted atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5000 {
				if !l.Acquire() {
					continue
				}
				admitted.Add(1)
				n := now.Add(1)
				for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
				}
				now.Add(-1)
				l.Release()
			}
		})
	}
	wg.Wait()
	if peak.Load() > most || admitted.Load() == 0 || l.InFlight() != 0 {
		t.Errorf("peak %d of %d, %d admitted, %d left in flight", peak.Load(), most, admitted.Load(), l.InFlight())
	}
}
