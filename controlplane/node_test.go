package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// childEnv makes this test binary a program of the mesh instead: it holds the path of the control
// plane's socket, a comma, and that of the Workload API.
const childEnv = "INLAY_TEST_CHILD"

func TestMain(m *testing.M) {
	if sockets := os.Getenv(childEnv); sockets != "" {
		if err := child(sockets); err != nil {
			fmt.Println("child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is what a program with the SDK does: it gets its SVID, registers over the unix socket, and
// stays until its standard input ends.
func child(sockets string) error {
	control, api, _ := strings.Cut(sockets, ",")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	client, err := identity.NewClient(identity.ClientConfig{Socket: "unix://" + api})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _ = client.Run(ctx) })
	svid, err := client.Wait(ctx)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix:"+control, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	s, err := registrypb.NewRegistryClient(conn).Register(ctx)
	if err != nil {
		return err
	}
	err = s.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: sdkInstance("child", "orders", "10.0.0.7:7000")}})
	if err != nil {
		return err
	}
	if _, err := s.Recv(); err != nil {
		return err
	}
	fmt.Println("registered as", svid.ID)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// Control plane, node and program with real sockets and processes: who the program is comes from
// the kernel, its SVID from the authority, and its registration reaches a client.
func TestAProgramBelowARegistrationIsItsService(t *testing.T) {
	dir := t.TempDir()
	control := filepath.Join(dir, "controlplane.sock")
	n, err := workload.New(workload.Config{RunDir: filepath.Join(dir, "run"), ControlPlane: control})
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, func(c *Config) { c.UnixSocket, c.NodeSocket = control, n.NodeSocket() })
	p.ready()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		if err := n.Run(ctx); err != nil {
			t.Errorf("node: %v", err)
		}
	})
	<-n.Ready()

	// As `inlay run --service orders`: this process is the root of the registration.
	nodeConn := p.dial("unix:"+n.NodeSocket(), insecure.NewCredentials())
	run, err := nodepb.NewNodeClient(nodeConn).Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := run.Send(&nodepb.RunRequest{Kind: &nodepb.RunRequest_Start{Start: &nodepb.Start{Namespace: "default", Service: "orders", RunId: "run-1"}}}); err != nil {
		t.Fatal(err)
	}
	started, err := run.Recv()
	if err != nil || started.GetStarted() == nil {
		t.Fatalf("started = %v, %v", started, err)
	}

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+control+","+n.WorkloadSocket())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 4096)
	got, err := io.ReadAtLeast(out, line, 1)
	if err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if want := "registered as spiffe://inlay.local/ns/default/svc/orders\n"; string(line[:got]) != want {
		t.Errorf("child said %q, want %q\n%s", line[:got], want, p.logs)
	} else {
		follow(t, p.mtls("cart"), endpoints, "orders.default:8080", "inlay.sdk").untilAddresses("10.0.0.7:7000")
	}
	_ = in.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("child: %v", err)
	}
}
