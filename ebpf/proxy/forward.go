package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"github.com/miekg/dns"
)

// maxTries bounds how many resolvers one query is sent to, as the C library's MAXNS does.
const maxTries = 3

// forwarder asks resolvers. It is safe for concurrent use.
type forwarder struct {
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	id        func() uint16
	clock     Clock
	upstreams func() []netip.AddrPort
	own       []netip.AddrPort // our listeners, which are never asked
	max       int

	mu       sync.Mutex
	inFlight int
	share    map[uint64]int // of inFlight, by cgroup
	sources  map[source]int // where queries under way are sent from
}

type source struct {
	addr netip.AddrPort
	tcp  bool
}

func newForwarder(cfg Config, upstreams func() []netip.AddrPort, own []netip.AddrPort) *forwarder {
	return &forwarder{
		dial: cfg.Dial, id: cfg.ID, clock: cfg.Clock, upstreams: upstreams, own: own, max: cfg.MaxInFlight,
		share: map[uint64]int{}, sources: map[source]int{},
	}
}

// acquire reports whether one more query of a workload may be under way; each true needs one release.
func (f *forwarder) acquire(cgroup uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	// One workload must not be able to take the names of the others away.
	if f.inFlight >= f.max || f.share[cgroup] >= max(1, f.max/2) {
		return false
	}
	f.inFlight++
	f.share[cgroup]++
	return true
}

func (f *forwarder) release(cgroup uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inFlight--
	if f.share[cgroup]--; f.share[cgroup] == 0 {
		delete(f.share, cgroup)
	}
}

// sent reports whether a query that came from addr is one that this process sent: the hooks
// redirect it when somebody started the process inside a managed cgroup.
func (f *forwarder) sent(addr netip.AddrPort, tcp bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sources[source{addr, tcp}] > 0
}

// resolvers are whom a query is sent to, in turn. A program that chose a resolver gets that one's
// word and nobody else's, twice, in the five seconds that the C library waits.
func resolvers(chosen netip.AddrPort, upstreams func() []netip.AddrPort, own []netip.AddrPort) []netip.AddrPort {
	isOwn := func(a netip.AddrPort) bool {
		for _, o := range own {
			if mapped(a) == o {
				return true
			}
		}
		return false
	}
	if chosen.IsValid() && !isOwn(chosen) {
		return []netip.AddrPort{chosen, chosen}
	}
	var to []netip.AddrPort
	for _, u := range upstreams() {
		if !isOwn(u) && len(to) < maxTries {
			to = append(to, u)
		}
	}
	if len(to) == 1 {
		to = append(to, to[0])
	}
	return to
}

// ask returns the answer of a resolver under the id of the query, as it came but for that. It
// takes at most tryTime for each of at most maxTries resolvers.
func (f *forwarder) ask(ctx context.Context, q query) ([]byte, error) {
	to := resolvers(q.client.Resolver, f.upstreams, f.own)
	if len(to) == 0 {
		return nil, errors.New("no resolver to ask: want a nameserver in resolv.conf that is not this proxy")
	}
	var errs []error
	var last []byte
	for i, r := range to {
		resp, err := f.try(ctx, r, q)
		if err != nil {
			errs = append(errs, fmt.Errorf("resolver %s: %w", r, err))
			if ctx.Err() != nil {
				break
			}
			continue
		}
		copy(resp, q.raw[:2])
		last = resp
		// Another resolver of the node may know better than one that has trouble.
		if trouble(resp) && i+1 < len(to) && to[i+1] != r {
			continue
		}
		return resp, nil
	}
	if last != nil {
		return last, nil
	}
	return nil, errors.Join(errs...)
}

func trouble(resp []byte) bool {
	switch int(resp[3] & 0xf) {
	case dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
		return true
	}
	return false
}

// try asks one resolver, by TCP when the program asked by TCP or the answer was cut.
func (f *forwarder) try(ctx context.Context, to netip.AddrPort, q query) ([]byte, error) {
	if q.tcp {
		return f.exchange(ctx, to, q, true)
	}
	resp, err := f.exchange(ctx, to, q, false)
	if err != nil {
		return nil, err
	}
	size := clientSize(q.msg)
	if cut := resp[2]&0x02 != 0; cut && size > dns.MinMsgSize {
		// Some servers cut at less than the program takes; then its own try by TCP is spared.
		if whole, err := f.exchange(ctx, to, q, true); err == nil && len(whole) <= size {
			return whole, nil
		}
	}
	if len(resp) > size {
		return truncated(q.msg), nil
	}
	return resp, nil
}

// exchange sends the query over a connection of its own, whose port the kernel picks at random, and
// returns the first message that answers it.
func (f *forwarder) exchange(ctx context.Context, to netip.AddrPort, q query, tcp bool) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	network := "udp"
	if tcp {
		network = "tcp"
	}
	conn, err := f.dial(ctx, network, to.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(f.clock.Now()) }) // a cut exchange fails by it
	defer stop()
	defer f.remember(conn, tcp)()

	id := f.id()
	msg := framed(q.raw)
	binary.BigEndian.PutUint16(msg[2:], id)
	if !tcp {
		msg = msg[2:]
	}
	if _, err := conn.Write(msg); err != nil {
		return nil, cause(ctx, err)
	}
	for {
		resp, err := receive(conn, clientSize(q.msg), tcp)
		if err != nil {
			return nil, cause(ctx, err)
		}
		if matches(q.msg, id, resp) {
			return resp, nil
		}
		// By UDP it may be forged or late: the true one may still come. A TCP stream has one author.
		if tcp {
			return nil, errors.New("the answer is to another question")
		}
	}
}

// receive reads one message: by TCP what follows its two bytes of length, else a datagram, of which
// it returns at most one byte more than size.
func receive(r io.Reader, size int, tcp bool) ([]byte, error) {
	if tcp {
		return readFramed(r)
	}
	buf := make([]byte, size+1)
	n, err := r.Read(buf)
	return buf[:n], err
}

// readFramed reads a message of a stream. RFC 1035, section 4.2.2: "The message is prefixed with a
// two byte length field which gives the message length, excluding the two byte length field."
func readFramed(r io.Reader) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(head[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}

// framed is a message as a stream carries it, in one piece. It must not be longer than 65535 bytes.
func framed(msg []byte) []byte {
	b := make([]byte, 2, 2+len(msg))
	binary.BigEndian.PutUint16(b, uint16(len(msg)))
	return append(b, msg...)
}

// remember keeps where conn sends from until the returned function is called.
func (f *forwarder) remember(conn net.Conn, tcp bool) (forget func()) {
	addr, ok := addrPort(conn.LocalAddr())
	if !ok {
		return func() {}
	}
	key := source{addr, tcp}
	f.mu.Lock()
	f.sources[key]++
	f.mu.Unlock()
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.sources[key]--; f.sources[key] == 0 {
			delete(f.sources, key)
		}
	}
}

func addrPort(a net.Addr) (netip.AddrPort, bool) {
	switch a := a.(type) {
	case *net.UDPAddr:
		return mapped(a.AddrPort()), true
	case *net.TCPAddr:
		return mapped(a.AddrPort()), true
	}
	return netip.AddrPort{}, false
}

// mapped is the one form in which addresses of clients and listeners are compared.
func mapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("no answer in %v", tryTime)
	}
	return err
}
