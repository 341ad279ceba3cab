package proxy

import (
	"encoding/binary"
	"errors"

	"github.com/miekg/dns"
)

// ttl of every answer about the mesh, negative ones too, in seconds: virtual addresses stay, but
// services come and go.
const ttl = 5

const (
	headerSize = 12
	// udpSize is what we say that we take by UDP, the size that needs no fragments (DNS flag day 2020).
	udpSize = 1232
)

// outcome is what becomes of one message.
type outcome struct {
	kind  outcomeKind
	reply []byte // of answered, refused, malformed (nil: dropped) and failed
	err   error  // of failed
	query query  // of forward
}

type outcomeKind int

const (
	answered outcomeKind = iota
	refused
	malformed
	failed
	forward
)

// query is a message that somebody else must answer.
type query struct {
	raw    []byte // as it came
	msg    *dns.Msg
	client Client
	tcp    bool
}

// asker finds out who asks; false says that no hook sent them here. It is called at most once a
// message, and only for one that needs it.
type asker func() (Client, bool, error)

// nameTable is Tables.Name.
type nameTable func(name string) (Addresses, bool, error)

// answer decides about one message. Nothing in it can panic, whatever the bytes are.
func answer(raw []byte, tcp bool, suffix string, who asker, names nameTable) outcome {
	// RFC 1035, section 4.1.1. A response is never answered, or two servers could keep each other busy.
	if len(raw) < headerSize || raw[2]&0x80 != 0 {
		return outcome{kind: malformed}
	}
	if opcode := int(raw[2]>>3) & 0xf; opcode != dns.OpcodeQuery {
		return outcome{kind: refused, reply: bare(raw, dns.RcodeNotImplemented)}
	}
	// RFC 9619, section 4: "A DNS message with OPCODE = 0 and QDCOUNT > 1 MUST be treated as an
	// incorrectly formatted message. The value of the RCODE parameter in the response message MUST be
	// set to 1 (FORMERR)." QDCOUNT 0 has a use for cookies alone (RFC 7873), which we do not give.
	if binary.BigEndian.Uint16(raw[4:]) != 1 {
		return outcome{kind: malformed, reply: bare(raw, dns.RcodeFormatError)}
	}
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil || len(m.Question) != 1 {
		return outcome{kind: malformed, reply: bare(raw, dns.RcodeFormatError)}
	}
	// RFC 6891, section 6.1.1: "If a query message with more than one OPT RR is received, a FORMERR
	// (RCODE=1) MUST be returned."
	opts := 0
	for _, rr := range m.Extra {
		if _, ok := rr.(*dns.OPT); ok {
			opts++
		}
	}
	if opts > 1 {
		return outcome{kind: malformed, reply: bare(raw, dns.RcodeFormatError)}
	}
	q := m.Question[0]
	switch q.Qtype {
	case dns.TypeAXFR, dns.TypeIXFR: // no zone of ours or of others is told whole
		return pack(refused, m, reply(m, dns.RcodeRefused), tcp)
	}
	client, sent, err := who()
	switch {
	case err != nil:
		return failure(m, err, tcp)
	case !sent:
		// Whoever found the port by itself is no workload of this node: neither the names of the mesh nor
		// the node's resolvers are theirs to ask here. RFC 8499, section 6: an open resolver "accepts and
		// processes DNS queries from any (or nearly any) client".
		return pack(refused, m, reply(m, dns.RcodeRefused), tcp)
	}
	l := plan(q.Name, suffix, or(client.Namespace, "default"))
	elsewhere := outcome{kind: forward, query: query{raw: raw, msg: m, client: client, tcp: tcp}}
	if q.Qclass != dns.ClassINET { // names of the mesh exist in the internet class only
		if l.ours {
			return pack(refused, m, reply(m, dns.RcodeRefused), tcp)
		}
		return elsewhere
	}
	var found Addresses
	exists := false
	for _, key := range l.keys {
		if found, exists, err = names(key); err != nil {
			return failure(m, err, tcp)
		}
		if exists {
			break
		}
	}
	if !exists && !l.ours {
		return elsewhere
	}
	// RFC 6891, section 6.1.3: "If a responder does not implement the VERSION level of the request,
	// then it MUST respond with RCODE=BADVERS."
	if o := m.IsEdns0(); o != nil && o.Version() != 0 {
		return pack(refused, m, reply(m, dns.RcodeBadVers), tcp)
	}
	return pack(answered, m, mesh(m, found, exists, l, suffix), tcp)
}

