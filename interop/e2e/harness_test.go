package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait of these tests: far above what anything takes, so that reaching it
// is a failure and never luck.
const patience = 60 * time.Second

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "inlay-e2e-bin-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "inlay")
	cmd := exec.Command("go", "build", raceFlag, "-o", bin, ".")
	cmd.Dir = filepath.Join("..", "..", "cmd", "inlay")
	cmd.Env = append(os.Environ(), "GOWORK=off")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, text)
	}
	return bin, nil
})

// mesh is one `inlay dev` of a test.
type mesh struct {
	t                     *testing.T
	bin, dir, config, run string
	dev                   *proc
	admin, xds            string
}

// proc is a process a test started, with the lines it wrote.
type proc struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error

	mu     sync.Mutex
	lines  []string
	news   chan struct{} // closed and replaced at each line
	stderr bytes.Buffer
}

// newMesh writes the files and starts `inlay dev` with the given further flags.
func newMesh(t *testing.T, files map[string]string, flags ...string) *mesh {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	// Socket paths are bounded (108 bytes), so not below t.TempDir.
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{t: t, bin: bin, dir: dir, config: filepath.Join(dir, "mesh"), run: filepath.Join(dir, "run")}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Mkdir(m.config, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		m.write(name, text)
	}
	args := append([]string{"dev", "--config", m.config, "--data", filepath.Join(dir, "data"), "--run-dir", m.run,
		"--xds-addr", "127.0.0.1:0", "--xds-mtls-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0"}, flags...)
	m.dev = m.start("dev", nil, args...)
	m.dev.line("Next: inlay run")
	m.admin = m.dev.match(`admin\s+http://(\S+)`)
	m.xds = m.dev.match(`xDS (\S+) \(plaintext`)
	return m
}

// write puts a file in place by rename, as editors and deployments do.
func (m *mesh) write(name, text string) {
	m.t.Helper()
	tmp := filepath.Join(m.config, "."+name+".new")
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(m.config, name)); err != nil {
		m.t.Fatal(err)
	}
}

// start runs the inlay binary.
func (m *mesh) start(name string, env []string, args ...string) *proc {
	m.t.Helper()
	return startProc(m.t, name, exec.Command(m.bin, args...), env)
}

func startProc(t *testing.T, name string, cmd *exec.Cmd, env []string) *proc {
	t.Helper()
	p := &proc{t: t, name: name, cmd: cmd, done: make(chan struct{}), news: make(chan struct{})}
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = lockedWriter{p}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.read(stdout)
		p.err = cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		select {
		case <-p.done:
		default:
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
			select {
			case <-p.done:
			case <-time.After(15 * time.Second):
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
				<-p.done
				t.Errorf("%s did not end within 15 s of SIGTERM", name)
			}
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if strings.Contains(p.stderr.String(), "WARNING: DATA RACE") {
			t.Errorf("%s: the race detector reported", name)
		}
		if t.Failed() {
			t.Logf("--- %s stdout:\n%s\n--- %s stderr:\n%s", name, strings.Join(last(p.lines, 40), "\n"), name, tailOf(p.stderr.String(), 6000))
		}
	})
	return p
}

func last(lines []string, n int) []string { return lines[max(0, len(lines)-n):] }

func tailOf(s string, n int) string { return s[max(0, len(s)-n):] }

type lockedWriter struct{ p *proc }

func (w lockedWriter) Write(b []byte) (int, error) {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	return w.p.stderr.Write(b)
}

func (p *proc) read(r io.Reader) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		p.mu.Lock()
		p.lines = append(p.lines, s.Text())
		close(p.news)
		p.news = make(chan struct{})
		p.mu.Unlock()
	}
}

// await waits until found says so of the lines so far.
func (p *proc) await(what string, found func(lines []string) bool) {
	p.t.Helper()
	deadline := time.After(patience)
	for {
		p.mu.Lock()
		ok, news := found(p.lines), p.news
		p.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-news:
		case <-p.done:
			p.mu.Lock()
			ok := found(p.lines)
			p.mu.Unlock()
			if !ok {
				p.t.Fatalf("%s ended (%v) without %s", p.name, p.err, what)
			}
			return
		case <-deadline:
			p.t.Fatalf("%s: no %s within %v", p.name, what, patience)
		}
	}
}

// line waits for a line that contains text.
func (p *proc) line(text string) {
	p.t.Helper()
	p.await(strconv.Quote(text), func(lines []string) bool {
		for _, l := range lines {
			if strings.Contains(l, text) {
				return true
			}
		}
		return false
	})
}

