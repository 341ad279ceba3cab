package identity_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/identity"
)

// wallClock is the clock of a machine that can be suspended: the wall goes on, timers do not.
type wallClock struct{ suspended atomic.Int64 }

func (c *wallClock) Now() time.Time {
	return time.Now().Round(0).Add(time.Duration(c.suspended.Load()))
}

func (*wallClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// A machine is suspended for two hours while somebody waits for half past: the moment is noticed
// within seconds of waking up, not after the rest of the half hour.
func TestWaitUntilLooksAtTheWall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := &wallClock{}
		reached := make(chan bool, 1)
		go func() { reached <- identity.WaitUntil(t.Context(), clock, clock.Now().Add(30*time.Minute), nil) }()
		time.Sleep(time.Minute) // of the bubble
		clock.suspended.Store(int64(2 * time.Hour))
		woke := time.Now()
		if !<-reached {
			t.Error("reported that it was woken")
		}
		if late := time.Since(woke); late > 5*time.Second {
			t.Errorf("noticed %s after the machine woke up, want at most 5s", late)
		}
	})
}

func TestWaitUntilEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		clock := &wallClock{}
		at := clock.Now().Add(12 * time.Second)
		if !identity.WaitUntil(t.Context(), clock, at, nil) || time.Since(began) != 12*time.Second {
			t.Errorf("waited %s, want exactly 12s", time.Since(began))
		}
		if !identity.WaitUntil(t.Context(), clock, at, nil) || time.Since(began) != 12*time.Second {
			t.Error("a moment that has passed was waited for")
		}
		woken := make(chan struct{}, 1)
		woken <- struct{}{}
		if identity.WaitUntil(t.Context(), clock, at.Add(time.Hour), woken) {
			t.Error("woken, and reported that the time has come")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 7*time.Second)
		defer cancel()
		if identity.WaitUntil(ctx, clock, at.Add(time.Hour), nil) || time.Since(began) != 19*time.Second {
			t.Errorf("ended after %s, want with its context after 19s", time.Since(began))
		}
	})
}
