package workload

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Cgroups gives managed runs their cgroups and knows them again: the part of the node agent that
// the node needs. It must be safe for concurrent use.
type Cgroups interface {
	// Admit makes the cgroup of a run, or takes the one back that a says, and returns its absolute
	// path. When it returns, the kernel's programs know the workload. An error that wraps ErrRefused
	// is the caller's fault; any other is the agent's.
	Admit(ctx context.Context, a Admission) (path string, err error)
	// Leave removes the cgroup of a run whose processes have all ended.
	Leave(runID string)
	// Find says which run's cgroup, or a cgroup below it, the process with this number is in; ok is
	// false for a process outside the managed root.
	Find(pid int) (runID string, ok bool, err error)
}

// ErrRefused is wrapped by what Admit refuses: a cgroup of another run, or outside the managed root.
var ErrRefused = errors.New("registration refused")

// Admission is one managed run.
type Admission struct {
	RunID              string
	Namespace, Service string
	Version            string
	Labels             map[string]string
	UID                uint32 // that the program runs as
	Raw                bool   // raw sockets are granted
	// Cgroup is the path that was given before, said again after a reconnection; empty asks for a
	// new one.
	Cgroup string
}

// managedStart is a checked Managed.
type managedStart struct {
	uid    uint32
	raw    bool
	cgroup string // asked for; then what was given
}

func readManaged(m *nodepb.Managed) (*managedStart, error) {
	if m == nil {
		return nil, nil
	}
	if c := m.GetCgroup(); c != "" && (c[0] != '/' || len(c) > 4096) {
		return nil, fmt.Errorf("cgroup %.80q: want the absolute path that the node gave before, or nothing", c)
	}
	return &managedStart{uid: m.GetUid(), raw: m.GetRawSockets(), cgroup: m.GetCgroup()}, nil
}

// user is whose services are asked for: of a managed run that of the program, since `inlay run`
// itself is root's; of any other run the caller.
func (s startRequest) user(caller attest.Caller) uint32 {
	if s.managed != nil {
		return s.managed.uid
	}
	return caller.UID
}

// permit decides whether the caller may register what it asks for; nil says yes.
func (n *Node) permit(caller attest.Caller, start startRequest) error {
	if start.managed != nil {
		switch {
		case n.cfg.Cgroups == nil:
			return status.Error(codes.FailedPrecondition, "this node manages no cgroups: start it as root with: inlay node --ebpf")
		case caller.UID != 0:
			return status.Errorf(codes.PermissionDenied, "user %d may not ask for a cgroup: only root may: use sudo", caller.UID)
		}
	}
	uid := start.user(caller)
	if !allowed(n.cfg.Users, uid, start.svc) {
		return status.Errorf(codes.PermissionDenied, "user %d may not run %s: start the node with --allow %d=%s/%s",
			uid, start.svc, uid, start.svc.namespace, start.svc.name)
	}
	return nil
}

// enter puts reg into the table; a managed run gets its cgroup first, so that no program of it can
// run before the kernel knows it. The cgroup's path is written into start and reg.
func (n *Node) enter(ctx context.Context, start *startRequest, reg *registration) error {
	if start.managed == nil {
		if err := n.regs.add(reg); err != nil {
			return status.Error(codes.AlreadyExists, err.Error())
		}
		return nil
	}
	if err := n.reserve(reg); err != nil {
		return status.Error(codes.AlreadyExists, err.Error())
	}
	defer n.unreserve(reg)
	// The registry first: a service that nobody declared comes to exist by it, and with it the
	// policies that Admit waits for.
	fresh := n.enlist(*start)
	path, err := n.cfg.Cgroups.Admit(ctx, start.admission())
	if err == nil {
		start.managed.cgroup, reg.cgroup = path, path
		if err = n.regs.add(reg); err == nil {
			n.rememberStart(*start, reg)
			return nil
		}
		n.cfg.Cgroups.Leave(reg.runID)
		err = status.Error(codes.AlreadyExists, err.Error())
	} else if errors.Is(err, ErrRefused) {
		err = status.Error(codes.PermissionDenied, err.Error())
	} else {
		err = status.Errorf(codes.FailedPrecondition, "no cgroup for %s: %v", start.svc, err)
	}
	if !fresh {
		return err
	}
	if inst := n.take(instanceKey{start.runID, true}); inst != nil {
		n.wg.Go(func() { n.drain(inst) }) // the caller need not wait for the mesh to forget it
	}
	return err
}

