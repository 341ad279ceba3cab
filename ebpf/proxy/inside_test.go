package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

func mustPack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func queryFor(t testing.TB, name string, tcp bool) query {
	m := new(dns.Msg)
	m.SetQuestion(name, dns.TypeA)
	return query{raw: mustPack(t, m), msg: m, tcp: tcp}
}

// TestSilentResolvers: each gets two seconds, then all have failed.
func TestSilentResolvers(t *testing.T) {
	a, b := netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("192.0.2.2:53")
	for name, tc := range map[string]struct {
		chosen    netip.AddrPort
		upstreams []netip.AddrPort
		tcp       bool
		want      []string // who is asked
	}{
		"a chosen one is asked twice":      {a, []netip.AddrPort{b}, false, []string{"udp 192.0.2.1:53", "udp 192.0.2.1:53"}},
		"those of the node once each":      {netip.AddrPort{}, []netip.AddrPort{a, b}, false, []string{"udp 192.0.2.1:53", "udp 192.0.2.2:53"}},
		"a single one of the node twice":   {netip.AddrPort{}, []netip.AddrPort{b}, false, []string{"udp 192.0.2.2:53", "udp 192.0.2.2:53"}},
		"no more than three":               {netip.AddrPort{}, []netip.AddrPort{a, b, a, b}, false, []string{"udp 192.0.2.1:53", "udp 192.0.2.2:53", "udp 192.0.2.1:53"}},
		"who asked by TCP is asked by TCP": {a, nil, true, []string{"tcp 192.0.2.1:53", "tcp 192.0.2.1:53"}},
		"nobody":                           {netip.AddrPort{}, nil, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked []string
				f := newForwarder(Config{
					Clock: realClock{}, MaxInFlight: 1, ID: func() uint16 { return 1 },
					Dial: func(_ context.Context, network, address string) (net.Conn, error) {
						asked = append(asked, network+" "+address)
						here, there := net.Pipe()
						go io.Copy(io.Discard, there) // it listens, and says nothing
						return here, nil
					},
				}, func() []netip.AddrPort { return tc.upstreams }, nil)
				q := queryFor(t, "www.example.", tc.tcp)
				q.client.Resolver = tc.chosen
				start := time.Now()
				resp, err := f.ask(t.Context(), q)
				if err == nil {
					t.Errorf("an answer: %x", resp)
				}
				if !slices.Equal(asked, tc.want) {
					t.Errorf("asked %v, want %v", asked, tc.want)
				}
				if took, want := time.Since(start), time.Duration(len(tc.want))*tryTime; took != want {
					t.Errorf("took %v, want %v", took, want)
				}
			})
		})
	}
}

// TestAbandon: an exchange ends at once when the process gives up.
func TestAbandon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newForwarder(Config{Clock: realClock{}, MaxInFlight: 1, ID: func() uint16 { return 1 },
			Dial: func(context.Context, string, string) (net.Conn, error) {
				here, there := net.Pipe()
				go io.Copy(io.Discard, there)
				return here, nil
			}}, func() []netip.AddrPort { return nobody }, nil)
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		time.AfterFunc(500*time.Millisecond, cancel)
		if _, err := f.ask(ctx, queryFor(t, "www.example.", false)); err == nil || time.Since(start) != 500*time.Millisecond {
			t.Errorf("%v after %v: want an error after 500ms", err, time.Since(start))
		}
	})
}

// TestIDs: the id on the wire is the drawn one, never the program's, and the answer has the program's.
func TestIDs(t *testing.T) {
	sent := make(chan uint16, 1)
	f := newForwarder(Config{Clock: realClock{}, MaxInFlight: 1, ID: func() uint16 { return 0xbeef },
		Dial: func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			go func() {
				buf := make([]byte, 1024)
				n, err := there.Read(buf)
				if err != nil {
					return
				}
				sent <- binary.BigEndian.Uint16(buf)
				buf[2] |= 0x80
				_, _ = there.Write(buf[:n])
			}()
			return here, nil
		}}, func() []netip.AddrPort { return nobody }, nil)
	q := queryFor(t, "www.example.", false)
	resp, err := f.ask(t.Context(), q)
	if err != nil || !bytes.Equal(resp[:2], q.raw[:2]) {
		t.Errorf("answer %x, %v: want the id of %x", resp, err, q.raw[:2])
	}
	if id := <-sent; id != 0xbeef {
		t.Errorf("id on the wire %x: want the drawn one", id)
	}
}

