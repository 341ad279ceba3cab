package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// nodeService is inlay.node.v1.Node.
type nodeService struct {
	nodepb.UnimplementedNodeServer
	node *Node
}

// Attest implements nodepb.NodeServer: the control plane of this machine asks who connected to it.
func (s *nodeService) Attest(ctx context.Context, req *nodepb.AttestRequest) (*nodepb.AttestResponse, error) {
	caller := attest.CallerFrom(ctx)
	if !caller.Local || caller.UID != uint32(os.Geteuid()) && caller.UID != 0 {
		return nil, status.Errorf(codes.PermissionDenied, "user %d may not ask whose a process is: want %d or 0", caller.UID, os.Geteuid())
	}
	p := attest.Process{PID: int(req.GetPid()), StartTime: req.GetStartTime()}
	reg, err := s.node.regs.findProcess(p)
	switch {
	case errors.Is(err, errOutside):
		return &nodepb.AttestResponse{}, nil // "spiffe_id is empty when the process is outside every registration"
	case err != nil:
		return nil, denied(err)
	}
	return &nodepb.AttestResponse{
		SpiffeId: reg.entry.id.String(), Namespace: reg.svc.namespace, Service: reg.svc.name,
	}, nil
}

// Run implements nodepb.NodeServer.
func (s *nodeService) Run(stream grpc.BidiStreamingServer[nodepb.RunRequest, nodepb.RunResponse]) error {
	n, ctx := s.node, stream.Context()
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	caller := attest.CallerFrom(ctx)
	start, err := readStart(first)
	if err != nil {
		return n.refused(ctx, caller, claimed(first.GetStart()), status.Error(codes.InvalidArgument, err.Error()))
	}
	if err := n.permit(caller, start); err != nil {
		return n.refused(ctx, caller, start, err)
	}
	id, err := n.id(start.svc)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	// The stream could be handed on to another process; the registration ends with its root.
	watch, err := attest.NewWatch(caller.Process)
	if err != nil {
		return denied(err)
	}
	defer watch.Close()

	uid := start.user(caller)
	reg := &registration{
		root: caller.Process, uid: uid, svc: start.svc, runID: start.runID,
		entry: n.issuer.acquire(start.svc, id, uid),
		ended: make(chan struct{}),
	}
	if err := n.enter(ctx, &start, reg); err != nil {
		n.issuer.release(reg.entry)
		return n.refused(ctx, caller, start, err)
	}
	n.log.InfoContext(ctx, "registration started", "service", start.svc.String(), "pid", caller.Process.PID, "uid", uid, "run_id", start.runID, "cgroup", reg.cgroup)
	defer n.retire(context.WithoutCancel(ctx), reg)

	if err := stream.Send(&nodepb.RunResponse{Kind: &nodepb.RunResponse_Started{Started: &nodepb.Started{
		SpiffeId: id.String(), WorkloadSocket: n.WorkloadSocket(), ControlPlane: "unix:" + n.cfg.ControlPlane, Cgroup: reg.cgroup,
	}}}); err != nil {
		return err
	}
	return s.converse(stream, start, reg, watch)
}

// converse serves listening and stopped until the registration ends.
func (s *nodeService) converse(stream grpc.BidiStreamingServer[nodepb.RunRequest, nodepb.RunResponse], start startRequest, reg *registration, watch *attest.Watch) error {
	n, ctx := s.node, stream.Context()
	requests, ended := make(chan *nodepb.RunRequest), make(chan error, 1)
	go func() { // ends with the stream, which ends when Run returns
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				ended <- ctx.Err() // the loop hears of the end from here alone
				return
			}
		}
	}()
	var (
		inst    *instance
		changed <-chan struct{}
	)
	for {
		select {
		case <-n.stopping:
			return status.Error(codes.Unavailable, "the node is stopping: register again")
		case <-reg.ended:
			return status.Error(codes.Aborted, "the process registered again on another stream")
		case <-watch.Ended():
			return status.Error(codes.Canceled, "the process that registered has ended")
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case req := <-requests:
			switch kind := req.GetKind().(type) {
			case *nodepb.RunRequest_Listening:
				binding, err := readListening(kind.Listening)
				if err == nil {
					binding.address, err = n.reachable(start, binding.address)
				}
				if err != nil {
					return status.Error(codes.InvalidArgument, err.Error())
				}
				inst = n.announce(start, binding)
				changed = inst.changes()
				if start.managed != nil {
					n.rememberPort(reg.runID, binding)
				}
			case *nodepb.RunRequest_Stopped:
				n.withdraw(instanceKey{reg.runID, false})
				if start.managed != nil {
					n.rememberPort(reg.runID, binding{})
				}
				inst, changed = nil, nil
				if err := stream.Send(&nodepb.RunResponse{Kind: &nodepb.RunResponse_Drained{Drained: &nodepb.Drained{}}}); err != nil {
					return err
				}
			default:
				return status.Error(codes.InvalidArgument, "request after start is neither listening nor stopped (a newer client?)")
			}
		case <-changed:
			var news *nodepb.Registered
			news, changed = inst.news()
			if news == nil {
				continue
			}
			if err := stream.Send(&nodepb.RunResponse{Kind: &nodepb.RunResponse_Registered{Registered: news}}); err != nil {
				return err
			}
		}
	}
}

