package node

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/load"
)

// patience bounds every wait of these tests: far above what anything takes, so that reaching it
// is a failure and never luck.
const patience = 60 * time.Second

// need skips a test that the machine cannot run; in CI, which can, that is a failure.
func need(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "these tests load programs into the kernel: run them as root"
	} else if err := load.Check(); err != nil {
		why = err.Error()
	}
	for _, tool := range []string{"nsenter", "ip", "gcc", "python3", "curl"} {
		if _, err := exec.LookPath(tool); err != nil && why == "" {
			why = tool + " is not installed"
		}
	}
	if why == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip("SKIPPED: " + why)
}

// built is what is compiled once for all tests: the product, and the program on glibc.
type built struct{ dir, inlay, client string }

// builtDir is what TestMain removes; empty while nothing was built.
var builtDir string

var build = sync.OnceValues(func() (built, error) {
	dir, err := os.MkdirTemp("", "inlay-node-bin-")
	if err != nil {
		return built{}, err
	}
	builtDir = dir
	b := built{dir, filepath.Join(dir, "inlay"), filepath.Join(dir, "client")}
	cmd := exec.Command("go", "build", raceFlag, "-o", b.inlay, ".")
	cmd.Dir = filepath.Join("..", "..", "cmd", "inlay")
	cmd.Env = append(os.Environ(), "GOWORK=off")
	if text, err := cmd.CombinedOutput(); err != nil {
		return b, fmt.Errorf("go build: %w\n%s", err, text)
	}
	if text, err := exec.Command("gcc", "-Wall", "-Werror", "-O2", "-o", b.client, filepath.Join("testdata", "client.c")).CombinedOutput(); err != nil {
		return b, fmt.Errorf("gcc: %w\n%s", err, text)
	}
	return b, nil
})

// random is a part of a name that nobody else has.
func random() string {
	b := make([]byte, 4)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// self is this test binary, by a path that others may run too.
func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// proc is a process a test started, with the lines it wrote.
type proc struct {
	t     *testing.T
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{}
	err   error

	asking sync.Mutex // one question at a time
	next   int        // the first line that no question has had

	mu     sync.Mutex
	lines  []string
	news   chan struct{} // closed and replaced at each line
	stderr bytes.Buffer
}

// startProc starts a process that ends with the test: by the end of its input and SIGTERM.
func startProc(t *testing.T, name string, cmd *exec.Cmd, env ...string) *proc {
	t.Helper()
	p := &proc{t: t, name: name, cmd: cmd, done: make(chan struct{}), news: make(chan struct{})}
	cmd.Env = append(os.Environ(), env...)
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.stdin, err = cmd.StdinPipe(); err != nil {
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
	t.Cleanup(p.finish)
	return p
}

func (p *proc) finish() {
	p.end()
	p.mu.Lock()
	defer p.mu.Unlock()
	if strings.Contains(p.stderr.String(), "WARNING: DATA RACE") {
		p.t.Errorf("%s: the race detector reported", p.name)
	}
	if p.t.Failed() {
		p.t.Logf("--- %s stdout:\n%s\n--- %s stderr:\n%s", p.name,
			strings.Join(p.lines[max(0, len(p.lines)-15):], "\n"), p.name, tail(p.stderr.String(), 4000))
	}
}

// end stops the process and waits; it may have ended.
func (p *proc) end() {
	_ = p.stdin.Close()
	select {
	case <-p.done:
		return
	default:
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		p.t.Errorf("%s did not end within 20 s of SIGTERM", p.name)
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

type lockedWriter struct{ p *proc }

func (w lockedWriter) Write(b []byte) (int, error) {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	defer w.p.wake()
	return w.p.stderr.Write(b)
}

// wake is called with mu held.
func (p *proc) wake() {
	close(p.news)
	p.news = make(chan struct{})
}

func (p *proc) read(r io.Reader) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		p.mu.Lock()
		p.lines = append(p.lines, s.Text())
		p.wake()
		p.mu.Unlock()
	}
}

// await waits until found says so; it is called with mu held, whenever something was written.
func (p *proc) await(t *testing.T, what string, found func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for over := false; ; {
		p.mu.Lock()
		ok, news := found(), p.news
		p.mu.Unlock()
		switch {
		case ok:
			return
		case over:
			t.Fatalf("%s ended (%v) without %s", p.name, p.err, what)
		}
		select {
		case <-news:
		case <-p.done:
			over = true
		case <-deadline:
			t.Fatalf("%s: no %s within %v", p.name, what, patience)
		}
	}
}

// line waits for a line that contains text.
func (p *proc) line(text string) {
	p.t.Helper()
	p.await(p.t, fmt.Sprintf("%q", text), func() bool { return strings.Contains(strings.Join(p.lines, "\n"), text) })
}

// said waits for all words in one line of stderr.
func (p *proc) said(words ...string) {
	p.t.Helper()
	p.await(p.t, fmt.Sprintf("%q on stderr", words), func() bool {
		for line := range strings.Lines(p.stderr.String()) {
			all := true
			for _, w := range words {
				all = all && strings.Contains(line, w)
			}
			if all {
				return true
			}
		}
		return false
	})
}

// reply is the next line of stdout.
func (p *proc) reply() string {
	p.t.Helper()
	var line string
	p.await(p.t, "an answer", func() bool {
		if len(p.lines) <= p.next {
			return false
		}
		line = p.lines[p.next]
		return true
	})
	p.next++
	return line
}

// eventually asks again, as there is nothing to wait on in another process, until it is true.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("never saw %s", what)
		}
		<-time.After(20 * time.Millisecond) // leave the processors to those who are asked
	}
}

// run runs a command to its end.
func run(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	_ = cmd.Wait() // the exit code says it
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}
