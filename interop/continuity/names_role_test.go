package continuity

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// lookup asks a resolver once, without another try, so that each lost query is seen.
func (r *running) lookup(ctx context.Context, i int) error {
	network := strings.TrimPrefix(r.Kind, "dns-")
	var d net.Dialer
	c, err := d.DialContext(ctx, network, r.target(i))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	name, err := dnsmessage.NewName(r.Question + ".")
	if err != nil {
		return err
	}
	q := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: uint16(i), RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	raw, err := q.Pack()
	if err != nil {
		return err
	}
	answer, err := exchange(c, network, raw)
	if err != nil {
		return err
	}
	var m dnsmessage.Message
	if err := m.Unpack(answer); err != nil {
		return err
	}
	if m.ID != q.ID || !m.Response {
		return fmt.Errorf("answer with id %d, response %v", m.ID, m.Response)
	}
	if m.RCode != dnsmessage.RCodeSuccess {
		return errors.New(m.RCode.String())
	}
	for _, a := range m.Answers {
		if a, ok := a.Body.(*dnsmessage.AResource); ok {
			if got := netip.AddrFrom4(a.A).String(); got != r.Want {
				return fmt.Errorf("%s has the address %s", r.Question, got)
			}
			return nil
		}
	}
	return errors.New("no address in the answer")
}

func exchange(c net.Conn, network string, q []byte) ([]byte, error) {
	if network == "tcp" { // RFC 1035, 4.2.2: a two byte length field
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)); err != nil {
			return nil, err
		}
		head := make([]byte, 2)
		if _, err := io.ReadFull(c, head); err != nil {
			return nil, err
		}
		b := make([]byte, binary.BigEndian.Uint16(head))
		_, err := io.ReadFull(c, b)
		return b, err
	}
	if _, err := c.Write(q); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	n, err := c.Read(b)
	return b[:n], err
}

// Where the real resolver of the machine listens, and what it answers: every name outside of the mesh has
// one address, and names of the mesh do not exist.
const (
	outsideName = "www.example.com"
	outsideAddr = "192.0.2.80"
)

// resolver is the real resolver: a process outside of the mesh (the test itself).
type resolver struct {
	addr  string
	mu    sync.Mutex
	asked map[string]int // by name
}

// resolver starts the real resolver of a mesh, which serves until the end of the test.
func (m *mesh) resolver() *resolver {
	t := m.t
	t.Helper()
	r := &resolver{addr: fmt.Sprintf("127.0.%d.53:53", m.number), asked: map[string]int{}}
	u, err := net.ListenPacket("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = u.Close()
		_ = l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		b := make([]byte, 4096)
		for {
			n, from, err := u.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = u.WriteTo(r.answer(b[:n]), from) // who asked may be gone
			}
		}
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(tryTime))
				head := make([]byte, 2)
				for {
					if _, err := io.ReadFull(c, head); err != nil {
						return
					}
					b := make([]byte, binary.BigEndian.Uint16(head))
					if _, err := io.ReadFull(c, b); err != nil {
						return
					}
					a := r.answer(b)
					if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...)); err != nil {
						return
					}
				}
			})
		}
	})
	return r
}

func (r *resolver) answer(q []byte) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(q); err != nil || len(m.Questions) != 1 {
		return nil
	}
	name := strings.ToLower(m.Questions[0].Name.String())
	r.mu.Lock()
	r.asked[name]++
	r.mu.Unlock()
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	if strings.HasSuffix(name, ".example.com.") {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 1},
			Body:   &dnsmessage.AResource{A: netip.MustParseAddr(outsideAddr).As4()},
		}}
	} else {
		m.RCode = dnsmessage.RCodeNameError
	}
	b, _ := m.Pack() // what was unpacked
	return b
}

// times is how often a name was asked.
func (r *resolver) times(name string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked[name+"."]
}
