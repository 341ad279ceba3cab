package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const route = `---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: split}
spec:
  parentRefs: [{kind: Service, group: "", name: greeter}]
  rules:
  - backendRefs: [{group: inlay.dev, kind: ServiceVersion, name: greeter.%s}]
`

const versions = `  versions:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
`

// TestSkeleton is one YAML file, one route, one gRPC caller and server as real processes, with
// mutual TLS, through every room.
func TestSkeleton(t *testing.T) {
	m := newMesh(t, map[string]string{"mesh.yaml": fmt.Sprintf(service, "greeter", "GRPC", "strict") + versions + fmt.Sprintf(route, "v1")})
	v1 := m.program("greeter", "v1", "grpc-server")
	v2 := m.program("greeter", "v2", "grpc-server")
	m.endpoints("greeter", 2)
	c := m.program("web", "", "once", "E2E_CALL=grpc:greeter")
	if got := c.event("ready").Text; got != "greeter-v1" {
		t.Errorf("answered by %q, want greeter-v1", got)
	}
	c.wait()
	v1.stop()
	v2.stop()
	e := v1.event("handled")
	if want := "spiffe://inlay.local/ns/default/svc/web"; e.Handled != 1 || e.Peers[want] != 1 {
		t.Errorf("v1 handled %d calls, of %v; want 1 of %s", e.Handled, e.Peers, want)
	}
	if n := v2.event("handled").Handled; n != 0 {
		t.Errorf("v2 handled %d calls, want 0", n)
	}
}

// TestLive measures the time from a file's rename to the first call that obeys, 20 times.
func TestLive(t *testing.T) {
	text := func(v string) string {
		return fmt.Sprintf(service, "greeter", "GRPC", "strict") + versions + fmt.Sprintf(route, v)
	}
	m := newMesh(t, map[string]string{"mesh.yaml": text("v1")})
	m.program("greeter", "v1", "grpc-server")
	m.program("greeter", "v2", "grpc-server")
	m.endpoints("greeter", 2)
	c := m.program("web", "", "watcher", "E2E_CALL=grpc:greeter")
	c.event("ready")
	var took []time.Duration
	for i := range 20 {
		want := []string{"v2", "v1"}[i%2]
		before := time.Now()
		m.write("mesh.yaml", text(want))
		e := c.change("greeter-"+want, i)
		took = append(took, time.Unix(0, e.Nanos).Sub(before))
	}
	slices.Sort(took)
	t.Logf("rename to the first call that obeys: p50 %v, p99 %v of %d", took[len(took)/2], took[len(took)-1], len(took))
	if took[len(took)-1] > 5*time.Second {
		t.Errorf("the slowest change took %v", took[len(took)-1])
	}
}

// change waits for the n-th change event, which must be to text.
func (p *proc) change(text string, n int) event {
	p.t.Helper()
	var got event
	p.await(fmt.Sprintf("change %d to %s", n, text), func(lines []string) bool {
		i := -1
		for _, l := range lines {
			var e event
			if json.Unmarshal([]byte(l), &e) == nil && e.Kind == "change" {
				if i++; i == n {
					got = e
					return true
				}
			}
		}
		return false
	})
	if got.Text != text {
		p.t.Fatalf("change %d is to %q, want %q", n, got.Text, text)
	}
	return got
}

// TestBrokenFile: a broken file is refused with its place, the running revision serves on, and a
// mended one goes live.
func TestBrokenFile(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	l := newLoad(m, 1)
	m.write("mesh.yaml", "apiVersion: inlay.dev/v1alpha1\nkind: MeshService\nmetadata: {name: greeter}\nspec:\n  ports: [{port: 8080, protocol: SMTP}]\n  mtsl: strict\n")
	var s struct {
		Revision struct {
			ID     string
			Faults []struct{ Code, Source, Message string }
		}
	}
	m.eventually("two faults", func() bool {
		m.jsonOf(&s, "status")
		return len(s.Revision.Faults) == 2
	})
	var sources []string
	for _, f := range s.Revision.Faults {
		sources = append(sources, f.Source)
		if f.Code == "" || f.Message == "" {
			t.Errorf("fault without code or message: %+v", f)
		}
	}
	for _, want := range []string{"mesh.yaml:5:", "mesh.yaml:6:"} {
		if !slices.ContainsFunc(sources, func(s string) bool { return strings.HasPrefix(s, want) }) {
			t.Errorf("no fault at %s in %v", want, sources)
		}
	}
	refused := s.Revision.ID
	l.progress(time.Second)
	m.write("mesh.yaml", greeterYAML(true)["mesh.yaml"])
	m.eventually("the mended revision", func() bool {
		s.Revision.Faults = nil
		m.jsonOf(&s, "status")
		return len(s.Revision.Faults) == 0 && s.Revision.ID != refused
	})
	l.end(true)
}

