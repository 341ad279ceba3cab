package query

import (
	"net/netip"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// kind says what values a field has, and so which operators it takes.
type kind int

const (
	kindText     kind = iota // any text
	kindWord                 // one of a fixed set
	kindPeer                 // NAME or NAME.NAMESPACE
	kindNumber               // plain numbers
	kindBytes                // numbers with k, M, G (thousands) or Ki, Mi, Gi
	kindDuration             // 5ms, 1.5s
	kindErrno                // a number or a name
	kindAddress              // an IP or a range of them
	kindBool
)

func (k kind) operators() []string {
	switch k {
	case kindText, kindPeer, kindWord:
		return []string{"=", "!=", "~", "!~", "in"}
	case kindNumber, kindBytes, kindDuration:
		return []string{"=", "!=", "<", "<=", ">", ">=", "in"}
	case kindErrno, kindAddress:
		return []string{"=", "!=", "in"}
	}
	return []string{"=", "!="}
}

// accepts says in words which values a field of the kind takes.
func (k kind) accepts() string {
	switch k {
	case kindPeer:
		return "NAME, NAME.NAMESPACE, host, world, agent or unknown"
	case kindNumber:
		return "a whole number"
	case kindBytes:
		return "a number of bytes: 1500, 10k, 1.5M, 4Ki"
	case kindDuration:
		return "a duration: 5ms, 1.5s, 2m"
	case kindErrno:
		return "a number or one of " + strings.Join(errnoNames(), ", ")
	case kindAddress:
		return "an IP address or a range: 10.0.0.1, 10.0.0.0/8, fd00::/8"
	case kindBool:
		return "true or false, or the field alone"
	}
	return "text"
}

// field is one thing that a query can ask of a flow. Exactly one getter is set, by kind. A getter
// returns every value the flow has for the field: a comparison holds when it holds for any.
type field struct {
	name  string
	help  string
	kind  kind
	words []string // of kindWord

	texts     func(*nodepb.Flow) []string
	numbers   func(*nodepb.Flow) []int64
	addresses func(*nodepb.Flow) []netip.Addr
	flag      func(*nodepb.Flow) bool
}

// Field describes a field to people.
type Field struct {
	Name      string
	Help      string
	Accepts   string   // which values
	Operators []string // `in` includes `not in`
}

// Fields returns every field in the order in which help texts show them.
func Fields() []Field {
	out := make([]Field, 0, len(fields))
	for _, f := range fields {
		a := f.kind.accepts()
		if f.kind == kindWord {
			a = strings.Join(f.words, ", ")
		}
		out = append(out, Field{Name: f.name, Help: f.help, Accepts: a, Operators: f.kind.operators()})
	}
	return out
}

const labelMark = ".label."

var fields = []field{
	{name: "from", help: "who opened the connection", kind: kindPeer, texts: one(func(f *nodepb.Flow) string { return f.GetFrom().GetName() })},
	{name: "to", help: "who was called", kind: kindPeer, texts: one(func(f *nodepb.Flow) string { return f.GetTo().GetName() })},
	{name: "service", help: "either end", kind: kindPeer, texts: func(f *nodepb.Flow) []string {
		return []string{f.GetFrom().GetName(), f.GetTo().GetName()}
	}},
	{name: "from.ns", help: "namespace of the caller", kind: kindText, texts: func(f *nodepb.Flow) []string { return namespace(f.GetFrom()) }},
	{name: "to.ns", help: "namespace of the called", kind: kindText, texts: func(f *nodepb.Flow) []string { return namespace(f.GetTo()) }},
	{name: "from.label.KEY", help: "a label of the caller", kind: kindText},
	{name: "to.label.KEY", help: "a label of the called", kind: kindText},
	{name: "port", help: "port that was asked for, or that the called listens on", kind: kindNumber, numbers: func(f *nodepb.Flow) []int64 {
		return ports(f.GetServiceAddress(), f.GetTo().GetAddress())
	}},
	{name: "from.port", help: "port of the caller", kind: kindNumber, numbers: func(f *nodepb.Flow) []int64 { return ports(f.GetFrom().GetAddress()) }},
	{name: "to.port", help: "port that the called listens on", kind: kindNumber, numbers: func(f *nodepb.Flow) []int64 { return ports(f.GetTo().GetAddress()) }},
	{name: "address", help: "of either end, or the service address that was asked for", kind: kindAddress, addresses: func(f *nodepb.Flow) []netip.Addr {
		return addresses(f.GetFrom().GetAddress(), f.GetTo().GetAddress(), f.GetServiceAddress())
	}},
	{name: "from.address", help: "of the caller", kind: kindAddress, addresses: func(f *nodepb.Flow) []netip.Addr { return addresses(f.GetFrom().GetAddress()) }},
	{name: "to.address", help: "of the called", kind: kindAddress, addresses: func(f *nodepb.Flow) []netip.Addr { return addresses(f.GetTo().GetAddress()) }},
	{name: "protocol", help: "above IP", kind: kindWord, words: []string{"tcp", "udp", "icmp"}, texts: one((*nodepb.Flow).GetProtocol)},
	{name: "direction", help: "seen from the workload of this node", kind: kindWord, words: []string{"egress", "ingress"}, texts: one((*nodepb.Flow).GetDirection)},
	{name: "verdict", help: "what was decided", kind: kindWord, words: []string{"allowed", "denied", "audited"}, texts: one((*nodepb.Flow).GetVerdict)},
	{name: "kind", help: "what the record tells", kind: kindWord, words: []string{"close", "sample", "denied", "audit"}, texts: one((*nodepb.Flow).GetKind)},
	{name: "reason", help: "why it ended so", kind: kindText, texts: one((*nodepb.Flow).GetReason)},
	{name: "policy", help: "NAMESPACE/NAME of the policy that decided", kind: kindText, texts: one((*nodepb.Flow).GetPolicy)},
	{name: "rule", help: "name of its rule", kind: kindText, texts: one((*nodepb.Flow).GetRule)},
	{name: "bytes", help: "sent and received together", kind: kindBytes, numbers: func(f *nodepb.Flow) []int64 {
		return []int64{clamp(f.GetBytesSent() + min(f.GetBytesReceived(), ^f.GetBytesSent()))}
	}},
	{name: "sent", help: "bytes that the workload of this node sent", kind: kindBytes, numbers: func(f *nodepb.Flow) []int64 { return []int64{clamp(f.GetBytesSent())} }},
	{name: "received", help: "bytes that it received", kind: kindBytes, numbers: func(f *nodepb.Flow) []int64 { return []int64{clamp(f.GetBytesReceived())} }},
	{name: "retransmits", help: "segments that it sent again", kind: kindNumber, numbers: func(f *nodepb.Flow) []int64 { return []int64{int64(f.GetRetransmits())} }},
	{name: "rtt", help: "smoothed round trip time; flows without one match no comparison but !=", kind: kindDuration, numbers: func(f *nodepb.Flow) []int64 { return duration(f.GetRtt()) }},
	{name: "duration", help: "of the connection; refused ones have none", kind: kindDuration, numbers: func(f *nodepb.Flow) []int64 { return duration(f.GetDuration()) }},
	{name: "reset", help: "the connection ended by a reset", kind: kindBool, flag: (*nodepb.Flow).GetReset_},
	{name: "before_agent", help: "the connection is older than the agent", kind: kindBool, flag: (*nodepb.Flow).GetBeforeAgent},
	{name: "errno", help: "that the refused call returned; 0 for none", kind: kindErrno, numbers: func(f *nodepb.Flow) []int64 { return []int64{int64(f.GetErrno())} }},
}

func one(get func(*nodepb.Flow) string) func(*nodepb.Flow) []string {
	return func(f *nodepb.Flow) []string { return []string{get(f)} }
}

// namespace of a workload; host, world and the like have none.
func namespace(p *nodepb.FlowPeer) []string {
	if _, ns, ok := strings.Cut(p.GetName(), "."); ok {
		return []string{ns}
	}
	return nil
}

func label(peer func(*nodepb.Flow) *nodepb.FlowPeer, key string) func(*nodepb.Flow) []string {
	return func(f *nodepb.Flow) []string {
		if v, ok := peer(f).GetLabels()[key]; ok {
			return []string{v}
		}
		return nil
	}
}

// ports of texts that are IP:PORT or :PORT.
func ports(texts ...string) []int64 {
	var out []int64
	for _, t := range texts {
		i := strings.LastIndexByte(t, ':')
		if i < 0 {
			continue
		}
		if n, err := strconv.ParseUint(t[i+1:], 10, 16); err == nil {
			out = append(out, int64(n))
		}
	}
	return out
}

func addresses(texts ...string) []netip.Addr {
	var out []netip.Addr
	for _, t := range texts {
		if ap, err := netip.ParseAddrPort(t); err == nil {
			out = append(out, ap.Addr().Unmap())
		} else if a, err := netip.ParseAddr(t); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

func duration(d *durationpb.Duration) []int64 {
	if d == nil {
		return nil
	}
	return []int64{int64(d.AsDuration())}
}

func clamp(n uint64) int64 { return int64(min(n, 1<<63-1)) }

// findField returns the field that t names, or an error with the nearest one.
func findField(t token) (field, error) {
	name := strings.ToLower(t.text)
	for _, f := range fields {
		if f.name == name {
			return f, nil
		}
	}
	for side, peer := range map[string]func(*nodepb.Flow) *nodepb.FlowPeer{"from": (*nodepb.Flow).GetFrom, "to": (*nodepb.Flow).GetTo} {
		prefix := side + labelMark
		if len(t.text) < len(prefix) || !strings.EqualFold(t.text[:len(prefix)], prefix) {
			continue
		}
		key := t.text[len(prefix):] // keys of labels are told apart by case
		if key == "" {
			return field{}, t.fault("%s without a key: want %sKEY, as in %sversion=v2", t.text, prefix, prefix)
		}
		return field{name: prefix + key, kind: kindText, texts: label(peer, key)}, nil
	}
	if n := nearest(name); n != "" {
		return field{}, t.fault("unknown field %q: did you mean %s?", t.text, n)
	}
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	return field{}, t.fault("unknown field %q: want one of %s", t.text, strings.Join(names, ", "))
}

// nearest returns the field whose name is closest to name, or "" when none is close.
func nearest(name string) string {
	best, at := "", min(3, len(name)/2+1) // as many edits are too many
	for _, f := range fields {
		if d := distance(name, f.name); d < at {
			best, at = f.name, d
		}
	}
	return best
}

// distance is the number of insertions, deletions, changes and swaps of neighbours between a and
// b (optimal string alignment).
func distance(a, b string) int {
	if len(a) > 32 {
		return len(a)
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			d := min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[i-2][j-2]+1)
			}
			rows[i][j] = d
		}
	}
	return rows[len(a)][len(b)]
}
