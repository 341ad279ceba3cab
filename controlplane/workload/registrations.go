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

// registration is one `inlay run`: every process below root is svc, or every process in its cgroup.
type registration struct {
	root   attest.Process
	uid    uint32
	svc    service
	runID  string
	cgroup string        // of a managed run: its processes are known by it, not by root; set before add
	entry  *entry        // the service's SVID
	ended  chan struct{} // closed when it is no longer in the table, also when a successor took its place
}

// registrations is the table of those that are alive. It is safe for concurrent use.
type registrations struct {
	table   attest.Table
	cgroups Cgroups // nil without managed runs

	mu     sync.Mutex
	byRoot map[attest.Process]*registration
	byRun  map[string]*registration
}

func newRegistrations(t attest.Table, c Cgroups) *registrations {
	return &registrations{table: t, cgroups: c, byRoot: make(map[attest.Process]*registration), byRun: make(map[string]*registration)}
}

// add enters r. The same root may register again with the same run id: it has reconnected before
// the end of its old stream was seen, and the new registration takes the place of the old one.
func (t *registrations) add(r *registration) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.taken(r); err != nil {
		return err
	}
	old := t.byRoot[r.root]
	t.byRoot[r.root], t.byRun[r.runID] = r, r
	if old != nil {
		close(old.ended)
	}
	return nil
}

// free returns the error that add would return.
func (t *registrations) free(r *registration) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.taken(r)
}

func (t *registrations) taken(r *registration) error {
	old := t.byRoot[r.root]
	switch {
	case old != nil && old.runID != r.runID:
		return fmt.Errorf("process %d as %s with run id %q: %w: one process, one registration", r.root.PID, old.svc, old.runID, errTaken)
	case old != nil && (old.svc != r.svc || old.uid != r.uid):
		return fmt.Errorf("run id %q as %s of user %d: %w: a reconnection says what the first stream said", r.runID, old.svc, old.uid, errTaken)
	case old == nil && t.byRun[r.runID] != nil:
		return fmt.Errorf("run id %q by process %d: %w: choose another one", r.runID, t.byRun[r.runID].root.PID, errTaken)
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

// find returns the registration of p for user uid: that of the cgroup it is in, else that of its
// nearest registered ancestor, never of p itself. A user other than the registration's is refused.
func (t *registrations) find(p attest.Process, uid uint32) (*registration, error) {
	r, managed, err := t.byCgroup(p, uid)
	if managed || err != nil {
		return r, err
	}
	chain, err := attest.Walk(t.table, p)
	if err != nil {
		return nil, err
	}
	return t.nearest(chain, uid)
}

// findProcess is find for the user that the process table says p has.
func (t *registrations) findProcess(p attest.Process) (*registration, error) {
	s, err := t.stat(p)
	if err != nil {
		return nil, err
	}
	return t.find(p, s.UID)
}

// stat reads the user of p, and fails when its number is another process's now.
func (t *registrations) stat(p attest.Process) (attest.Stat, error) {
	s, err := t.table.Stat(p.PID)
	if err == nil && s.Process != p {
		err = fmt.Errorf("process %d started at tick %d, not %d: %w", p.PID, s.StartTime, p.StartTime, attest.ErrNoProcess)
	}
	return s, err
}

// byCgroup returns the registration of the managed cgroup that p is in. managed is false for a
// process outside all of them.
func (t *registrations) byCgroup(p attest.Process, uid uint32) (r *registration, managed bool, err error) {
	if t.cgroups == nil {
		return nil, false, nil
	}
	runID, managed, err := t.cgroups.Find(p.PID)
	// The number must still be that of p now that its cgroup was read.
	if _, ended := t.stat(p); ended != nil {
		return nil, false, ended
	}
	if err != nil || !managed {
		return nil, false, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch r = t.byRun[runID]; {
	case r == nil || r.cgroup == "":
		return nil, true, fmt.Errorf("process %d is in the cgroup of run %q, which is not registered: it is %w", p.PID, runID, errOutside)
	case uid != r.uid:
		return nil, true, otherUser(p.PID, uid, r)
	}
	return r, true, nil
}

func (t *registrations) nearest(chain []attest.Stat, uid uint32) (*registration, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ancestor := range chain[1:] {
		r := t.byRoot[ancestor.Process]
		switch {
		case r == nil:
			continue
		case r.cgroup != "":
			return nil, fmt.Errorf("process %d has left the cgroup of %s: it is %w", chain[0].PID, r.svc, errOutside)
		case uid != r.uid:
			return nil, otherUser(chain[0].PID, uid, r)
		}
		return r, nil
	}
	return nil, fmt.Errorf("process %d is %w", chain[0].PID, errOutside)
}

func otherUser(pid int, uid uint32, r *registration) error {
	return fmt.Errorf("process %d is of user %d, %s is run by user %d: %w", pid, uid, r.svc, r.uid, errOtherUser)
}
