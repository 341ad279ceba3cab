package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/inlay-mesh/inlay/meshsdk"
)

// endpoint is a row of `inlay get endpoints`.
type endpoint struct {
	Addresses   []string
	InstanceID  string `json:"instance_id"`
	Health      string
	TLS         string
	Unreachable string
}

// listed returns the endpoints of a service; none when nobody knows it.
func (m *mesh) listed(service string) []endpoint {
	m.t.Helper()
	stdout, _, code := m.cli("get", "endpoints", service, "--run-dir", m.run, "-o", "json")
	var got struct{ Endpoints []endpoint }
	if code == 0 {
		if err := json.Unmarshal([]byte(stdout), &got); err != nil {
			m.t.Fatal(err)
		}
	}
	return got.Endpoints
}

// listedWhen waits until the endpoints of a service are as wanted.
func (m *mesh) listedWhen(service, what string, holds func([]endpoint) bool) (got []endpoint) {
	m.t.Helper()
	m.eventually(what, func() bool { got = m.listed(service); return holds(got) })
	return got
}

// freePort is a port that was free a moment ago, for programs that cannot say which one they took.
func freePort(t *testing.T) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	_, port, err := net.SplitHostPort(lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func testBinary(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return self
}

// outside starts a role that is not below `inlay run`, but knows where the mesh is.
func (m *mesh) outside(role string, env ...string) *proc {
	m.t.Helper()
	if !hasKey(env, "INLAY_STATE_DIR") {
		env = append(env, "INLAY_STATE_DIR="+filepath.Join(m.dir, "state", "outside-"+role))
	}
	return startProc(m.t, "outside/"+role, exec.Command(testBinary(m.t)), append(env, "E2E_ROLE="+role))
}

// pythonFiles is a program without the SDK: Python's own web server over a directory with one page.
func pythonFiles(t *testing.T, port string) []string {
	t.Helper()
	python, err := exec.LookPath("python3")
	if err != nil {
		skip(t, "python3 is not there: run through make test, which installs it")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "index.html"), []byte("a plain page"), 0o644); err != nil {
		t.Fatal(err)
	}
	return []string{python, "-m", "http.server", port, "--bind", "127.0.0.1", "--directory", dir}
}

// TestPortOfStrictService: a program without the SDK in a strict service is registered, and both
// ends say why nobody calls it; a caller fails and leaves nothing in plaintext.
func TestPortOfStrictService(t *testing.T) {
	m := newMesh(t, map[string]string{"mesh.yaml": fmt.Sprintf(service, "legacy", "HTTP", "strict")})
	port := freePort(t)
	legacy := m.start("legacy", nil, append([]string{"run", "--run-dir", m.run, "--service", "legacy", "--port", "8080:" + port, "--"}, pythonFiles(t, port)...)...)
	legacy.awaitStderr("port 8080 is registered, but nobody will call it: service legacy.default is strict")
	legacy.awaitStderr("mtls: permissive") // the remedy
	got := m.listed("legacy")
	if len(got) != 1 || got[0].TLS != "none" || !strings.Contains(got[0].Unreachable, "strict") {
		t.Errorf("endpoints %+v, want one without mesh TLS and the reason why it is not called", got)
	}
	caller := m.program("web", "", "once", "E2E_CALL=http:legacy")
	if e := caller.event("error"); !strings.Contains(e.Text, "no endpoint") && !strings.Contains(e.Text, "no ready endpoint") {
		t.Errorf("the caller says %q, want that there is no endpoint", e.Text)
	}
	stdout, _, code := m.cli("explain", "GET", "http://legacy/", "--from", "shop", "--run-dir", m.run)
	if code != 1 || !strings.Contains(stdout, "no_endpoint") || !strings.Contains(stdout, "inlay get endpoints legacy") {
		t.Errorf("explain: exit code %d:\n%s", code, stdout)
	}
	legacy.stop()
	if strings.Contains(legacy.stderrText(), "GET /") {
		t.Errorf("the program was called: %s", legacy.stderrText())
	}
	if code := legacy.cmd.ProcessState.ExitCode(); code != 128+int(syscall.SIGTERM) {
		t.Errorf("exit code %d, want %d: the signal's", code, 128+int(syscall.SIGTERM))
	}
}

