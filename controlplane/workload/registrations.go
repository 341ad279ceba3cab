package workload

import (
	"errors"
	"fmt"
	"sync"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

var (
	errOutside   = errors.New("outside every registration: start the program with: inlay run --service NAME -- CMD")
	errOtherUser = errors.New("of another user than the registration")
	errTaken     = errors.New("registered already")
)

// registration is one `inlay run`: every process below root is svc.
type registration struct {
	root  attest.Process
	uid   uint32
	svc   service
	runID string
	entry *entry        // the service's SVID
	ended chan struct{} // closed when it is no longer in the table, also when a successor took its place
}

// registrations is the table of those that are alive. It is safe for concurrent use.
type registrations struct {
	table attest.Table

	mu     sync.Mutex
	byRoot map[attest.Process]*registration
	byRun  map[string]*registration
}

func newRegistrations(t attest.Table) *registrations {
	return &registrations{table: t, byRoot: make(map[attest.Process]*registration), byRun: make(map[string]*registration)}
}

// add enters r. The same root may register again with the same run id: it has reconnected before
// the end of its old stream was seen, and the new registration takes the place of the old one.
func (t *registrations) add(r *registration) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.byRoot[r.root]
	if old != nil && old.runID != r.runID {
		return fmt.Errorf("process %d as %s with run id %q: %w: one process, one registration", r.root.PID, old.svc, old.runID, errTaken)
	}
	if old == nil && t.byRun[r.runID] != nil {
		return fmt.Errorf("run id %q by process %d: %w: choose another one", r.runID, t.byRun[r.runID].root.PID, errTaken)
	}
	t.byRoot[r.root], t.byRun[r.runID] = r, r
	if old != nil {
		close(old.ended)
	}
	return nil
}

// remove takes r out and reports whether it was still in: false means that a successor has its place.
func (t *registrations) remove(r *registration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byRoot[r.root] != r {
		return false
	}
	delete(t.byRoot, r.root)
	delete(t.byRun, r.runID)
	close(r.ended)
	return true
}

// find returns the registration of p for user uid: that of its nearest registered ancestor, never
// of p itself. A user other than the one who registered is refused.
func (t *registrations) find(p attest.Process, uid uint32) (*registration, error) {
	chain, err := attest.Walk(t.table, p)
	if err != nil {
		return nil, err
	}
	return t.nearest(chain, uid)
}

// findProcess is find for the user that the process table says p has.
func (t *registrations) findProcess(p attest.Process) (*registration, error) {
	chain, err := attest.Walk(t.table, p)
	if err != nil {
		return nil, err
	}
	return t.nearest(chain, chain[0].UID)
}

func (t *registrations) nearest(chain []attest.Stat, uid uint32) (*registration, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ancestor := range chain[1:] {
		r := t.byRoot[ancestor.Process]
		if r == nil {
			continue
		}
		if uid != r.uid {
			return nil, fmt.Errorf("process %d is of user %d, %s is run by user %d: %w", chain[0].PID, uid, r.svc, r.uid, errOtherUser)
		}
		return r, nil
	}
	return nil, fmt.Errorf("process %d is %w", chain[0].PID, errOutside)
}
