package load

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// A caller tells each round it has made by a line "round"; wait lets it make n more.
func (p *prober) wait(n int) {
	p.t.Helper()
	for range n {
		if _, err := io.WriteString(p.stdin, "."); err != nil {
			p.t.Fatal(err)
		}
	}
	for range n {
		if got := p.line(); got != "round" {
			p.t.Fatalf("%q, want a round", got)
		}
	}
}

func init() {
	// A server echoes one byte at a time.
	roles["server"] = func() error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		fmt.Println(l.Addr())
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); io.Copy(c, c) }()
			}
		}()
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	}
	// A round of a caller is an echo over a connection of its own, and one over the first, which it keeps.
	roles["caller"] = func() error {
		long, err := net.Dial("tcp", os.Getenv("INLAY_LOAD_ARGS"))
		if err != nil {
			return err
		}
		defer long.Close()
		return rounds(func() (bad int) {
			c, err := net.DialTimeout("tcp", long.RemoteAddr().String(), 2*time.Second)
			if err == nil {
				err = echo(c)
				c.Close()
			}
			for _, err := range []error{err, echo(long)} {
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					bad++
				}
			}
			return bad
		})
	}
	// A stranger's round is wrong when it connects.
	roles["stranger"] = func() error {
		return rounds(func() int {
			c, err := net.DialTimeout("tcp", os.Getenv("INLAY_LOAD_ARGS"), 50*time.Millisecond)
			if err != nil {
				return 0
			}
			c.Close()
			return 1
		})
	}
}

// rounds runs without a pause, tells a round for each byte of its input, and the sum at its end.
func rounds(round func() (bad int)) error {
	asked, end := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(end)
		in := bufio.NewReader(os.Stdin)
		for {
			if _, err := in.ReadByte(); err != nil {
				return
			}
			asked <- struct{}{}
		}
	}()
	n, bad := 0, 0
	for {
		bad += round()
		if n++; n == 1 {
			fmt.Println("round")
		}
		select {
		case <-asked:
			fmt.Println("round")
		case <-end:
			fmt.Println(n, bad)
			return nil
		default:
		}
	}
}

func echo(c net.Conn) error {
	c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Write([]byte{7}); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}
