package tables

import (
	"encoding/binary"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "seed of the differential tests; 0 draws one")
	casesFlag = flag.Int("cases", 120_000, "cases of a differential test")
)

// random draws meshes, policies and questions that are near each other, so that they meet.
type random struct{ *rand.Rand }

func newRandom(t testing.TB) random {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d; repeat with -seed %d", seed, seed)
	return random{rand.New(rand.NewPCG(seed, 5))}
}

func one[T any](r random, of ...T) T { return of[r.IntN(len(of))] }

func (r random) chance(percent int) bool { return r.IntN(100) < percent }

func (r random) labels() map[string]string {
	out := make(map[string]string)
	if r.chance(60) {
		out["tier"] = one(r, "web", "db")
	}
	if r.chance(50) {
		out["version"] = one(r, "v1", "v2")
	}
	return out
}

func (r random) identity() Identity {
	return Identity{Namespace: one(r, "shop", "bank"), Service: one(r, "orders", "billing", "cart"), Labels: r.labels()}
}

func (r random) selector() *nodepb.Selector {
	s := &nodepb.Selector{}
	if r.chance(60) {
		s.Namespace = one(r, "shop", "bank", "nowhere")
	}
	if r.chance(50) {
		s.Service = one(r, "orders", "billing", "cart")
	}
	if r.chance(40) {
		s.Labels = r.labels()
	}
	return s
}

var cidrs = []string{
	"0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "10.1.2.128/25", "192.0.2.0/24", "127.0.0.0/8",
	"::/0", "fd00::/8", "fd00:1::/32", "fd00:1:2::/48", "fd00:1:2::3/128", "2001:db8::/32", "::1/128",
	"::ffff:0:0/96", "::ffff:10.1.0.0/112", "::ffff:10.1.2.3/128", "::ffff:0:0/90", "::/64", "10.1.2.77/9",
}

var addrs = []string{
	"10.0.0.1", "10.1.0.1", "10.1.2.3", "10.1.2.200", "10.255.0.1", "192.0.2.7", "127.0.0.1", "198.51.100.9",
	"fd00::1", "fd00:1::1", "fd00:1:2::3", "fd00:1:2::4", "2001:db8::1", "::1", "::2", "::ffff:10.1.2.3", "::fffe:0:1", "2600::1",
}

func (r random) peer() *nodepb.Peer {
	switch r.IntN(10) {
	case 0, 1, 2, 3:
		return &nodepb.Peer{Kind: &nodepb.Peer_Workloads{Workloads: r.selector()}}
	case 4, 5, 6:
		return &nodepb.Peer{Kind: &nodepb.Peer_Entity{Entity: one(r, nodepb.Entity_ENTITY_HOST, nodepb.Entity_ENTITY_WORLD, nodepb.Entity_ENTITY_MESH)}}
	}
	c := &nodepb.Cidr{Cidr: one(r, cidrs...)}
	for r.chance(45) {
		c.Except = append(c.Except, one(r, cidrs...))
	}
	return &nodepb.Peer{Kind: &nodepb.Peer_Cidr{Cidr: c}}
}

var ports = []uint32{0, 1, 22, 79, 80, 81, 443, 8000, 8080, 8100, 65534, 65535}

func (r random) ports() *nodepb.PortRange {
	p := &nodepb.PortRange{Protocol: nodepb.Transport(r.IntN(4))}
	if p.Protocol == nodepb.Transport_TRANSPORT_ICMP || r.chance(15) {
		return p
	}
	a, b := one(r, ports...), one(r, ports...)
	p.First, p.Last = min(a, b), max(a, b)
	return p
}

func (r random) rules(source string) (out []*nodepb.PolicyRule) {
	for i := range r.IntN(5) {
		rule := &nodepb.PolicyRule{Source: fmt.Sprintf("%s:%d", source, i+2), Deny: r.chance(35)}
		if r.chance(30) {
			rule.Name = one(r, "first", "second")
		}
		if r.chance(30) {
			rule.Errno = one[uint32](r, 1, 13, 111, 113)
		}
		for range one(r, 0, 1, 1, 2, 3) {
			rule.Peers = append(rule.Peers, r.peer())
		}
		for range one(r, 0, 0, 1, 2, 4) {
			rule.Ports = append(rule.Ports, r.ports())
		}
		out = append(out, rule)
	}
	return out
}