type beats struct {
	mu   sync.Mutex
	at   []time.Duration
	t0   time.Time
	fail bool
}

func (b *beats) Name(string) (Addresses, bool, error) { return Addresses{}, false, nil }
func (b *beats) Client(netip.AddrPort, bool) (Client, bool, error) {
	return Client{}, false, nil
}
func (b *beats) Leave(uint64) error { return nil }
func (b *beats) Beat(uint64, netip.AddrPort, netip.AddrPort) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at = append(b.at, time.Since(b.t0))
	if b.fail {
		return errors.New("no room")
	}
	return nil
}

func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var failed atomic.Uint64
		var log bytes.Buffer
		b := &beats{t0: time.Now()}
		h := &heartbeat{tables: b, clock: realClock{}, log: slog.New(slog.NewTextHandler(&log, nil)), failed: &failed}
		if err := h.start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second + time.Millisecond)
		h.stop()
		time.Sleep(time.Second)
		want := []time.Duration{0, 250 * time.Millisecond, 500 * time.Millisecond, 750 * time.Millisecond, time.Second}
		if !slices.Equal(b.at, want) {
			t.Errorf("beats at %v, want %v", b.at, want)
		}
		h.stop() // twice is fine

		b.mu.Lock()
		b.fail = true
		b.mu.Unlock()
		if err := h.start(); err == nil {
			t.Error("a first beat that failed is no error")
		}
		b.mu.Lock()
		b.fail = false
		b.mu.Unlock()
		if err := h.start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond) // between the beats
		for _, fail := range []bool{true, false} {
			b.mu.Lock()
			b.fail = fail
			b.mu.Unlock()
			time.Sleep(time.Second)
		}
		h.stop()
		if failed.Load() != 4 || strings.Count(log.String(), "level=ERROR") != 1 || strings.Count(log.String(), "written again") != 1 {
			t.Errorf("%d failed: want 4, told once each way:\n%s", failed.Load(), &log)
		}
	})
}

func TestResolvConf(t *testing.T) {
	for name, tc := range map[string]struct{ file, want string }{
		"in order":              {"nameserver 192.0.2.1\nsearch example.com\nnameserver 2001:db8::1\n", "[192.0.2.1:53 [2001:db8::1]:53]"},
		"with an interface":     {"nameserver fe80::1%eth0\n", "[[fe80::1%eth0]:53]"},
		"the unspecified is us": {"nameserver 0.0.0.0\n", "[127.0.0.1:53]"},
		"what is no address":    {"nameserver ns.example.com\nnameserver 192.0.2.1\n", "[192.0.2.1:53]"},
		"none":                  {"# nothing\n", "[127.0.0.1:53]"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseResolvConf(strings.NewReader(tc.file))
			if err != nil || "["+strings.Join(texts(got), " ")+"]" != tc.want {
				t.Errorf("%v, %v: want %s", got, err, tc.want)
			}
		})
	}
}

func texts(all []netip.AddrPort) []string {
	var s []string
	for _, a := range all {
		s = append(s, a.String())
	}
	return s
}