// admission is what the agent is asked for.
func (s startRequest) admission() Admission {
	return Admission{
		RunID: s.runID, Namespace: s.svc.namespace, Service: s.svc.name, Version: s.version,
		Labels: s.labels, UID: s.managed.uid, Raw: s.managed.raw, Cgroup: s.managed.cgroup,
	}
}

// reserve holds a run id from the question whether it is free to its entry, so that of two who ask
// at once one is told so.
func (n *Node) reserve(reg *registration) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.entering[reg.runID] {
		return fmt.Errorf("run id %q: %w a moment ago, and not yet admitted: try again", reg.runID, errTaken)
	}
	if err := n.regs.free(reg); err != nil {
		return err
	}
	n.entering[reg.runID] = true
	return nil
}

func (n *Node) unreserve(reg *registration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.entering, reg.runID)
}

// refused writes down who was refused what, for those who look after the machine, and returns err.
func (n *Node) refused(ctx context.Context, caller attest.Caller, start startRequest, err error) error {
	cgroup := ""
	if start.managed != nil {
		cgroup = start.managed.cgroup
	}
	n.log.WarnContext(ctx, "registration refused", "uid", start.user(caller), "caller_uid", caller.UID, "pid", caller.Process.PID,
		"service", start.svc.String(), "run_id", start.runID, "cgroup", cgroup, "reason", status.Convert(err).Message())
	return err
}

// retire ends what a registration held when its stream has ended. A managed run whose program is
// still there stays until its cgroup is empty: the program may outlive `inlay run`, and goes on to
// be what it was.
func (n *Node) retire(ctx context.Context, reg *registration) {
	if reg.cgroup == "" {
		n.end(ctx, reg)
		return
	}
	select {
	case <-n.stopping: // the programs live on, and so do their leases; who starts again takes them over
		n.abandonAll(reg.runID)
		n.issuer.release(reg.entry)
		return
	default:
	}
	n.wg.Go(func() {
		if err := attest.WaitCgroupEmpty(n.workers, reg.cgroup, reg.ended); err != nil {
			n.log.Warn("cgroup not watched: the workload ends with its run", "cgroup", reg.cgroup, "err", err)
		}
		select {
		case <-n.stopping:
			n.issuer.release(reg.entry)
		default:
			n.end(n.workers, reg)
		}
	})
}

// end takes reg out of the table and what it announced out of the mesh, unless a successor has its
// place.
func (n *Node) end(ctx context.Context, reg *registration) {
	defer n.issuer.release(reg.entry)
	if !n.regs.remove(reg) {
		return
	}
	n.leave(reg.runID)
	if reg.cgroup != "" {
		n.cfg.Cgroups.Leave(reg.runID)
		n.remember(func(runs map[string]managedRun) { delete(runs, reg.runID) })
	}
	n.log.InfoContext(ctx, "registration ended", "service", reg.svc.String(), "pid", reg.root.PID, "run_id", reg.runID)
}

// enlist makes a managed run known to the mesh as a workload: an instance without ports, by which
// the policies of other nodes know where its connections come from. It stays beside the endpoint
// that the run may announce, so that the program has its name before it listens, while it drains,
// and when an SDK takes the endpoint's place. It reports false for one that is known from before a
// reconnection.
func (n *Node) enlist(start startRequest) bool {
	key := instanceKey{start.runID, true}
	n.mu.Lock()
	_, known := n.instances[key]
	n.mu.Unlock()
	if !known {
		n.keep(key, start, binding{})
	}
	return !known
}

// instanceKey names an instance of a run: its endpoint, or the workload itself.
type instanceKey struct {
	runID    string
	workload bool
}

// nodeAddresses are the texts of the node's addresses, sorted.
func nodeAddresses(addrs []netip.Addr) []string {
	out := make([]string, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, a.Unmap().String())
	}
	slices.Sort(out)
	return slices.Compact(out)
}
