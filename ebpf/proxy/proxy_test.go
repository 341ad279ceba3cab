package proxy_test

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

func TestNames(t *testing.T) {
	elsewhere := resolver(t, fixed("203.0.113.1"))
	tab := newTables()
	tab.names["mesh.shop"] = proxy.Addresses{V4: netip.MustParseAddr("198.18.0.7")}
	var shop atomic.Bool
	tab.who = func(netip.AddrPort, bool) (proxy.Client, bool, error) {
		if shop.Load() {
			return proxy.Client{Cgroup: 1, Namespace: "shop"}, true, nil
		}
		return proxy.Client{Cgroup: 2}, true, nil
	}
	p := launch(t, proxy.Config{Tables: tab, Upstreams: []netip.AddrPort{elsewhere}})
	for name, tc := range map[string]struct {
		name  string
		qtype uint16
		shop  bool
		want  string
	}{
		"a single label resolves in the default namespace for one that has none": {"orders.", dns.TypeA, false, "NOERROR 198.18.0.1"},
		"a single label resolves in the namespace of the asker":                  {"orders.", dns.TypeA, true, "NOERROR 198.18.0.2"},
		"AAAA gives the other family":                                            {"orders.", dns.TypeAAAA, false, "NOERROR fd69:6e6c:6179::1"},
		"ANY gives both":                                                         {"orders.", dns.TypeANY, false, "NOERROR 198.18.0.1 fd69:6e6c:6179::1"},
		"a name with its namespace":                                              {"orders.shop.", dns.TypeA, false, "NOERROR 198.18.0.2"},
		"a name with namespace and suffix":                                       {"orders.shop.mesh.", dns.TypeA, false, "NOERROR 198.18.0.2"},
		"a name with the suffix alone is one of the asker's namespace":           {"orders.mesh.", dns.TypeA, true, "NOERROR 198.18.0.2"},
		"case does not matter":                                                   {"oRdErS.Shop.MESH.", dns.TypeA, false, "NOERROR 198.18.0.2"},
		"a family that the service lacks is empty, not absent":                   {"four.", dns.TypeAAAA, false, "NOERROR ns:SOA:four."},
		"the same under the suffix":                                              {"six.default.mesh.", dns.TypeA, false, "NOERROR ns:SOA:mesh."},
		"a service without any address exists":                                   {"bare.default.mesh.", dns.TypeA, false, "NOERROR ns:SOA:mesh."},
		"another type of a name that exists is empty":                            {"orders.default.mesh.", dns.TypeHTTPS, false, "NOERROR ns:SOA:mesh."},
		"a name under the suffix that does not exist":                            {"nobody.default.mesh.", dns.TypeA, false, "NXDOMAIN ns:SOA:mesh."},
		"SRV below a service does not exist":                                     {"_grpc._tcp.orders.default.mesh.", dns.TypeSRV, false, "NXDOMAIN ns:SOA:mesh."},
		"the suffix itself exists":                                               {"mesh.", dns.TypeA, false, "NOERROR ns:SOA:mesh."},
		"the suffix has an SOA":                                                  {"mesh.", dns.TypeSOA, false, "NOERROR SOA"},
		"a service may bear the suffix's name":                                   {"mesh.", dns.TypeA, true, "NOERROR 198.18.0.7"},
		"a single label that is no service is asked elsewhere":                   {"printer.", dns.TypeA, false, "NOERROR 203.0.113.1"},
		"NAME.NAMESPACE that is no service is asked elsewhere":                   {"example.com.", dns.TypeA, false, "NOERROR 203.0.113.1"},
		"three labels are asked elsewhere":                                       {"orders.default.example.", dns.TypeA, false, "NOERROR 203.0.113.1"},
		"localhost is no service":                                                {"localhost.", dns.TypeA, false, "NOERROR 203.0.113.1"},
		"an escaped dot is no dot":                                               {`orders\.shop.`, dns.TypeA, false, "NOERROR 203.0.113.1"},
		"an escaped dot under the suffix does not exist":                         {`orders\.shop.mesh.`, dns.TypeA, false, "NXDOMAIN ns:SOA:mesh."},
		"a map that cannot be read is SERVFAIL":                                  {"broken.", dns.TypeA, false, "SERVFAIL"},
		"a zone is not told whole":                                               {"mesh.", dns.TypeAXFR, false, "REFUSED"},
	} {
		t.Run(name, func(t *testing.T) {
			shop.Store(tc.shop)
			for _, network := range []string{"udp", "tcp"} {
				for _, at := range p.status.Addresses {
					q := question(tc.name, tc.qtype)
					r := ask(t, network, at, q)
					if s := got(r); s != tc.want {
						t.Errorf("%s %s: %s: got %q, want %q", network, at, tc.name, s, tc.want)
					}
					if r.Question[0].Name != tc.name {
						t.Errorf("%s %s: the question came back as %q, sent %q", network, at, r.Question[0].Name, tc.name)
					}
					for _, rr := range append(r.Answer, r.Ns...) {
						if h := rr.Header(); strings.HasPrefix(tc.want, "NOERROR 198") && (h.Ttl != 5 || h.Name != tc.name) {
							t.Errorf("record %v: want TTL 5 and the name as asked", rr)
						}
					}
				}
			}
		})
	}
}

