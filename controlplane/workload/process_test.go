//go:build linux

package workload_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/identity/workloadpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// The tests are about processes, so this binary is run again as each of them. What a process does
// is a list of words, each doing its part and handing the rest on to a child:
//
//	root SERVICE RUNID ...  registers, as `inlay run` does, and waits for every process below
//	self ...                prints its own identity, then runs the rest
//	orphan ...              starts the rest and ends at once
//	lonely ...              waits until its parent has ended
//	setuid UID ...          becomes another user
//	fetch                   prints its identity
//	client                  prints its identity by the SDK's own client
//	watch N                 prints the serial of N SVIDs of one stream, or its end
//	insist                  prints its identity once it has one
//	dying-root ...          registers, starts the rest with its connection, and ends at once
//	attest                  asks the node whose process 1 is
//	managed SERVICE RUNID   asks for a cgroup and prints the answer
//	until-stdin-ends        waits
const runDirVariable = "INLAY_TEST_RUN_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(runDirVariable); dir != "" {
		if err := act(dir, os.Args[1:]); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func act(dir string, words []string) error {
	if len(words) == 0 {
		return nil
	}
	switch words[0] {
	case "fetch":
		fmt.Println(fetch(dir))
		return nil
	case "self":
		fmt.Println(fetch(dir))
		return act(dir, words[1:])
	case "setuid":
		uid, err := strconv.Atoi(words[1])
		if err != nil {
			return err
		}
		if err := syscall.Setuid(uid); err != nil {
			return err
		}
		return act(dir, words[2:])
	case "client":
		c, err := identity.NewClient(identity.ClientConfig{Socket: "unix://" + filepath.Join(dir, workload.WorkloadSocket)})
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()
		running.Go(func() { _ = c.Run(ctx) })
		svid, err := c.Wait(ctx)
		if err != nil {
			return err
		}
		fmt.Println(svid.ID)
		return nil
	case "watch":
		n, err := strconv.Atoi(words[1])
		if err != nil {
			return err
		}
		return watch(dir, n)
	case "insist":
		for {
			if got := fetch(dir); strings.HasPrefix(got, "spiffe:") {
				fmt.Println(got)
				return nil
			}
		}
	case "dying-root":
		return dyingRoot(dir, words[1], words[2], words[3:])
	case "attest":
		conn, err := dialUnix(filepath.Join(dir, workload.NodeSocket))
		if err != nil {
			return err
		}
		_, err = nodepb.NewNodeClient(conn).Attest(context.Background(), &nodepb.AttestRequest{Pid: 1})
		fmt.Println(status.Code(err), status.Convert(err).Message())
		return nil
	case "managed":
		conn, err := dialUnix(filepath.Join(dir, workload.NodeSocket))
		if err != nil {
			return err
		}
		stream, err := nodepb.NewNodeClient(conn).Run(context.Background())
		if err != nil {
			return err
		}
		if err := stream.Send(managedStart(words[1], words[2], &nodepb.Managed{Uid: uint32(os.Getuid())})); err != nil {
			return err
		}
		_, err = stream.Recv()
		fmt.Println(status.Code(err), status.Convert(err).Message())
		return nil
	case "until-stdin-ends":
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	case "orphan":
		// The child sees the end of this process as the end of its input.
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		cmd := again(dir, append([]string{"lonely", strconv.Itoa(os.Getpid())}, words[1:]...)...)
		cmd.Stdin, cmd.Stdout = r, os.Stdout
		if err := cmd.Start(); err != nil {
			return err
		}
		runtime.KeepAlive(w)
		return nil // w is closed by the exit
	case "lonely":
		if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
			return err
		}
		for strconv.Itoa(os.Getppid()) == words[1] {
			runtime.Gosched() // its files are closed, it is about to end
		}
		return act(dir, words[2:])
	case "root":
		return actRoot(dir, words[1], words[2], words[3:])
	}
	return fmt.Errorf("unknown word %q", words[0])
}

