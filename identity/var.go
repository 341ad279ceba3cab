package identity

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Var is a Source whose SVID is set from outside. The zero Var is not usable; make it with NewVar.
// It is safe for concurrent use.
type Var struct {
	clock Clock

	mu      sync.Mutex
	svid    *SVID
	reason  error // why there is no newer one; nil when nobody said
	changed chan struct{}
	stop    func() bool // of the timer that tells of the expiry
}

// NewVar returns a Source without SVID, on the real clock.
func NewVar() *Var { return NewVarClock(nil) }

// NewVarClock is NewVar on another clock; nil is the real one.
func NewVarClock(clock Clock) *Var {
	if clock == nil {
		clock = realClock{}
	}
	return &Var{clock: clock, changed: make(chan struct{})}
}

// Static returns a Source that has this SVID until it expires, on the real clock.
func Static(s *SVID) Source {
	v := NewVar()
	v.Set(s)
	return v
}

// Set replaces the SVID; nil takes it away. Whoever waits is told.
func (v *Var) Set(s *SVID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.svid, v.reason = s, nil
	if v.stop != nil {
		v.stop()
		v.stop = nil
	}
	if s != nil {
		// Expiry is a change of Current too.
		v.stop = v.clock.AfterFunc(s.NotAfter().Sub(v.clock.Now()), func() { v.expire(s) })
	}
	v.tell()
}

// Fail says why no newer SVID comes. The one that is there stays until it expires.
func (v *Var) Fail(reason error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.reason = reason
}

// expire tells of the end of s. A clock that was set back is asked again instead.
func (v *Var) expire(s *SVID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.svid != s {
		return
	}
	if left := s.NotAfter().Sub(v.clock.Now()); left > 0 {
		v.stop = v.clock.AfterFunc(left, func() { v.expire(s) })
		return
	}
	v.tell()
}

func (v *Var) tell() {
	close(v.changed)
	v.changed = make(chan struct{})
}

// Current implements Source.
func (v *Var) Current() (*SVID, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.current()
}

func (v *Var) current() (*SVID, error) {
	now := v.clock.Now()
	switch {
	case v.svid != nil && now.Before(v.svid.NotAfter()):
		return v.svid, nil
	case v.svid != nil:
		err := fmt.Errorf("%w: the SVID of %s expired at %s", ErrNoIdentity, v.svid.ID, v.svid.NotAfter().Format(time.RFC3339))
		if v.reason != nil {
			err = fmt.Errorf("%w and was not renewed: %w", err, v.reason)
		}
		return nil, err
	case v.reason != nil:
		return nil, fmt.Errorf("%w: %w", ErrNoIdentity, v.reason)
	}
	return nil, fmt.Errorf("%w: none was received yet", ErrNoIdentity)
}

// Wait implements Source. When ctx ends first, the error says that and why there is no SVID.
func (v *Var) Wait(ctx context.Context) (*SVID, error) {
	for {
		v.mu.Lock()
		s, err := v.current()
		changed := v.changed
		v.mu.Unlock()
		if err == nil {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			v.mu.Lock()
			_, err = v.current()
			v.mu.Unlock()
			return nil, errors.Join(err, context.Cause(ctx))
		}
	}
}

// Updated implements Source.
func (v *Var) Updated() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}