func (r random) policies(namespace, service string) *nodepb.Policies {
	out := &nodepb.Policies{Namespace: namespace, Service: service}
	for i := range r.IntN(5) {
		p := &nodepb.Policy{
			Namespace: namespace, Name: fmt.Sprint("p", i), Source: fmt.Sprintf("p%d.yaml:%d", i, r.IntN(3)),
			Audit: r.chance(35),
		}
		for range 1 + r.IntN(2) {
			s := &nodepb.Selector{Namespace: namespace, Service: service}
			if r.chance(40) {
				s.Labels = r.labels()
			}
			p.Subjects = append(p.Subjects, s)
		}
		if r.chance(75) {
			p.Ingress = r.rules(p.Source)
		}
		if r.chance(75) {
			p.Egress = r.rules(p.Source)
		}
		out.Policies = append(out.Policies, p)
	}
	if r.chance(4) {
		out.Policies = append(out.Policies, tooMany(namespace, service))
	}
	return out
}

// tooMany is a policy that draws more lines between ports than a port set has room for.
func tooMany(namespace, service string) *nodepb.Policy {
	p := &nodepb.Policy{
		Namespace: namespace, Name: "stripes", Source: "stripes.yaml:1",
		Subjects: []*nodepb.Selector{{Namespace: namespace, Service: service}},
		Egress:   []*nodepb.PolicyRule{{Source: "stripes.yaml:2"}},
	}
	for i := range uint32(maxSegs + 1) {
		p.Egress[0].Ports = append(p.Egress[0].Ports, &nodepb.PortRange{Protocol: nodepb.Transport_TRANSPORT_TCP, First: 100 * (i + 1), Last: 100*(i+1) + 9})
	}
	return p
}

func (r random) query(subjects, known []uint64) Query {
	q := Query{Subject: one(r, subjects...), Dir: uint8(r.IntN(2)), Proto: one(r, TCP, TCP, UDP, ICMP), Addr: netip.MustParseAddr(one(r, addrs...))}
	if r.chance(2) {
		q.Subject = one(r, r.Uint64(), one(r, known...)) // not of this node
	}
	if q.Proto != ICMP {
		q.Port = uint16(one(r, ports...))
		if r.chance(30) {
			q.Port = uint16(int(q.Port) + r.IntN(3) - 1)
		}
	}
	switch r.IntN(10) {
	case 0, 1, 2:
		q.Peer = one(r, IDUnknown, IDHost, IDWorld, IDAgent)
	case 3:
		q.Peer = IDFirst + r.Uint64N(1<<60) // a workload that nobody announced
	default:
		q.Peer = one(r, known...)
	}
	return q
}

// world is one mesh under test: the model and tables that must agree with it.
type world struct {
	t      *testing.T
	r      random
	model  *Model
	node   *node
	tables []*Table
	ask    func(Query) bpfobj.InlayDecideCase // of the kernel; nil without one

	services map[string][]Identity // by name
	policies map[string]*nodepb.Policies
	hosted   map[uint64]Identity // by cgroup
	asked    int
	met      map[string]int // what questions met
}

func (w *world) each(f func(*Table) error) {
	w.t.Helper()
	for _, table := range w.tables {
		if err := f(table); err != nil {
			w.t.Fatal(err)
		}
	}
}

// change does one random thing to the mesh.
func (w *world) change() {
	r := w.r
	switch r.IntN(8) {
	case 0, 1, 2, 3:
		var hosts []Identity
		for _, cgroup := range slices.Sorted(maps.Keys(w.hosted)) {
			hosts = append(hosts, w.hosted[cgroup])
		}
		who := one(r, append(hosts, r.identity())...)
		p := r.policies(who.Namespace, who.Service)
		w.policies[p.Namespace+"/"+p.Service] = p
		w.model.SetPolicies(p)
		w.each(func(t *Table) error { return t.SetPolicies(p) })
	case 4, 5:
		who := r.identity()
		name := who.Namespace + "/" + who.Service
		list := slices.DeleteFunc(slices.Clone(w.services[name]), func(o Identity) bool { return same(&o, &who) })
		if len(list) == len(w.services[name]) {
			list = append(list, who)
		}
		w.services[name] = list
		s := &nodepb.Service{Namespace: who.Namespace, Name: who.Service}
		for _, i := range list {
			s.Workloads = append(s.Workloads, &nodepb.Workload{Labels: i.Labels})
		}
		w.each(func(t *Table) error { return t.SetService(s) })
	case 6:
		cgroup := 1 + r.Uint64N(4)
		who := r.identity()
		w.hosted[cgroup] = who
		w.each(func(t *Table) error {
			t.SetWorkload(cgroup, Workload{Namespace: who.Namespace, Service: who.Service, Labels: who.Labels})
			return nil
		})
	case 7:
		cgroup := 1 + r.Uint64N(4)
		delete(w.hosted, cgroup)
		w.each(func(t *Table) error { t.DeleteWorkload(cgroup); return nil })
	}
	w.model.identities = make(map[uint64]Identity)
	for _, list := range w.services {
		for _, who := range list {
			w.model.SetIdentity(who)
		}
	}
	for _, who := range w.hosted {
		w.model.SetIdentity(who)
	}
}

