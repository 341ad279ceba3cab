//go:build linux

package workload_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// cgroupVariable in a process's environment stands for the cgroup it is in.
const cgroupVariable = "INLAY_TEST_CGROUP"

// cgroups stands for the agent: directories with a file cgroup.events, and processes that are in the
// cgroup that their environment names.
type cgroups struct {
	dir string

	mu       sync.Mutex
	admitted []workload.Admission
	left     chan string
}

func newCgroups(t *testing.T) *cgroups {
	return &cgroups{dir: t.TempDir(), left: make(chan string, 16)}
}

func (c *cgroups) Admit(_ context.Context, a workload.Admission) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.admitted = append(c.admitted, a)
	path := filepath.Join(c.dir, a.Service+"."+a.Namespace+"-"+a.RunID)
	switch {
	case a.Service == "broken":
		return "", errors.New("no room for a workload")
	case a.Cgroup != "" && a.Cgroup != path:
		return "", fmt.Errorf("%w: cgroup %s is not that of run %q", workload.ErrRefused, a.Cgroup, a.RunID)
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", err
	}
	return path, c.populate(path, true)
}

func (c *cgroups) populate(path string, yes bool) error {
	text := "populated 0\n"
	if yes {
		text = "populated 1\n"
	}
	// In place and of one length: like the kernel's file, it is never empty.
	f, err := os.OpenFile(filepath.Join(path, "cgroup.events"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt([]byte(text), 0)
	return err
}

func (c *cgroups) Leave(runID string) { c.left <- runID }

func (c *cgroups) Find(pid int) (string, bool, error) {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "", false, err
	}
	for kv := range bytes.SplitSeq(env, []byte{0}) {
		if run, ok := bytes.CutPrefix(kv, []byte(cgroupVariable+"=")); ok {
			return string(run), true, nil
		}
	}
	return "", false, nil
}

// in has a process live in the cgroup of a run.
func in(cmd *exec.Cmd, runID string) *exec.Cmd {
	cmd.Env = append(cmd.Environ(), cgroupVariable+"="+runID)
	return cmd
}

// managedHouse is a house whose node has cgroups.
func managedHouse(t *testing.T, users map[uint32][]string, log *logged) (*house, *cgroups) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "managed runs are root's to register")
	}
	h, c := newHouse(t, time.Hour), newCgroups(t)
	h.startControlPlane()
	startManaging(h, c, users, log)
	return h, c
}

func startManaging(h *house, c *cgroups, users map[uint32][]string, log *logged) {
	h.t.Helper()
	h.startNode(func(cfg *workload.Config) {
		cfg.Cgroups, cfg.Users = c, users
		cfg.NodeAddresses = []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")}
		if log != nil {
			cfg.Log = slog.New(slog.NewTextHandler(log, nil))
		}
	})
}

// logged is a log that the node writes and the test reads.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// take returns what was written since the last time.
func (l *logged) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

func managedStart(service, runID string, m *nodepb.Managed) *nodepb.RunRequest {
	req := startOf(service, runID)
	req.GetStart().Managed = m
	return req
}

// ask opens a stream and sends the first request; the answer is what the node says to it.
func (h *house) ask(req *nodepb.RunRequest) (grpc.BidiStreamingClient[nodepb.RunRequest, nodepb.RunResponse], *nodepb.Started, error) {
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
	if err := stream.Send(req); err != nil {
		h.t.Fatal(err)
	}
	resp, err := stream.Recv()
	return stream, resp.GetStarted(), err
}