// TestPortOfPermissiveService: the SDK calls a program without the SDK in plaintext.
func TestPortOfPermissiveService(t *testing.T) {
	m := newMesh(t, map[string]string{"mesh.yaml": fmt.Sprintf(service, "legacy", "HTTP", "permissive")})
	port := freePort(t)
	m.start("legacy", nil, append([]string{"run", "--run-dir", m.run, "--service", "legacy", "--port", "8080:" + port, "--"}, pythonFiles(t, port)...)...)
	m.endpoints("legacy", 1)
	caller := m.program("web", "", "once", "E2E_CALL=http:legacy")
	if e := caller.event("ready"); e.Text != "a plain page" {
		t.Errorf("answer %q, want the page", e.Text)
	}
}

// TestPortIsReplaced: an SDK that registers below the same run takes the place of the port. The
// signal that makes it do so goes through `inlay run`; SIGTERM takes the port out of the mesh before
// the program sees it, and the exit code is the program's own.
func TestPortIsReplaced(t *testing.T) {
	m := newMesh(t, map[string]string{"mesh.yaml": fmt.Sprintf(service, "legacy", "HTTP", "permissive")})
	plain := func(name string) *proc {
		port := freePort(t)
		return m.start(name, []string{"E2E_ROLE=plain", "E2E_NAME=" + name, "E2E_ADDR=127.0.0.1:" + port, "INLAY_STATE_DIR=" + filepath.Join(m.dir, "state", name)},
			"run", "--run-dir", m.run, "--service", "legacy", "--port", "8080:"+port, "--", testBinary(t))
	}
	late := plain("late")
	late.event("ready")
	m.endpoints("legacy", 1)
	before := m.listed("legacy")
	if before[0].TLS != "none" {
		t.Errorf("before the SDK: %+v, want no mesh TLS", before)
	}
	if err := late.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	late.awaitStderr("takes this endpoint's place")
	after := m.listedWhen("legacy", "the SDK's endpoint alone", func(got []endpoint) bool { return len(got) == 1 && got[0].TLS == "mesh" })
	if after[0].InstanceID == before[0].InstanceID {
		t.Errorf("the instance is %s as before", after[0].InstanceID)
	}
	caller := m.program("web", "", "once", "E2E_CALL=http:legacy")
	if e := caller.event("ready"); e.Text != "late by the SDK" {
		t.Errorf("answered by %q, want the SDK", e.Text)
	}

	drained := plain("drained")
	drained.event("ready")
	m.endpoints("legacy", 2)
	if err := drained.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	drained.event("SIGTERM") // it has the signal now, and stays until told
	for _, e := range m.listed("legacy") {
		if e.TLS == "none" && e.Health == "healthy" {
			t.Errorf("the program has SIGTERM and its endpoint is still called: %+v", e)
		}
	}
	if err := drained.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	drained.wait()
	if code := drained.cmd.ProcessState.ExitCode(); code != 3 {
		t.Errorf("exit code %d, want the program's 3", code)
	}
}

// TestOrphan: a grandchild that left its session, whose parent has died, still has the identity of
// the run that it is below.
func TestOrphan(t *testing.T) {
	m := newMesh(t, nil)
	p := m.program("shop", "", "orphan")
	e := p.event("orphan")
	p.wait()
	if want := "spiffe://inlay.local/ns/default/svc/shop"; e.Text != want {
		t.Errorf("identity %q, want %s", e.Text, want)
	}
	if want := int64(p.cmd.Process.Pid); e.Calls != want {
		t.Errorf("the orphan's parent is %d, want %d: `inlay run` itself", e.Calls, want)
	}
	if p.err != nil {
		t.Errorf("exit: %v", p.err)
	}
}

