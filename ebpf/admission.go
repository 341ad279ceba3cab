package ebpf

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/tables"
	"github.com/inlay-mesh/inlay/identity"
)

// ErrRefused is in the chain of Admit's error when the admission breaks a rule and will be refused
// however often it is tried.
var ErrRefused = errors.New("registration refused")

// Times of admissions.
const (
	// policyWait is how long an admission waits for the policies of its service. The control plane's
	// silence counts as its word after the resource timer (15 s), so this is a little more.
	policyWait = 20 * time.Second
	// claimWait is how long a restarted agent keeps an empty cgroup for whoever registered it.
	claimWait = 30 * time.Second
)

// Admission is one program that is to run as a workload. Who may run which service has been
// decided before.
type Admission struct {
	// RunID names the registration, for ever: 1 to 64 letters, digits, - and _.
	RunID              string
	Namespace, Service string
	// Version is the label "version"; empty when it has none, or stands in Labels.
	Version string
	Labels  map[string]string
	// UID that the program runs as.
	UID uint32
	// Raw grants raw sockets.
	Raw bool
	// Cgroup is what Admit returned before, when the caller reconnects; empty asks for a new one.
	Cgroup string
}

// workload is one registered cgroup.
type workload struct {
	Admission             // Cgroup is the absolute path
	admitted    time.Time // the first time
	id          uint64    // of the cgroup; 0 until it exists
	labels      map[string]string
	left        bool // the registration ended: it goes once it is empty
	claimed     bool // asked for in the life of this agent
	tableKnows  bool
	refusedText string
}

func (w *workload) service() string { return w.Namespace + "/" + w.Service }

// leaf is the name of the cgroup, which people read in ps and systemd-cgls.
func (in Admission) leaf() string { return in.Service + "." + in.Namespace + "-" + in.RunID }

// check refuses words that could not be what they say.
func (in Admission) check() (labels map[string]string, err error) {
	var faults []error
	if in.RunID == "" || len(in.RunID) > 64 || strings.Trim(in.RunID, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
		faults = append(faults, fmt.Errorf("run id %.80q: want 1 to 64 letters, digits, - or _", in.RunID))
	}
	if err := identity.CheckService(in.Namespace, in.Service); err != nil {
		faults = append(faults, err)
	}
	labels = maps.Clone(in.Labels)
	switch v, ok := labels["version"]; {
	case in.Version == "":
	case ok && v != in.Version:
		faults = append(faults, fmt.Errorf("version %.80q and label version %.80q: want one of them, or the same", in.Version, v))
	default:
		if labels == nil {
			labels = map[string]string{}
		}
		labels["version"] = in.Version
	}
	return labels, errors.Join(faults...)
}

// same refuses a registration under the run id of another one.
func (w *workload) same(in Admission, labels map[string]string) error {
	switch {
	case w.Namespace != in.Namespace || w.Service != in.Service:
		return fmt.Errorf("run %s is %s.%s, not %s.%s: a run keeps its service", in.RunID, w.Service, w.Namespace, in.Service, in.Namespace)
	case w.UID != in.UID:
		return fmt.Errorf("run %s belongs to user %d, not %d: a run keeps its user", in.RunID, w.UID, in.UID)
	case !maps.Equal(w.labels, labels):
		return fmt.Errorf("run %s has the labels %v, not %v: a run keeps its labels", in.RunID, w.labels, labels)
	case w.Raw != in.Raw:
		return fmt.Errorf("run %s was granted raw sockets: %v, and asks now: %v: a run keeps what it was granted", in.RunID, w.Raw, in.Raw)
	}
	return nil
}