// A managed run is known by its cgroup, wherever in the process tree its program lives, and only for
// the user it was registered for. Its place in the tree alone gives nothing.
func TestManagedIsKnownByItsCgroup(t *testing.T) {
	h, c := managedHouse(t, map[uint32][]string{65534: {"*"}, 0: {"*"}}, nil)
	go func() { // the registry answers whatever is registered
		for range h.reg.requests {
			h.reg.answers <- registered(60, "")
		}
	}()
	_, started, err := h.ask(managedStart("cart", "r1", &nodepb.Managed{Uid: 65534, RawSockets: true}))
	if err != nil || started.GetCgroup() != filepath.Join(c.dir, "cart.default-r1") || started.GetSpiffeId() != "spiffe://inlay.local/ns/default/svc/cart" {
		t.Fatalf("started %v, %v", started, err)
	}
	if a := c.admitted[0]; a.UID != 65534 || !a.Raw || a.Service != "cart" || a.Namespace != "default" || a.Cgroup != "" {
		t.Errorf("admitted %+v", a)
	}
	print := func(cmd *exec.Cmd) string {
		t.Helper()
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	const cart = "spiffe://inlay.local/ns/default/svc/cart"
	for name, tc := range map[string]struct {
		cmd  *exec.Cmd
		want string
	}{
		"its user in its cgroup":                {in(again(h.dir, "setuid", "65534", "fetch"), "r1"), cart},
		"root in its cgroup is another user":    {in(again(h.dir, "fetch"), "r1"), "PermissionDenied"},
		"its user below the run, outside of it": {again(h.dir, "setuid", "65534", "fetch"), "PermissionDenied"},
		"a cgroup that nobody registered":       {in(again(h.dir, "setuid", "65534", "fetch"), "r9"), "PermissionDenied"},
		"a run of its own inside the cgroup":    {in(again(h.dir, "setuid", "65534", "root", "orders", "r2", "fetch"), "r1"), cart},
	} {
		if got := print(tc.cmd); !strings.HasPrefix(got, tc.want) {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
	if got := print(again(h.dir, "setuid", "65534", "fetch")); !strings.Contains(got, "has left the cgroup of cart.default") {
		t.Errorf("outside the cgroup: %q, want that it says so", got)
	}
	// The control plane learns the same.
	child := in(again(h.dir, "until-stdin-ends"), "r1")
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
	resolve := workload.NewResolver(h.node.NodeSocket())
	if _, err := resolve(t.Context(), st.Process, 0); err == nil || !strings.Contains(err.Error(), "of user 0, cart.default is run by user 65534") {
		t.Errorf("attest of root in the cgroup: %v", err)
	}
	stdin.Close()
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestManagedIsRefusedAndWrittenDown(t *testing.T) {
	var log logged
	h, c := managedHouse(t, map[uint32][]string{65534: {"cart", "broken"}}, &log)
	elsewhere := filepath.Join(c.dir, "..", "other")
	for name, tc := range map[string]struct {
		req  *nodepb.RunRequest
		code codes.Code
		want string
	}{
		"a service that the program's user may not run": {managedStart("orders", "r1", &nodepb.Managed{Uid: 65534}), codes.PermissionDenied, "user 65534 may not run orders.default: start the node with --allow 65534=default/orders"},
		"root, whom the list does not name":             {managedStart("cart", "r2", &nodepb.Managed{}), codes.PermissionDenied, "user 0 may not run cart.default"},
		"a cgroup that is another's":                    {managedStart("cart", "r3", &nodepb.Managed{Uid: 65534, Cgroup: elsewhere}), codes.PermissionDenied, "is not that of run"},
		"an agent that cannot":                          {managedStart("broken", "r4", &nodepb.Managed{Uid: 65534}), codes.FailedPrecondition, "no room for a workload"},
	} {
		if _, _, err := h.ask(tc.req); status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s that says %q", name, err, tc.code, tc.want)
		}
		if text := log.take(); !strings.Contains(text, "registration refused") || !strings.Contains(text, "uid="+fmt.Sprint(tc.req.GetStart().GetManaged().GetUid())) {
			t.Errorf("%s: log %q, want the refusal with its user", name, text)
		}
	}
	if _, _, err := h.ask(managedStart("cart", "r5", &nodepb.Managed{Uid: 65534, Cgroup: "relative"})); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a path that is none: %v, want InvalidArgument", err)
	}
	if text := log.take(); !strings.Contains(text, "registration refused") || !strings.Contains(text, "cgroup=relative") || !strings.Contains(text, "uid=65534") {
		t.Errorf("a path that is none: log %q, want the refusal", text)
	}
	got := run(t, h, "setuid", "65534", "managed", "cart", "r6")
	if !slices.Equal(got, []string{"PermissionDenied user 65534 may not ask for a cgroup: only root may: use sudo"}) {
		t.Errorf("a caller who is not root: %q", got)
	}
}

func TestManagedNeedsAnAgent(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	_, _, err := h.ask(managedStart("cart", "r1", &nodepb.Managed{}))
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "inlay node --ebpf") {
		t.Errorf("error %v, want FailedPrecondition with the remedy", err)
	}
}

// A managed run is registered at once, without ports; its port is an instance beside it. Both stay
// when the stream breaks while the program lives, and leave when its cgroup is empty.
func TestManagedStaysUntilItsCgroupIsEmpty(t *testing.T) {
	h, c := managedHouse(t, map[uint32][]string{65534: {"*"}}, nil)
	stream, started, err := h.ask(managedStart("cart", "r1", &nodepb.Managed{Uid: 65534}))
	if err != nil {
		t.Fatal(err)
	}
	first := (<-h.reg.requests).GetInstance()
	if len(first.GetPorts()) != 0 || !slices.Equal(first.GetAddresses(), []string{"192.0.2.7", "2001:db8::7"}) || first.GetService() != "cart" || first.GetRunId() != "" {
		t.Errorf("registered %v, want a workload without ports and with the node's addresses", first)
	}
	h.reg.answers <- registered(60, "")
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 53, Address: "0.0.0.0:5353", Udp: true}}})
	second := (<-h.reg.requests).GetInstance()
	if p := second.GetPorts()[0]; p.GetProtocol() != registrypb.Protocol_PROTOCOL_UDP || p.GetAddresses()[0] != "192.0.2.7:5353" || second.GetInstanceId() == first.GetInstanceId() {
		t.Errorf("registered %v, want the port at the node's first address", second)
	}
	h.reg.answers <- registered(60, "")
	recv(t, stream)
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err == nil {
		t.Fatal("the stream did not end")
	}
	fetchAs := func() string {
		out, err := in(again(h.dir, "setuid", "65534", "fetch"), "r1").Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	if got := fetchAs(); got != "spiffe://inlay.local/ns/default/svc/cart" {
		t.Errorf("a program that outlived its run: %q", got)
	}
	// The same run comes back: it has its cgroup still, and no instance is registered twice.
	stream, started, err = h.ask(managedStart("cart", "r1", &nodepb.Managed{Uid: 65534, Cgroup: started.GetCgroup()}))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.ask(managedStart("orders", "r1", &nodepb.Managed{Uid: 65534, Cgroup: started.GetCgroup()})); status.Code(err) != codes.AlreadyExists {
		t.Errorf("another service by the same run id: %v, want AlreadyExists", err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := c.populate(started.GetCgroup(), false); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if req := <-h.reg.requests; req.GetDrain() == nil {
			t.Errorf("after the last process: %v, want drain", req)
		}
		h.reg.answers <- answer{resp: &registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Drained{Drained: &registrypb.Drained{All: true}}}}
	}
	if got := <-c.left; got != "r1" {
		t.Errorf("run %q left, want r1", got)
	}
	if got := fetchAs(); !strings.HasPrefix(got, "PermissionDenied") {
		t.Errorf("afterwards: %q, want PermissionDenied", got)
	}
}

