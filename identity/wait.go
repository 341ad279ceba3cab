package identity

import (
	"context"
	"time"
)

// napMax bounds one sleep of WaitUntil.
const napMax = 5 * time.Second

// WaitUntil waits until the clock on the wall shows at, and reports true; false when ctx ended or
// woken received first. A nil woken never does.
//
// It is for moments in the life of a certificate. A timer stands still while the machine is
// suspended; certificates grow old meanwhile, and a laptop that wakes up after an hour must renew
// at once, not half an hour later. So the wall is looked at every few seconds.
func WaitUntil(ctx context.Context, clock Clock, at time.Time, woken <-chan struct{}) bool {
	at = at.Round(0) // without its monotonic reading
	for ctx.Err() == nil {
		left := at.Sub(clock.Now().Round(0))
		if left <= 0 {
			return true
		}
		due := make(chan struct{})
		stop := clock.AfterFunc(min(left, napMax), func() { close(due) })
		select {
		case <-due:
		case <-woken:
			stop()
			return false
		case <-ctx.Done():
			stop()
		}
	}
	return false
}
