package controlplane

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/xds/meshpb/capb"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// node is the part of a node that the control plane asks: whose a process is.
type node struct {
	nodepb.UnimplementedNodeServer
	mu    sync.Mutex
	id    string
	asked int
}

func (n *node) Attest(_ context.Context, req *nodepb.AttestRequest) (*nodepb.AttestResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked++
	if int(req.GetPid()) != os.Getpid() {
		return nil, status.Errorf(codes.InvalidArgument, "asked about process %d", req.GetPid())
	}
	return &nodepb.AttestResponse{SpiffeId: n.id}, nil
}

func (n *node) is(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.id = id
}

// withNode launches a control plane on a unix socket beside a node.
func withNode(t *testing.T) (*plane, *node) {
	t.Helper()
	dir := t.TempDir()
	lis, err := net.Listen("unix", filepath.Join(dir, "node.sock"))
	if err != nil {
		t.Fatal(err)
	}
	n := &node{}
	srv := grpc.NewServer()
	nodepb.RegisterNodeServer(srv, n)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(lis) })
	t.Cleanup(func() { srv.Stop(); wg.Wait() })
	p := launch(t, func(c *Config) {
		c.UnixSocket, c.NodeSocket = filepath.Join(dir, "controlplane.sock"), filepath.Join(dir, "node.sock")
	})
	p.ready()
	return p, n
}

func (p *plane) local() *grpc.ClientConn {
	return p.dial("unix:"+p.cfg.UnixSocket, insecure.NewCredentials())
}

func TestTheUnixSocketKnowsWhoCalls(t *testing.T) {
	p, n := withNode(t)
	if info, err := os.Stat(p.cfg.UnixSocket); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("socket = %v, %v, want 0666", info, err)
	}
	n.is("spiffe://inlay.local/ns/default/svc/orders")
	workload := p.local()
	enrol(t, workload, sdkInstance("i-1", "orders", "10.0.0.1:7000"))
	follow(t, workload, endpoints, "orders.default:8080", "inlay.sdk").untilAddresses("10.0.0.1:7000")
	// A workload is no node, though its user is the same.
	if _, err := capb.NewCAClient(workload).Sign(t.Context(), &capb.SignRequest{Namespace: "default", Service: "orders"}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a workload asks for a signature: %v", err)
	}

	n.is("") // a process outside every registration, of the node's user: the node itself
	nodes := p.local()
	bundle, err := capb.NewCAClient(nodes).WatchBundle(t.Context(), &capb.WatchBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := bundle.Recv(); err != nil || b.GetTrustDomain() != "inlay.local" || len(b.GetRoots()) != 1 {
		t.Errorf("bundle = %v, %v", b, err)
	}
	in := sdkInstance("node-1", "billing", "127.0.0.1:7001")
	in.Tls, in.RunId = registrypb.Tls_TLS_NONE, "run-1"
	enrol(t, nodes, in)
}

// When the node did not know a process at the moment it connected, asking again must help.
func TestARefusedProcessIsAskedAboutAgain(t *testing.T) {
	p, n := withNode(t)
	conn := p.local()
	register := func() error {
		s, err := registrypb.NewRegistryClient(conn).Register(t.Context(), grpc.WaitForReady(true))
		if err != nil {
			return err
		}
		_ = s.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: sdkInstance("i-1", "orders", "10.0.0.1:7000")}})
		_, err = s.Recv()
		return err
	}
	if err := register(); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "inlay run --service orders") {
		t.Fatalf("register without identity: %v", err)
	}
	n.is("spiffe://inlay.local/ns/default/svc/orders")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if !conn.WaitForStateChange(ctx, conn.GetState()) { // the server closes the connection
		t.Fatal("the connection stays")
	}
	if err := register(); err != nil {
		t.Errorf("register again: %v", err)
	}
}

func TestASocketOfADeadProcessIsReplacedAndALiveOneIsNot(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "controlplane.sock")
	dead, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = dead.Close()
	launch(t, func(c *Config) { c.UnixSocket = path })

	other, err := New(Config{UnixSocket: path})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := other.Start(ctx); err == nil || !strings.Contains(err.Error(), "address in use by pid ") || !strings.Contains(err.Error(), "pass another --run-dir") {
		t.Errorf("Start = %v", err)
	}
	if _, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live socket was taken away: %v", err)
	}
}

// A live socket whose queue of connections is full refuses with another error than a dead one.
func TestASocketThatIsTooBusyIsNotTakenAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "controlplane.sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for { // nobody accepts
		conn, err := net.DialTimeout("unix", path, 10*time.Millisecond)
		if err != nil {
			break
		}
		defer conn.Close()
	}
	other, err := New(Config{UnixSocket: path})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "address in use") {
		t.Errorf("Start = %v, want that the address is in use", err)
		_ = other.Stop(t.Context())
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the live socket was taken away: %v", err)
	}
}
