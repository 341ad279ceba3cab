package retry

import (
	"math"
	"sync/atomic"
	"time"
)

// BudgetConfig says how many retries a cluster may get.
type BudgetConfig struct {
	// Percent of the calls of the last ten seconds that may be retried. Zero means 20; negative
	// means none. Source: Envoy, RetryBudget.budget_percent, "This parameter is optional. Defaults
	// to 20%".
	Percent float64
	// MinPerSecond retries are always allowed. Zero means 3 and negative none; 3 as Envoy's min_retry_concurrency ("The
	// limit on the number of active retries may never go below this number. This parameter is
	// optional. Defaults to 3."): without a floor a cluster with few calls could never retry.
	MinPerSecond int64
}

// window is how long a call counts, in slots of one second.
const window = 10

// Budget bounds the retries to one cluster to a share of the calls to it, with a floor for each
// second. It is safe for concurrent use, takes no lock and allocates nothing.
//
// What it holds: retries granted <= Percent/100 * calls + MinPerSecond * seconds. A retry stays in
// the window at least as long as any call that allowed it, so no call is counted twice.
type Budget struct {
	perMille atomic.Int64 // of the calls, in 1/1000
	floor    atomic.Uint32
	epoch    time.Time
	calls    [window]slot
	retries  [window]slot
}

// slot counts within one second: the second above, the count below, in one word, so that a count
// is never added to a second it does not belong to.
type slot struct{ v atomic.Uint64 }

func (s *slot) add(second uint64) {
	for {
		v := s.v.Load()
		if v>>32 == second {
			s.v.Add(1)
			return
		}
		if s.v.CompareAndSwap(v, second<<32|1) {
			return
		}
	}
}

func (s *slot) count(second uint64) int64 {
	if v := s.v.Load(); v>>32 == second {
		return int64(v & (1<<32 - 1))
	}
	return 0
}

// take is add unless the second already holds limit; limit < 0 means no limit.
func (s *slot) take(second uint64, limit int64) bool {
	for {
		v := s.v.Load()
		next := second<<32 | 1
		if v>>32 == second {
			if n := int64(v & (1<<32 - 1)); limit >= 0 && n >= limit {
				return false
			}
			next = v + 1
		} else if limit == 0 {
			return false
		}
		if s.v.CompareAndSwap(v, next) {
			return true
		}
	}
}

func (s *slot) giveBack(second uint64) {
	for {
		v := s.v.Load()
		if v>>32 != second || v&(1<<32-1) == 0 {
			return
		}
		if s.v.CompareAndSwap(v, v-1) {
			return
		}
	}
}

// NewBudget returns a full budget. Times given to it later are measured from epoch.
func NewBudget(cfg BudgetConfig, epoch time.Time) *Budget {
	// One window before epoch, so that second 0, which empty slots hold, is always in the past.
	b := &Budget{epoch: epoch.Add(-2 * window * time.Second)}
	b.Set(cfg)
	return b
}

// Set changes the bounds and keeps what was counted.
func (b *Budget) Set(cfg BudgetConfig) {
	if cfg.Percent == 0 {
		cfg.Percent = 20
	}
	if cfg.MinPerSecond == 0 {
		cfg.MinPerSecond = 3
	}
	b.perMille.Store(int64(max(cfg.Percent, 0) * 10))
	b.floor.Store(uint32(min(max(cfg.MinPerSecond, 0), math.MaxUint32)))
}

func (b *Budget) second(now time.Time) uint64 {
	return uint64(max(now.Sub(b.epoch)/time.Second, 0))
}

// Call counts a call (not its retries).
func (b *Budget) Call(now time.Time) {
	s := b.second(now)
	b.calls[s%window].add(s)
}

// Take reports whether one retry may be made, and counts it when so.
func (b *Budget) Take(now time.Time) bool {
	s := b.second(now)
	here := &b.retries[s%window]
	if here.take(s, int64(b.floor.Load())) {
		return true
	}
	// Count first, look afterwards: retries that ask at once may be refused together, but the share
	// is never exceeded.
	here.take(s, -1)
	var calls, retries int64
	for i := range uint64(window) {
		calls += b.calls[(s-i)%window].count(s - i)
		retries += b.retries[(s-i)%window].count(s - i)
	}
	if retries*1000 > calls*b.perMille.Load() {
		here.giveBack(s)
		return false
	}
	return true
}
