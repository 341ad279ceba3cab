package tables

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

const (
	maxSegs  = len(bpfobj.InlayPortSet{}.Segs)
	cidrBase = 160 // CIDR_BASE: bits of a cidr_key before the address
)

const (
	none  = uint8(bpfobj.InlayVerdictVERDICT_NONE)
	allow = uint8(bpfobj.InlayVerdictVERDICT_ALLOW)
	deny  = uint8(bpfobj.InlayVerdictVERDICT_DENY)
)

// flat is what the policies of one workload become: keys with generation 0, segments as the bytes
// of a port_set.
type flat struct {
	value bpfobj.InlaySubject
	pol   map[bpfobj.InlayPolKey]string
	cidr  map[bpfobj.InlayCidrKey]uint32
}

// directory finds workloads.
type directory interface {
	// matching calls f with the number of each known workload that s selects.
	matching(s *selector, f func(n uint64))
}

// flatten resolves the policies that select a workload. An entry for a special peer holds what the
// rules for more general ones say of it too: the first that a program finds is the answer.
func flatten(subject uint64, who Identity, policies []*policy, peers directory) (*flat, error) {
	out := &flat{pol: make(map[bpfobj.InlayPolKey]string), cidr: make(map[bpfobj.InlayCidrKey]uint32)}
	for dir := range directions {
		f := flattener{out: out, subject: subject, dir: uint8(dir), made: make(map[string]*[len(protocols)]string)}
		for _, p := range policies {
			f.rules = append(f.rules, p.rules[dir]...)
		}
		f.defaults()
		f.peers(peers)
		f.addresses()
		if f.tooMany != nil {
			f.tooMany.Subject, f.tooMany.Direction = who, directions[dir]
			return nil, f.tooMany
		}
	}
	return out, nil
}

// flattener does one direction.
type flattener struct {
	out     *flat
	subject uint64
	dir     uint8
	rules   []*policyRule                      // by policy, then as written: the order in which one is told
	made    map[string]*[len(protocols)]string // segments by the set of rules
	tooMany *TooManySegmentsError
}

// defaults: a direction that an enforced allow rule selects denies what no rule speaks of, and so
// it is with audited rules in the world in which they are enforced.
func (f *flattener) defaults() {
	v := &f.out.value
	for _, r := range f.rules {
		if r.Deny {
			continue
		}
		if v.AuditRule[f.dir] == 0 {
			v.AuditRule[f.dir] = r.number
			v.Flags |= uint32(bpfobj.InlaySubjectFlagSUBJECT_AUDIT_DENY_EGRESS) << f.dir
		}
		if v.Rule[f.dir] == 0 && !r.Audit {
			v.Rule[f.dir] = r.number
			v.Flags |= uint32(bpfobj.InlaySubjectFlagSUBJECT_DENY_EGRESS) << f.dir
		}
	}
}

// ruleSet is a set of rules of one flattener.
type ruleSet []uint64

func (f *flattener) set() ruleSet { return make(ruleSet, (len(f.rules)+63)/64) }

func (s ruleSet) add(i int)      { s[i/64] |= 1 << (i % 64) }
func (s ruleSet) has(i int) bool { return s[i/64]&(1<<(i%64)) != 0 }

func (s ruleSet) key() string {
	b := make([]byte, 0, len(s)*8)
	for _, w := range s {
		b = binary.NativeEndian.AppendUint64(b, w)
	}
	return string(b)
}

// peers writes the entries of peers that are known by who they are.
func (f *flattener) peers(known directory) {
	everybody, mesh, host, world := f.set(), f.set(), f.set(), f.set()
	workloads := make(map[uint64]ruleSet)
	for i, r := range f.rules {
		if r.everybody {
			for _, s := range []ruleSet{everybody, mesh, host, world} {
				s.add(i)
			}
		}
		if r.mesh {
			mesh.add(i)
		}
		if r.host {
			host.add(i)
		}
		if r.world {
			world.add(i)
		}
		for j := range r.workloads {
			known.matching(&r.workloads[j], func(n uint64) {
				s := workloads[n]
				if s == nil {
					s = f.set()
					workloads[n] = s
				}
				s.add(i)
			})
		}
	}
	nothing := new([len(protocols)]string)
	all := f.segments(everybody)
	f.write(bpfobj.InlayPeerKindPEER_ANY, 0, all, nothing)
	f.write(bpfobj.InlayPeerKindPEER_MESH, 0, f.segments(mesh), all)
	f.write(bpfobj.InlayPeerKindPEER_IDENTITY, IDHost, f.segments(host), all)
	f.write(bpfobj.InlayPeerKindPEER_IDENTITY, IDAgent, f.segments(host), all) // the node's own process is no workload
	f.write(bpfobj.InlayPeerKindPEER_IDENTITY, IDWorld, f.segments(world), all)
	for n, s := range workloads {
		for i := range s {
			s[i] |= mesh[i]
		}
		f.write(bpfobj.InlayPeerKindPEER_IDENTITY, n, f.segments(s), f.segments(mesh))
	}
}

