package proxy_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

// ensureConfig starts this test binary as a proxy.
func ensureConfig(t *testing.T, c child) proxy.EnsureConfig {
	t.Helper()
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return proxy.EnsureConfig{
		Command: []string{self}, Env: append(os.Environ(), childVar+"="+string(raw)),
		Socket: c.Socket, Version: c.Version, Wait: 30 * time.Second,
	}
}

func ensure(t *testing.T, c child) int {
	t.Helper()
	pid, err := proxy.Ensure(t.Context(), ensureConfig(t, c))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func stopAfter(t *testing.T, socket string) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := proxy.Stop(ctx, socket); err != nil {
			t.Error(err)
		}
	})
}

// prober asks without ever trying again, in each way that a program may.
type prober struct {
	asked, failed atomic.Uint64
	quit          chan struct{}
	wg            sync.WaitGroup
}

func probe(t *testing.T, at netip.AddrPort) *prober {
	p := &prober{quit: make(chan struct{})}
	timeout := 10 * time.Second
	loop := func(what string, once func() (*dns.Msg, error)) {
		p.wg.Go(func() {
			for {
				select {
				case <-p.quit:
					return
				default:
				}
				r, err := once()
				p.asked.Add(1)
				if err != nil || r.Rcode != dns.RcodeSuccess || len(r.Answer) != 1 {
					p.failed.Add(1)
					t.Errorf("%s: %v, %v", what, r, err)
				}
			}
		})
	}
	for _, network := range []string{"udp", "tcp"} {
		for what, name := range map[string]string{"a name of the mesh": "orders.", "a name of the world": "www.example."} {
			loop(network+", "+what, func() (*dns.Msg, error) {
				r, _, err := (&dns.Client{Net: network, Timeout: timeout}).Exchange(question(name, dns.TypeA), at.String())
				return r, err
			})
		}
		// Programs keep their sockets.
		conn, err := dns.Dial(network, at.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		loop(network+", one socket", func() (*dns.Msg, error) {
			if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
				return nil, err
			}
			r, _, err := (&dns.Client{Net: network, Timeout: timeout}).ExchangeWithConn(question("orders.", dns.TypeA), conn)
			return r, err
		})
	}
	return p
}

// more returns when n more queries were asked.
func (p *prober) more(t *testing.T, n uint64) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for until := p.asked.Load() + n; p.asked.Load() < until; {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
	}
}

func (p *prober) stop() {
	close(p.quit)
	p.wg.Wait()
}