// TestOutside: a program outside any run has no identity; what it says names the remedy.
func TestOutside(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	for name, tc := range map[string]struct{ socket, want string }{
		"of any run":          {"unix://" + filepath.Join(m.run, "workload.sock"), "it has no identity: start the program with `inlay run"},
		"with a dead socket":  {"unix://" + filepath.Join(m.dir, "dead.sock"), "nothing answers at its SPIFFE_ENDPOINT_SOCKET: is `inlay dev` or `inlay node` running?"},
		"that names no node":  {"", "it has no identity: start the program with `inlay run"},
		"with a broken value": {"workload.sock", "SPIFFE_ENDPOINT_SOCKET"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // each waits for its call's deadline
			env := []string{"E2E_CALL=grpc:greeter", "E2E_WITHIN=3s", "INLAY_SERVICE=web", "INLAY_ADDR=unix:" + filepath.Join(m.run, "controlplane.sock"),
				"SPIFFE_ENDPOINT_SOCKET=" + tc.socket, "INLAY_STATE_DIR=" + t.TempDir()}
			c := startProc(t, "outside", exec.Command(testBinary(t)), append(env, "E2E_ROLE=once"))
			if e := c.event("error"); !strings.Contains(e.Text, tc.want) {
				t.Errorf("it says %q, want %q in it", e.Text, tc.want)
			}
			c.wait()
			if c.cmd.ProcessState.ExitCode() != 1 {
				t.Errorf("exit code %d, want 1", c.cmd.ProcessState.ExitCode())
			}
		})
	}
	dead := m.outside("go-spiffe", "SPIFFE_ENDPOINT_SOCKET=unix://"+filepath.Join(m.run, "workload.sock"))
	if e := dead.event("error"); !strings.Contains(e.Text, "PermissionDenied") || !strings.Contains(e.Text, "inlay run") {
		t.Errorf("the Workload API says %q, want PermissionDenied and the remedy", e.Text)
	}
}

