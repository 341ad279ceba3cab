package proxy_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

// childVar tells the test binary that it is to be a proxy of its own.
const childVar = "INLAY_TEST_PROXY"

// child is what such a process is told.
type child struct {
	Socket, Version, Suffix string
	Upstreams               []netip.AddrPort
	// DieAtBeat ends the process by SIGKILL at its first heartbeat: after it has the sockets, before
	// it says that it serves.
	DieAtBeat bool
}

func TestMain(m *testing.M) {
	if raw := os.Getenv(childVar); raw != "" {
		os.Exit(beChild(raw))
	}
	if raw := os.Getenv(pinnedVar); raw != "" {
		os.Exit(bePinned(raw))
	}
	if os.Getenv(askerVar) != "" {
		os.Exit(beAsker())
	}
	// Under the race detector each child would sleep for a second when it ends.
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")) // fails only for a bad name
	os.Exit(m.Run())
}

func beChild(raw string) int {
	var c child
	if err := json.Unmarshal([]byte(raw), &c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	tables := newTables()
	if c.DieAtBeat {
		tables.beat = func(uint64, netip.AddrPort, netip.AddrPort) error {
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	if err := proxy.Run(ctx, proxy.Config{
		Tables: tables, Socket: c.Socket, Version: c.Version, Suffix: c.Suffix, Upstreams: c.Upstreams,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// tables are the node's as these tests want them: orders in default and in shop, and who asks.
type tables struct {
	names map[string]proxy.Addresses
	// who is asked for every client; nil takes everybody for a workload without a namespace.
	who  func(from netip.AddrPort, tcp bool) (proxy.Client, bool, error)
	beat func(netns uint64, v4, v6 netip.AddrPort) error

	mu sync.Mutex
}

func newTables() *tables {
	return &tables{names: map[string]proxy.Addresses{
		"orders.default":    {V4: netip.MustParseAddr("198.18.0.1"), V6: netip.MustParseAddr("fd69:6e6c:6179::1")},
		"orders.shop":       {V4: netip.MustParseAddr("198.18.0.2"), V6: netip.MustParseAddr("fd69:6e6c:6179::2")},
		"four.default":      {V4: netip.MustParseAddr("198.18.0.4")},
		"six.default":       {V6: netip.MustParseAddr("fd69:6e6c:6179::6")},
		"bare.default":      {},
		"localhost.default": {V4: netip.MustParseAddr("198.18.0.9")},
	}}
}

func (t *tables) Name(name string) (proxy.Addresses, bool, error) {
	if name == "broken.default" {
		return proxy.Addresses{}, false, fmt.Errorf("map names: %w", os.ErrPermission)
	}
	a, ok := t.names[name]
	return a, ok, nil
}

func (t *tables) Client(from netip.AddrPort, tcp bool) (proxy.Client, bool, error) {
	if t.who == nil {
		return proxy.Client{}, true, nil
	}
	return t.who(from, tcp)
}

func (t *tables) Beat(netns uint64, v4, v6 netip.AddrPort) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.beat != nil {
		return t.beat(netns, v4, v6)
	}
	return nil
}

func (t *tables) Leave(uint64) error { return nil }

// running is a proxy in this process.
type running struct {
	path   string
	status proxy.Status
	stop   func()
	ended  <-chan error
}

func socketPath(t *testing.T) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "dns.sock")
}

// launch starts a proxy and returns when it serves.
func launch(t *testing.T, cfg proxy.Config) *running {
	t.Helper()
	r, err := tryLaunch(t, cfg)
	if err != nil {
		t.Fatalf("proxy: %v", err)
	}
	return r
}

func tryLaunch(t *testing.T, cfg proxy.Config) (*running, error) {
	t.Helper()
	if cfg.Socket == "" {
		cfg.Socket = socketPath(t)
	}
	if cfg.Tables == nil && cfg.Maps == nil {
		cfg.Tables = newTables()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	ready := make(chan proxy.Status, 1)
	cfg.Ready = func(s proxy.Status) { ready <- s }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ended <- proxy.Run(ctx, cfg)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	select {
	case s := <-ready:
		return &running{path: cfg.Socket, status: s, stop: cancel, ended: ended}, nil
	case err := <-ended:
		return nil, err
	case <-time.After(20 * time.Second):
		t.Fatal("proxy neither serves nor ends")
		return nil, nil
	}
}

func (r *running) ask(t *testing.T) proxy.Status {
	t.Helper()
	s, err := proxy.Ask(t.Context(), r.path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// wait returns how Run ended.
func (r *running) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.ended:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("proxy does not end")
		return nil
	}
}

// resolver is a DNS server for UDP and TCP on one port.
func resolver(t *testing.T, h func(w dns.ResponseWriter, q *dns.Msg)) netip.AddrPort {
	t.Helper()
	var pc net.PacketConn
	var l net.Listener
	for i := 0; ; i++ {
		var err error
		if l, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if pc, err = net.ListenPacket("udp4", l.Addr().String()); err == nil {
			break
		}
		l.Close()
		if i == 16 {
			t.Fatal(err)
		}
	}
	serveDNS(t, pc, l, h)
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func serveDNS(t *testing.T, pc net.PacketConn, l net.Listener, h dns.HandlerFunc) {
	t.Helper()
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		ended := make(chan error, 1)
		go func() { ended <- s.ActivateAndServe() }()
		<-up
		t.Cleanup(func() {
			if err := s.Shutdown(); err != nil {
				t.Error(err)
			}
			<-ended
		})
	}
}

// fixed answers every question by one A record, so that it shows who answered.
func fixed(ip string) func(w dns.ResponseWriter, q *dns.Msg) {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg)
		r.SetReply(q)
		r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(ip)}}
		_ = w.WriteMsg(r)
	}
}

func question(name string, qtype uint16) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	return m
}

// ask sends one query; network is "udp" or "tcp".
func ask(t *testing.T, network string, to netip.AddrPort, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := &dns.Client{Net: network, Timeout: 10 * time.Second}
	r, _, err := c.Exchange(m, to.String())
	if err != nil {
		t.Fatalf("%s %s: %v", network, m.Question[0].Name, err)
	}
	return r
}

// got is an answer in one line: its code and the data of its records.
func got(r *dns.Msg) string {
	s := dns.RcodeToString[r.Rcode]
	for _, rr := range r.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			s += " " + rr.A.String()
		case *dns.AAAA:
			s += " " + rr.AAAA.String()
		default:
			s += " " + dns.TypeToString[rr.Header().Rrtype]
		}
	}
	for _, rr := range r.Ns {
		s += " ns:" + dns.TypeToString[rr.Header().Rrtype] + ":" + rr.Header().Name
	}
	return s
}