func TestEDNS(t *testing.T) {
	p := launch(t, proxy.Config{})
	q := question("orders.", dns.TypeA)
	q.SetEdns0(4096, true)
	r := ask(t, "udp", p.status.Addresses[0], q)
	if o := r.IsEdns0(); o == nil || !o.Do() || o.UDPSize() != 1232 {
		t.Errorf("OPT of the answer: %v, want DO copied and 1232 bytes", o)
	}
	q = question("orders.", dns.TypeA)
	if o := ask(t, "udp", p.status.Addresses[0], q).IsEdns0(); o != nil {
		t.Errorf("an OPT was sent to who sent none: %v", o)
	}
	q.SetEdns0(1232, false)
	q.IsEdns0().SetVersion(1)
	if r := ask(t, "udp", p.status.Addresses[0], q); r.Rcode != dns.RcodeBadVers {
		t.Errorf("EDNS version 1: %s, want BADVERS", dns.RcodeToString[r.Rcode])
	}
}

// raw sends bytes by UDP and then a good query, and returns what came back before its answer: so
// that "no answer" needs no waiting.
func raw(t *testing.T, at netip.AddrPort, msg []byte) []byte {
	t.Helper()
	c, err := net.Dial("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	good := question("orders.", dns.TypeA)
	good.Id = 0xfffe
	b, err := good.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range [][]byte{msg, b} {
		if _, err := c.Write(m); err != nil {
			t.Fatal(err)
		}
	}
	var first []byte
	for {
		buf := make([]byte, 4096)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("no answer to a good query after a bad one: %v", err)
		}
		if binary.BigEndian.Uint16(buf) == good.Id {
			return first
		}
		first = buf[:n]
	}
}

