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
	start, err := readStart(first)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	caller := attest.CallerFrom(ctx)
	if !allowed(n.cfg.Users, caller.UID, start.svc) {
		return status.Errorf(codes.PermissionDenied, "user %d may not run %s: start the node with --allow %d=%s/%s",
			caller.UID, start.svc, caller.UID, start.svc.namespace, start.svc.name)
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

	reg := &registration{
		root: caller.Process, uid: caller.UID, svc: start.svc, runID: start.runID,
		entry: n.issuer.acquire(start.svc, id, caller.UID),
		ended: make(chan struct{}),
	}
	defer n.issuer.release(reg.entry)
	if err := n.regs.add(reg); err != nil {
		return status.Error(codes.AlreadyExists, err.Error())
	}
	n.log.InfoContext(ctx, "registration started", "service", start.svc.String(), "pid", caller.Process.PID, "uid", caller.UID, "run_id", start.runID)
	defer func() {
		if n.regs.remove(reg) {
			n.leave(reg.runID)
		}
		n.log.InfoContext(ctx, "registration ended", "service", start.svc.String(), "pid", caller.Process.PID, "run_id", start.runID)
	}()

	if err := stream.Send(&nodepb.RunResponse{Kind: &nodepb.RunResponse_Started{Started: &nodepb.Started{
		SpiffeId: id.String(), WorkloadSocket: n.WorkloadSocket(), ControlPlane: "unix:" + n.cfg.ControlPlane,
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
				if err != nil {
					return status.Error(codes.InvalidArgument, err.Error())
				}
				inst = n.announce(start, binding)
				changed = inst.changes()
			case *nodepb.RunRequest_Stopped:
				n.leave(reg.runID)
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
	return startRequest{svc: svc, version: m.GetVersion(), labels: m.GetLabels(), runID: m.GetRunId()}, nil
}

// binding is a checked Listening.
type binding struct {
	port    uint16
	address netip.AddrPort
}

func readListening(m *nodepb.Listening) (binding, error) {
	if m.GetPort() == 0 || m.GetPort() > 65535 {
		return binding{}, fmt.Errorf("listening: port %d: want the service's port, 1 to 65535", m.GetPort())
	}
	addr, err := netip.ParseAddrPort(m.GetAddress())
	if err != nil {
		return binding{}, fmt.Errorf("listening: address: %w: want IP:PORT", err)
	}
	if addr.Port() == 0 || addr.Addr().IsUnspecified() {
		return binding{}, fmt.Errorf("listening: address %s: want the address that callers connect to", addr)
	}
	return binding{port: uint16(m.GetPort()), address: addr}, nil
}

// announce has the program's port registered as an instance. What an earlier stream of the same
// run announced is taken over.
func (n *Node) announce(start startRequest, b binding) *instance {
	n.mu.Lock()
	old := n.instances[start.runID]
	delete(n.instances, start.runID)
	n.mu.Unlock()
	if old != nil {
		old.abandon()
	}
	inst := newInstance(n.workers, instanceConfig{
		registry: n.registry, start: start, binding: b,
		clock: n.cfg.Clock, random: n.cfg.Rand, log: n.log,
	})
	n.mu.Lock()
	n.instances[start.runID] = inst
	n.mu.Unlock()
	n.wg.Go(inst.run)
	return inst
}

// leaveTimeout bounds a drain: the registry itself waits 5 s for its clients.
const leaveTimeout = 6 * time.Second

// leave drains what a run announced, unless the node is stopping: then the program lives on, and
// its lease with it.
func (n *Node) leave(runID string) {
	n.mu.Lock()
	inst := n.instances[runID]
	delete(n.instances, runID)
	n.mu.Unlock()
	if inst == nil {
		return
	}
	select {
	case <-n.stopping:
		inst.abandon()
		return
	default:
	}
	if all := inst.drain(n.stopping, leaveTimeout); !all {
		n.log.Warn("instance left without drain: its lease ends by itself", "run_id", runID)
	}
}