// write enters the segments of a peer where they differ from those of the more general entry.
func (f *flattener) write(kind bpfobj.InlayPeerKind, peer uint64, segs, general *[len(protocols)]string) {
	for i, s := range segs {
		if s != general[i] {
			f.out.pol[bpfobj.InlayPolKey{Subject: f.subject, Peer: peer, Dir: f.dir, Proto: protocols[i], Kind: uint8(kind)}] = s
		}
	}
}

// addresses writes the prefixes and their classes. Of a prefix it is known which CIDRs hold all
// addresses whose longest prefix it is: those that contain it, unless an exception does.
func (f *flattener) addresses() {
	type word struct {
		rule, cidr int
		except     bool
	}
	said := make(map[netip.Prefix][]word)
	covers4 := false
	for i, r := range f.rules {
		for j, c := range r.cidrs {
			said[c.in] = append(said[c.in], word{i, j, false})
			covers4 = covers4 || over4(c.in)
			for _, e := range c.except {
				said[e] = append(said[e], word{i, j, true})
				covers4 = covers4 || over4(e)
			}
		}
	}
	if every4 := netip.PrefixFrom(netip.IPv4Unspecified(), 0); covers4 && said[every4] == nil {
		said[every4] = []word{} // IPv4 lies inside, as ::ffff:0:0/96, and is no IPv6
	}
	prefixes := keysOf(said)
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int {
		if c := mappedPrefix(a).Addr().Compare(mappedPrefix(b).Addr()); c != 0 {
			return c
		}
		return mappedPrefix(a).Bits() - mappedPrefix(b).Bits()
	})
	type step struct {
		prefix netip.Prefix
		class  uint32
	}
	var above []step // those that contain the one at hand
	classes := map[string]uint32{f.set().key(): 0}
	for _, p := range prefixes {
		at := mappedPrefix(p)
		for len(above) > 0 && !contains(mappedPrefix(above[len(above)-1].prefix), at) {
			above = above[:len(above)-1]
		}
		parent := uint32(0)
		if len(above) > 0 {
			parent = above[len(above)-1].class
		}
		in, except := make(map[word]bool), make(map[word]bool)
		note := func(q netip.Prefix) {
			if q.Addr().Is4() != p.Addr().Is4() {
				return // a CIDR speaks of its own family only
			}
			for _, w := range said[q] {
				if w.except {
					except[word{w.rule, w.cidr, false}] = true
				} else {
					in[w] = true
				}
			}
		}
		for _, s := range above {
			note(s.prefix)
		}
		note(p)
		rules := f.set()
		for w := range in {
			if !except[w] {
				rules.add(w.rule)
			}
		}
		key := rules.key()
		class, ok := classes[key]
		if !ok {
			class = uint32(len(classes))
			classes[key] = class
			f.write(bpfobj.InlayPeerKindPEER_CIDR, uint64(class), f.segments(rules), new([len(protocols)]string))
		}
		above = append(above, step{p, class})
		if class != parent {
			f.out.cidr[bpfobj.InlayCidrKey{
				Prefixlen: cidrBase + uint32(at.Bits()),
				Subject:   f.subject,
				Dir:       uint32(f.dir),
				Addr:      mapped(at.Addr()),
			}] = class
		}
	}
}

// mappedPrefix is a prefix as the trie holds it: that of IPv4 under ::ffff:0:0/96.
func mappedPrefix(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4() {
		return netip.PrefixFrom(netip.AddrFrom16(p.Addr().As16()), p.Bits()+96)
	}
	return p
}