func TestMalformed(t *testing.T) {
	p := launch(t, proxy.Config{})
	pack := func(f func(m *dns.Msg)) []byte {
		m := question("orders.", dns.TypeA)
		m.Id = 7
		f(m)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := pack(func(*dns.Msg) {})
	for name, tc := range map[string]struct {
		msg  []byte
		want int // -1: nothing comes back
	}{
		"less than a header":        {good[:11], -1},
		"nothing":                   {nil, -1},
		"a response":                {pack(func(m *dns.Msg) { m.Response = true }), -1},
		"a header that promises":    {good[:12], dns.RcodeFormatError},
		"a name that is cut":        {good[:15], dns.RcodeFormatError},
		"a pointer to itself":       {append(append([]byte{}, good[:12]...), 0xc0, 12, 0, 1, 0, 1), dns.RcodeFormatError},
		"no question":               {pack(func(m *dns.Msg) { m.Question = nil }), dns.RcodeFormatError},
		"two questions":             {pack(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), dns.RcodeFormatError},
		"an update":                 {pack(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		"an opcode that nobody has": {pack(func(m *dns.Msg) { m.Opcode = 15 }), dns.RcodeNotImplemented},
		"two OPT records": {pack(func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			m.Extra = append(m.Extra, m.Extra[0])
		}), dns.RcodeFormatError},
		"another class under the suffix": {pack(func(m *dns.Msg) {
			m.Question[0] = dns.Question{Name: "orders.mesh.", Qtype: dns.TypeA, Qclass: dns.ClassCHAOS}
		}), dns.RcodeRefused},
	} {
		t.Run(name, func(t *testing.T) {
			b := raw(t, p.status.Addresses[0], tc.msg)
			if tc.want < 0 {
				if b != nil {
					t.Errorf("an answer came: %x", b)
				}
				return
			}
			if b == nil || binary.BigEndian.Uint16(b) != 7 || b[2]&0x80 == 0 || int(b[3]&0xf) != tc.want {
				t.Errorf("answer %x: want id 7, a response, code %s", b, dns.RcodeToString[tc.want])
			}
		})
	}
	st, err := proxy.Ask(t.Context(), p.path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Malformed != 9 || st.Refused != 3 || st.Answered != 12 || st.Queries != st.Refused+st.Answered {
		t.Errorf("status %+v: want 9 malformed, 3 refused, 12 answered", st)
	}
}

func TestForward(t *testing.T) {
	node := resolver(t, fixed("203.0.113.1"))
	chosen := resolver(t, fixed("203.0.113.2"))
	big := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg)
		r.SetReply(q)
		for range 40 {
			r.Answer = append(r.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{strings.Repeat("x", 40)}})
		}
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			r.Truncate(dns.MinMsgSize) // whatever the client takes
		}
		_ = w.WriteMsg(r)
	})
	servfail := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg)
		_ = w.WriteMsg(r.SetRcode(q, dns.RcodeServerFailure))
	})
	liar := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		// Forgeries first: another id, another question. Then the truth.
		for _, change := range []func(r *dns.Msg){
			func(r *dns.Msg) { r.Id++ },
			func(r *dns.Msg) { r.Question[0].Name = "other.example." },
			func(r *dns.Msg) { r.Question[0].Qtype = dns.TypeAAAA },
			func(r *dns.Msg) { r.Response = false },
			func(*dns.Msg) {},
		} {
			r := new(dns.Msg)
			r.SetReply(q)
			r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(6, 6, 6, 6)}}
			before := r.Copy()
			change(r)
			if r.String() == before.String() {
				r.Answer[0].(*dns.A).A = net.IPv4(203, 0, 113, 5)
			}
			_ = w.WriteMsg(r)
		}
	})
	dead := closedPort(t)

	var to atomic.Value
	tab := newTables()
	tab.who = func(netip.AddrPort, bool) (proxy.Client, bool, error) {
		return proxy.Client{Cgroup: 9, Namespace: "default", Resolver: to.Load().(netip.AddrPort)}, true, nil
	}
	p := launch(t, proxy.Config{Tables: tab, Upstreams: []netip.AddrPort{servfail, node}})
	at := p.status.Addresses[0]
	for name, tc := range map[string]struct {
		to   netip.AddrPort
		want string
	}{
		"the resolver that the program chose":                  {chosen, "NOERROR 203.0.113.2"},
		"the node's where none is known; the next on SERVFAIL": {netip.AddrPort{}, "NOERROR 203.0.113.1"},
		"never this proxy itself":                              {at, "NOERROR 203.0.113.1"},
		"what a chosen resolver says is not asked elsewhere":   {servfail, "SERVFAIL"},
		"forged answers are passed over":                       {liar, "NOERROR 203.0.113.5"},
		"nobody listens":                                       {dead, "SERVFAIL"},
	} {
		t.Run(name, func(t *testing.T) {
			to.Store(tc.to)
			for _, network := range []string{"udp", "tcp"} {
				if network == "tcp" && tc.to == liar {
					continue
				}
				q := question("wWw.example.com.", dns.TypeA)
				r := ask(t, network, at, q)
				if got(r) != tc.want || r.Id != q.Id || r.Question[0].Name != "wWw.example.com." {
					t.Errorf("%s: %s id %d question %q: want %s, id %d, the question as sent", network, got(r), r.Id, r.Question[0].Name, tc.want, q.Id)
				}
			}
		})
	}
	t.Run("an answer over TCP comes whole", func(t *testing.T) {
		to.Store(big)
		if r := ask(t, "tcp", at, question("big.example.", dns.TypeTXT)); len(r.Answer) != 40 || r.Truncated {
			t.Errorf("%d records, truncated %v: want 40", len(r.Answer), r.Truncated)
		}
	})
	t.Run("a cut answer tells to ask by TCP", func(t *testing.T) {
		to.Store(big)
		if r := ask(t, "udp", at, question("big.example.", dns.TypeTXT)); !r.Truncated {
			t.Errorf("%d records without the truncation bit", len(r.Answer))
		}
	})
	t.Run("an answer that a resolver cut too early is fetched by TCP", func(t *testing.T) {
		to.Store(big)
		q := question("big.example.", dns.TypeTXT)
		q.SetEdns0(4096, false)
		c := &dns.Client{UDPSize: 4096, Timeout: 10 * time.Second}
		r, _, err := c.Exchange(q, at.String())
		if err != nil || r.Truncated || len(r.Answer) != 40 {
			t.Errorf("%v, %v: want 40 records", r, err)
		}
	})
}

