//go:build linux

package attest_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

const socketVariable = "INLAY_TEST_SOCKET"

// This binary, run again with a socket, connects to it, hands the connection on to a child that
// lives until its input ends, and ends.
func TestMain(m *testing.M) {
	path := os.Getenv(socketVariable)
	if path == "" {
		os.Exit(m.Run())
	}
	if len(os.Args) > 1 && os.Args[1] == "hold" {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		os.Exit(1)
	}
	file, err := conn.(*net.UnixConn).File()
	if err != nil {
		os.Exit(1)
	}
	child := exec.Command("/proc/self/exe", "hold")
	child.Stdin, child.ExtraFiles = os.Stdin, []*os.File{file}
	if child.Start() != nil {
		os.Exit(1)
	}
	_, _ = os.Stdout.WriteString("connected\n")
	os.Exit(0)
}

func listen(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "inlay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.UnixListener), path
}

// pair is a connection of this process to itself.
func pair(t *testing.T) (server, client *net.UnixConn) {
	t.Helper()
	l, path := listen(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return s, c.(*net.UnixConn)
}

func TestPeerProcessIsWhoConnected(t *testing.T) {
	s, _ := pair(t)
	own, err := attest.Proc{}.Stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.PeerProcess(s)
	if err != nil || p.Process != own.Process || p.UID != uint32(os.Geteuid()) {
		t.Errorf("%+v, %v; want %+v", p, err, own)
	}
}

// The process that connected has ended; another one holds its connection. Nobody may be taken for it.
func TestPeerThatHasEndedIsRefused(t *testing.T) {
	l, path := listen(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), socketVariable+"="+path)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close() // ends the child
	cmd.Stdin = r
	if out, err := cmd.Output(); err != nil || string(out) != "connected\n" {
		t.Fatalf("%q, %v", out, err)
	}
	r.Close()
	s, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if p, err := attest.PeerProcess(s); !errors.Is(err, attest.ErrNoProcess) {
		t.Errorf("%+v, %v; want ErrNoProcess", p, err)
	}
}

func TestWatch(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "hold")
	cmd.Env = append(os.Environ(), socketVariable+"=unused")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	st, err := attest.Proc{}.Stat(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	early, err := attest.NewWatch(st.Process)
	if err != nil {
		t.Fatal(err)
	}
	if err := early.Close(); err != nil { // ends while the process lives
		t.Error(err)
	}
	select {
	case <-early.Ended():
		t.Error("a closed watch says that the process has ended")
	default:
	}
	w, err := attest.NewWatch(st.Process)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	stdin.Close()
	<-w.Ended()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := attest.NewWatch(st.Process); !errors.Is(err, attest.ErrNoProcess) {
		t.Errorf("a watch of an ended process: %v, want ErrNoProcess", err)
	}
	own, err := attest.Proc{}.Stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	own.StartTime++
	if _, err := attest.NewWatch(own.Process); !errors.Is(err, attest.ErrNoProcess) {
		t.Errorf("a watch of another process of the number: %v, want ErrNoProcess", err)
	}
}

func TestCredentials(t *testing.T) {
	cart := spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/cart")
	down := errors.New("the node is down")
	for name, tc := range map[string]struct {
		resolve attest.Resolve
		id      spiffeid.ID
		err     error
	}{
		"nobody resolves":  {nil, spiffeid.ID{}, nil},
		"a workload":       {func(context.Context, attest.Process, uint32) (spiffeid.ID, error) { return cart, nil }, cart, nil},
		"resolving failed": {func(context.Context, attest.Process, uint32) (spiffeid.ID, error) { return cart, down }, spiffeid.ID{}, down},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := pair(t)
			_, info, err := attest.NewCredentials(tc.resolve).ServerHandshake(s)
			if err != nil {
				t.Fatal(err)
			}
			c := info.(attest.Info).Caller
			if c.ID != tc.id || !errors.Is(c.Err, tc.err) || !c.Local || c.Process.PID != os.Getpid() || c.UID != uint32(os.Geteuid()) {
				t.Errorf("caller %+v", c)
			}
		})
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := attest.NewCredentials(nil).ServerHandshake(a); err == nil {
		t.Error("a connection that is no unix socket was let in")
	}
}

func TestIsNode(t *testing.T) {
	cart := spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/cart")
	for name, tc := range map[string]struct {
		caller attest.Caller
		want   bool
	}{
		"a local process of a listed user": {attest.Caller{Local: true, UID: 7}, true},
		"another user":                     {attest.Caller{Local: true, UID: 8}, false},
		"a workload of a listed user":      {attest.Caller{Local: true, UID: 7, ID: cart}, false},
		"over the network":                 {attest.Caller{UID: 7}, false},
	} {
		if got := tc.caller.IsNode(7); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