// TestPlaintextCaller: what a program outside the mesh gets of a strict and of a permissive service,
// and that a change from the one to the other applies to new connections of the running server.
func TestPlaintextCaller(t *testing.T) {
	m := newMesh(t, map[string]string{"mesh.yaml": fmt.Sprintf(service, "pages", "HTTP", "strict")})
	server := m.program("pages", "", "http-server")
	m.endpoints("pages", 1)
	url := "http://" + m.listed("pages")[0].Addresses[0] + "/"
	inside := m.program("web", "", "caller", "E2E_CALL=http:pages", "E2E_WORKERS=2")
	inside.event("ready")

	get := func() (string, error) { // one connection a call, as curl makes it
		hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
		resp, err := hc.Get(url)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		raw, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("status %s", resp.Status)
		}
		return string(raw), err
	}
	if text, err := get(); err == nil {
		t.Fatalf("a strict service answered %q to plaintext", text)
	}
	m.write("mesh.yaml", fmt.Sprintf(service, "pages", "HTTP", "permissive"))
	m.eventually("an answer in plaintext", func() bool { text, err := get(); return err == nil && text == "pages" })
	m.write("mesh.yaml", fmt.Sprintf(service, "pages", "HTTP", "strict"))
	m.eventually("plaintext refused again", func() bool { _, err := get(); return err != nil })

	inside.stop()
	made := inside.event("calls")
	if made.Failed != 0 || made.Calls == 0 {
		t.Errorf("%d of %d calls of the mesh failed meanwhile: %q", made.Failed, made.Calls, last(inside.errors(), 3))
	}
	server.stop()
	handled := server.event("handled")
	if handled.Peers["nobody"] == 0 {
		t.Errorf("handled %v: no call without identity", handled.Peers)
	}
	if got := handled.Peers["spiffe://inlay.local/ns/default/svc/web"]; got != made.Calls {
		t.Errorf("handled %d calls of web, it made %d", got, made.Calls)
	}
	if len(handled.Peers) != 2 {
		t.Errorf("peers %v, want web and nobody: a plaintext caller never has an identity", handled.Peers)
	}
	// What was counted is with the control plane: curl asks the same way.
	resp, err := http.Post("http://"+m.admin+"/inlay.admin.v1.Admin/GetCounters", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var counters struct {
		Services []struct {
			Service string
			Calls   []struct {
				Direction, Peer string
				Calls, MTLS     string // 64 bits are strings in proto3 JSON
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&counters); err != nil {
		t.Fatal(err)
	}
	plain := int64(0)
	for _, s := range counters.Services {
		for _, c := range s.Calls {
			n, _ := strconv.ParseInt(c.Calls, 10, 64)
			secure, _ := strconv.ParseInt(c.MTLS, 10, 64)
			if s.Service == "pages" && c.Direction == "server" {
				plain += n - secure
			}
		}
	}
	if plain != handled.Peers["nobody"] {
		t.Errorf("%d plaintext calls counted, the server handled %d: %+v", plain, handled.Peers["nobody"], counters)
	}
}

// lonelyRole plays the roles that decide themselves when they join the mesh, if at all.
func lonelyRole(ctx context.Context, role string) (bool, error) {
	switch role {
	case "plain":
		return true, plainServer(ctx)
	case "orphan":
		return true, orphan()
	case "orphan-parent":
		return true, orphanParent()
	case "orphan-child":
		return true, orphanChild(ctx)
	}
	return false, nil
}

// plainServer serves HTTP without the SDK; at SIGUSR1 it joins the mesh and serves by the SDK as well.
// It says when SIGTERM comes and ends with 3 at the SIGUSR2 after.
func plainServer(ctx context.Context) error {
	more := make(chan os.Signal, 4)
	signal.Notify(more, syscall.SIGUSR1, syscall.SIGUSR2)
	name := os.Getenv("E2E_NAME")
	lis, err := net.Listen("tcp", os.Getenv("E2E_ADDR"))
	if err != nil {
		return err
	}
	answer := func(how string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name+" by "+how) })
	}
	go func() { _ = http.Serve(lis, answer("itself")) }()
	say(event{Kind: "ready"})
	done := ctx.Done()
	ended, joined := make(chan error, 1), false
	for {
		select {
		case s := <-more:
			if s == syscall.SIGUSR2 {
				os.Exit(3)
			}
			m, err := meshsdk.Open(ctx)
			if err != nil {
				return err
			}
			joined = true
			go func() { ended <- m.Run(ctx, meshsdk.HTTP(8080, answer("the SDK"))) }()
		case err := <-ended:
			return err
		case <-done:
			done = nil
			say(event{Kind: "SIGTERM"})
			if joined {
				return <-ended
			}
		}
	}
}

// orphan starts a parent that starts a child and dies; it waits for the child by a pipe that only
// the child still holds.
func orphan() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	parent, err := again("orphan-parent", w)
	if err != nil {
		return err
	}
	_ = w.Close()
	if err := parent.Wait(); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

// orphanParent leaves the session (it was started so), starts the child and dies. The child knows
// by the end of another pipe.
func orphanParent() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	_, err = again("orphan-child", os.NewFile(3, "held"), r)
	runtime.KeepAlive(w) // it is closed by the end of this process
	return err
}

func orphanChild(ctx context.Context) error {
	if _, err := io.Copy(io.Discard, os.NewFile(4, "parent")); err != nil { // until the parent is dead
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx)
	if err != nil {
		return err
	}
	say(event{Kind: "orphan", Text: svid.ID.String(), Calls: int64(os.Getppid())})
	return nil
}

// again starts another role of this binary in a session of its own, with further descriptors.
func again(role string, files ...*os.File) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "E2E_ROLE="+role)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd, errors.Join(cmd.Start())
}