// TestResolvConfChanges: a new file counts a second later, and one that is gone or bad keeps the last.
func TestResolvConfChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		u := &upstreams{path: path, clock: realClock{}, log: slog.New(slog.DiscardHandler)}
		put := func(s string) {
			t.Helper()
			if err := os.WriteFile(path+".new", []byte(s), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".new", path); err != nil {
				t.Fatal(err)
			}
		}
		check := func(when, want string) {
			t.Helper()
			if got := strings.Join(texts(u.list()), " "); got != want {
				t.Errorf("%s: %s, want %s", when, got, want)
			}
		}
		check("no file: the machine's own", "127.0.0.1:53")
		put("nameserver 192.0.2.1\n")
		check("in the same second", "127.0.0.1:53")
		time.Sleep(time.Second)
		check("a second later", "192.0.2.1:53")
		put("nameserver 192.0.2.2\n")
		time.Sleep(time.Second)
		check("replaced", "192.0.2.2:53")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		check("gone", "192.0.2.2:53")
		put("nameserver 192.0.2.3\n")
		time.Sleep(time.Second)
		check("there again", "192.0.2.3:53")
	})
}

// TestImportRefuses: what comes in a hand-over is checked, and nothing stays open.
func TestImportRefuses(t *testing.T) {
	lock, err := takeLock(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := bind(lock, filepath.Join(t.TempDir(), "s"), "127.0.0.1:0", "[::1]:0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	before := openFiles(t)
	for name, tc := range map[string]struct {
		change func(roles []string) []string
		want   string
	}{
		"without its giver":  {func(r []string) []string { return r[:6] }, "sockets came for"},
		"as they are":        {func(r []string) []string { return r }, ""},
		"an unknown role":    {func(r []string) []string { r[2] = "tunnel"; return r }, "does not know it"},
		"fewer roles":        {func(r []string) []string { return r[1:] }, "roles"},
		"a role twice":       {func(r []string) []string { r[4], r[5] = r[2], r[3]; return r }, "each once"},
		"families mixed":     {func(r []string) []string { return []string{r[0], r[1], r[2], "tcp6"} }, "sockets came for"},
		"a family alone":     {func(r []string) []string { r[4], r[5] = r[5], r[4]; return r }, "socket"},
		"another kind":       {func(r []string) []string { r[2], r[3] = r[3], r[2]; return r }, "socket"},
		"no control":         {func(r []string) []string { r[1] = "lock"; return r }, "each once"},
		"control that is no": {func(r []string) []string { r[0], r[1] = r[1], r[0]; return r }, "socket \"control\""},
	} {
		t.Run(name, func(t *testing.T) {
			roles, fds, err := s.export()
			if err != nil {
				t.Fatal(err)
			}
			if len(roles) != 7 {
				if os.Getenv("CI") == "true" {
					t.Fatalf("no IPv6 here, roles %v", roles)
				}
				t.Skipf("NOT RUN: no IPv6 here, roles %v", roles)
			}
			roles = tc.change(roles)
			got, err := imported(roles, fds)
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if got.v4 != s.v4 || got.v6 != s.v6 {
					t.Errorf("at %v and %v, sent %v and %v", got.v4, got.v6, s.v4, s.v6)
				}
				got.close()
			} else if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v: want an error that says %q", err, tc.want)
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d files are open, %d were", after, before)
			}
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// FuzzAnswer: whatever comes from a program, nothing panics, and what goes back is a response to it
// that fits.
func FuzzAnswer(f *testing.F) {
	for _, name := range []string{"orders.", "orders.default.mesh.", "nobody.mesh.", "mesh.", "www.example.com."} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeANY, dns.TypeSRV, dns.TypeAXFR} {
			m := new(dns.Msg)
			m.SetQuestion(name, qtype)
			f.Add(mustPack(f, m), false)
			m.SetEdns0(100, true)
			f.Add(mustPack(f, m), true)
		}
	}
	f.Add([]byte{}, false)
	f.Add(bytes.Repeat([]byte{0xc0, 12}, 20), true)
	found := Addresses{V4: netip.MustParseAddr("198.18.0.1"), V6: netip.MustParseAddr("fd69:6e6c:6179::1")}
	f.Fuzz(func(t *testing.T, raw []byte, tcp bool) {
		names := func(name string) (Addresses, bool, error) {
			if _, ok := nameKey(name); !ok || strings.Count(name, ".") != 1 || strings.ContainsAny(name, "\\\x00 ") || strings.ToLower(name) != name {
				t.Errorf("key %q", name)
			}
			return found, strings.HasPrefix(name, "orders."), nil
		}
		out := answer(raw, tcp, "mesh", func() (Client, bool, error) { return Client{Namespace: "default"}, true, nil }, names)
		if out.kind == forward {
			if out.query.msg == nil || len(out.query.msg.Question) != 1 || out.reply != nil {
				t.Fatalf("a query to forward that nobody can compare: %+v", out)
			}
			if b := truncated(out.query.msg); len(b) > dns.MinMsgSize {
				t.Errorf("the shortest reply has %d bytes", len(b))
			}
			return
		}
		if out.kind == failed {
			t.Fatalf("failed: %v", out.err)
		}
		if out.reply == nil {
			if out.kind != malformed || len(raw) >= headerSize && raw[2]&0x80 == 0 {
				t.Fatalf("%x is dropped as %d", raw, out.kind)
			}
			return
		}
		m := new(dns.Msg)
		if err := m.Unpack(out.reply); err != nil {
			t.Fatalf("reply %x: %v", out.reply, err)
		}
		if !m.Response || m.Id != binary.BigEndian.Uint16(raw) {
			t.Errorf("reply %v to id %d", m, binary.BigEndian.Uint16(raw))
		}
		if !tcp && len(out.reply) > dns.MinMsgSize && m.IsEdns0() == nil {
			t.Errorf("%d bytes to a program that takes 512", len(out.reply))
		}
	})
}

// FuzzMatches: whatever a resolver sends is the answer to one question or to none.
func FuzzMatches(f *testing.F) {
	m := new(dns.Msg)
	m.SetQuestion("www.Example.com.", dns.TypeA)
	m.Id = 7
	m.Response = true
	f.Add(mustPack(f, m))
	m.Question[0].Name = "www.example.org."
	f.Add(mustPack(f, m))
	f.Add([]byte{0, 7, 0x80, 2, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, resp []byte) {
		sent := new(dns.Msg)
		sent.SetQuestion("www.example.com.", dns.TypeA)
		if !matches(sent, 7, resp) {
			return
		}
		if resp[0] != 0 || resp[1] != 7 || resp[2]&0x80 == 0 {
			t.Errorf("%x is taken for the answer", resp)
		}
		if resp[5] == 1 {
			name, _, err := dns.UnpackDomainName(resp, headerSize)
			if err != nil || !strings.EqualFold(name, "www.example.com.") {
				t.Errorf("%q, %v is taken for the answer", name, err)
			}
		}
	})
}

// FuzzLine: whatever is said on the control socket is a line or an error.
func FuzzLine(f *testing.F) {
	f.Add([]byte(`{"op":"takeover","protocol":1}` + "\n"))
	f.Add([]byte("[]\n"))
	f.Add(bytes.Repeat([]byte("x"), 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := readRequest(bufio.NewReaderSize(bytes.NewReader(b), maxLine))
		if err == nil && !bytes.Contains(b, []byte("\n")) {
			t.Errorf("half a line is taken for %+v", req)
		}
	})
}

func TestPorts(t *testing.T) {
	for _, p := range []uint16{0, 1, 53, 0x1234, 65535} {
		var b [2]byte
		binary.NativeEndian.PutUint16(b[:], rawPort(p))
		if binary.BigEndian.Uint16(b[:]) != p || hostPort(rawPort(p)) != p {
			t.Errorf("port %d lies in a key as %x", p, b)
		}
	}
}

// BenchmarkAnswer is what a query costs between the sockets, without the maps.
func BenchmarkAnswer(b *testing.B) {
	raw := queryFor(b, "orders.default.mesh.", false).raw
	found := Addresses{V4: netip.MustParseAddr("198.18.0.1")}
	b.ReportAllocs()
	for b.Loop() {
		out := answer(raw, false, "mesh", func() (Client, bool, error) { return Client{Namespace: "default"}, true, nil },
			func(string) (Addresses, bool, error) { return found, true, nil })
		if out.kind != answered {
			b.Fatal(out.kind)
		}
	}
}