// startRequest is a checked Start.
type startRequest struct {
	svc     service
	version string
	labels  map[string]string
	runID   string
	managed *managedStart // nil: known by its place in the process tree
}

func readStart(req *nodepb.RunRequest) (startRequest, error) {
	m := req.GetStart()
	if m == nil {
		return startRequest{}, errors.New("first request is not start: want the service and a run id")
	}
	svc, err := newService(m.GetNamespace(), m.GetService())
	if err != nil {
		return startRequest{}, err
	}
	if n := len(m.GetRunId()); n == 0 || n > 128 {
		return startRequest{}, fmt.Errorf("run id has %d characters: want 1 to 128, chosen at random", n)
	}
	managed, err := readManaged(m.GetManaged())
	if err != nil {
		return startRequest{}, err
	}
	return startRequest{svc: svc, version: m.GetVersion(), labels: m.GetLabels(), runID: m.GetRunId(), managed: managed}, nil
}

// claimed is what a start that is refused says of itself, cut short: for the log and nothing else.
func claimed(m *nodepb.Start) startRequest {
	short := func(s string) string { return fmt.Sprintf("%.80s", s) }
	out := startRequest{svc: service{short(m.GetNamespace()), short(m.GetService())}, runID: short(m.GetRunId())}
	if c := m.GetManaged(); c != nil {
		out.managed = &managedStart{uid: c.GetUid(), cgroup: short(c.GetCgroup())}
	}
	return out
}

// binding is a checked Listening. The zero value is no port.
type binding struct {
	port    uint16
	address netip.AddrPort
	udp     bool
}

func readListening(m *nodepb.Listening) (binding, error) {
	if m.GetPort() == 0 || m.GetPort() > 65535 {
		return binding{}, fmt.Errorf("listening: port %d: want the service's port, 1 to 65535", m.GetPort())
	}
	addr, err := netip.ParseAddrPort(m.GetAddress())
	if err != nil {
		return binding{}, fmt.Errorf("listening: address: %w: want IP:PORT", err)
	}
	if addr.Port() == 0 {
		return binding{}, fmt.Errorf("listening: address %s: want the port that was bound", addr)
	}
	return binding{port: uint16(m.GetPort()), address: addr, udp: m.GetUdp()}, nil
}

// reachable is where callers connect to what listens at addr. A managed program that listens on
// every address is called at the node's first one of that family, where it has none on loopback.
func (n *Node) reachable(start startRequest, addr netip.AddrPort) (netip.AddrPort, error) {
	switch {
	case !addr.Addr().IsUnspecified():
		return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), nil
	case start.managed == nil:
		return addr, fmt.Errorf("listening: address %s: want the address that callers connect to", addr)
	}
	for _, a := range n.cfg.NodeAddresses {
		// A socket on [::] takes IPv4 too, unless it asked for IPv6 only, which nobody sees from outside.
		if a = a.Unmap(); a.Is4() || addr.Addr().Is6() {
			return netip.AddrPortFrom(a, addr.Port()), nil
		}
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), addr.Port()), nil
}

// announce has the program's port registered as an instance. What an earlier stream of the same
// run announced is taken over.
func (n *Node) announce(start startRequest, b binding) *instance {
	key := instanceKey{start.runID, false}
	n.abandon(key)
	return n.keep(key, start, b)
}

// keep starts an instance, which runs until it is withdrawn or abandoned.
func (n *Node) keep(key instanceKey, start startRequest, b binding) *instance {
	inst := newInstance(n.workers, instanceConfig{
		registry: n.registry, start: start, binding: b, addresses: nodeAddresses(n.cfg.NodeAddresses),
		clock: n.cfg.Clock, random: n.cfg.Rand, log: n.log,
	})
	n.mu.Lock()
	n.instances[key] = inst
	n.mu.Unlock()
	n.wg.Go(inst.run)
	return inst
}

// abandon stops to renew an instance and leaves its lease as it is.
func (n *Node) abandon(key instanceKey) {
	if inst := n.take(key); inst != nil {
		inst.abandon()
	}
}

func (n *Node) take(key instanceKey) *instance {
	n.mu.Lock()
	defer n.mu.Unlock()
	inst := n.instances[key]
	delete(n.instances, key)
	return inst
}

// leaveTimeout bounds a drain: the registry itself waits 5 s for its clients.
const leaveTimeout = 6 * time.Second

// leave drains what a run announced, the endpoint first, unless the node is stopping: then the
// program lives on, and its leases with it.
func (n *Node) leave(runID string) {
	n.withdraw(instanceKey{runID, false})
	n.withdraw(instanceKey{runID, true})
}

func (n *Node) abandonAll(runID string) {
	n.abandon(instanceKey{runID, false})
	n.abandon(instanceKey{runID, true})
}

func (n *Node) withdraw(key instanceKey) {
	if inst := n.take(key); inst != nil {
		n.drain(inst)
	}
}

func (n *Node) drain(inst *instance) {
	select {
	case <-n.stopping:
		inst.abandon()
		return
	default:
	}
	if all := inst.drain(n.stopping, leaveTimeout); !all {
		n.log.Warn("instance left without drain: its lease ends by itself", "run_id", inst.start.runID)
	}
}
