//go:build linux

package workload_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// house is a machine: a control plane that can be stopped and started again, and a node.
type house struct {
	t    *testing.T
	dir  string // run directory of the node
	cp   string // the control plane's socket
	data string
	ttl  time.Duration
	reg  *fakeRegistry

	server   *grpc.Server
	served   sync.WaitGroup
	node     *workload.Node
	stopNode func()
}

func newHouse(t *testing.T, ttl time.Duration) *house {
	t.Helper()
	base, err := os.MkdirTemp("", "inlay") // short: sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	return &house{
		t: t, dir: filepath.Join(base, "run"), cp: filepath.Join(base, "cp.sock"), data: filepath.Join(base, "ca"),
		ttl: ttl, reg: newFakeRegistry(),
	}
}

// startControlPlane serves a real CA and a registry on a unix socket, as the control plane does.
func (h *house) startControlPlane() *ca.CA {
	h.t.Helper()
	authority, err := ca.New(ca.Config{Dir: h.data, SVIDTTL: h.ttl})
	if err != nil {
		h.t.Fatal(err)
	}
	l, err := net.Listen("unix", h.cp)
	if err != nil {
		h.t.Fatal(err)
	}
	h.server = grpc.NewServer(grpc.Creds(attest.NewCredentials(workload.NewResolver(filepath.Join(h.dir, workload.NodeSocket)))))
	authority.Register(h.server)
	registrypb.RegisterRegistryServer(h.server, h.reg)
	h.served.Go(func() { _ = h.server.Serve(l) })
	h.t.Cleanup(h.stopControlPlane)
	return authority
}

func (h *house) stopControlPlane() {
	h.server.Stop()
	h.served.Wait()
}

func (h *house) startNode(change func(*workload.Config)) {
	h.t.Helper()
	cfg := workload.Config{RunDir: h.dir, ControlPlane: h.cp, Log: slog.New(slog.NewTextHandler(h.t.Output(), nil))}
	if change != nil {
		change(&cfg)
	}
	node, err := workload.New(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	h.node = node
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- node.Run(ctx) }()
	h.stopNode = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			h.t.Errorf("node: %v", err)
		}
	})
	h.t.Cleanup(h.stopNode)
	select {
	case <-node.Ready():
	case err := <-ended:
		h.t.Fatalf("node: %v", err)
	}
}

// fakeRegistry is a registry that hands every request to the test and answers what it is told.
type fakeRegistry struct {
	registrypb.UnimplementedRegistryServer
	requests chan *registrypb.RegisterRequest
	answers  chan answer
}

type answer struct {
	resp *registrypb.RegisterResponse
	err  error
}

func newFakeRegistry() *fakeRegistry {
	return &fakeRegistry{requests: make(chan *registrypb.RegisterRequest), answers: make(chan answer)}
}

func (f *fakeRegistry) Register(stream registrypb.Registry_RegisterServer) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		select {
		case f.requests <- req:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
		for more := true; more; {
			select {
			case a := <-f.answers:
				if a.err != nil {
					return a.err
				}
				if err := stream.Send(a.resp); err != nil {
					return err
				}
				more = a.resp.GetRegistered() != nil && a.resp.GetRegistered().GetLeaseSeconds() == 0
			case <-stream.Context().Done():
				return stream.Context().Err()
			}
		}
	}
}