// match returns the first group of a pattern in what was written so far.
func (p *proc) match(pattern string) string {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	found := regexp.MustCompile(pattern).FindStringSubmatch(strings.Join(p.lines, "\n"))
	if found == nil {
		p.t.Fatalf("%s wrote nothing like %s", p.name, pattern)
	}
	return found[1]
}

// event waits for an event of a role.
func (p *proc) event(kind string) event {
	p.t.Helper()
	var got event
	p.await("event "+kind, func(lines []string) bool {
		for _, l := range lines {
			var e event
			if json.Unmarshal([]byte(l), &e) == nil && e.Kind == kind {
				got = e
				return true
			}
		}
		return false
	})
	return got
}

// errors are the texts of the error events so far.
func (p *proc) errors() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, l := range p.lines {
		var e event
		if json.Unmarshal([]byte(l), &e) == nil && e.Kind == "error" {
			out = append(out, e.Text)
		}
	}
	return out
}

// stderrText is what was written to stderr so far.
func (p *proc) stderrText() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stderr.String()
}

// stop sends SIGTERM and waits for the end.
func (p *proc) stop() {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	p.wait()
}

// wait waits for the end of the process.
func (p *proc) wait() {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("%s did not end", p.name)
	}
}

// program starts a role of this test binary below `inlay run`.
func (m *mesh) program(service, version, role string, env ...string) *proc {
	m.t.Helper()
	self, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	args := []string{"run", "--run-dir", m.run, "--service", service}
	name := service
	if version != "" {
		args = append(args, "--version", version)
		name += "-" + version
	}
	if !hasKey(env, "E2E_NAME") {
		env = append(env, "E2E_NAME="+name)
	}
	env = append(env, "E2E_ROLE="+role)
	if !hasKey(env, "INLAY_STATE_DIR") {
		env = append(env, "INLAY_STATE_DIR="+filepath.Join(m.dir, "state", name+"-"+role))
	}
	return m.start(name+"/"+role, env, append(args, "--", self)...)
}

func hasKey(env []string, key string) bool {
	for _, kv := range env {
		if strings.HasPrefix(kv, key+"=") {
			return true
		}
	}
	return false
}

// cli runs a verb to its end and returns what it printed and its exit code.
func (m *mesh) cli(args ...string) (stdout, stderr string, code int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, m.bin, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		m.t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// jsonOf runs a read verb with -o json and decodes it.
func (m *mesh) jsonOf(v any, args ...string) {
	m.t.Helper()
	stdout, stderr, code := m.cli(append(args, "--run-dir", m.run, "-o", "json")...)
	if code != 0 {
		m.t.Fatalf("inlay %s: exit code %d: %s", strings.Join(args, " "), code, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), v); err != nil {
		m.t.Fatalf("inlay %s: %v in %s", strings.Join(args, " "), err, stdout)
	}
}

// daemon returns the pid of "control plane" or "node" as dev shows it.
func (m *mesh) daemon(name string) int {
	m.t.Helper()
	pid, err := strconv.Atoi(m.dev.match(name + `\s+pid (\d+)`))
	if err != nil {
		m.t.Fatal(err)
	}
	return pid
}

// endpoints waits until a service has so many endpoints that are called.
func (m *mesh) endpoints(service string, want int) {
	m.t.Helper()
	m.eventually(fmt.Sprintf("%d endpoints of %s", want, service), func() bool {
		stdout, _, code := m.cli("get", "endpoints", service, "--run-dir", m.run, "-o", "json")
		if code != 0 {
			return false // nobody knows the service yet, or the control plane is on its way back
		}
		var got struct {
			Endpoints []struct{ Unreachable, Health string }
		}
		if err := json.Unmarshal([]byte(stdout), &got); err != nil {
			m.t.Fatal(err)
		}
		n := 0
		for _, e := range got.Endpoints {
			if e.Unreachable == "" && e.Health == "healthy" {
				n++
			}
		}
		return n == want
	})
}

// eventually asks again, as there is nothing to wait on in another process, until it is true.
func (m *mesh) eventually(what string, holds func() bool) {
	m.t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			m.t.Fatalf("never saw %s", what)
		}
		<-time.After(20 * time.Millisecond) // leave the processors to those who are asked
	}
}

// skip leaves out what this machine cannot do; in CI, which can, that is a failure.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}