// judge decides on an admission, and returns the workload that it stands for: one that is known
// already, or a new one. exists tells whether a cgroup is there.
func judge(known map[string]*workload, root string, in Admission, labels map[string]string, exists func(string) bool) (*workload, error) {
	mine := known[in.RunID]
	if in.Cgroup != "" {
		path := filepath.Clean(in.Cgroup)
		if path != in.Cgroup || filepath.Dir(path) != root {
			return nil, fmt.Errorf("cgroup %.200q is outside the managed root: want a cgroup directly below %s", in.Cgroup, root)
		}
		for _, w := range known {
			if w.Cgroup == path && w != mine {
				return nil, fmt.Errorf("cgroup %s is another's: it belongs to run %s of %s.%s", path, w.RunID, w.Service, w.Namespace)
			}
		}
		switch {
		case mine == nil:
			return nil, fmt.Errorf("cgroup %s is unknown: this agent gave it to nobody under run %s: register without a cgroup to get a new one", path, in.RunID)
		case mine.Cgroup != path:
			return nil, fmt.Errorf("cgroup %s is not that of run %s: it was given %s", path, in.RunID, mine.Cgroup)
		case !exists(path):
			return nil, fmt.Errorf("cgroup %s is gone: register without a cgroup to get a new one", path)
		}
	}
	if mine != nil {
		return mine, mine.same(in, labels)
	}
	in.Cgroup = filepath.Join(root, in.leaf())
	return &workload{Admission: in, labels: labels}, nil
}

// Admit makes the cgroup of a workload, or finds it again after a reconnection, and returns its
// absolute path. When it returns, whatever starts in the cgroup is the workload, and the policies of
// its service hold: Admit waits for them, at most 20 s, and fails rather than admit a program whose
// policies nobody knows. A refusal by rule has ErrRefused in its chain; whoever asked writes it down,
// since it knows who asked.
func (a *Agent) Admit(ctx context.Context, in Admission) (cgroup string, err error) {
	labels, err := in.check()
	if err != nil {
		return "", refusal(err)
	}
	select {
	case <-a.ready:
	case <-ctx.Done():
		return "", fmt.Errorf("admit %s.%s: the node agent has not started: %w", in.Service, in.Namespace, context.Cause(ctx))
	}
	if a.set == nil {
		return "", fmt.Errorf("this node runs without programs (--allow-unmanaged): %w", a.unsupported)
	}
	// Before anything is made: it may fail, and takes time.
	service := in.Namespace + "/" + in.Service
	a.host(service)
	defer a.unhost(service)
	if err := a.awaitPolicies(ctx, service); err != nil {
		return "", fmt.Errorf("admit %s.%s: %w", in.Service, in.Namespace, err)
	}

	a.writing.Lock()
	defer a.writing.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	w, err := judge(a.workloads, a.cgroups.root, in, labels, a.cgroups.exists)
	if err != nil {
		return "", refusal(err)
	}
	_, known := a.workloads[in.RunID]
	left := w.left
	w.left, w.claimed = false, true
	if !known {
		w.admitted = a.cfg.Clock.Now()
		a.workloads[in.RunID] = w
		a.hostLocked(w.service())
	}
	undo := func() {
		w.left = left
		if !known {
			a.forget(w)
			err = errors.Join(err, a.saveWorkloads())
		}
	}
	// The file comes first: a cgroup that no file remembers would be nobody's after a crash.
	if !known || left {
		if err = a.saveWorkloads(); err != nil {
			err = fmt.Errorf("admit %s.%s: %w", in.Service, in.Namespace, err)
			undo()
			return "", err
		}
	}
	if err = a.enter(ctx, w); err != nil {
		err = fmt.Errorf("admit %s.%s: %w", in.Service, in.Namespace, err)
		undo()
		return "", err
	}
	if !known {
		a.log.InfoContext(ctx, "workload admitted", "run_id", w.RunID, "namespace", w.Namespace, "service", w.Service,
			"uid", w.UID, "cgroup", w.Cgroup, "raw_sockets", w.Raw)
	}
	return w.Cgroup, nil
}