// closedPort is one that nothing listens on.
func closedPort(t *testing.T) netip.AddrPort {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// TestShare: one workload that takes every slot of its share does not take the names of others, and
// mesh names need none.
func TestShare(t *testing.T) {
	release := make(chan struct{})
	waiting := make(chan struct{}, 16)
	slow := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		if q.Question[0].Name == "slow.example." {
			waiting <- struct{}{}
			<-release
		}
		fixed("203.0.113.1")(w, q)
	})
	var modest atomic.Bool
	tab := newTables()
	tab.who = func(netip.AddrPort, bool) (proxy.Client, bool, error) {
		if modest.Load() {
			return proxy.Client{Cgroup: 2}, true, nil
		}
		return proxy.Client{Cgroup: 1}, true, nil
	}
	p := launch(t, proxy.Config{Tables: tab, Upstreams: []netip.AddrPort{slow}, MaxInFlight: 4})
	at := p.status.Addresses[0]
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if s := got(ask(t, "udp", at, question("slow.example.", dns.TypeA))); s != "NOERROR 203.0.113.1" {
				t.Errorf("a query within the share: %s", s)
			}
		})
		<-waiting
	}
	if s := got(ask(t, "udp", at, question("third.example.", dns.TypeA))); s != "SERVFAIL" {
		t.Errorf("beyond the share of a workload: %s, want SERVFAIL", s)
	}
	if s := got(ask(t, "udp", at, question("orders.", dns.TypeA))); s != "NOERROR 198.18.0.1" {
		t.Errorf("a name of the mesh: %s", s)
	}
	modest.Store(true)
	if s := got(ask(t, "udp", at, question("third.example.", dns.TypeA))); s != "NOERROR 203.0.113.1" {
		t.Errorf("another workload: %s", s)
	}
	close(release)
	wg.Wait()
	if st := p.ask(t); st.Shed != 1 || st.Forwarded != 3 || st.Answered != 1 {
		t.Errorf("status %+v: want 1 shed, 3 forwarded, 1 answered", st)
	}
}

// TestLoop: a proxy whose own queries are led back to it ends the circle at the first turn.
func TestLoop(t *testing.T) {
	var self atomic.Value
	p := launch(t, proxy.Config{
		Upstreams: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")},
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, self.Load().(netip.AddrPort).String()) // as a hook would
		},
	})
	at := p.status.Addresses[0]
	self.Store(at)
	for _, network := range []string{"udp", "tcp"} {
		if s := got(ask(t, network, at, question("www.example.", dns.TypeA))); s != "SERVFAIL" {
			t.Errorf("%s: %s, want SERVFAIL", network, s)
		}
	}
	if st := p.ask(t); st.Looped != 2 {
		t.Errorf("looped %d: want 2", st.Looped)
	}
}

