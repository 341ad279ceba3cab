package ebpf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/ebpf/flow"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// namer lets the flow log ask the table.
type namer struct{ t table }

func (n namer) Identity(number uint64) (flow.Identity, bool) {
	id, ok := n.t.Identity(number)
	return flow.Identity{Namespace: id.Namespace, Service: id.Service, Labels: id.Labels}, ok
}

func (n namer) Rule(number uint32) (flow.Rule, bool) {
	r, ok := n.t.Rule(number)
	return flow.Rule{Policy: r.Policy, Name: r.Name, Source: r.Source, Audit: r.Audit}, ok
}

func (n namer) ServiceAt(at netip.AddrPort, proto uint8) (string, uint16, bool) {
	host, port, ok := n.t.ServiceAt(at, proto)
	// The table says NAME.NAMESPACE, as it resolves; neither holds a dot.
	name, namespace, _ := strings.Cut(host, ".")
	return namespace + "/" + name, port, ok
}

// listenFlows opens the socket of flows, for root (the agent's user) and Config.FlowsUID.
func (a *Agent) listenFlows() (net.Listener, error) {
	path := filepath.Join(a.cfg.RunDir, FlowsSocket)
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("node agent: %s is in the way and is no socket: move it away", path)
	case err == nil:
		if err := os.Remove(path); err != nil { // of a dead agent: one alone holds the pins
			return nil, fmt.Errorf("node agent: socket of a dead agent: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("node agent: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("node agent: %w", err)
	}
	err = os.Chmod(path, 0o600)
	if err == nil && a.cfg.FlowsUID != 0 {
		err = os.Chown(path, int(a.cfg.FlowsUID), -1) // root may connect to any
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("node agent: %w", err), l.Close())
	}
	return l, nil
}

// serveFlows serves inlay.node.v1.Flows until ctx is done.
func (a *Agent) serveFlows(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(64<<10), grpc.WaitForHandlers(true))
	nodepb.RegisterFlowsServer(s, flow.NewServer(a.flows, a.describe))
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() {
		<-ctx.Done()
		s.Stop() // observers that follow would never end
	})
	if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// describe is the state of the agent.
func (a *Agent) describe(context.Context) (*nodepb.Agent, error) {
	now := a.cfg.Clock.Now()
	out := &nodepb.Agent{Version: a.cfg.Version, Started: timestamppb.New(a.started), Metrics: a.metrics}
	if a.set == nil {
		return out, nil
	}
	for _, u := range a.table.Usage() {
		out.Maps = append(out.Maps, &nodepb.MapUsage{Name: u.Name, Entries: uint64(u.Entries), Capacity: uint64(u.Capacity)})
	}
	out.Cgroup, out.Pin, out.Services = a.set.Cgroup(), a.set.Pin(), uint32(a.table.Services())
	a.mu.Lock()
	defer a.mu.Unlock()
	out.Breakglass, out.Proxy, out.Workloads = a.open, a.proxyUp, uint32(len(a.workloads))
	if age, ok := a.configAge(now); ok {
		out.ConfigAge = durationpb.New(age)
	}
	return out, nil
}
