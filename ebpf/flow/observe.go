package flow

import (
	"context"

	"github.com/inlay-mesh/inlay/ebpf/flow/query"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// batch bounds how many flows an observer takes from the ring at once.
const batch = 256

// Observe sends the newest flows that the query of req selects, oldest first, and with follow those
// that come after, until ctx is done or send fails. An observer that reads more slowly than flows
// come loses the oldest, and is told how many of all flows it missed; it never holds up the log.
// A query that does not parse is a *query.Error; the end of ctx is its error.
func (l *Log) Observe(ctx context.Context, req *nodepb.ObserveRequest, send func(*nodepb.ObserveResponse) error) error {
	q, err := query.Parse(req.GetQuery())
	if err != nil {
		return err
	}
	kept, next := l.newest()
	if last := req.GetLast(); last > 0 {
		// From the newest back, until there are enough.
		i := len(kept)
		for found := uint32(0); i > 0 && found < last; i-- {
			if q.Match(kept[i-1].flow(kept[i-1].event)) {
				found++
			}
		}
		kept = kept[i:]
	}
	for i, n := range kept {
		kept[i] = nil // a slow observer holds no more than it has to
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := n.sendTo(q, send); err != nil {
			return err
		}
	}
	if !req.GetFollow() {
		return nil
	}
	for {
		fresh, missed, wake := l.after(&next)
		if missed > 0 {
			if err := send(&nodepb.ObserveResponse{Missed: missed}); err != nil {
				return err
			}
		}
		for _, n := range fresh {
			if err := n.sendTo(q, send); err != nil {
				return err
			}
		}
		if wake == nil {
			if err := ctx.Err(); err != nil {
				return err
			}
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-wake:
		}
	}
}

// sendTo sends the entry if q selects it.
func (n *entry) sendTo(q *query.Query, send func(*nodepb.ObserveResponse) error) error {
	f := n.flow(n.event)
	if !q.Match(f) {
		return nil
	}
	return send(&nodepb.ObserveResponse{Flow: f})
}

// newest returns every kept entry, oldest first, and the sequence number after the last.
func (l *Log) newest() ([]*entry, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*entry
	for n := l.tail(); n < l.head; n++ {
		out = append(out, l.ring[n%uint64(len(l.ring))])
	}
	return out, l.head
}

// tail is the sequence number of the oldest kept entry; mu is held.
func (l *Log) tail() uint64 {
	if size := uint64(len(l.ring)); l.head > size {
		return l.head - size
	}
	return 0
}

// after returns up to a batch of the entries from next on, advances it, and says how many were
// overwritten before they could be returned. Without any it returns a channel that is closed when
// there is one.
func (l *Log) after(next *uint64) (fresh []*entry, missed uint64, wake <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if tail := l.tail(); *next < tail {
		missed = tail - *next
		*next = tail
	}
	for ; *next < l.head && len(fresh) < batch; *next++ {
		fresh = append(fresh, l.ring[*next%uint64(len(l.ring))])
	}
	if fresh == nil && missed == 0 {
		if l.wake == nil {
			l.wake = make(chan struct{})
		}
		wake = l.wake
	}
	return fresh, missed, wake
}
