package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const service = `apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: %s}
spec:
  ports: [{port: 8080, protocol: %s}]
  mtls: %s
`

const retries = `---
apiVersion: inlay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: %[1]s}
spec:
  targetRef: {kind: Service, name: %[1]s}
  retries: {attempts: 2, on: [unavailable, connect-failure, refused-stream]}
`

func greeterYAML(withRetries bool) map[string]string {
	text := fmt.Sprintf(service, "greeter", "GRPC", "strict") + "---\n" + fmt.Sprintf(service, "pages", "HTTP", "strict")
	if withRetries {
		text += fmt.Sprintf(retries, "greeter") + fmt.Sprintf(retries, "pages")
	}
	return map[string]string{"mesh.yaml": text}
}

// load is servers and callers of both kinds, with what each end counted.
type load struct {
	m                *mesh
	servers, callers []*proc
}

// newLoad starts n servers of each kind, and one caller of each kind once the mesh has them all.
func newLoad(m *mesh, n int) *load {
	m.t.Helper()
	l := &load{m: m}
	for i := range n {
		l.servers = append(l.servers, l.server("greeter", "grpc-server", i), l.server("pages", "http-server", i))
	}
	m.endpoints("greeter", n)
	m.endpoints("pages", n)
	for _, call := range []string{"grpc:greeter", "http:pages"} {
		c := m.program("web", "", "caller", "E2E_CALL="+call, "E2E_WORKERS=4", "INLAY_STATE_DIR="+filepath.Join(m.dir, "state", "web-"+call[:4]))
		l.callers = append(l.callers, c)
	}
	for _, c := range l.callers {
		c.event("ready")
	}
	return l
}

func (l *load) server(svc, role string, i int) *proc {
	name := fmt.Sprintf("%s%d", svc, i)
	return l.m.program(svc, "", role, "E2E_NAME="+name, "INLAY_STATE_DIR="+filepath.Join(l.m.dir, "state", name))
}

// progress waits until every caller has made calls for d: long enough that what just happened
// shows in the counts.
func (l *load) progress(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C // the length of the load itself, not a wait for something to have happened
}

// end stops callers first, then servers, and compares both ends: no call failed, and servers
// handled what callers made.
func (l *load) end(exact bool) {
	l.m.t.Helper()
	var calls, failed, handled int64
	for _, c := range l.callers {
		c.stop()
		e := c.event("calls")
		calls += e.Calls
		failed += e.Failed
		if e.Failed > 0 {
			l.m.t.Errorf("%s: %d of %d calls failed, among them: %q", c.name, e.Failed, e.Calls, last(c.errors(), 3))
		}
	}
	for _, s := range l.servers {
		s.stop()
		handled += s.event("handled").Handled
	}
	l.m.t.Logf("calls %d, failed %d, handled %d", calls, failed, handled)
	if calls == 0 {
		l.m.t.Error("no call was made")
	}
	if exact && handled != calls {
		l.m.t.Errorf("callers made %d calls, servers handled %d", calls, handled)
	}
	if handled < calls-failed {
		l.m.t.Errorf("callers saw %d calls succeed, servers handled %d", calls-failed, handled)
	}
}

