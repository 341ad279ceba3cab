//go:build linux

package workload_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/identity/workloadpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// register makes this test process the root of a registration: its children are the service.
func (h *house) register(service, runID string) grpc.BidiStreamingClient[nodepb.RunRequest, nodepb.RunResponse] {
	h.t.Helper()
	conn, err := dialUnix(h.node.NodeSocket())
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	stream, err := nodepb.NewNodeClient(conn).Run(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	if err := stream.Send(startOf(service, runID)); err != nil {
		h.t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		h.t.Fatal(err)
	}
	started := resp.GetStarted()
	if started.GetSpiffeId() != "spiffe://inlay.local/ns/default/svc/"+service ||
		started.GetWorkloadSocket() != h.node.WorkloadSocket() || started.GetControlPlane() != "unix:"+h.cp {
		h.t.Fatalf("started: %v", started)
	}
	return stream
}

func TestTheHeaderIsRequired(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	conn, err := dialUnix(h.node.WorkloadSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	call := func(method string, header ...string) error {
		ctx := metadata.AppendToOutgoingContext(t.Context(), header...)
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
		if err != nil {
			return err
		}
		if err := stream.SendMsg(&workloadpb.X509SVIDRequest{}); err != nil {
			return err
		}
		return stream.RecvMsg(&workloadpb.X509SVIDResponse{})
	}
	for name, tc := range map[string]struct {
		err  error
		want codes.Code
	}{
		"no header":                {call("/SpiffeWorkloadAPI/FetchX509SVID"), codes.InvalidArgument},
		"another value":            {call("/SpiffeWorkloadAPI/FetchX509SVID", "workload.spiffe.io", "True"), codes.InvalidArgument},
		"two values":               {call("/SpiffeWorkloadAPI/FetchX509SVID", "workload.spiffe.io", "true", "workload.spiffe.io", "true"), codes.InvalidArgument},
		"no header for bundles":    {call("/SpiffeWorkloadAPI/FetchX509Bundles"), codes.InvalidArgument},
		"bundles for a stranger":   {call("/SpiffeWorkloadAPI/FetchX509Bundles", "workload.spiffe.io", "true"), codes.PermissionDenied},
		"a profile that is absent": {call("/SpiffeWorkloadAPI/FetchJWTSVID", "workload.spiffe.io", "true"), codes.Unimplemented},
	} {
		if status.Code(tc.err) != tc.want {
			t.Errorf("%s: %v, want %s", name, tc.err, tc.want)
		}
	}
}

// With SVIDs of 2 s, one open stream is sent new ones before the old end.
func TestRotationReachesOpenStreams(t *testing.T) {
	h := newHouse(t, 2*time.Second)
	h.startControlPlane()
	h.startNode(nil)
	out := pipeChild(t, h, "root", "cart", "r1", "watch", "4")
	var serials = map[string]bool{}
	for line := range out {
		if line == "expired" {
			t.Error("an SVID came after the one before had ended")
		}
		serials[line] = true
	}
	if len(serials) != 4 {
		t.Errorf("serials %v, want 4 different ones", serials)
	}
}

// The control plane is away: what was issued serves on, also processes that start now; a service
// that has not run here yet waits with the reason, and is served when the control plane returns.
func TestControlPlaneAway(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	const cart = "spiffe://inlay.local/ns/default/svc/cart"
	if got := run(t, h, "root", "cart", "r1", "fetch")[0]; got != cart {
		t.Fatalf("printed %q", got)
	}
	h.stopControlPlane()
	if got := run(t, h, "root", "cart", "r2", "fetch")[0]; got != cart {
		t.Errorf("a service that ran here: %q, want %s", got, cart)
	}
	got := run(t, h, "root", "orders", "r3", "fetch")[0]
	if !strings.HasPrefix(got, "Unavailable no SVID for orders.default: control plane") || !strings.Contains(got, h.cp) {
		t.Errorf("a new service: %q, want Unavailable with the reason and the socket", got)
	}
	out := pipeChild(t, h, "root", "orders", "r4", "insist")
	h.startControlPlane()
	if got := <-out; got != "spiffe://inlay.local/ns/default/svc/orders" {
		t.Errorf("after the return: %q", got)
	}
}

// A control plane with a new root (its data directory is lost): every workload gets an SVID of the
// new root on its open stream.
func TestNewRootReplacesSVIDs(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	out := pipeChild(t, h, "root", "cart", "r1", "watch", "2")
	first := <-out
	h.stopControlPlane()
	if err := os.RemoveAll(h.data); err != nil {
		t.Fatal(err)
	}
	h.startControlPlane()
	if second := <-out; second == first || second == "" {
		t.Errorf("second SVID %q, want another than %q", second, first)
	}
}

func TestAnotherTrustDomainIsRefused(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(func(c *workload.Config) { c.TrustDomain = "other.test" })
	got := run(t, h, "root", "cart", "r1", "fetch")[0]
	if !strings.HasPrefix(got, "Unavailable") || !strings.Contains(got, "--trust-domain") {
		t.Errorf("printed %q, want Unavailable with the remedy", got)
	}
}

func TestRegistrationEndsWithTheStream(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	stream := h.register("cart", "r1")
	if got := run(t, h, "fetch")[0]; got != "spiffe://inlay.local/ns/default/svc/cart" {
		t.Fatalf("a child of this process: %q", got)
	}
	out := pipeChild(t, h, "watch", "2")
	<-out
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if got := <-out; !strings.HasPrefix(got, "PermissionDenied") {
		t.Errorf("the open stream got %q, want PermissionDenied", got)
	}
	if got := run(t, h, "fetch")[0]; !strings.HasPrefix(got, "PermissionDenied") {
		t.Errorf("a child afterwards: %q, want PermissionDenied", got)
	}
}

// The registration ends with its process also when something else holds the connection, and with
// it the stream, open: its run id is free again.
func TestRegistrationEndsWithTheProcess(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	cmd := again(h.dir, "dying-root", "cart", "r1", "until-stdin-ends")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close() // ends the child that holds the connection
	cmd.Stdin = r
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	conn, err := dialUnix(h.node.NodeSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		stream, err := nodepb.NewNodeClient(conn).Run(ctx)
		if err == nil {
			err = stream.Send(startOf("cart", "r1"))
		}
		if err == nil {
			_, err = stream.Recv()
		}
		if err == nil {
			return
		}
		if status.Code(err) != codes.AlreadyExists {
			t.Fatalf("run id of a process that has ended: %v, want that it becomes free", err)
		}
	}
}

func TestOneProcessOneRegistration(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	first := h.register("cart", "r1")
	conn, err := dialUnix(h.node.NodeSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other, err := nodepb.NewNodeClient(conn).Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Send(startOf("orders", "r2")); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Recv(); status.Code(err) != codes.AlreadyExists {
		t.Errorf("a second registration: %v, want AlreadyExists", err)
	}
	// The same run id is a reconnect: it takes the place of the first.
	h.register("cart", "r1")
	if _, err := first.Recv(); status.Code(err) != codes.Aborted {
		t.Errorf("the first stream: %v, want Aborted", err)
	}
	if got := run(t, h, "fetch")[0]; got != "spiffe://inlay.local/ns/default/svc/cart" {
		t.Errorf("after the reconnect: %q", got)
	}
}

func TestRunRefusesBadRequests(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	listening := func(port uint32, address string) *nodepb.RunRequest {
		return &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: port, Address: address}}}
	}
	for name, tc := range map[string]struct {
		requests []*nodepb.RunRequest
		want     string
	}{
		"no start":          {[]*nodepb.RunRequest{listening(80, "127.0.0.1:1")}, "first request is not start"},
		"an empty request":  {[]*nodepb.RunRequest{{}}, "first request is not start"},
		"no run id":         {[]*nodepb.RunRequest{startOf("cart", "")}, "run id has 0 characters"},
		"a name with a dot": {[]*nodepb.RunRequest{startOf("cart.shop", "r1")}, `'.' at character 5`},
		"the mesh's own namespace": {[]*nodepb.RunRequest{{Kind: &nodepb.RunRequest_Start{Start: &nodepb.Start{
			Namespace: "inlay", Service: "controlplane", RunId: "r1"}}}}, "the mesh's own"},
		"two starts":    {[]*nodepb.RunRequest{startOf("cart", "r1"), startOf("cart", "r1")}, "neither listening nor stopped"},
		"port 0":        {[]*nodepb.RunRequest{startOf("cart", "r1"), listening(0, "127.0.0.1:1")}, "port 0"},
		"a host":        {[]*nodepb.RunRequest{startOf("cart", "r1"), listening(80, "localhost:1")}, "want IP:PORT"},
		"every address": {[]*nodepb.RunRequest{startOf("cart", "r1"), listening(80, "0.0.0.0:1")}, "want the address that callers connect to"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := dialUnix(h.node.NodeSocket())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			stream, err := nodepb.NewNodeClient(conn).Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, req := range tc.requests {
				if err := stream.Send(req); err != nil {
					break // the reason is in Recv
				}
			}
			for {
				if _, err = stream.Recv(); err != nil {
					break
				}
			}
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want InvalidArgument that says %q", err, tc.want)
			}
		})
	}
}

