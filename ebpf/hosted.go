package ebpf

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// hosted is a service of which workloads run here: its policies are watched.
type hosted struct {
	refs   int
	cancel func()
	known  chan struct{} // closed once its policies, or that there are none, are known
	isIn   bool          // known is closed
	has    bool          // policies have been set
	absent bool          // the server has none, which counts once it is known to serve node agents
	err    error         // why they are not known
}

func (a *Agent) host(service string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hostLocked(service)
}

func (a *Agent) hostLocked(service string) {
	h := a.hosted[service]
	if h == nil {
		h = &hosted{known: make(chan struct{})}
		a.hosted[service] = h
		h.cancel = a.client.Watch(PoliciesType, service, xds.WatcherFunc(func(r xds.Resource) { a.policiesChanged(service, h, r) }))
	}
	h.refs++
}

func (a *Agent) unhost(service string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unhostLocked(service)
}

func (a *Agent) unhostLocked(service string) {
	h := a.hosted[service]
	if h.refs--; h.refs > 0 {
		return
	}
	h.cancel()
	delete(a.hosted, service)
	a.table.DeletePolicies(service)
	signal(a.dirty)
}

// policiesChanged takes news of the policies of a hosted service.
func (a *Agent) policiesChanged(service string, h *hosted, r xds.Resource) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.hosted[service] != h {
		return
	}
	h.err = nil
	switch {
	case r.Err == nil:
		p, ok := r.Decoded.Value.(*nodepb.Policies)
		if !ok {
			h.err = fmt.Errorf("policies of %s: a %T", service, r.Decoded.Value)
			break
		}
		if h.err = a.table.SetPolicies(p); h.err == nil {
			h.has, h.absent = true, false
			h.settle()
		}
	case errors.Is(r.Err, xds.ErrNotExist):
		// A service without policies has an empty resource. One that is gone while its programs run
		// has none at all, and what held for them goes on to hold: nobody has allowed more.
		h.absent = true
		if a.synced {
			a.settleLater(h)
		}
	default:
		h.err = r.Err
	}
	if h.err != nil {
		a.log.Error("policies cannot be used, those before hold", "service", service, "err", h.err)
	}
	signal(a.dirty)
}

// absentWait is how long a service may be unknown to the control plane before it counts as one
// without policies: one that nobody declared comes to exist by the registration that is under way.
const absentWait = 2 * time.Second

// settleLater takes a service as one without policies unless they come. The lock is held.
func (a *Agent) settleLater(h *hosted) {
	a.cfg.Clock.AfterFunc(absentWait, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if h.absent && !h.isIn {
			h.settle()
			signal(a.dirty)
		}
	})
}

func (h *hosted) settle() {
	if !h.isIn {
		h.isIn = true
		close(h.known)
	}
}

// awaitPolicies waits until the policies of a hosted service are known.
func (a *Agent) awaitPolicies(ctx context.Context, service string) error {
	a.mu.Lock()
	h := a.hosted[service]
	a.mu.Unlock()
	late := make(chan struct{})
	defer a.cfg.Clock.AfterFunc(policyWait, func() { close(late) })()
	select {
	case <-h.known:
		return nil
	case <-late:
	case <-ctx.Done():
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	why := h.err
	switch {
	case why != nil:
	case ctx.Err() != nil:
		why = context.Cause(ctx)
	case !a.client.Connected():
		why = fmt.Errorf("the control plane (%s) does not answer, and nothing is on disk: it is admitted once the control plane is back", a.cfg.ControlPlane)
	default:
		why = fmt.Errorf("the control plane (%s) is connected and says nothing: it has refused its configuration since it started (inlay status, or its log), or it is of another version, or the agent runs as neither root nor its user", a.cfg.ControlPlane)
	}
	return fmt.Errorf("network policies of %s are not known: %w", service, why)
}

// allKnown says whether the policies of every hosted service are known. The lock is held.
func (a *Agent) allKnown() bool {
	for _, h := range a.hosted {
		if !h.isIn {
			return false
		}
	}
	return true
}

// services is the agent as the watcher of all services.
type services struct{ a *Agent }

// Changed takes news of one service.
func (s services) Changed(name string, r xds.Resource) {
	switch {
	case r.Err == nil:
		m, ok := r.Decoded.Value.(*nodepb.Service)
		if !ok {
			return // the decoder of the type makes nothing else
		}
		if err := s.a.table.SetService(m); err != nil {
			s.a.log.Error("service cannot be used, the one before holds", "service", name, "err", err)
			return
		}
	case errors.Is(r.Err, xds.ErrNotExist):
		s.a.table.DeleteService(name)
	default:
		return // rejected, and told by the client
	}
	signal(s.a.dirty)
}

// Synced learns that all services have been told.
func (s services) Synced(err error) {
	a := s.a
	if err != nil {
		a.log.Error("services cannot be watched", "err", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.synced, a.confirmed = true, a.cfg.Clock.Now()
	for _, h := range a.hosted {
		if h.absent {
			a.settleLater(h)
		}
	}
	signal(a.dirty)
}
