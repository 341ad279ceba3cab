package continuity

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait of these tests: far above what anything takes, so that reaching it
// is a failure and never luck.
const patience = 60 * time.Second

// proc is a process a test started, with the lines it wrote.
type proc struct {
	t     *testing.T
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser // of a program; nil for others
	began time.Time
	up    chan struct{}     // closed when a daemon is ready
	at    map[string]string // what it said then; read after up
	done  chan struct{}
	err   error // after done

	mu     sync.Mutex
	stdout []string
	stderr []string
	news   chan struct{} // closed and replaced at each line
}

// start runs a command, which the caller ends. A daemon writes a line to descriptor 3 when it is ready.
func start(t *testing.T, name string, cmd *exec.Cmd, daemon, talks bool) *proc {
	t.Helper()
	p := &proc{t: t, name: name, cmd: cmd, began: time.Now(), up: make(chan struct{}), done: make(chan struct{}), news: make(chan struct{})}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if talks {
		if p.stdin, err = cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
	}
	var r, w *os.File
	if daemon {
		if r, w, err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		cmd.ExtraFiles = []*os.File{w}
	}
	err = cmd.Start()
	if daemon {
		_ = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	var readers sync.WaitGroup
	if daemon {
		readers.Go(func() {
			defer func() { _ = r.Close() }()
			line, err := bufio.NewReader(r).ReadBytes('\n')
			var said struct {
				Addresses map[string]string `json:"addresses"`
			}
			if err == nil && json.Unmarshal(line, &said) == nil { // else it ended before
				p.at = said.Addresses
				close(p.up)
			}
		})
	}
	readers.Go(func() { p.read(stdout, &p.stdout) })
	readers.Go(func() { p.read(stderr, &p.stderr) })
	go func() {
		readers.Wait()
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p
}

// check looks, after the end, for what the race detector said, and shows the last words when the test
// has failed.
func (p *proc) check() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.stderr {
		if strings.Contains(l, "WARNING: DATA RACE") {
			p.t.Errorf("%s: the race detector reported:\n%s", p.name, strings.Join(last(p.stderr, 60), "\n"))
			return
		}
	}
	if p.t.Failed() {
		p.t.Logf("--- %s stdout:\n%s\n--- %s stderr:\n%s", p.name, strings.Join(last(p.stdout, 4), "\n"), p.name, strings.Join(last(p.stderr, 40), "\n"))
	}
}

func last(lines []string, n int) []string { return lines[max(0, len(lines)-n):] }

func (p *proc) read(r io.Reader, into *[]string) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<22)
	for s.Scan() {
		p.mu.Lock()
		*into = append(*into, s.Text())
		close(p.news)
		p.news = make(chan struct{})
		p.mu.Unlock()
	}
}

// end ends the process as an operator would, if it runs.
func (p *proc) end() {
	select {
	case <-p.done:
		return
	default:
	}
	if p.stdin != nil {
		_ = p.stdin.Close()
	}
	_ = syscall.Kill(p.cmd.Process.Pid, syscall.SIGCONT) // a test may have stopped it
	_ = syscall.Kill(p.cmd.Process.Pid, syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		p.t.Errorf("%s did not end within 20 s of SIGTERM", p.name)
	}
}

// kill sends SIGKILL and waits for the end.
func (p *proc) kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	p.wait()
}

func (p *proc) signal(s syscall.Signal) {
	p.t.Helper()
	if err := syscall.Kill(p.cmd.Process.Pid, s); err != nil {
		p.t.Fatalf("%s: signal %v: %v", p.name, s, err)
	}
}

func (p *proc) wait() {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("%s did not end within %v", p.name, patience)
	}
}

// ready waits until a daemon is, and returns how long that took since its start.
func (p *proc) ready() time.Duration {
	p.t.Helper()
	select {
	case <-p.up:
		return time.Since(p.began)
	case <-p.done:
		p.t.Fatalf("%s ended before it was ready: %v\n%s", p.name, p.err, strings.Join(last(p.errLines(), 10), "\n"))
	case <-time.After(patience):
		p.t.Fatalf("%s is not ready after %v", p.name, patience)
	}
	return 0
}

func (p *proc) errLines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.stderr...)
}

// logged waits for a line on stderr that contains all of parts, after the first skip lines.
func (p *proc) logged(skip int, parts ...string) string {
	p.t.Helper()
	var got string
	p.await("log line "+fmt.Sprint(parts), func() bool {
		for _, l := range p.stderr[min(skip, len(p.stderr)):] {
			if containsAll(l, parts) {
				got = l
				return true
			}
		}
		return false
	})
	return got
}

func containsAll(s string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(s, part) {
			return false
		}
	}
	return true
}

// reported waits for a report of a role that found accepts.
func (p *proc) reported(what string, found func(report) bool) report {
	p.t.Helper()
	var got report
	p.await("report "+what, func() bool {
		for _, l := range p.stdout {
			var r report
			if json.Unmarshal([]byte(l), &r) == nil && found(r) {
				got = r
				return true
			}
		}
		return false
	})
	return got
}

// await waits until found says so of the lines so far; it is called with the lock held.
func (p *proc) await(what string, found func() bool) {
	p.t.Helper()
	deadline := time.After(patience)
	for ended := false; ; {
		p.mu.Lock()
		ok, news := found(), p.news
		p.mu.Unlock()
		if ok {
			return
		}
		if ended {
			p.t.Fatalf("%s ended (%v) without %s", p.name, p.err, what)
		}
		select {
		case <-news:
		case <-p.done:
			ended = true // look once more at its last words
		case <-deadline:
			p.t.Fatalf("%s: no %s within %v", p.name, what, patience)
		}
	}
}
