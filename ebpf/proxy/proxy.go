// Package proxy is the node's DNS process: it gives programs that do not link the SDK the names of
// the mesh, whatever resolver they were told to use.
//
// `inlay node proxy` calls Run, one process a network namespace. It holds the sockets and nothing
// else of worth, so it outlives the agent: it reads the pinned maps that the agent fills and
// answers from them, and forwards every other name to the resolver that the program meant. The
// agent calls Ensure from time to time, which starts a process where none answers and lets a new
// version take the sockets of an old one over without losing a query. Its heartbeat, in the map
// dns_proxies, is what makes the hooks send port 53 here; when it stops, they stop by themselves.
//
// It never caches, never changes what it forwards, never writes a map other than dns_proxies,
// listens on loopback only, and answers nobody but the workloads that the hooks sent.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Clock tells the time and calls back later.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// Config is what a proxy needs.
type Config struct {
	// Maps are the pinned maps, opened by the caller (load.OpenMaps), who closes them after Run.
	// Used are names, workloads, dns_clients and dns_proxies. Required unless Tables is set.
	Maps *bpfobj.InlayMaps
	// Tables takes the place of Maps where there is no kernel to ask.
	Tables Tables
	// Socket is the path of the control socket, at most 107 bytes. Its directory must exist and
	// belong to the user of this process. Beside it lies Socket.lock. Required.
	Socket string
	// Listen4 and Listen6 are where a proxy that takes over nobody's sockets listens, on UDP and TCP
	// alike: loopback addresses, port 0 for any. Empty means 127.0.0.1:0 and [::1]:0. IPv6 is left
	// out, with a warning, on a machine that has none.
	Listen4, Listen6 string
	// Suffix is the mesh's own, in which NAME.NAMESPACE.Suffix resolves. Empty means "mesh"; "local"
	// belongs to multicast DNS (RFC 6762, section 3) and is refused.
	Suffix string
	// Upstreams are asked when it is not known which resolver a program meant. Empty means the
	// nameservers of ResolvConf, read again when the file changes.
	Upstreams []netip.AddrPort
	// ResolvConf is empty for /etc/resolv.conf.
	ResolvConf string
	// Version is told in Status; Ensure replaces a process of another one.
	Version string
	// MaxInFlight bounds how many forwarded queries wait for an answer at once; the queries of one
	// workload may take half of it. What finds no room is answered SERVFAIL. Zero means 512.
	MaxInFlight int
	// MaxConns bounds accepted TCP connections; one more is closed at once. Those of one workload may
	// be half of it. Zero means 256.
	MaxConns int
	// Ready is called once, when the process serves and its first heartbeat is written. Nil is fine.
	Ready func(Status)
	// Dial makes connections to resolvers. Nil is a net.Dialer; on a connection of "udp" each Read
	// must give one datagram.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// ID makes the ids of forwarded queries, which must not be guessed. Nil is dns.Id.
	ID    func() uint16
	Clock Clock        // nil is the machine's
	Log   *slog.Logger // nil discards
}

// Times of the protocol with the hooks and with resolvers.
const (
	// HeartbeatEvery is how often the entry in dns_proxies is written; the hooks take one older than
	// two seconds for that of a dead proxy.
	HeartbeatEvery = 250 * time.Millisecond
	// tryTime is how long one try at one resolver may take.
	tryTime = 2 * time.Second
	// idleTime is how long a TCP connection may be silent. RFC 7766, section 6.2.3: "It is
	// RECOMMENDED that the default server application-level idle period be on the order of seconds".
	idleTime = 10 * time.Second
	// lingerTime is how long a process that was stopped still reads what programs sent before they
	// knew.
	lingerTime = 100 * time.Millisecond
	// drainTime bounds how long a process that was stopped waits for answers under way.
	drainTime = 3 * tryTime
	// leaveTime bounds how long a process that gave its sockets away serves the TCP connections it
	// has: they cannot be passed on with half a query read.
	leaveTime = 30 * time.Second
)

