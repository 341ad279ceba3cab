package node

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/net/dns/dnsmessage"
)

// goServer answers with its name, NODE_NAME, and the address that it sees: at NODE_TCP to connections
// and at NODE_UDP to datagrams. NODE_NETWORK is 4, 6 or empty for Go's own dual-stack listeners. Its
// order is `count`: how many connections and datagrams it answered.
func goServer() error {
	name, family := os.Getenv("NODE_NAME"), os.Getenv("NODE_NETWORK")
	var answered atomic.Int64
	if at := os.Getenv("NODE_TCP"); at != "" {
		l, err := net.Listen("tcp"+family, at)
		if err != nil {
			return err
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					if err := answerConn(c, name, &answered); err != nil {
						fmt.Fprintln(os.Stderr, "server:", err)
					}
				}()
			}
		}()
	}
	if at := os.Getenv("NODE_UDP"); at != "" {
		c, err := net.ListenPacket("udp"+family, at)
		if err != nil {
			return err
		}
		defer c.Close()
		go func() {
			b := make([]byte, 4096)
			for {
				_, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				answered.Add(1)
				_, _ = c.WriteTo([]byte(name+" "+from.String()), from) // its peer counts answers
			}
		}()
	}
	fmt.Println("ready")
	return orders(func(_ context.Context, words []string) answer {
		if words[0] != "count" {
			return answer{Fault: "order unknown"}
		}
		return answer{Count: answered.Load()}
	})
}

// answerConn serves one connection by its first line: GET, ECHO, or FILE BYTES.
func answerConn(c net.Conn, name string, answered *atomic.Int64) error {
	r := bufio.NewReader(c)
	first, err := r.ReadString('\n')
	if err != nil {
		return nil // it asked for nothing
	}
	answered.Add(1)
	switch words := strings.Fields(first); words[0] {
	case "GET":
		for line := first; strings.TrimSpace(line) != ""; {
			if line, err = r.ReadString('\n'); err != nil {
				return err
			}
		}
		body := name + " " + c.RemoteAddr().String() + "\n"
		_, err := fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		return err
	case "ECHO":
		_, err := io.Copy(c, r)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return err
	case "FILE":
		var n int64
		if _, err := fmt.Sscan(words[1], &n); err != nil {
			return err
		}
		f, err := os.CreateTemp("", "inlay-node-file-")
		if err != nil {
			return err
		}
		defer os.Remove(f.Name())
		defer f.Close()
		if err := f.Truncate(n); err != nil {
			return err
		}
		_, err = io.Copy(c, f) // by sendfile(2)
		return err
	}
	return fmt.Errorf("first line %q: want GET, ECHO or FILE", first)
}

// serveDNS is a resolver of the outside at NODE_UDP, which knows one name: what the mesh forwards to.
func serveDNS() error {
	c, err := net.ListenPacket("udp", os.Getenv("NODE_UDP"))
	if err != nil {
		return err
	}
	defer c.Close()
	var asked atomic.Int64
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			asked.Add(1)
			if out, err := outside(b[:n]); err == nil {
				_, _ = c.WriteTo(out, from) // whoever asked asks again
			}
		}
	}()
	fmt.Println("ready")
	return orders(func(context.Context, []string) answer { return answer{Count: asked.Load()} })
}

// outside answers a query: A of outside.example is 192.0.2.7, nothing else exists.
func outside(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	m.Response, m.RecursionAvailable = true, true
	m.Additionals = nil
	q := m.Questions[0]
	known := bytes.EqualFold([]byte(q.Name.String()), []byte("outside.example."))
	switch {
	case !known:
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
			Body:   &dnsmessage.AResource{A: [4]byte{192, 0, 2, 7}},
		}}
	}
	return m.Pack()
}
