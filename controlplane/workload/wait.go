package workload

import (
	"context"
	"time"
)

// backoffFor is how long to wait after so many failures in a row: base, growing by 1.6 up to
// limit, with a jitter of a fifth either way. random is in [0, 1).
func backoffFor(failures int, base, limit time.Duration, random float64) time.Duration {
	d := float64(base)
	for range min(failures, 64) {
		d *= 1.6
	}
	return time.Duration(min(d, float64(limit)/1.2) * (0.8 + 0.4*random))
}

// sleep waits and reports whether the time has passed; false means that ctx ended or woken
// received first.
func sleep(ctx context.Context, clock Clock, d time.Duration, woken <-chan struct{}) bool {
	due := make(chan struct{})
	stop := clock.AfterFunc(d, func() { close(due) })
	defer stop()
	select {
	case <-due:
		return true
	case <-woken:
		return false
	case <-ctx.Done():
		return false
	}
}
