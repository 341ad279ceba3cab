package attest

import (
	"errors"
	"fmt"
)

// Stat is one process at one moment.
type Stat struct {
	Process
	PPID int // 0 for the first process of a namespace
	UID  uint32
}

// Table reads the processes of this machine. Proc is the real one.
type Table interface {
	// Stat returns what is known of the process with this number now; ErrNoProcess when there is none.
	Stat(pid int) (Stat, error)
}

// ErrNoProcess says that the process has ended, or that its number belongs to another one now.
var ErrNoProcess = errors.New("process has ended")

// maxDepth bounds a walk; Linux nests processes far less deep, a broken table might not end.
const maxDepth = 4096

// Walk returns p and its ancestors, the nearest first, each with its user. Every start time and
// every parent is read a second time afterwards: a number that was reused in between, at any step,
// fails the comparison, so that no process is ever taken for the ancestor of a stranger. A tree
// that changes meanwhile (a parent that ends hands its children on) is walked again, a few times.
func Walk(t Table, p Process) ([]Stat, error) {
	var last error
	for range 8 {
		chain, err := walkOnce(t, p)
		if err == nil {
			return chain, nil
		}
		if !errors.Is(err, errChanged) {
			return nil, err
		}
		last = err
	}
	return nil, fmt.Errorf("process %d: ancestors: %w", p.PID, last)
}

var errChanged = errors.New("the process tree keeps changing: try again")

func walkOnce(t Table, p Process) ([]Stat, error) {
	first, err := t.Stat(p.PID)
	if err != nil {
		return nil, err
	}
	if first.Process != p {
		return nil, fmt.Errorf("process %d started at tick %d, not %d: %w", p.PID, first.StartTime, p.StartTime, ErrNoProcess)
	}
	chain := []Stat{first}
	for cur := first; cur.PPID > 0; {
		if len(chain) > maxDepth {
			return nil, fmt.Errorf("process %d has more than %d ancestors", p.PID, maxDepth)
		}
		parent, err := t.Stat(cur.PPID)
		if errors.Is(err, ErrNoProcess) {
			return nil, errChanged // it ended between two readings
		}
		if err != nil {
			return nil, err
		}
		chain = append(chain, parent)
		cur = parent
	}
	for i, s := range chain {
		again, err := t.Stat(s.PID)
		switch {
		case i == 0 && errors.Is(err, ErrNoProcess):
			return nil, err
		case errors.Is(err, ErrNoProcess):
			return nil, errChanged
		case err != nil:
			return nil, err
		case again != s:
			return nil, errChanged // walked again; a p that was reused fails there
		}
	}
	return chain, nil
}
