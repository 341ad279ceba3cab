package node

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"time"
)

// answer is what a program says of one call. The question is a line of words: `tcp NET HOST PORT`
// connects, asks by HTTP/1.0 and reads the answer; `udp` sends one datagram on a socket that is not
// connected, `udpc` on one that is. NET is 4, 6, mapped (an IPv6 socket and an IPv4 address) or any.
type answer struct {
	Errno syscall.Errno `json:"errno"` // of the call that failed; ETIMEDOUT after 2 s
	Fault string        `json:"fault"` // what failed without a number
	Curl  int           `json:"curl"`  // curl's exit code
	Text  string        `json:"text"`  // what the server said
	Peer  string        `json:"peer"`  // getpeername(), or the source of the datagram
	Local string        `json:"local"` // getsockname()
	Nanos int64         `json:"nanos"` // of connect(), or of the exchange
	Count int64         `json:"count"`
}

// took is how long the call was.
func (a answer) took() time.Duration { return time.Duration(a.Nanos) }

// peer is where the program thinks to have called.
func (a answer) peer() netip.AddrPort { return address(a.Peer) }

func (a answer) local() netip.AddrPort { return address(a.Local) }

// address reads IP:PORT, :PORT of an address that is not known, or IP PORT as curl says it, and takes a
// mapped IPv4 address for what it is.
func address(s string) netip.AddrPort {
	if ip, port, ok := strings.Cut(s, " "); ok {
		a, err := netip.ParseAddr(ip)
		var p uint16
		if _, scan := fmt.Sscan(port, &p); err != nil || scan != nil {
			return netip.AddrPort{}
		}
		return netip.AddrPortFrom(a.Unmap(), p)
	}
	if strings.HasPrefix(s, ":") {
		s = "0.0.0.0" + s
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// ask has a program do something and gives what came of it.
func (p *proc) ask(words ...any) answer {
	p.t.Helper()
	line := strings.TrimSuffix(fmt.Sprintln(words...), "\n")
	p.asking.Lock()
	defer p.asking.Unlock()
	if _, err := fmt.Fprintln(p.stdin, line); err != nil {
		p.t.Fatalf("%s: %s: %v", p.name, line, err)
	}
	reply := p.reply()
	var a answer
	if err := json.Unmarshal([]byte(reply), &a); err != nil {
		p.t.Fatalf("%s: %s: %v in %q", p.name, line, err, reply)
	}
	return a
}

// soon is what the kernel needs at most for an answer of its own, with a machine that is busy with other
// things in mind: a SYN that is lost is sent again after 1 s.
const soon = 100 * time.Millisecond

// askSoon asks for what is refused at once. When the answer was late the question is asked again, at
// most twice: the machine is shared. It gives the fastest answer.
func (p *proc) askSoon(words ...any) answer {
	p.t.Helper()
	a := p.ask(words...)
	for range 2 {
		if a.took() <= soon {
			break
		}
		if again := p.ask(words...); again.took() < a.took() {
			a = again
		}
	}
	return a
}

// failed says in words how a call failed; empty when it did not.
func (a answer) failed() string {
	switch {
	case a.Errno != 0:
		return a.Errno.Error()
	case a.Curl != 0:
		return fmt.Sprintf("curl(%d): %s", a.Curl, a.Fault)
	}
	return a.Fault
}
