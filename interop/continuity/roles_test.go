package continuity

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// settingsVariable holds what a role is told, as JSON.
const settingsVariable = "CONTINUITY_SETTINGS"

// report is one line that a role writes to stdout.
type report struct {
	Kind string `json:"kind"` // ready, error, or the command it answers: stats, finish and others
	ID   int    `json:"id,omitempty"`
	Text string `json:"text,omitempty"`
	// Probes of a prober, by name.
	Probes map[string]counts `json:"probes,omitempty"`
	// Served of a server: what it answered, by the word of who called.
	Served map[string]int64 `json:"served,omitempty"`
	// Numbers are what else a command is answered with.
	Numbers map[string]int64 `json:"numbers,omitempty"`
}

// counts of one probe.
type counts struct {
	Tries int64 `json:"tries"`
	OK    int64 `json:"ok"`
	// Errors counts what went wrong, by reason: the name of an errno, or a text.
	Errors map[string]int64 `json:"errors,omitempty"`
	// Fails are the first of them, by the time at which the try began.
	Fails []fail `json:"fails,omitempty"`
	// Longest try, whatever became of it.
	Longest time.Duration `json:"longest"`
}

func (c counts) failed() int64 {
	var n int64
	for _, x := range c.Errors {
		n += x
	}
	return n
}

// fail is one try that went wrong, in Unix nanoseconds.
type fail struct {
	At   int64  `json:"at"`
	Took int64  `json:"took"`
	Why  string `json:"why"`
}

const maxFails = 2000

var out sync.Mutex

func say(r report) {
	raw, _ := json.Marshal(r) // plain values
	out.Lock()
	defer out.Unlock()
	fmt.Println(string(raw))
}

// play runs a role until its commands end, or SIGTERM.
func play(role string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	roles := map[string]func(context.Context, []byte) error{
		"server": playServer, "prober": playProber, "sender": playSender, "idle": playIdle,
	}
	run := roles[role]
	if run == nil {
		return fmt.Errorf("role %q", role)
	}
	return run(ctx, []byte(os.Getenv(settingsVariable)))
}

// commands are the lines on stdin, each a word and a number, until stdin or ctx ends. Words that answer
// holds are answered with what it gives.
func commands(ctx context.Context, answer map[string]func() report) {
	lines := make(chan string)
	go func() { // ends with the process: nothing interrupts a read of stdin
		defer close(lines)
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
			lines <- s.Text()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case line, ok := <-lines:
			if !ok {
				return
			}
			var word string
			var id int
			if _, err := fmt.Sscan(line, &word, &id); err != nil || answer[word] == nil {
				say(report{Kind: "error", Text: "command " + line})
				continue
			}
			r := answer[word]()
			r.Kind, r.ID = word, id
			say(r)
		}
	}
}

// playIdle does nothing: it is a workload.
func playIdle(ctx context.Context, _ []byte) error {
	say(report{Kind: "ready"})
	commands(ctx, nil)
	return nil
}

// serverSettings: one address is listened on.
type serverSettings struct {
	TCP string `json:"tcp,omitempty"`
	UDP string `json:"udp,omitempty"`
}

// server counts whom it answered. A TCP client says who it is in a line; one that says "flow" is
// answered with running checksums, one that says "count" with how much it sent.
type server struct {
	mu     sync.Mutex
	served map[string]int64
}

func (s *server) count(who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.served[who]++
}

func (s *server) report() report {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := report{Served: map[string]int64{}}
	for k, v := range s.served {
		r.Served[k] = v
	}
	return r
}

func playServer(ctx context.Context, settings []byte) error {
	var set serverSettings
	if err := json.Unmarshal(settings, &set); err != nil {
		return err
	}
	s := &server{served: map[string]int64{}}
	if set.UDP != "" {
		c, err := net.ListenPacket("udp", set.UDP)
		if err != nil {
			return err
		}
		go s.echo(c)
	} else {
		l, err := net.Listen("tcp", set.TCP)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				s.count("accepted")
				go s.talk(c)
			}
		}()
	}
	say(report{Kind: "ready"})
	commands(ctx, map[string]func() report{"stats": s.report})
	return nil
}

func (s *server) echo(c net.PacketConn) {
	b := make([]byte, 2048)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		who, _, _ := bytes.Cut(b[:n], []byte(" "))
		s.count(string(who))
		if _, err := c.WriteTo(b[:n], from); err != nil {
			s.count("errors")
		}
	}
}