func TestSecondNodeIsRefused(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startNode(nil)
	second, err := workload.New(workload.Config{RunDir: h.dir, ControlPlane: h.cp})
	if err != nil {
		t.Fatal(err)
	}
	err = second.Run(t.Context())
	wantText(t, err, "a node runs already, pid "+pidText())
	for _, name := range []string{workload.WorkloadSocket, workload.NodeSocket} {
		info, err := os.Stat(filepath.Join(h.dir, name))
		if err != nil || info.Mode().Perm() != 0o666 {
			t.Errorf("%s: %v, %v; want 0666 and untouched", name, info, err)
		}
	}
	h.stopNode()
	third, err := workload.New(workload.Config{RunDir: h.dir, ControlPlane: h.cp})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := third.Run(ctx); err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
}

func TestSocketOfADeadNodeIsReplaced(t *testing.T) {
	h := newHouse(t, time.Hour)
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	dead, err := net.Listen("unix", filepath.Join(h.dir, workload.WorkloadSocket))
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	dead.Close()
	h.startNode(nil)
	if got := run(t, h, "fetch")[0]; !strings.HasPrefix(got, "PermissionDenied") {
		t.Errorf("fetch: %q, want an answer of the new node", got)
	}
}

func TestBadRunDirectories(t *testing.T) {
	base := t.TempDir()
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(base, "open")
	if err := errors.Join(os.Mkdir(open, 0o755), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	inTheWay := filepath.Join(base, "way")
	if err := errors.Join(os.Mkdir(inTheWay, 0o755), os.WriteFile(filepath.Join(inTheWay, workload.NodeSocket), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ dir, want string }{
		"a file":                   {file, "it is a file"},
		"open to others":           {open, "chmod 755"},
		"too long for a socket":    {filepath.Join(base, strings.Repeat("x", 100)), "choose a shorter --run-dir"},
		"a file where a socket is": {inTheWay, "is in the way and is no socket"},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := workload.New(workload.Config{RunDir: tc.dir, ControlPlane: "/nowhere"})
			if err != nil {
				t.Fatal(err)
			}
			wantText(t, n.Run(t.Context()), tc.want)
		})
	}
	if _, err := os.Stat(filepath.Join(inTheWay, workload.NodeSocket)); errors.Is(err, fs.ErrNotExist) {
		t.Error("the file in the way was removed")
	}
}

func TestNewRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		cfg  workload.Config
		want string
	}{
		"no run directory":   {workload.Config{ControlPlane: "/x"}, "RunDir is empty"},
		"no control plane":   {workload.Config{RunDir: "/x"}, "ControlPlane is empty"},
		"a bad trust domain": {workload.Config{RunDir: "/x", ControlPlane: "/x", TrustDomain: "a b"}, `trust domain "a b"`},
		"bad users":          {workload.Config{RunDir: "/x", ControlPlane: "/x", Users: map[uint32][]string{7: {"Cart", "/x"}}}, `users: 7: "Cart"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := workload.New(tc.cfg)
			wantText(t, err, tc.want)
		})
	}
}

// The control plane learns through the node who connected to it.
func TestResolver(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	resolve := workload.NewResolver(h.node.NodeSocket())
	own, err := attest.Proc{}.Stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if id, err := resolve(t.Context(), own.Process, own.UID); err != nil || !id.IsZero() {
		t.Errorf("a process outside: %v, %v; want nobody", id, err)
	}
	h.register("cart", "r1")
	child := again(h.dir, "until-stdin-ends")
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	st, err := attest.Proc{}.Stat(child.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := resolve(t.Context(), st.Process, st.UID); err != nil || id.String() != "spiffe://inlay.local/ns/default/svc/cart" {
		t.Errorf("a child: %v, %v", id, err)
	}
	reused := st.Process
	reused.StartTime--
	if id, err := resolve(t.Context(), reused, st.UID); err == nil || !id.IsZero() {
		t.Errorf("another process of that number: %v, %v; want an error", id, err)
	}
	stdin.Close()
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	if id, err := resolve(t.Context(), st.Process, st.UID); err == nil || !id.IsZero() {
		t.Errorf("after its end: %v, %v; want an error", id, err)
	}
	h.stopNode()
	_, err = resolve(t.Context(), own.Process, own.UID)
	wantText(t, err, "is `inlay node` running?")
}

func TestOnlyTheNodesUserMayAttest(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "becoming another user needs root")
	}
	h := newHouse(t, time.Hour)
	h.startNode(nil)
	if got := run(t, h, "setuid", "65534", "attest"); !strings.HasPrefix(got[0], "PermissionDenied user 65534 may not ask") {
		t.Errorf("printed %q, want PermissionDenied", got)
	}
}

func TestRunAsAnApplication(t *testing.T) {
	h := newHouse(t, time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	cfg := workload.Config{RunDir: h.dir, ControlPlane: h.cp}
	ended := make(chan error, 1)
	ready := make(chan string, 1)
	go func() {
		ended <- workload.Run(ctx, cfg, func(n *workload.Node) error {
			ready <- n.WorkloadSocket()
			return nil
		})
	}()
	if got, want := <-ready, filepath.Join(h.dir, workload.WorkloadSocket); got != want {
		t.Errorf("ready at %s, want %s", got, want)
	}
	if got := fetch(h.dir); !strings.HasPrefix(got, "PermissionDenied") { // it answers as soon as it is ready
		t.Errorf("fetch says %q, want PermissionDenied", got)
	}
	wantText(t, workload.Run(t.Context(), cfg, nil), "a node runs already")
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("stop: %v", err)
	}
	wantText(t, workload.Run(t.Context(), workload.Config{}, nil), "RunDir is empty")
	wantText(t, workload.Run(t.Context(), cfg, func(*workload.Node) error { return errors.New("nobody hears it") }), "nobody hears it")
	if err := workload.Run(ctx, cfg, nil); err != nil {
		t.Errorf("told to end before it starts: %v", err)
	}
}

func wantText(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want one that says %q", err, want)
	}
}
