package ebpf

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/tables"
	"github.com/inlay-mesh/inlay/xds"
)

// Times of the loops.
const (
	// commitWait gathers news of the control plane before they are written.
	commitWait = 5 * time.Millisecond
	// sweepEvery is the time between two looks at all sockets: samples of long connections, and
	// connections that are older than the agent.
	sweepEvery = 10 * time.Second
	// retryEvery is the time between two tries to write what found no room.
	retryEvery = 10 * time.Second
	// countEvery is the time between two counts of the maps that programs fill.
	countEvery = 30 * time.Second
)

// attach brings the programs up, with the last known state in their maps.
func (a *Agent) attach(ctx context.Context) error {
	root, err := a.rooms.resolve(a.cfg.Cgroup)
	if err != nil {
		return err
	}
	if err := errors.Join(checkOwn("run directory", a.cfg.RunDir), openState(a.cfg.StateDir)); err != nil {
		return err
	}
	workloads, err := a.loadWorkloads(root)
	if err != nil {
		return err
	}
	cache := a.openCache()
	if cache != nil {
		a.confirmed = a.loadConfirmed(cache)
	}
	cg, err := a.rooms.cgroups(root)
	if err != nil {
		return err
	}
	a.set, err = a.rooms.open(load.Config{
		Cgroup: a.cfg.Cgroup, Pin: a.cfg.Pin, MapSizes: a.cfg.MapSizes, Stats: a.cfg.Stats, Handover: a.handover(ctx), Log: a.log,
	}, func(maps *bpfobj.InlayMaps) error {
		t, err := a.rooms.table(maps, tables.Config{Log: a.log})
		if err != nil {
			return err
		}
		a.adopt(ctx, cg, workloads)
		if err := a.fill(t, cache, workloads); err != nil {
			a.log.ErrorContext(ctx, "part of the last known state cannot be used", "err", err)
		}
		a.table = t
		a.mu.Lock()
		defer a.mu.Unlock()
		// What finds no room is told, and closed: to run without programs would open it.
		change, err := t.Commit()
		a.react(ctx, change, err)
		return nil
	})
	if err != nil {
		return errors.Join(err, cg.Close())
	}
	a.cgroups = cg
	if err := a.begin(cache, workloads); err != nil {
		return errors.Join(err, a.set.Close(), cg.Close())
	}
	return nil
}

// begin watches what the workloads need of the control plane; nothing is asked before the client runs.
func (a *Agent) begin(cache *xds.Cache, workloads map[string]*workload) (err error) {
	if a.client, err = a.newClient(cache); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range workloads {
		a.workloads[w.RunID] = w
		a.hostLocked(w.service())
	}
	a.client.WatchAll(ServiceType, services{a})
	return a.saveWorkloads()
}

// adopt looks which cgroups of the workloads that an agent before knew are still there, and drops
// the others.
func (a *Agent) adopt(ctx context.Context, cg *cgroups, workloads map[string]*workload) {
	mine := map[string]bool{}
	for id, w := range workloads {
		if !cg.exists(w.Cgroup) {
			delete(workloads, id)
			a.log.InfoContext(ctx, "workload gone", "run_id", w.RunID, "namespace", w.Namespace, "service", w.Service, "cgroup", w.Cgroup)
			continue
		}
		var err error
		if w.id, _, err = cg.make(w.Cgroup); err != nil {
			delete(workloads, id)
			a.log.ErrorContext(ctx, "cgroup of a workload cannot be used", "run_id", w.RunID, "cgroup", w.Cgroup, "err", err)
			continue
		}
		mine[w.Cgroup] = true
	}
	leaves, err := cg.leaves()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		a.log.WarnContext(ctx, "managed cgroup cannot be listed", "err", err)
	}
	for _, leaf := range leaves {
		if mine[leaf] {
			continue
		}
		if populated, err := cg.populated(leaf); err != nil || populated {
			a.log.WarnContext(ctx, "cgroup below the managed root is no registration's: what runs there is unmanaged", "cgroup", leaf, "err", err)
		} else if err := cg.remove(leaf); err == nil {
			a.log.InfoContext(ctx, "empty cgroup removed", "cgroup", leaf)
		}
	}
}

// applyLoop writes what the control plane says, a few milliseconds after it said it.
func (a *Agent) applyLoop(ctx context.Context) error {
	for {
		select {
		case <-a.dirty:
		case <-ctx.Done():
			return nil
		}
		due := make(chan struct{})
		stop := a.cfg.Clock.AfterFunc(commitWait, func() { close(due) })
		select {
		case <-due:
		case <-ctx.Done():
			stop()
			return nil
		}
		a.apply(ctx)
	}
}

// apply writes what is set, and does what follows.
func (a *Agent) apply(ctx context.Context) {
	a.writing.Lock()
	defer a.writing.Unlock()
	change, err := a.table.Commit()
	a.mu.Lock()
	a.react(ctx, change, err)
	prune := a.synced && !a.pruned && a.allKnown()
	a.mu.Unlock()
	if prune {
		a.prune(ctx)
	}
}