// TestVerbs walks through the read verbs and one wrong input of each.
func TestVerbs(t *testing.T) {
	m := newMesh(t, map[string]string{"mesh.yaml": fmt.Sprintf(service, "greeter", "GRPC", "strict") + versions + fmt.Sprintf(route, "v1")})
	server := m.program("greeter", "v1", "grpc-server")
	m.endpoints("greeter", 1)
	caller := m.program("web", "", "caller", "E2E_CALL=grpc:greeter", "E2E_WORKERS=1")
	caller.event("ready")
	at := []string{"--run-dir", m.run}
	for _, tc := range []struct {
		args []string
		want []string
		code int
	}{
		{[]string{"get", "services"}, []string{"greeter", "8080/GRPC", "strict", "v1,v2", "mesh.yaml:1:"}, 0},
		{[]string{"get", "routes", "greeter"}, []string{"greeter.default:8080|v1=1", "GRPCRoute/default/split", "mesh.yaml:"}, 0},
		{[]string{"get", "endpoints", "greeter"}, []string{"version=v1", "mesh", "registered"}, 0},
		{[]string{"get", "clients"}, []string{"spiffe://inlay.local/ns/default/svc/web", "delta", "acked"}, 0},
		{[]string{"get", "certs"}, []string{"spiffe://inlay.local/ns/default/svc/greeter"}, 0},
		{[]string{"status"}, []string{"inlay.local", "clients acknowledged it"}, 0},
		{[]string{"explain", "POST", "http://greeter/inlay.examples.v1.Greeter/Hello", "--from", "web"}, []string{"greeter.default:8080|v1", "GRPCRoute/default/split", "mesh.yaml:"}, 0},
		{[]string{"get", "nothing"}, []string{"services, routes, endpoints, clients or certs"}, 2},
		{[]string{"explain", "GET", "http://nowhere/", "--from", "web"}, []string{"no route", "nowhere"}, 1},
	} {
		stdout, stderr, code := m.cli(append(slices.Clone(tc.args), at...)...)
		if code != tc.code {
			t.Errorf("inlay %v: exit code %d, want %d: %s", tc.args, code, tc.code, stderr)
		}
		for _, w := range tc.want {
			if !strings.Contains(stdout+stderr, w) {
				t.Errorf("inlay %v: no %q in\n%s%s", tc.args, w, stdout, stderr)
			}
		}
		if tc.code == 0 {
			for _, f := range []string{"json", "yaml"} {
				if _, stderr, code := m.cli(append(append(slices.Clone(tc.args), at...), "-o", f)...); code != 0 {
					t.Errorf("inlay %v -o %s: exit code %d: %s", tc.args, f, code, stderr)
				}
			}
		}
	}
	caller.stop()
	if e := caller.event("calls"); e.Failed != 0 {
		t.Errorf("%d of %d calls failed", e.Failed, e.Calls)
	}
	server.stop()
}

// TestWrongCommands: each mistake has one clear error and its exit code.
func TestWrongCommands(t *testing.T) {
	m := newMesh(t, nil)
	empty := t.TempDir()
	readOnly := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(readOnly, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		args []string
		want string
		code int
	}{
		{"a second dev says who runs", []string{"dev", "--config", m.config, "--run-dir", m.run}, "a mesh runs here already: `inlay dev`, pid", 6},
		{"a taken port", []string{"dev", "--config", m.config, "--run-dir", filepath.Join(m.dir, "other"), "--data", filepath.Join(m.dir, "data2"), "--xds-addr", "", "--xds-mtls-addr", "", "--admin-addr", m.admin}, "address in use by pid", 1},
		{"a data directory that is a file", []string{"dev", "--config", m.config, "--run-dir", filepath.Join(m.dir, "o2"), "--data", readOnly, "--xds-addr", "", "--xds-mtls-addr", "", "--admin-addr", "127.0.0.1:0"}, readOnly, 1},
		{"plaintext xDS off loopback", []string{"dev", "--config", m.config, "--run-dir", filepath.Join(m.dir, "o3"), "--data", filepath.Join(m.dir, "data3"), "--xds-addr", "0.0.0.0:0", "--xds-mtls-addr", "", "--admin-addr", "127.0.0.1:0"}, "loopback", 1},
		{"nothing runs", []string{"status", "--run-dir", empty}, "start one with `inlay dev`", 5},
		{"run without a node", []string{"run", "--service", "a", "--run-dir", empty, "--", "true"}, "no node runs here", 5},
		{"run of no service", []string{"run", "--", "true"}, "--service is missing", 2},
		{"run of no program", []string{"run", "--service", "a", "--run-dir", m.run}, "no program", 2},
		{"run of a program that is not there", []string{"run", "--service", "a", "--run-dir", m.run, "--", "no-such-program"}, "no-such-program", 127},
		{"run returns the program's code", []string{"run", "--service", "a", "--run-dir", m.run, "--", "sh", "-c", "exit 7"}, "", 7},
		{"run returns 128 and the signal", []string{"run", "--service", "a", "--run-dir", m.run, "--", "sh", "-c", "kill -9 $$"}, "", 137},
		{"an unknown flag", []string{"status", "--nope"}, "--help", 2},
		{"an unknown verb", []string{"frobnicate"}, "frobnicate", 2},
		{"a config directory that is not there", []string{"dev", "--config", filepath.Join(m.dir, "nope"), "--run-dir", filepath.Join(m.dir, "o4")}, "want a directory", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stdout, stderr, code := m.cli(tc.args...)
			if code != tc.code || !strings.Contains(stderr, tc.want) {
				t.Errorf("exit code %d, want %d; stderr %q, want %q in it; stdout %q", code, tc.code, stderr, tc.want, stdout)
			}
			if strings.Contains(stderr, "panic") || strings.Contains(stderr, "goroutine ") {
				t.Errorf("a panic: %s", stderr)
			}
		})
	}
}