func (s *server) talk(c net.Conn) {
	defer func() { _ = c.Close() }()
	r := bufio.NewReader(c)
	who, err := r.ReadString('\n')
	if err != nil {
		s.count("silent")
		return
	}
	who = strings.TrimSpace(who)
	s.count(who)
	switch who {
	case "flow":
		sum, block := sha256.New(), make([]byte, blockSize)
		for {
			if _, err := io.ReadFull(r, block); err != nil {
				return
			}
			_, _ = sum.Write(block) // never fails (hash.Hash)
			if _, err := c.Write(sum.Sum(nil)); err != nil {
				return
			}
		}
	case "count":
		n, err := io.Copy(io.Discard, r)
		if err == nil {
			_, _ = fmt.Fprintf(c, "%d\n", n)
		}
	case "hold":
		_, _ = io.WriteString(c, "ok\n")
		_, _ = io.Copy(io.Discard, r)
	default:
		_, _ = io.WriteString(c, "ok\n")
	}
}

// probe is one thing that a prober tries again and again.
type probe struct {
	Name string `json:"name"`
	// Kind: tcp connects, says Word and waits for the answer; udp sends a datagram from one socket for
	// all, connected from one for each; dns-udp and dns-tcp ask Target for Question; flow keeps one
	// connection and compares checksums.
	Kind   string   `json:"kind"`
	Target []string `json:"target"` // in turn
	Word   string   `json:"word,omitempty"`
	// Question and the address that is to be the answer.
	Question string `json:"question,omitempty"`
	Want     string `json:"want,omitempty"`
	// Rate in tries a second.
	Rate int `json:"rate"`
	// Count of tries, which begin at the command "go"; 0 means that they begin at once and go on.
	Count int `json:"count,omitempty"`
	// Refused says that no try should go well: what goes wrong is counted and not kept.
	Refused bool `json:"refused,omitempty"`
}

const (
	blockSize = 4096
	tryTime   = 5 * time.Second
)

// running is a probe at work.
type running struct {
	probe
	try func(context.Context, int) error

	mu    sync.Mutex
	now   counts
	tries sync.WaitGroup
}

func playProber(ctx context.Context, settings []byte) error {
	var probes []probe
	if err := json.Unmarshal(settings, &probes); err != nil {
		return err
	}
	var all []*running
	burst := make(chan struct{})
	work, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for _, p := range probes {
		r := &running{probe: p, now: counts{Errors: map[string]int64{}}}
		switch p.Kind {
		case "tcp":
			r.try = r.call
		case "udp":
			u, err := newDatagrams()
			if err != nil {
				return err
			}
			r.try = func(ctx context.Context, i int) error { return u.call(ctx, p, i) }
		case "connected":
			r.try = r.datagram
		case "dns-udp", "dns-tcp":
			r.try = r.lookup
		case "flow":
			f := &longFlow{probe: p, sum: sha256.New()}
			r.try = f.block
		default:
			return fmt.Errorf("probe kind %q", p.Kind)
		}
		all = append(all, r)
		wg.Go(func() { r.run(work, burst) })
	}
	stats := func() report {
		out := report{Probes: map[string]counts{}}
		for _, r := range all {
			out.Probes[r.Name] = r.counts()
		}
		return out
	}
	say(report{Kind: "ready"})
	commands(ctx, map[string]func() report{
		"stats":  stats,
		"go":     func() report { close(burst); return report{} },
		"finish": func() report { stop(); wg.Wait(); return stats() },
	})
	stop()
	wg.Wait()
	return nil
}

// run begins tries at the rate, whatever becomes of those before, until ctx is done, and waits for all.
func (r *running) run(ctx context.Context, burst <-chan struct{}) {
	defer r.tries.Wait()
	if r.Count > 0 {
		select {
		case <-burst:
		case <-ctx.Done():
			return
		}
	}
	began := time.Now()
	for i := 0; r.Count == 0 || i < r.Count; i++ {
		due := began.Add(time.Duration(i) * time.Second / time.Duration(r.Rate))
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Until(due)):
		}
		one := func() {
			at := time.Now()
			bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), tryTime)
			defer cancel()
			r.note(at, r.try(bounded, i))
		}
		if r.Kind == "flow" { // one connection, one block at a time
			one()
		} else {
			r.tries.Go(one)
		}
	}
}

func (r *running) note(at time.Time, err error) {
	took := time.Since(at)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.Tries++
	r.now.Longest = max(r.now.Longest, took)
	if err == nil {
		r.now.OK++
		return
	}
	why := reasonOf(err)
	r.now.Errors[why]++
	if len(r.now.Fails) < maxFails && !r.Refused {
		r.now.Fails = append(r.now.Fails, fail{At: at.UnixNano(), Took: int64(took), Why: why})
	}
}