// contains says whether all of b is in a, both as the trie holds them.
func contains(a, b netip.Prefix) bool {
	if a.Bits() > b.Bits() {
		return false
	}
	in, err := b.Addr().Prefix(a.Bits())
	return err == nil && in.Addr() == a.Addr()
}

// over4 says whether a prefix of IPv6 holds ::ffff:0:0/96.
func over4(p netip.Prefix) bool {
	return !p.Addr().Is4() && contains(p, netip.PrefixFrom(netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff}), 96))
}

// segments are the port sets of a set of rules, by protocol.
func (f *flattener) segments(rules ruleSet) *[len(protocols)]string {
	key := rules.key()
	if got := f.made[key]; got != nil {
		return got
	}
	out := new([len(protocols)]string)
	var list []*policyRule
	for i, r := range f.rules {
		if rules.has(i) {
			list = append(list, r)
		}
	}
	for i, proto := range protocols {
		segs, ok := cutPorts(list, i)
		if !ok && f.tooMany == nil {
			f.tooMany = &TooManySegmentsError{Proto: proto, Segments: len(segs)}
		}
		out[i] = encodeSegs(segs)
	}
	f.made[key] = out
	return out
}

// cutPorts divides the ports into ranges on which the same is said. It stops at one range too many.
func cutPorts(rules []*policyRule, proto int) (segs []bpfobj.InlaySeg, ok bool) {
	var starts []int
	var speak []*policyRule
	for _, r := range rules {
		for _, s := range r.ports[proto] {
			starts = append(starts, int(s.lo), int(s.hi)+1)
		}
		if len(r.ports[proto]) > 0 {
			speak = append(speak, r)
		}
	}
	slices.Sort(starts)
	starts = slices.Compact(starts)
	for i := 0; i+1 < len(starts); i++ {
		s := judge(speak, proto, uint16(starts[i]))
		if s.Action == none && s.Audit == none {
			continue
		}
		s.Lo, s.Hi = uint16(starts[i]), uint16(starts[i+1]-1)
		if n := len(segs); n > 0 && int(segs[n-1].Hi)+1 == int(s.Lo) {
			last := segs[n-1]
			last.Lo, last.Hi = s.Lo, s.Hi
			if last == s {
				segs[n-1].Hi = s.Hi
				continue
			}
		}
		if segs = append(segs, s); len(segs) > maxSegs {
			return segs, false
		}
	}
	return segs, true
}

// judge says what the rules say of one port: a rule that denies before one that allows, of several
// the first; in the enforced world and in the one where audited policies are enforced too.
func judge(rules []*policyRule, proto int, port uint16) (s bpfobj.InlaySeg) {
	for _, r := range rules {
		if !speaks(r.ports[proto], port) {
			continue
		}
		verdict := allow
		if r.Deny {
			verdict = deny
		}
		if !r.Audit && s.Action < verdict { // none < allow < deny
			s.Action, s.Rule, s.Err = verdict, r.number, 0
			if r.Deny {
				s.Err = r.errno
			}
		}
		if s.Audit < verdict {
			s.Audit, s.AuditRule = verdict, r.number
		}
	}
	return s
}

func encodeSegs(segs []bpfobj.InlaySeg) string {
	if len(segs) > maxSegs {
		segs = segs[:maxSegs]
	}
	b := make([]byte, 0, len(segs)*16)
	for i := range segs {
		s := &segs[i]
		b = binary.NativeEndian.AppendUint16(b, s.Lo)
		b = binary.NativeEndian.AppendUint16(b, s.Hi)
		b = append(b, s.Action, s.Audit)
		b = binary.NativeEndian.AppendUint16(b, s.Err)
		b = binary.NativeEndian.AppendUint32(b, s.Rule)
		b = binary.NativeEndian.AppendUint32(b, s.AuditRule)
	}
	return string(b)
}

func decodeSegs(text string) (out bpfobj.InlayPortSet) {
	b := []byte(text)
	for ; len(b) >= 16 && int(out.N) < maxSegs; b = b[16:] {
		out.Segs[out.N] = bpfobj.InlaySeg{
			Lo: binary.NativeEndian.Uint16(b), Hi: binary.NativeEndian.Uint16(b[2:]),
			Action: b[4], Audit: b[5], Err: binary.NativeEndian.Uint16(b[6:]),
			Rule: binary.NativeEndian.Uint32(b[8:]), AuditRule: binary.NativeEndian.Uint32(b[12:]),
		}
		out.N++
	}
	return out
}