// TestHandOver: 20 upgrades from process to process, and no query is lost.
func TestHandOver(t *testing.T) {
	world := resolver(t, fixed("203.0.113.1"))
	c := child{Socket: socketPath(t), Version: "0", Upstreams: []netip.AddrPort{world}}
	first := ensure(t, c)
	stopAfter(t, c.Socket)
	before, err := proxy.Ask(t.Context(), c.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if before.PID != first {
		t.Fatalf("process %d answers, %d was started", before.PID, first)
	}
	probers := []*prober{probe(t, before.Addresses[0]), probe(t, before.Addresses[1])}
	pids := map[int]bool{first: true}
	for i := range 20 {
		c.Version = fmt.Sprint(i + 1)
		pid := ensure(t, c)
		if pids[pid] {
			t.Fatalf("upgrade %d: process %d runs still", i, pid)
		}
		pids[pid] = true
		for _, p := range probers {
			p.more(t, 20)
		}
	}
	var asked, failed uint64
	for _, p := range probers {
		p.stop()
		asked, failed = asked+p.asked.Load(), failed+p.failed.Load()
	}
	t.Logf("%d queries, %d failed, over 20 upgrades", asked, failed)
	after, err := proxy.Ask(t.Context(), c.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(after.Addresses) != fmt.Sprint(before.Addresses) || after.Version != "20" {
		t.Errorf("after: version %s at %v, before: %v", after.Version, after.Addresses, before.Addresses)
	}
}

// TestHandOverInOneProcess: the same between two Runs, where the race detector sees both sides.
func TestHandOverInOneProcess(t *testing.T) {
	world := resolver(t, fixed("203.0.113.1"))
	cfg := proxy.Config{Socket: socketPath(t), Version: "0", Upstreams: []netip.AddrPort{world}}
	old := launch(t, cfg)
	p := probe(t, old.status.Addresses[0])
	var left []*running
	for i := range 20 {
		cfg.Version = fmt.Sprint(i + 1)
		left = append(left, old)
		old = launch(t, cfg)
		if st := old.ask(t); st.Version != cfg.Version {
			t.Fatalf("version %s answers, want %s", st.Version, cfg.Version)
		}
		p.more(t, 20)
	}
	p.stop()
	old.stop()
	if err := old.wait(t); err != nil {
		t.Error(err)
	}
	t.Logf("%d queries, %d failed", p.asked.Load(), p.failed.Load())
	for _, r := range left {
		r.stop() // those with a connection of the prober would wait for it
		if err := r.wait(t); err != nil {
			t.Error(err)
		}
	}
}

// conversation is a new process that speaks the protocol by hand and dies where the test wants.
type conversation struct {
	*net.UnixConn
	lines *bufio.Reader
}

func converse(t *testing.T, socket string) *conversation {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return &conversation{c, bufio.NewReader(c)}
}

func (c *conversation) say(t *testing.T, line string) {
	t.Helper()
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		t.Fatal(err)
	}
}

func (c *conversation) hear(t *testing.T, want string) {
	t.Helper()
	line, err := c.lines.ReadString('\n')
	if err != nil || !strings.Contains(line, want) {
		t.Fatalf("heard %q, %v: want %q", line, err, want)
	}
}

// TestHandOverBreaksOff: wherever the new process ends, the old one serves on.
func TestHandOverBreaksOff(t *testing.T) {
	p := launch(t, proxy.Config{Version: "old"})
	at := p.status.Addresses[0]
	serves := func(t *testing.T) {
		t.Helper()
		for _, network := range []string{"udp", "tcp"} {
			if s := got(ask(t, network, at, question("orders.", dns.TypeA))); s != "NOERROR 198.18.0.1" {
				t.Errorf("%s: %s", network, s)
			}
		}
		if st := p.ask(t); st.Version != "old" {
			t.Errorf("version %q answers", st.Version)
		}
	}
	t.Run("after it asked", func(t *testing.T) {
		c := converse(t, p.path)
		c.say(t, `{"op":"takeover","protocol":1}`)
		c.Close()
		serves(t)
	})
	t.Run("after it has the sockets", func(t *testing.T) {
		c := takeover(t, p.path)
		serves(t) // as it does all the while
		busy := converse(t, p.path)
		busy.say(t, `{"op":"takeover","protocol":1}`)
		busy.hear(t, `"busy":true`)
		c.Close()
		serves(t)
	})
	t.Run("after it serves", func(t *testing.T) {
		c := takeover(t, p.path)
		c.say(t, `{"op":"serving"}`)
		c.hear(t, `"stopped":true`)
		// Nobody reads now; what is sent waits in the sockets.
		answered := make(chan string)
		go func() {
			r, _, err := (&dns.Client{Timeout: 10 * time.Second}).Exchange(question("orders.", dns.TypeA), at.String())
			if err != nil {
				answered <- err.Error()
				return
			}
			answered <- got(r)
		}()
		c.Close()
		if s := <-answered; s != "NOERROR 198.18.0.1" {
			t.Errorf("a query between: %s", s)
		}
		serves(t)
	})
	t.Run("with another word", func(t *testing.T) {
		c := takeover(t, p.path)
		c.say(t, `{"op":"serving"}`)
		c.hear(t, `"stopped":true`)
		c.say(t, `{"op":"status"}`)
		serves(t)
	})
	t.Run("killed by the kernel", func(t *testing.T) {
		cfg := ensureConfig(t, child{Socket: p.path, Version: "new", DieAtBeat: true})
		if pid, err := proxy.Ensure(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("Ensure: %d, %v: want an error that says it was killed", pid, err)
		}
		serves(t)
	})
	t.Run("and then another one succeeds", func(t *testing.T) {
		next := launch(t, proxy.Config{Socket: p.path, Version: "next"})
		if fmt.Sprint(next.status.Addresses) != fmt.Sprint(p.status.Addresses) {
			t.Errorf("addresses %v, before %v", next.status.Addresses, p.status.Addresses)
		}
		if err := p.wait(t); err != nil {
			t.Error(err)
		}
		if got := next.ask(t).Version; got != "next" {
			t.Errorf("version %q answers", got)
		}
	})
}

// takeover begins a hand-over, waiting for one that is just ending.
func takeover(t *testing.T, socket string) *conversation {
	t.Helper()
	for {
		c := converse(t, socket)
		c.say(t, `{"op":"takeover","protocol":1}`)
		line, oob := make([]byte, 4096), make([]byte, 1024)
		n, oobn, _, _, err := c.ReadMsgUnix(line, oob)
		if err != nil {
			t.Fatal(err)
		}
		if oobn == 0 && strings.Contains(string(line[:n]), `"busy":true`) {
			c.Close()
			continue
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			t.Fatalf("%q, %v, %d control messages", line[:n], err, len(msgs))
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) < 4 {
			t.Fatalf("%d descriptors, %v", len(fds), err)
		}
		for _, fd := range fds {
			if err := unix.Close(fd); err != nil {
				t.Error(err)
			}
		}
		return c
	}
}

func TestControlRefuses(t *testing.T) {
	p := launch(t, proxy.Config{})
	for name, tc := range map[string]struct{ line, want string }{
		"no JSON":          {"status", "not the JSON"},
		"an unknown word":  {`{"op":"dance"}`, "want status, stop or takeover"},
		"another protocol": {`{"op":"takeover","protocol":2}`, "want 1"},
		"a line too long":  {strings.Repeat("x", 70000), "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			c := converse(t, p.path)
			go io.WriteString(c, tc.line+"\n") // the other side may not read it to the end
			c.hear(t, tc.want)
		})
	}
	t.Run("another user", func(t *testing.T) {
		if os.Geteuid() != 0 {
			lacks(t, "only root can become another user")
		}
		if err := os.Chmod(p.path, 0o666); err != nil { // the kernel's word alone must do
			t.Fatal(err)
		}
		for dir := filepath.Dir(p.path); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		heard := make(chan string)
		go func() {
			// The thread that has become another user ends with this goroutine.
			runtime.LockOSThread()
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
				heard <- errno.Error()
				return
			}
			c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: p.path, Net: "unix"})
			if err != nil {
				heard <- err.Error()
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, `{"op":"stop"}`+"\n")
			b, err := io.ReadAll(c)
			heard <- fmt.Sprint(string(b), err)
		}()
		if s := <-heard; !strings.Contains(s, "user 65534 may not control") {
			t.Errorf("%s: want a refusal", s)
		}
		p.ask(t)
	})
}