// prune drops what the maps hold beyond what is wanted, once that is known whole. The lock of writes is held.
func (a *Agent) prune(ctx context.Context) {
	var change tables.Change
	err := a.table.Prune()
	whole := err == nil
	if whole {
		change, err = a.table.Commit()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pruned = a.pruned || whole
	a.react(ctx, change, err)
	if whole {
		a.log.InfoContext(ctx, "state of the control plane is whole", "services", a.table.Services())
	}
}

// commit writes what is set. Both locks are held.
func (a *Agent) commit(ctx context.Context) error {
	change, err := a.table.Commit()
	a.react(ctx, change, err)
	return err
}

// react does what follows from a commit. The lock is held.
func (a *Agent) react(ctx context.Context, change tables.Change, err error) {
	a.once(ctx, "commit", err, "maps were not written whole")
	for _, w := range a.workloads {
		w.refusedText = ""
		if w.tableKnows && slices.Contains(change.Refused, w.id) {
			w.refusedText = "the maps of the node do not hold it, and what runs in its cgroup would be outside every policy"
			a.once(ctx, "refused "+w.RunID, errors.New(w.refusedText), "workload is not registered")
		}
	}
	if len(change.Closed) > 0 {
		names := make([]string, 0, len(change.Closed))
		for _, n := range change.Closed {
			if id, ok := a.table.Identity(n); ok {
				names = append(names, id.Service+"."+id.Namespace)
			}
		}
		slices.Sort(names)
		a.once(ctx, "closed", &closedError{names}, "workloads are closed: their policies found no room")
	} else {
		a.once(ctx, "closed", nil, "")
	}
	if len(change.Gone) > 0 {
		a.gone = append(a.gone, departed{due: a.cfg.Clock.Now().Add(a.cfg.Grace), eps: change.Gone})
		a.cfg.Clock.AfterFunc(a.cfg.Grace, func() { signal(a.sweep) })
	}
	if len(change.Subjects) > 0 {
		signal(a.sweep)
	}
}

// closedError lists workloads to which nothing is allowed.
type closedError struct{ names []string }

func (e *closedError) Error() string {
	text := ""
	for i, n := range e.names {
		if i == 10 {
			return text + ", ..."
		}
		if i > 0 {
			text += ", "
		}
		text += n
	}
	return text
}

// once logs a failure when it is new or another one, and its end. The lock is held.
func (a *Agent) once(ctx context.Context, what string, err error, message string) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if a.told[what] == text {
		return
	}
	if err == nil {
		delete(a.told, what)
		a.log.InfoContext(ctx, "works again", "what", what)
		return
	}
	a.told[what] = text
	a.log.ErrorContext(ctx, message, "err", err)
}

// sweepLoop has live sockets decided again: now and then, when policies changed, and when
// endpoints have been gone for a while.
func (a *Agent) sweepLoop(ctx context.Context) error {
	for ctx.Err() == nil {
		due := make(chan struct{})
		stop := a.cfg.Clock.AfterFunc(sweepEvery, func() { close(due) })
		select {
		case <-a.sweep:
		case <-due:
		case <-ctx.Done():
		}
		stop()
		if ctx.Err() == nil {
			a.sweepNow(ctx)
		}
	}
	return nil
}

func (a *Agent) sweepNow(ctx context.Context) {
	now := a.cfg.Clock.Now()
	var eps []tables.Endpoint
	a.mu.Lock()
	for len(a.gone) > 0 && !a.gone[0].due.After(now) {
		eps = append(eps, a.gone[0].eps...)
		a.gone = a.gone[1:]
	}
	a.mu.Unlock()
	n, err := 0, error(nil)
	if len(eps) > 0 {
		n, err = a.table.MarkGone(eps)
	}
	err = errors.Join(err, a.set.Sweep())
	if n > 0 {
		err = errors.Join(err, a.table.ClearGone())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.once(ctx, "sweep", err, "live sockets were not all looked at")
}

// countLoop counts what programs put into maps, and has it warned of before there is no room.
func (a *Agent) countLoop(ctx context.Context) error {
	a.every(ctx, countEvery, func() {
		err := a.table.Count()
		a.mu.Lock()
		defer a.mu.Unlock()
		a.once(ctx, "count", err, "entries of maps were not counted")
	})
	return nil
}

// watchLoop keeps an eye on what others change: breakglass, the connection, room in the maps.
func (a *Agent) watchLoop(ctx context.Context) error {
	next := a.cfg.Clock.Now()
	was := false // the control plane stood by the configuration
	a.every(ctx, time.Second, func() {
		on, err := a.set.Breakglass()
		a.mu.Lock()
		defer a.mu.Unlock()
		a.once(ctx, "breakglass", err, "breakglass cannot be read")
		if err == nil && on != a.open {
			a.open = on
			a.log.WarnContext(ctx, "breakglass flipped", "allow_all", on) // the audit: seen at every level but error
		}
		now := a.cfg.Clock.Now()
		is := a.synced && a.client.Connected()
		if is {
			a.confirmed = now
		}
		if was && !is || is && !now.Before(next) {
			a.once(ctx, "confirmed", a.saveConfirmed(), "age of the configuration is not kept")
		}
		was = is
		if now.Before(next) {
			return
		}
		next = now.Add(retryEvery)
		if a.told["commit"] != "" {
			signal(a.dirty) // what found no room is tried again
		}
	})
	return nil
}