// enter makes the cgroup and tells the programs whose it is. Both locks are held.
func (a *Agent) enter(ctx context.Context, w *workload) error {
	if !w.tableKnows && a.cgroups.exists(w.Cgroup) {
		populated, err := a.cgroups.populated(w.Cgroup)
		if err != nil {
			return fmt.Errorf("cgroup %s is there, and whether it holds processes is not to be seen: %w", w.Cgroup, err)
		}
		if populated {
			return fmt.Errorf("cgroup %s is there and holds processes that no registration is known for: end them first", w.Cgroup)
		}
	}
	id, made, err := a.cgroups.make(w.Cgroup)
	if err != nil {
		return err
	}
	if w.tableKnows && w.id != id {
		a.table.DeleteWorkload(w.id) // it had been removed
	}
	w.id = id
	a.tell(w)
	err = a.commit(ctx)
	if w.refusedText == "" {
		return nil // what else found no room has been told, and is tried again
	}
	err = errors.Join(errors.New(w.refusedText), err)
	if made {
		err = errors.Join(err, a.cgroups.remove(w.Cgroup))
	}
	return err
}

// tell gives a workload to the table. The lock is held.
func (a *Agent) tell(w *workload) {
	w.refusedText, w.tableKnows = "", true
	a.table.SetWorkload(w.id, w.inTable())
}

func (w *workload) inTable() tables.Workload {
	return tables.Workload{Namespace: w.Namespace, Service: w.Service, Labels: w.labels, UID: w.UID, Raw: w.Raw, RunID: w.RunID, Path: w.Cgroup}
}

// forget drops a workload. The lock is held.
func (a *Agent) forget(w *workload) {
	if w.tableKnows {
		a.table.DeleteWorkload(w.id)
		signal(a.dirty)
	}
	delete(a.workloads, w.RunID)
	delete(a.told, "refused "+w.RunID)
	a.unhostLocked(w.service())
}

// refusal is the error of what a rule forbids.
func refusal(why error) error { return fmt.Errorf("%w: %w", ErrRefused, why) }

// Leave ends a registration. What still runs in its cgroup stays the workload; the cgroup goes with
// the last process in it. An unknown run id is no fault. Leave does not wait.
func (a *Agent) Leave(runID string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.workloads[runID]
	if w == nil || w.left {
		return
	}
	w.left = true
	if err := a.saveWorkloads(); err != nil {
		a.log.Warn("end of a registration not remembered: a restarted agent keeps the cgroup a while longer", "run_id", runID, "err", err)
	}
	signal(a.reap)
}

// Find tells which registration a process belongs to, by its cgroup: that of the workload, or one
// below it. ok is false for a process outside every workload. It fails when the process is gone.
func (a *Agent) Find(pid int) (runID string, ok bool, err error) {
	select {
	case <-a.ready:
	default:
		return "", false, nil
	}
	if a.set == nil {
		return "", false, nil
	}
	path, err := a.cgroups.of(pid)
	if err != nil {
		return "", false, err
	}
	leaf, ok := leafOf(a.cgroups.root, path)
	if !ok {
		return "", false, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range a.workloads {
		if w.Cgroup == leaf && w.tableKnows {
			return w.RunID, true, nil
		}
	}
	return "", false, nil
}

// reapLoop removes cgroups that are empty and nobody's any more.
func (a *Agent) reapLoop(ctx context.Context) error {
	for {
		select {
		case <-a.reap:
			a.reapNow(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// over says whether a workload is to go, when its cgroup is empty.
func (w *workload) over(now, started time.Time) bool {
	return w.left || !w.claimed && now.Sub(started) >= claimWait
}

func (a *Agent) reapNow(ctx context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now, changed := a.cfg.Clock.Now(), false
	for _, id := range slices.Sorted(maps.Keys(a.workloads)) {
		w := a.workloads[id]
		there := a.cgroups.exists(w.Cgroup)
		if there && !w.over(now, a.started) {
			continue
		}
		if there {
			populated, err := a.cgroups.populated(w.Cgroup)
			if err == nil && !populated {
				err = a.cgroups.remove(w.Cgroup)
			}
			if populated || err != nil && !errors.Is(err, os.ErrNotExist) {
				continue // its processes have not quite gone; the next round tries again
			}
		}
		a.forget(w)
		changed = true
		a.log.InfoContext(ctx, "workload gone", "run_id", w.RunID, "namespace", w.Namespace, "service", w.Service, "cgroup", w.Cgroup)
	}
	if changed {
		if err := a.saveWorkloads(); err != nil {
			a.log.WarnContext(ctx, "state not saved", "err", err)
		}
	}
}