// TestHandOverUnderWay: what the old process has read it answers, however long that takes.
func TestHandOverUnderWay(t *testing.T) {
	t.Parallel()
	release, waiting := make(chan struct{}), make(chan struct{}, 2)
	slow := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		waiting <- struct{}{}
		<-release
		fixed("203.0.113.1")(w, q)
	})
	cfg := proxy.Config{Socket: socketPath(t), Version: "old", Upstreams: []netip.AddrPort{slow}}
	old := launch(t, cfg)
	var wg sync.WaitGroup
	for _, network := range []string{"udp", "tcp"} {
		wg.Go(func() {
			if s := got(ask(t, network, old.status.Addresses[0], question("slow.example.", dns.TypeA))); s != "NOERROR 203.0.113.1" {
				t.Errorf("%s: %s", network, s)
			}
		})
		<-waiting
	}
	cfg.Version = "new"
	next := launch(t, cfg)
	if st := next.ask(t); st.Version != "new" {
		t.Errorf("version %q answers", st.Version)
	}
	// A new one stops, and another starts, while the first has not ended.
	if err := proxy.Stop(t.Context(), cfg.Socket); err != nil {
		t.Error(err)
	}
	if err := next.wait(t); err != nil {
		t.Error(err)
	}
	third := launch(t, cfg)
	if s := got(ask(t, "udp", third.status.Addresses[0], question("orders.", dns.TypeA))); s != "NOERROR 198.18.0.1" {
		t.Error(s)
	}
	close(release)
	wg.Wait()
	if err := old.wait(t); err != nil {
		t.Error(err)
	}
}

// TestHandOverAfterTheFirstIsGone: the kernel names the process that once called listen(2) as the
// peer of a unix socket, also when that one has long ended and its sockets live on.
func TestHandOverAfterTheFirstIsGone(t *testing.T) {
	t.Parallel()
	c := child{Socket: socketPath(t), Version: "0"}
	stopAfter(t, c.Socket)
	pid := ensure(t, c)
	for i := range 3 {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		c.Version = fmt.Sprint(i + 1)
		next := ensure(t, c)
		n := 0
		for err = unix.EINTR; errors.Is(err, unix.EINTR); { // the runtime signals threads
			n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10000)
		}
		if n != 1 || err != nil {
			t.Fatalf("process %d does not end: %v", pid, err)
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
		pid = next
	}
}