func (r *running) counts() counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.now
	c.Errors = map[string]int64{}
	for k, v := range r.now.Errors {
		c.Errors[k] = v
	}
	c.Fails = append([]fail(nil), c.Fails...)
	return c
}

// reasonOf is short, so that errors can be counted by it.
func reasonOf(err error) string {
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	}
	return err.Error()
}

func (r *running) target(i int) string { return r.Target[i%len(r.Target)] }

// call is one connection. That connect() went well and the rest did not is told apart: a server that
// must not be reached was.
func (r *running) call(ctx context.Context, i int) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", r.target(i))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	if _, err := io.WriteString(c, r.Word+"\n"); err != nil {
		return errors.New("connected, then: " + err.Error()) // not wrapped: no errno is to be told in its place
	}
	said, err := io.ReadAll(c)
	if err != nil || string(said) != "ok\n" {
		return errors.New("connected, then: " + fmt.Sprint(strconv.Quote(string(said)), ", ", err))
	}
	return nil
}

// datagram is one question and one answer on a connected socket.
func (r *running) datagram(ctx context.Context, i int) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", r.target(i))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	msg := fmt.Sprintf("%s %d", r.Word, i)
	if _, err := io.WriteString(c, msg); err != nil {
		return err
	}
	b := make([]byte, 2048)
	n, err := c.Read(b)
	if err == nil && string(b[:n]) != msg {
		err = fmt.Errorf("answer %q", b[:n])
	}
	return err
}

// datagrams is one unconnected socket with the answers that are waited for.
type datagrams struct {
	c    net.PacketConn
	mu   sync.Mutex
	wait map[string]chan string // by message; gets who answered
}

func newDatagrams() (*datagrams, error) {
	c, err := net.ListenPacket("udp4", ":0")
	if err != nil {
		return nil, err
	}
	u := &datagrams{c: c, wait: map[string]chan string{}}
	go func() { // ends with the process
		b := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				continue // ECONNREFUSED of a datagram before
			}
			u.mu.Lock()
			if w := u.wait[string(b[:n])]; w != nil {
				w <- from.String()
				delete(u.wait, string(b[:n]))
			}
			u.mu.Unlock()
		}
	}()
	return u, nil
}

// call sends a datagram and wants the answer from the address that it asked.
func (u *datagrams) call(ctx context.Context, p probe, i int) error {
	to := p.Target[i%len(p.Target)]
	at, err := net.ResolveUDPAddr("udp", to)
	if err != nil {
		return err
	}
	msg, got := fmt.Sprintf("%s %d", p.Word, i), make(chan string, 1)
	u.mu.Lock()
	u.wait[msg] = got
	u.mu.Unlock()
	if _, err := u.c.WriteTo([]byte(msg), at); err != nil {
		return err
	}
	select {
	case from := <-got:
		if from != to {
			return fmt.Errorf("answered by %s, asked %s", from, to)
		}
		return nil
	case <-ctx.Done():
		u.mu.Lock()
		delete(u.wait, msg)
		u.mu.Unlock()
		return ctx.Err()
	}
}

// longFlow is one connection that lives as long as its prober. It is never made anew: after its end
// every try fails.
type longFlow struct {
	probe
	c   net.Conn
	sum hash.Hash
	err error
}

func (f *longFlow) block(ctx context.Context, _ int) error {
	if f.err == nil {
		f.err = f.exchange(ctx)
	}
	return f.err
}

func (f *longFlow) exchange(ctx context.Context) error {
	deadline, _ := ctx.Deadline()
	if f.c == nil {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", f.Target[0])
		if err != nil {
			return err
		}
		f.c = c
		if _, err := io.WriteString(c, "flow\n"); err != nil {
			return err
		}
	}
	_ = f.c.SetDeadline(deadline)
	block, want := make([]byte, blockSize), make([]byte, sha256.Size)
	_, _ = rand.Read(block)   // never fails (crypto/rand)
	_, _ = f.sum.Write(block) // never fails (hash.Hash)
	if _, err := f.c.Write(block); err != nil {
		return err
	}
	if _, err := io.ReadFull(f.c, want); err != nil {
		return err
	}
	if !bytes.Equal(want, f.sum.Sum(nil)) {
		return errors.New("checksums differ")
	}
	return nil
}