func TestTCPConnections(t *testing.T) {
	release := make(chan struct{})
	slow := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
		<-release
		fixed("203.0.113.1")(w, q)
	})
	p := launch(t, proxy.Config{Upstreams: []netip.AddrPort{slow}, MaxConns: 1})
	c, err := dns.Dial("tcp", p.status.Addresses[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	first, second := question("slow.example.", dns.TypeA), question("orders.", dns.TypeA)
	for _, q := range []*dns.Msg{first, second} {
		if err := c.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
	}
	r, err := c.ReadMsg()
	if err != nil || r.Id != second.Id {
		t.Fatalf("%v, %v: want the answer that needs nobody before the one that waits", r, err)
	}
	if _, _, err := (&dns.Client{Net: "tcp", Timeout: 10 * time.Second}).Exchange(second, p.status.Addresses[0].String()); err == nil {
		t.Error("a connection beyond the bound was served")
	}
	close(release)
	if r, err := c.ReadMsg(); err != nil || r.Id != first.Id || got(r) != "NOERROR 203.0.113.1" {
		t.Errorf("%v, %v: want the answer that waited", r, err)
	}
	if st := p.ask(t); st.Shed != 1 {
		t.Errorf("shed %d: want 1", st.Shed)
	}
}

// TestStop: the entry goes first, what is under way is answered, the socket is gone.
func TestStop(t *testing.T) {
	for name, how := range map[string]func(t *testing.T, r *running, socket string){
		"by its context": func(_ *testing.T, r *running, _ string) { r.stop() },
		"by request": func(t *testing.T, _ *running, socket string) {
			if err := proxy.Stop(t.Context(), socket); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			release, waiting := make(chan struct{}), make(chan struct{}, 1)
			slow := resolver(t, func(w dns.ResponseWriter, q *dns.Msg) {
				waiting <- struct{}{}
				<-release
				fixed("203.0.113.1")(w, q)
			})
			tab := newTables()
			left := make(chan struct{})
			p := launch(t, proxy.Config{Tables: &leaving{tables: tab, left: left}, Upstreams: []netip.AddrPort{slow}})
			socket := p.path
			var wg sync.WaitGroup
			wg.Go(func() {
				if s := got(ask(t, "udp", p.status.Addresses[0], question("slow.example.", dns.TypeA))); s != "NOERROR 203.0.113.1" {
					t.Errorf("a query under way: %s", s)
				}
			})
			<-waiting
			wg.Go(func() { how(t, p, socket) })
			<-left
			close(release)
			wg.Wait()
			if err := p.wait(t); err != nil {
				t.Errorf("Run: %v", err)
			}
			if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("control socket: %v, want it gone", err)
			}
			if _, err := proxy.Ask(t.Context(), socket); !errors.Is(err, proxy.ErrNotRunning) {
				t.Errorf("Ask: %v, want ErrNotRunning", err)
			}
			if err := proxy.Stop(t.Context(), socket); err != nil {
				t.Errorf("Stop of one that is gone: %v", err)
			}
		})
	}
}

type leaving struct {
	*tables
	left chan struct{}
}

func (l *leaving) Leave(netns uint64) error {
	defer close(l.left)
	return l.tables.Leave(netns)
}