// commit commits to every table and tells the model who is closed.
func (w *world) commit() {
	w.t.Helper()
	w.model.closed = make(map[uint64]bool)
	for i, table := range w.tables {
		c, err := table.Commit()
		if err != nil && len(c.Closed) == 0 {
			w.t.Fatal(err)
		}
		if i == 0 {
			for _, n := range c.Closed {
				w.model.SetClosed(n, true)
			}
		}
	}
	w.node.check(w.t, w.tables[0])
}

// known are the numbers that questions are about: of workloads of this node, and of all.
func (w *world) known() (subjects, all []uint64) {
	for _, who := range w.hosted {
		subjects = append(subjects, who.Number())
	}
	slices.Sort(subjects)
	return subjects, slices.Sorted(maps.Keys(w.model.identities))
}

// compare asks all the same and fails at the first difference.
func (w *world) compare(q Query) {
	w.t.Helper()
	// The model knows every workload; the node is asked about those that it hosts.
	hosted := false
	for _, who := range w.hosted {
		hosted = hosted || who.Number() == q.Subject
	}
	want := w.model.Decide(q)
	if !hosted {
		want = Verdict{Allowed: true, WouldAllow: true} // no subject, no policy
	}
	w.asked++
	w.note(q, want, hosted)
	if !w.model.AllowAll {
		w.same("walk over the maps", q, w.tables[0], w.node.decide(q), want)
	}
	if w.ask != nil {
		w.same("program", q, w.tables[len(w.tables)-1], w.ask(q), want)
	}
}

// note counts what a case was of, so that a run which meets too little fails.
func (w *world) note(q Query, v Verdict, hosted bool) {
	meet := func(what string, is bool) {
		if is {
			w.met[what]++
		}
	}
	byRule := v.Rule != Rule{}
	meet("denied by a rule", byRule && v.Rule.Deny)
	meet("denied by default", byRule && !v.Rule.Deny && !v.Allowed)
	meet("allowed by a rule", byRule && v.Allowed)
	meet("audited", v.Allowed && !v.WouldAllow)
	meet("denied and audit would allow", !v.Allowed && v.WouldAllow)
	meet("closed", w.model.closed[q.Subject] && hosted)
	meet("errno other than EPERM", v.Errno > 1)
	meet("ingress", q.Dir == 1 && byRule)
	meet("ICMP by a rule", q.Proto == ICMP && byRule)
	meet("UDP by a rule", q.Proto == UDP && byRule)
	meet("unknown peer by a rule", q.Peer == IDUnknown && byRule)
	meet("host by a rule", q.Peer == IDHost && byRule)
	meet("world by a rule", q.Peer == IDWorld && byRule)
	meet("workload by a rule", q.Peer >= IDFirst && byRule)
	meet("mapped address by a rule", q.Addr.Is4In6() && byRule)
	meet("IPv6 by a rule", q.Addr.Is6() && byRule)
}

func (w *world) same(who string, q Query, table *Table, c bpfobj.InlayDecideCase, want Verdict) {
	w.t.Helper()
	rule := func(n uint32) Rule {
		r, ok := table.Rule(n)
		if !ok && n != 0 {
			w.t.Errorf("rule %d is unknown", n)
		}
		return r
	}
	got := Verdict{
		Allowed: c.Verdict == allow, Errno: c.Err, Rule: rule(c.Rule),
		WouldAllow: c.Audit == allow, WouldRule: rule(c.AuditRule),
	}
	if got == want {
		return
	}
	subject := w.model.identities[q.Subject]
	w.t.Fatalf("case %d: %s\nquestion %+v\nsubject %+v\npeer %+v\n got %+v\nwant %+v\npolicies %s", w.asked, who, q,
		subject, w.model.identities[q.Peer], got, want, prototext.Format(w.policies[subject.Namespace+"/"+subject.Service]))
}

