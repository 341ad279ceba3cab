package examples_test

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// lab is a directory with the binaries and, where a test starts one, a mesh.
type lab struct {
	t   *testing.T
	dir string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "ex-") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return &lab{t, dir}
}

// build compiles a package and returns the program.
func (l *lab) build(dir, pkg string) string {
	l.t.Helper()
	bin := filepath.Join(l.dir, filepath.Base(dir)+"-"+filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-o", bin, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		l.t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	return bin
}

// start runs a program until the end of the test, and returns when it has printed a line that
// contains text (at once when text is empty).
func (l *lab) start(text, program string, args ...string) {
	l.t.Helper()
	cmd := exec.Command(program, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	seen := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		found := false
		for s := bufio.NewScanner(out); s.Scan(); {
			if !found && strings.Contains(s.Text(), text) {
				found = true
				close(seen)
			}
		}
	})
	l.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		wg.Wait()
		_ = cmd.Wait() // a program that a signal ends has no other code
	})
	if text == "" {
		return
	}
	select {
	case <-seen:
	case <-time.After(time.Minute):
		l.t.Fatalf("%s %v printed no %q", program, args, text)
	}
}

// run runs a program to its end and returns its stdout.
func (l *lab) run(env []string, program string, args ...string) string {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr // the log
	out, err := cmd.Output()
	if err != nil {
		l.t.Fatalf("%s %v: %v\n%s%s", program, args, err, out, stderr.String())
	}
	return string(out)
}

// TestMeshExamples runs each example as its comment says: a server and a caller below `inlay run`.
func TestMeshExamples(t *testing.T) {
	for _, name := range []string{"grpc", "http"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			inlay, example := l.build("../cmd/inlay", "."), l.build(".", "./"+name)
			at := filepath.Join(l.dir, "run")
			config := filepath.Join(l.dir, "mesh")
			if err := os.Mkdir(config, 0o755); err != nil {
				t.Fatal(err)
			}
			l.start("Next: inlay run", inlay, "dev", "--config", config, "--data", filepath.Join(l.dir, "data"), "--run-dir", at,
				"--xds-addr", "", "--xds-mtls-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0")
			state := "INLAY_STATE_DIR=" + filepath.Join(l.dir, "state")
			l.start("", "env", state, inlay, "run", "--run-dir", at, "--service", "greeter", "--", example, "serve")
			for deadline := time.Now().Add(time.Minute); !strings.Contains(l.run(nil, inlay, "get", "endpoints", "--run-dir", at), "greeter"); {
				if time.Now().After(deadline) {
					t.Fatal("the server never registered")
				}
			}
			got := l.run([]string{state + "2"}, inlay, "run", "--run-dir", at, "--service", "me", "--", example, "call", "World")
			if want := "Hello World, you are spiffe://inlay.local/ns/default/svc/me\n"; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// TestStandalone compiles the example's configuration, with the port of a server of this test, and
// runs it without any mesh.
func TestStandalone(t *testing.T) {
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "a file\n")
	}))
	defer files.Close()
	_, port, err := net.SplitHostPort(files.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	raw, err := os.ReadFile("standalone/mesh/files.yaml")
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(l.dir, "mesh")
	if err := os.Mkdir(config, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(config, "files.yaml"), []byte(strings.Replace(string(raw), "port: 9001", "port: "+port, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	snapshot := filepath.Join(l.dir, "me.inlay")
	l.run(nil, l.build("../cmd/inlay", "."), "compile", config, "--for", "me", "-o", snapshot)
	empty := filepath.Join(l.dir, "empty")
	got := l.run([]string{"INLAY_CONFIG=" + snapshot, "HOME=" + empty, "XDG_RUNTIME_DIR=" + empty, "INLAY_STATE_DIR=" + empty}, l.build(".", "./standalone"), "http://files/")
	for _, want := range []string{"a file\n", "200 OK, 7 bytes", "to cluster files.default:80: ok", "files.yaml:"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
}

// TestExamplesAreShort: an example that needs more than 60 lines is none.
func TestExamplesAreShort(t *testing.T) {
	for _, name := range []string{"grpc", "http", "standalone"} {
		raw, err := os.ReadFile(filepath.Join(name, "main.go"))
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(raw), "\n"); n >= 60 {
			t.Errorf("%s/main.go has %d lines, want less than 60", name, n)
		}
	}
}