func TestBadConfig(t *testing.T) {
	good := func() proxy.Config {
		return proxy.Config{Tables: newTables(), Socket: filepath.Join(t.TempDir(), "dns.sock")}
	}
	for name, tc := range map[string]struct {
		change func(c *proxy.Config)
		want   string
	}{
		"no maps":               {func(c *proxy.Config) { c.Tables = nil }, "no maps"},
		"multicast DNS":         {func(c *proxy.Config) { c.Suffix = ".Local" }, "belongs to multicast DNS"},
		"below multicast DNS":   {func(c *proxy.Config) { c.Suffix = "mesh.local." }, "belongs to multicast DNS"},
		"localhost":             {func(c *proxy.Config) { c.Suffix = "localhost" }, "always the machine itself"},
		"suffix of dots":        {func(c *proxy.Config) { c.Suffix = "." }, "want labels"},
		"suffix with a space":   {func(c *proxy.Config) { c.Suffix = "my mesh" }, "want labels"},
		"no socket":             {func(c *proxy.Config) { c.Socket = "" }, "no path"},
		"relative socket":       {func(c *proxy.Config) { c.Socket = "dns.sock" }, "absolute path"},
		"long socket":           {func(c *proxy.Config) { c.Socket = "/" + strings.Repeat("x", 107) }, "at most 107"},
		"no directory":          {func(c *proxy.Config) { c.Socket += "/below" }, "directory"},
		"open to the world":     {func(c *proxy.Config) { c.Listen4 = "0.0.0.0:53" }, "only programs of this machine"},
		"the wrong family":      {func(c *proxy.Config) { c.Listen6 = "127.0.0.1:0" }, "want [::1]"},
		"no address":            {func(c *proxy.Config) { c.Listen4 = "localhost:0" }, "want ADDRESS:PORT"},
		"upstream without port": {func(c *proxy.Config) { c.Upstreams = []netip.AddrPort{netip.MustParseAddrPort("9.9.9.9:0")} }, "a port other than 0"},
		"negative bound":        {func(c *proxy.Config) { c.MaxConns = -1 }, "want 0 for the default"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good()
			tc.change(&cfg)
			ctx, cancel := context.WithCancel(t.Context())
			cfg.Ready = func(proxy.Status) { cancel() } // it must not come to this
			if err := proxy.Run(ctx, cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v: want one that says %q", err, tc.want)
			}
		})
	}
}

// A process that no hook sent is told nothing, neither of the mesh nor of the world, and costs nobody
// a question.
func TestOthersOnTheMachineAreRefused(t *testing.T) {
	elsewhere := resolver(t, func(dns.ResponseWriter, *dns.Msg) { t.Error("a stranger's question was forwarded") })
	tab := newTables()
	tab.who = func(netip.AddrPort, bool) (proxy.Client, bool, error) { return proxy.Client{}, false, nil }
	p := launch(t, proxy.Config{Tables: tab, Upstreams: []netip.AddrPort{elsewhere}})
	n := uint64(0)
	for _, network := range []string{"udp", "tcp"} {
		for _, at := range p.status.Addresses {
			for _, name := range []string{"orders.", "orders.shop.mesh.", "nobody.default.mesh.", "example.com."} {
				if s := got(ask(t, network, at, question(name, dns.TypeA))); s != "REFUSED" {
					t.Errorf("%s %s: %s: got %q, want REFUSED", network, at, name, s)
				}
				n++
			}
		}
	}
	if s := p.ask(t); s.Refused != n || s.Queries != n || s.Answered+s.Forwarded != 0 {
		t.Errorf("status %+v: want %d refused", s, n)
	}
}

// One workload, or somebody whom no hook sent, holds at most half of the connections.
func TestConnectionsAreShared(t *testing.T) {
	tab := newTables()
	var cgroup atomic.Uint64
	tab.who = func(netip.AddrPort, bool) (proxy.Client, bool, error) {
		return proxy.Client{Cgroup: cgroup.Load()}, cgroup.Load() != 0, nil
	}
	p := launch(t, proxy.Config{Tables: tab, MaxConns: 4})
	at := p.status.Addresses[0].String()
	served := func() bool {
		t.Helper()
		c, err := dns.DialTimeout("tcp", at, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_ = c.WriteMsg(question("orders.", dns.TypeA)) // a closed connection may refuse it
		_, err = c.ReadMsg()
		return err == nil
	}
	for _, who := range []uint64{0, 7} {
		cgroup.Store(who)
		for i, want := range []bool{true, true, false} {
			if got := served(); got != want {
				t.Errorf("cgroup %d: connection %d served: %v, want %v", who, i, got, want)
			}
		}
	}
	if s := p.ask(t); s.Shed != 2 {
		t.Errorf("shed %d: want 2", s.Shed)
	}
}