func newWorld(t *testing.T, r random) *world {
	w := &world{
		t: t, r: r, model: NewModel(), node: newNode(1<<20, nil),
		services: make(map[string][]Identity), policies: make(map[string]*nodepb.Policies), hosted: make(map[uint64]Identity), met: make(map[string]int),
	}
	table, err := newTable(w.node.contents(), Config{})
	if err != nil {
		t.Fatal(err)
	}
	w.tables = []*Table{table}
	for range 12 { // somebody to ask about
		w.change()
	}
	w.hosted[9] = Identity{Namespace: "shop", Service: "orders", Labels: map[string]string{"tier": "web"}}
	w.each(func(t *Table) error {
		t.SetWorkload(9, Workload{Namespace: "shop", Service: "orders", Labels: map[string]string{"tier": "web"}})
		return nil
	})
	return w
}

// run asks n questions while the mesh changes.
func (w *world) run(n int, breakglass func(bool)) {
	const perChange = 150
	for w.asked < n {
		w.change()
		w.commit()
		if breakglass != nil && w.r.chance(3) {
			w.model.AllowAll = true
			breakglass(true)
		}
		subjects, known := w.known()
		for range perChange {
			w.compare(w.r.query(subjects, known))
		}
		if w.model.AllowAll {
			w.model.AllowAll = false
			breakglass(false)
		}
	}
	w.t.Logf("%d cases, 0 differences; of them %v", w.asked, w.met)
	for _, what := range []string{
		"denied by a rule", "denied by default", "allowed by a rule", "audited", "denied and audit would allow", "closed",
		"errno other than EPERM", "ingress", "ICMP by a rule", "UDP by a rule", "unknown peer by a rule", "host by a rule",
		"world by a rule", "workload by a rule", "mapped address by a rule", "IPv6 by a rule",
	} {
		if n >= 100_000 && w.met[what] < 100 {
			w.t.Errorf("only %d cases were %s: want at least 100", w.met[what], what)
		}
	}
}

// The model says what policies mean; a walk over the maps, as programs do it, must say the same.
func TestMapsMeanWhatPoliciesMean(t *testing.T) {
	w := newWorld(t, newRandom(t))
	w.run(*casesFlag, nil)
}

// The same with the real program and real maps.
func TestProgramDecidesAsModel(t *testing.T) {
	kernel := kernelMaps(t, nil)
	program := testProgram(t, "decide_test", kernel)
	w := newWorld(t, newRandom(t))
	kernelTable, err := New(kernel, Config{})
	if err != nil {
		t.Fatal(err)
	}
	// What the first table was told, the second is told as it was left.
	for name, list := range w.services {
		s := &nodepb.Service{}
		s.Namespace, s.Name = split(name)
		for _, i := range list {
			s.Workloads = append(s.Workloads, &nodepb.Workload{Labels: i.Labels})
		}
		if err := kernelTable.SetService(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range w.policies {
		if err := kernelTable.SetPolicies(p); err != nil {
			t.Fatal(err)
		}
	}
	for cgroup, who := range w.hosted {
		kernelTable.SetWorkload(cgroup, Workload{Namespace: who.Namespace, Service: who.Service, Labels: who.Labels})
	}
	w.tables = append(w.tables, kernelTable)
	w.ask = func(q Query) (c bpfobj.InlayDecideCase) {
		out := make([]byte, 256)
		opts := ebpf.RunOptions{Data: bytesOf(q), DataOut: out}
		if _, err := program.Run(&opts); err != nil {
			t.Fatal(err)
		}
		if _, err := binary.Decode(opts.DataOut, binary.NativeEndian, &c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	w.run(*casesFlag, func(on bool) {
		s := bpfobj.InlaySettings{}
		if on {
			s.AllowAll = 1
		}
		if err := kernel.SettingsMap.Put(uint32(0), &s); err != nil {
			t.Fatal(err)
		}
	})
}