func (c *Config) withDefaults() error {
	var errs []error
	if c.Tables == nil {
		t, err := FromMaps(c.Maps)
		if err != nil {
			errs = append(errs, err)
		}
		c.Tables = t
	}
	if err := checkSocket(c.Socket); err != nil {
		errs = append(errs, err)
	}
	c.Listen4 = or(c.Listen4, "127.0.0.1:0")
	c.Listen6 = or(c.Listen6, "[::1]:0")
	errs = append(errs, checkListen(c.Listen4, true), checkListen(c.Listen6, false))
	suffix, err := ParseSuffix(or(c.Suffix, "mesh"))
	c.Suffix = suffix
	errs = append(errs, err)
	for _, u := range c.Upstreams {
		if !u.IsValid() || u.Port() == 0 || u.Addr().IsUnspecified() {
			errs = append(errs, fmt.Errorf("upstream %s: want an address and a port other than 0", u))
		}
	}
	if c.MaxInFlight < 0 || c.MaxConns < 0 {
		errs = append(errs, fmt.Errorf("bounds %d in flight, %d connections: want 0 for the default, or more", c.MaxInFlight, c.MaxConns))
	}
	c.ResolvConf = or(c.ResolvConf, "/etc/resolv.conf")
	c.MaxInFlight = or(c.MaxInFlight, 512)
	c.MaxConns = or(c.MaxConns, 256)
	if c.Dial == nil {
		c.Dial = new(net.Dialer).DialContext
	}
	if c.ID == nil {
		c.ID = dns.Id
	}
	if c.Clock == nil {
		c.Clock = realClock{}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// ParseSuffix checks the suffix of the mesh's names and returns it in lower case, without dots at
// its ends.
func ParseSuffix(s string) (string, error) {
	suffix := strings.ToLower(strings.Trim(s, "."))
	labels := strings.Split(suffix, ".")
	switch {
	// RFC 6762, section 3: "any DNS query for a name ending with '.local.' MUST be sent to the mDNS
	// IPv4 link-local multicast address". Programs would not ask us.
	case labels[len(labels)-1] == "local":
		return "", fmt.Errorf("suffix %q: .local belongs to multicast DNS, programs do not ask a DNS server for it: want another, such as mesh", s)
	case labels[len(labels)-1] == "localhost":
		return "", fmt.Errorf("suffix %q: .localhost is always the machine itself: want another, such as mesh", s)
	case len(suffix) > 63:
		return "", fmt.Errorf("suffix %q: %d bytes: want at most 63", s, len(suffix))
	}
	for _, l := range labels {
		if !isLabel(l) || l[0] == '-' || l[0] == '_' {
			return "", fmt.Errorf("suffix %q: want labels of letters, digits and hyphens, separated by dots, such as mesh", s)
		}
	}
	return suffix, nil
}

func checkSocket(path string) error {
	switch {
	case path == "":
		return errors.New("control socket: no path: want one below the run directory")
	case !filepath.IsAbs(path):
		return fmt.Errorf("control socket %q: want an absolute path", path)
	case len(path) > 107: // sun_path of unix(7), with its NUL
		return fmt.Errorf("control socket %q: %d bytes: the kernel takes at most 107; use a shorter run directory", path, len(path))
	}
	return nil
}

func checkListen(addr string, v4 bool) error {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return fmt.Errorf("listen address %q: %w: want ADDRESS:PORT", addr, err)
	}
	if !a.Addr().IsLoopback() || a.Addr().Is4() != v4 {
		want := "an IPv4 loopback address such as 127.0.0.1:0"
		if !v4 {
			want = "[::1] with a port, such as [::1]:0"
		}
		return fmt.Errorf("listen address %q: only programs of this machine are answered: want %s", addr, want)
	}
	return nil
}

// Status is what a proxy says of itself. Counts are since the process started.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// Suffix without dots at its ends.
	Suffix string `json:"suffix"`
	// Netns is the cookie of the network namespace.
	Netns uint64 `json:"netns"`
	// MapID is the kernel's number of dns_proxies, which tells the maps of one pin directory from
	// those of another; 0 without maps.
	MapID uint32 `json:"mapId,omitempty"`
	// Addresses that it listens on, UDP and TCP alike, IPv4 first.
	Addresses []netip.AddrPort `json:"addresses"`
	// Upstreams that are asked when it is not known whom the program meant.
	Upstreams []netip.AddrPort `json:"upstreams"`

	// Queries that were received and well formed; each is also Answered from the mesh, Forwarded or
	// Refused (by form: opcode, class, zone transfer; or because no hook had sent who asked).
	Queries   uint64 `json:"queries"`
	Answered  uint64 `json:"answered"`
	Forwarded uint64 `json:"forwarded"`
	Refused   uint64 `json:"refused"`
	// Failed are forwarded queries that no resolver answered, and names whose maps could not be read.
	Failed uint64 `json:"failed"`
	// Shed are forwarded queries for which there was no room, and TCP connections closed for the same.
	Shed uint64 `json:"shed"`
	// Looped are queries that this process had sent itself.
	Looped uint64 `json:"looped"`
	// Malformed messages: dropped, or answered FORMERR where they had a header.
	Malformed uint64 `json:"malformed"`
	// BeatsFailed are heartbeats that could not be written.
	BeatsFailed uint64 `json:"beatsFailed"`
}