func actRoot(dir, service, runID string, rest []string) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	conn, err := dialUnix(filepath.Join(dir, workload.NodeSocket))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := nodepb.NewNodeClient(conn).Run(context.Background())
	if err != nil {
		return err
	}
	if err := stream.Send(startOf(service, runID)); err != nil {
		return err
	}
	if _, err := stream.Recv(); err != nil {
		fmt.Println(status.Code(err), status.Convert(err).Message())
		return nil
	}
	if len(rest) > 0 && rest[0] == "self" {
		fmt.Println(fetch(dir))
		rest = rest[1:]
	}
	cmd := again(dir, rest...)
	cmd.Stdout = os.Stdout
	if err := cmd.Start(); err != nil {
		return err
	}
	for { // the child and every orphan below
		if _, err := unix.Wait4(-1, nil, 0, nil); err == unix.ECHILD {
			return nil
		}
	}
}

// dyingRoot hands its connection on to the child, so that the stream outlives the process.
func dyingRoot(dir, service, runID string, rest []string) error {
	var file *os.File
	conn, err := grpc.NewClient("passthrough:///test",
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			c, err := net.Dial("unix", filepath.Join(dir, workload.NodeSocket))
			if err == nil {
				file, err = c.(*net.UnixConn).File()
			}
			return c, err
		}))
	if err != nil {
		return err
	}
	stream, err := nodepb.NewNodeClient(conn).Run(context.Background())
	if err != nil {
		return err
	}
	if err := stream.Send(startOf(service, runID)); err != nil {
		return err
	}
	if _, err := stream.Recv(); err != nil {
		return err
	}
	cmd := again(dir, rest...)
	cmd.Stdin, cmd.ExtraFiles = os.Stdin, []*os.File{file}
	return cmd.Start()
}

func watch(dir string, n int) error {
	conn, err := dialUnix(filepath.Join(dir, workload.WorkloadSocket))
	if err != nil {
		return err
	}
	defer conn.Close()
	next, err := openFetch(context.Background(), conn)
	if err != nil {
		return err
	}
	var last *identity.SVID
	for range n {
		svid, err := next()
		if err != nil {
			fmt.Println(status.Code(err), status.Convert(err).Message())
			return nil
		}
		if last != nil && !time.Now().Before(last.NotAfter()) {
			fmt.Println("expired")
		}
		fmt.Println(svid.Certificate.Leaf.SerialNumber)
		last = svid
	}
	return nil
}

func again(dir string, words ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", words...)
	// A process under the race detector waits a second before it ends, unless told not to.
	cmd.Env = append(os.Environ(), runDirVariable+"="+dir, "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	cmd.Stderr = os.Stderr
	return cmd
}

// fetch is the SPIFFE ID of this process, or the status that it got.
func fetch(dir string) string {
	conn, err := dialUnix(filepath.Join(dir, workload.WorkloadSocket))
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	svid, err := fetchOver(ctx, conn)
	if err != nil {
		return status.Code(err).String() + " " + status.Convert(err).Message()
	}
	return svid.ID.String()
}

func fetchOver(ctx context.Context, conn *grpc.ClientConn) (*identity.SVID, error) {
	stream, err := openFetch(ctx, conn)
	if err != nil {
		return nil, err
	}
	return stream()
}

// openFetch returns what receives the next SVID.
func openFetch(ctx context.Context, conn *grpc.ClientConn) (func() (*identity.SVID, error), error) {
	ctx = metadata.AppendToOutgoingContext(ctx, identity.SecurityHeader, "true")
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, identity.MethodFetchX509SVID)
	if err != nil {
		return nil, err
	}
	if err := stream.SendMsg(&workloadpb.X509SVIDRequest{}); err != nil {
		return nil, err
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	return func() (*identity.SVID, error) {
		resp := &workloadpb.X509SVIDResponse{}
		if err := stream.RecvMsg(resp); err != nil {
			return nil, err
		}
		return identity.Decode(resp)
	}, nil
}

func startOf(service, runID string) *nodepb.RunRequest {
	return &nodepb.RunRequest{Kind: &nodepb.RunRequest_Start{Start: &nodepb.Start{Service: service, RunId: runID}}}
}

func dialUnix(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///test",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}))
}

// run is a process that does words; the lines it and its children printed.
func run(t *testing.T, h *house, words ...string) []string {
	t.Helper()
	cmd := again(h.dir, words...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", words, err, out)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// pipeChild starts a process and returns the lines that it prints; the channel is closed with it.
func pipeChild(t *testing.T, h *house, words ...string) <-chan string {
	t.Helper()
	cmd := again(h.dir, words...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 16)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	return lines
}

func pidText() string { return strconv.Itoa(os.Getpid()) }