// A node that starts again knows the managed programs whose `inlay run` is gone: they have their
// identity and their place in the registry under the same ids, and leave with their last process.
func TestManagedOutlivesRunAndNode(t *testing.T) {
	users := map[uint32][]string{65534: {"*"}}
	h, c := managedHouse(t, users, nil)
	stream, started, err := h.ask(managedStart("cart", "r1", &nodepb.Managed{Uid: 65534}))
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]string{} // of the instances, with their addresses
	note := func() {
		in := (<-h.reg.requests).GetInstance()
		text := fmt.Sprint(len(in.GetPorts()))
		if len(in.GetPorts()) > 0 {
			text = in.GetPorts()[0].GetAddresses()[0]
		}
		if was, known := ids[in.GetInstanceId()]; known && was != text {
			t.Errorf("instance %s at %s, then at %s", in.GetInstanceId(), was, text)
		}
		ids[in.GetInstanceId()] = text
		h.reg.answers <- registered(60, "")
	}
	note()
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 80, Address: "127.0.0.1:4000"}}})
	note()
	recv(t, stream)
	h.stopNode()
	startManaging(h, c, users, nil)
	note()
	note()
	if len(ids) != 2 {
		t.Errorf("instances %v, want the same two", ids)
	}
	fetchAs := func() string {
		out, err := in(again(h.dir, "setuid", "65534", "fetch"), "r1").Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	if got := fetchAs(); got != "spiffe://inlay.local/ns/default/svc/cart" {
		t.Errorf("a program that outlived its run and its node: %q", got)
	}
	if err := c.populate(started.GetCgroup(), false); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if req := <-h.reg.requests; req.GetDrain() == nil {
			t.Errorf("after the last process: %v, want drain", req)
		}
		h.reg.answers <- answer{resp: &registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Drained{Drained: &registrypb.Drained{All: true}}}}
	}
	if got := <-c.left; got != "r1" {
		t.Errorf("run %q left, want r1", got)
	}
	if got := fetchAs(); !strings.HasPrefix(got, "PermissionDenied") {
		t.Errorf("afterwards: %q, want PermissionDenied", got)
	}
	// Nothing is left to be taken over, and a user who may not run the service any more takes nothing.
	h.stopNode()
	startManaging(h, c, users, nil)
	if _, _, err := h.ask(managedStart("cart", "r1", &nodepb.Managed{Uid: 65534})); err != nil {
		t.Errorf("the run id is free again: %v", err)
	}
	note()
	h.stopNode()
	startManaging(h, c, map[uint32][]string{65534: {"orders"}}, nil)
	if got := fetchAs(); !strings.HasPrefix(got, "PermissionDenied") {
		t.Errorf("a service that its user may not run any more: %q", got)
	}
}
