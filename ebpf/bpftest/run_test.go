package bpftest

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// run gives a case to one of the programs of object decide and reads the answer.
func run[T any](t testing.TB, k *kit, name string, c T) T {
	t.Helper()
	var in bytes.Buffer
	if err := binary.Write(&in, binary.NativeEndian, c); err != nil {
		t.Fatal(err)
	}
	ret, out, err := k.prog("decide/" + name).Test(in.Bytes())
	if err != nil || ret != 0 {
		t.Fatalf("%s: %d, %v", name, ret, err)
	}
	if err := binary.Read(bytes.NewReader(out), binary.NativeEndian, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDecide(t *testing.T) {
	k := newKit(t, settings{detached: true})
	const subject, gen = uint64(5000), uint32(3)
	var sets uint32
	entry := func(kind bpfobj.InlayPeerKind, peer uint64, proto uint8, segs ...bpfobj.InlaySeg) {
		sets++
		ps := bpfobj.InlayPortSet{N: uint32(len(segs))}
		copy(ps.Segs[:], segs)
		k.put("port_sets", sets, ps)
		k.put("policies", bpfobj.InlayPolKey{Subject: subject, Peer: peer, Gen: gen, Dir: ingress, Proto: proto, Kind: uint8(kind)}, sets)
	}
	seg := func(lo, hi uint16, action uint8, rule uint32) bpfobj.InlaySeg {
		return bpfobj.InlaySeg{Lo: lo, Hi: hi, Action: action, Audit: action, Rule: rule, AuditRule: rule}
	}
	k.put("subjects", subject, bpfobj.InlaySubject{
		Gen: gen, Flags: uint32(bpfobj.InlaySubjectFlagSUBJECT_DENY_INGRESS | bpfobj.InlaySubjectFlagSUBJECT_AUDIT_DENY_INGRESS),
		Rule: [2]uint32{70, 71}, AuditRule: [2]uint32{80, 81},
	})
	var full []bpfobj.InlaySeg
	for i := range uint16(64) {
		full = append(full, seg(i*1000+1, i*1000+10, allow, uint32(100+i)))
	}
	entry(bpfobj.InlayPeerKindPEER_IDENTITY, billing, unix.IPPROTO_TCP, seg(80, 80, allow, 1), seg(443, 450, deny, 2))
	entry(bpfobj.InlayPeerKindPEER_IDENTITY, other, unix.IPPROTO_TCP, full...)
	entry(bpfobj.InlayPeerKindPEER_MESH, 0, unix.IPPROTO_TCP, seg(90, 90, allow, 3))
	entry(bpfobj.InlayPeerKindPEER_ANY, 0, unix.IPPROTO_TCP, seg(0, 65535, allow, 4))
	entry(bpfobj.InlayPeerKindPEER_IDENTITY, world, unix.IPPROTO_ICMP, seg(0, 65535, allow, 5))
	entry(bpfobj.InlayPeerKindPEER_CIDR, 1, unix.IPPROTO_TCP, seg(80, 85, deny, 6))
	entry(bpfobj.InlayPeerKindPEER_CIDR, 2, unix.IPPROTO_TCP, seg(22, 22, allow, 7))
	cidr := func(p string, class uint32) {
		prefix := netip.MustParsePrefix(p)
		bits := prefix.Bits()
		if prefix.Addr().Is4() {
			bits += 96
		}
		k.put("cidrs", bpfobj.InlayCidrKey{Prefixlen: uint32(160 + bits), Gen: gen, Subject: subject, Dir: uint32(ingress), Addr: addr(prefix.Addr())}, class)
	}
	cidr("10.0.0.0/8", 1)
	cidr("10.1.0.0/16", 2)

	elsewhere := "192.0.2.1"
	for name, tc := range map[string]struct {
		peer    uint64
		from    string
		port    uint16
		proto   uint8
		verdict uint8
		rule    uint32
	}{
		"an entry of the peer":                       {billing, elsewhere, 80, unix.IPPROTO_TCP, allow, 1},
		"a range, its first port":                    {billing, elsewhere, 443, unix.IPPROTO_TCP, deny, 2},
		"a range, its last port":                     {billing, elsewhere, 450, unix.IPPROTO_TCP, deny, 2},
		"beyond the range, the default":              {billing, elsewhere, 451, unix.IPPROTO_TCP, deny, 71},
		"below every segment":                        {billing, elsewhere, 79, unix.IPPROTO_TCP, deny, 71},
		"the first entry found ends the search":      {billing, elsewhere, 90, unix.IPPROTO_TCP, deny, 71},
		"another workload has what the mesh has":     {orders, elsewhere, 90, unix.IPPROTO_TCP, allow, 3},
		"the world has what anybody has":             {world, elsewhere, 90, unix.IPPROTO_TCP, allow, 4},
		"so has the unknown":                         {0, elsewhere, 90, unix.IPPROTO_TCP, allow, 4},
		"the first of 64 segments":                   {other, elsewhere, 1, unix.IPPROTO_TCP, allow, 100},
		"the last of 64 segments":                    {other, elsewhere, 63010, unix.IPPROTO_TCP, allow, 163},
		"one of the middle":                          {other, elsewhere, 31005, unix.IPPROTO_TCP, allow, 131},
		"between two":                                {other, elsewhere, 31011, unix.IPPROTO_TCP, deny, 71},
		"after the last":                             {other, elsewhere, 63011, unix.IPPROTO_TCP, deny, 71},
		"ICMPv6 is ICMP":                             {world, "2001:db8::1", 0, unix.IPPROTO_ICMPV6, allow, 5},
		"another protocol, the default":              {billing, elsewhere, 80, unix.IPPROTO_UDP, deny, 71},
		"a denied network wins over an allowed peer": {billing, "10.9.9.9", 80, unix.IPPROTO_TCP, deny, 6},
		"the longest prefix alone counts":            {billing, "10.1.9.9", 80, unix.IPPROTO_TCP, allow, 1},
		"an allowed network adds to what a peer has": {billing, "10.1.9.9", 22, unix.IPPROTO_TCP, allow, 7},
		"a denied peer wins over an allowed network": {billing, "10.1.9.9", 443, unix.IPPROTO_TCP, deny, 2},
		"where both allow, the rule is the peer's":   {0, "10.1.9.9", 22, unix.IPPROTO_TCP, allow, 4},
		"the other direction has no default":         {billing, elsewhere, 80, 255, allow, 0}, // proto 255: see below
		"no subject, no policy":                      {billing, elsewhere, 80, 254, allow, 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := bpfobj.InlayDecideCase{Subject: subject, Peer: tc.peer, Addr: addr(netip.MustParseAddr(tc.from)), Port: be16(tc.port), Proto: tc.proto, Dir: ingress}
			switch tc.proto {
			case 255:
				c.Dir, c.Proto = egress, unix.IPPROTO_TCP
			case 254:
				c.Subject, c.Proto = 1, unix.IPPROTO_TCP
			}
			got := run(t, k, "decide_test", c)
			if got.Verdict != tc.verdict || got.Rule != tc.rule {
				t.Errorf("verdict %d by rule %d, want %d by %d", got.Verdict, got.Rule, tc.verdict, tc.rule)
			}
			if (got.Err == 0) != (got.Verdict == allow) {
				t.Errorf("verdict %d with errno %d", got.Verdict, got.Err)
			}
		})
	}
}

func TestPickFollowsTheWeights(t *testing.T) {
	k := newKit(t, settings{detached: true})
	vip := at(vip4, 80)
	a := bpfobj.InlayBackend{Addr: addr(netip.MustParseAddr("10.0.0.1")), Port: be16(1), Identity: 1}
	b := bpfobj.InlayBackend{Addr: addr(netip.MustParseAddr("10.0.0.2")), Port: be16(2), Identity: 2}
	k.put("services", svcKey(vip, unix.IPPROTO_TCP), bpfobj.InlaySvc{Id: 9, Gen: 4, Slots: 2})
	// a has 3 of 4: its own column whole, and half of the other's.
	k.put("slots", bpfobj.InlaySlotKey{Svc: 9, Gen: 4, Index: 0}, bpfobj.InlaySlot{Cut: math.MaxUint32, A: a, B: a})
	k.put("slots", bpfobj.InlaySlotKey{Svc: 9, Gen: 4, Index: 1}, bpfobj.InlaySlot{Cut: math.MaxUint32 / 2, A: b, B: a})
	for name, seeded := range map[string]bool{"at random": false, "by seed": true} {
		t.Run(name, func(t *testing.T) {
			const n = 20000
			hits := 0
			for i := range uint32(n) {
				c := bpfobj.InlayPickCase{Service: svcKey(vip, unix.IPPROTO_TCP)}
				if seeded {
					c.Seed = i*7 + 1
				}
				got := run(t, k, "pick_test", c)
				if got.Found != 1 {
					t.Fatalf("found %d", got.Found)
				}
				if got.Backend.Identity == 1 {
					hits++
				}
			}
			// 4 standard deviations of a binomial distribution.
			if d := math.Abs(float64(hits)-n*0.75) / math.Sqrt(n*0.75*0.25); d > 4 {
				t.Errorf("%d of %d, want 3/4: %.1f standard deviations away", hits, n, d)
			}
		})
	}
	k.put("services", svcKey(vip, unix.IPPROTO_TCP), bpfobj.InlaySvc{Id: 9, Gen: 5, Slots: 1, Only: b})
	if got := run(t, k, "pick_test", bpfobj.InlayPickCase{Service: svcKey(vip, unix.IPPROTO_TCP)}); got.Found != 1 || got.Backend != b {
		t.Errorf("a service of one endpoint: found %d, %+v, want 1, %+v", got.Found, got.Backend, b)
	}
	k.put("services", svcKey(vip, unix.IPPROTO_TCP), bpfobj.InlaySvc{Id: 9, Gen: 6, Slots: 2})
	if got := run(t, k, "pick_test", bpfobj.InlayPickCase{Service: svcKey(vip, unix.IPPROTO_TCP)}); got.Found != 2 {
		t.Errorf("a service whose slots are missing: found %d, want 2", got.Found)
	}
	k.put("services", svcKey(vip, unix.IPPROTO_TCP), bpfobj.InlaySvc{Id: 9, Gen: 7})
	if got := run(t, k, "pick_test", bpfobj.InlayPickCase{Service: svcKey(vip, unix.IPPROTO_TCP)}); got.Found != 2 {
		t.Errorf("a service without endpoint: found %d, want 2", got.Found)
	}
	if got := run(t, k, "pick_test", bpfobj.InlayPickCase{Service: svcKey(at(vip6, 1), unix.IPPROTO_TCP)}); got.Found != 0 {
		t.Errorf("no service: found %d, want 0", got.Found)
	}
}

// An endpoint is read whole or not at all while it is replaced, although the kernel gives the memory of
// the replaced value to the next one at once: each address comes with its own identity.
func TestPickIsWholeWhileEndpointsAreReplaced(t *testing.T) {
	k := newKit(t, settings{detached: true})
	const services = 4
	key := func(i int) bpfobj.InlaySvcKey { return svcKey(at(vip4, uint16(80+i)), unix.IPPROTO_TCP) }
	endpoint := func(service, turn uint32) bpfobj.InlayBackend {
		n := service<<24 | turn&0xffffff
		a := netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		return bpfobj.InlayBackend{Addr: addr(a), Port: uint16(n), Identity: uint64(n)}
	}
	put := func(service int, turn uint32) {
		k.put("services", key(service), bpfobj.InlaySvc{Id: uint32(service) + 1, Gen: turn, Slots: 1, Only: endpoint(uint32(service)+1, turn)})
	}
	for i := range services {
		put(i, 0)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	end := sync.OnceFunc(func() { close(stop); wg.Wait() })
	defer end()
	turns := uint32(0)
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			turns++
			for i := range services {
				put(i, turns)
			}
		}
	})
	again := 0
	for i := range 100_000 {
		service := i % services
		got := run(t, k, "pick_test", bpfobj.InlayPickCase{Service: key(service)})
		if got.Found != 1 {
			again++ // replaced twice while it was read
			continue
		}
		if n := uint32(got.Backend.Identity); got.Backend != endpoint(n>>24, n) || int(n>>24) != service+1 {
			t.Fatalf("service %d: %+v: parts of several endpoints, or that of another service", service+1, got.Backend)
		}
	}
	end()
	t.Logf("%d turns of replacements; %d of 100000 found nothing", turns, again)
	if turns < 1000 {
		t.Errorf("%d turns of replacements: too few to mean anything", turns)
	}
	if again > 100 {
		t.Errorf("%d of 100000 picks found nothing: want at most 100", again)
	}
}