// mesh answers a question about a name of the mesh.
func mesh(m *dns.Msg, found Addresses, exists bool, l lookup, suffix string) *dns.Msg {
	q := m.Question[0]
	r := reply(m, dns.RcodeSuccess)
	r.Authoritative = true
	head := func(rrtype uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: ttl}
	}
	if (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY) && found.V4.IsValid() {
		r.Answer = append(r.Answer, &dns.A{Hdr: head(dns.TypeA), A: found.V4.AsSlice()})
	}
	if (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY) && found.V6.IsValid() {
		r.Answer = append(r.Answer, &dns.AAAA{Hdr: head(dns.TypeAAAA), AAAA: found.V6.AsSlice()})
	}
	zone := q.Name // a name that is shared with the world is a zone of its own
	if l.ours {
		zone = suffix + "."
	}
	soa := &dns.SOA{
		Hdr: dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttl},
		Ns:  "ns." + suffix + ".", Mbox: "hostmaster." + suffix + ".",
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: ttl,
	}
	switch {
	case l.apex && (q.Qtype == dns.TypeSOA || q.Qtype == dns.TypeANY && len(r.Answer) == 0):
		r.Answer = append(r.Answer, soa)
	case len(r.Answer) == 0:
		// RFC 2308, section 3: "Name servers authoritative for a zone MUST include the SOA record of
		// the zone in the authority section of the response when reporting an NXDOMAIN or indicating
		// that no data of the requested type exists."
		r.Ns = append(r.Ns, soa)
		if !exists && !l.apex {
			r.Rcode = dns.RcodeNameError
		}
	}
	return r
}

// reply is the answer to m without records. The question is as it came, upper and lower case too:
// some resolvers put randomness there.
func reply(m *dns.Msg, rcode int) *dns.Msg {
	r := new(dns.Msg)
	r.SetRcode(m, rcode)
	r.RecursionAvailable = true
	r.Compress = true
	if o := m.IsEdns0(); o != nil {
		// RFC 6891, section 6.1.1: "If an OPT record is present in a received request, compliant
		// responders MUST include an OPT record in their respective responses." RFC 3225, section 3:
		// "The DO bit of the query MUST be copied in the response."
		r.SetEdns0(udpSize, o.Do())
	}
	return r
}

func failure(m *dns.Msg, err error, tcp bool) outcome {
	out := pack(failed, m, reply(m, dns.RcodeServerFailure), tcp)
	out.err = errors.Join(err, out.err)
	return out
}

// pack encodes a reply so that it fits.
func pack(kind outcomeKind, m, r *dns.Msg, tcp bool) outcome {
	if !tcp {
		r.Truncate(clientSize(m))
	}
	b, err := r.Pack()
	if err != nil {
		return outcome{kind: failed, err: err}
	}
	return outcome{kind: kind, reply: b}
}

// clientSize is how large an answer by UDP may be. RFC 6891, section 6.2.3: "Values lower than 512
// MUST be treated as equal to 512."
func clientSize(m *dns.Msg) int {
	if o := m.IsEdns0(); o != nil {
		return max(dns.MinMsgSize, int(o.UDPSize()))
	}
	return dns.MinMsgSize
}

// bare is the header alone, for a message whose rest is not understood: id, opcode and the wish for
// recursion as they came.
func bare(raw []byte, rcode int) []byte {
	b := make([]byte, headerSize)
	copy(b, raw[:2])
	b[2] = 0x80 | raw[2]&0x79
	b[3] = 0x80 | byte(rcode)
	return b
}

// truncated is the reply that tells the client to ask again by TCP.
func truncated(m *dns.Msg) []byte {
	r := reply(m, dns.RcodeSuccess)
	r.Truncated = true
	b, err := r.Pack()
	if err != nil {
		return nil
	}
	return b
}

// matches reports whether a message is the answer to what was sent: by its id and its question,
// compared without case, since not every server keeps it. The source is the connection's matter.
func matches(sent *dns.Msg, id uint16, resp []byte) bool {
	if len(resp) < headerSize || binary.BigEndian.Uint16(resp) != id || resp[2]&0x80 == 0 || int(resp[2]>>3)&0xf != dns.OpcodeQuery {
		return false
	}
	switch binary.BigEndian.Uint16(resp[4:]) {
	case 0:
		// A server that could not read the question, or would not, may send its header alone.
		switch int(resp[3] & 0xf) {
		case dns.RcodeFormatError, dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
			return true
		}
		return false
	case 1:
	default:
		return false
	}
	name, off, err := dns.UnpackDomainName(resp, headerSize)
	if err != nil || off+4 > len(resp) {
		return false
	}
	q := sent.Question[0]
	return dns.CanonicalName(name) == dns.CanonicalName(q.Name) &&
		binary.BigEndian.Uint16(resp[off:]) == q.Qtype && binary.BigEndian.Uint16(resp[off+2:]) == q.Qclass
}