// TestKillControlPlane: the death of the control plane under load fails no call, and its return
// brings endpoints and clients back.
func TestKillControlPlane(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	l := newLoad(m, 1)
	l.progress(time.Second)
	if err := syscall.Kill(m.daemon("control plane"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.dev.awaitStderr("controlplane is back")
	l.progress(2 * time.Second)
	m.endpoints("greeter", 1)
	m.endpoints("pages", 1)
	l.end(true)
}

// TestKillNode: the death of the node under load fails no call; programs register again.
func TestKillNode(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	l := newLoad(m, 1)
	l.progress(time.Second)
	if err := syscall.Kill(m.daemon("node"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.dev.awaitStderr("node is back")
	for _, p := range append(l.servers, l.callers...) {
		p.awaitStderr("registered again")
	}
	l.progress(2 * time.Second)
	l.end(true)
}

// TestColdStart: a service that ran on this node starts while the control plane is away.
func TestColdStart(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	server := m.program("greeter", "", "grpc-server")
	m.endpoints("greeter", 1)
	state := "INLAY_STATE_DIR=" + filepath.Join(m.dir, "state", "web")
	first := m.program("web", "", "once", "E2E_CALL=grpc:greeter", state)
	first.event("ready")
	first.wait()

	// Stopped, not killed: dev would start a killed one again at once.
	pid := m.daemon("control plane")
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	second := m.program("web", "", "once", "E2E_CALL=grpc:greeter", state)
	if got := second.event("ready").Text; got != "greeter" {
		t.Errorf("answered by %q, want greeter", got)
	}
	second.wait()
	if second.err != nil {
		t.Errorf("the second caller: %v", second.err)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	server.stop()
}

// TestRollingRestart: three servers of each kind are replaced one by one under load; with retries
// off nothing may fail by itself, with retries on nothing may be doubled into a failure.
func TestRollingRestart(t *testing.T) {
	for _, withRetries := range []bool{false, true} {
		t.Run(fmt.Sprintf("retries=%v", withRetries), func(t *testing.T) {
			m := newMesh(t, greeterYAML(withRetries))
			l := newLoad(m, 3)
			l.progress(time.Second)
			for i := range 3 {
				for k, kind := range []struct{ svc, role string }{{"greeter", "grpc-server"}, {"pages", "http-server"}} {
					old := l.servers[2*i+k]
					l.servers = append(l.servers, l.server(kind.svc, kind.role, 3+i))
					m.endpoints(kind.svc, 4)
					old.stop()
					m.endpoints(kind.svc, 3)
				}
			}
			l.progress(time.Second)
			l.end(!withRetries)
		})
	}
}

// TestRotation: certificates of 10 s for a minute of load fail no call.
func TestRotation(t *testing.T) {
	t.Parallel() // these four mostly wait
	m := newMesh(t, greeterYAML(false), "--svid-ttl", "10s")
	l := newLoad(m, 1)
	l.progress(time.Minute)
	var certs struct {
		Certs []struct {
			SpiffeID string `json:"spiffe_id"`
		}
	}
	m.jsonOf(&certs, "get", "certs")
	if len(certs.Certs) == 0 {
		t.Error("no live certificate")
	}
	l.end(true)
}

// TestWrongIdentity: a server of another identity at an endpoint's address is refused, and the
// error names both IDs.
func TestWrongIdentity(t *testing.T) {
	m := newMesh(t, nil)
	impostor := m.program("impostor", "", "grpc-server")
	m.endpoints("impostor", 1)
	var got struct {
		Endpoints []struct{ Addresses []string }
	}
	m.jsonOf(&got, "get", "endpoints", "impostor")
	host, port, _ := strings.Cut(got.Endpoints[0].Addresses[0], ":")
	m.write("orders.yaml", fmt.Sprintf(service, "orders", "GRPC", "strict")+
		fmt.Sprintf("  endpoints: [{address: %s, port: %s, tls: mesh}]\n", host, port))
	m.endpoints("orders", 1)
	caller := m.program("web", "", "once", "E2E_CALL=grpc:orders")
	e := caller.event("error")
	for _, id := range []string{"spiffe://inlay.local/ns/default/svc/impostor", "spiffe://inlay.local/ns/default/svc/orders"} {
		if !strings.Contains(e.Text, id) {
			t.Errorf("error %q does not name %s", e.Text, id)
		}
	}
	caller.wait()
	if caller.err == nil {
		t.Error("the caller's exit code is 0")
	}
	impostor.stop()
	if n := impostor.event("handled").Handled; n != 0 {
		t.Errorf("the impostor handled %d calls", n)
	}
}

// awaitStderr waits until a process has written text to stderr.
func (p *proc) awaitStderr(text string) {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		p.mu.Lock()
		ok := strings.Contains(p.stderr.String(), text)
		p.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%s never wrote %q", p.name, text)
		}
		select {
		case <-p.done:
			p.t.Fatalf("%s ended without writing %q", p.name, text)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
