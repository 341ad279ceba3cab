package proxy

import (
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// upstreams are the resolvers of the node. list is safe for concurrent use and reads a file at most
// once a second.
type upstreams struct {
	fixed []netip.AddrPort // when not empty, no file is read
	path  string
	clock Clock
	log   *slog.Logger

	mu      sync.Mutex
	asked   bool
	checked time.Time // when the file was last looked at
	seen    fs.FileInfo
	servers []netip.AddrPort
}

const checkEvery = time.Second

func (u *upstreams) list() []netip.AddrPort {
	if len(u.fixed) > 0 {
		return u.fixed
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.clock.Now()
	if u.asked && now.Sub(u.checked) < checkEvery {
		return u.servers
	}
	u.checked = now
	info, err := os.Stat(u.path)
	if err == nil && u.seen != nil && os.SameFile(info, u.seen) && info.ModTime().Equal(u.seen.ModTime()) && info.Size() == u.seen.Size() {
		return u.servers
	}
	servers, err := u.read()
	if err != nil {
		if !u.asked || u.seen != nil {
			u.log.Warn("resolver file unreadable", "path", u.path, "err", err, "upstreams", u.servers)
		}
		u.seen = nil
		if u.asked { // the last known ones serve on
			return u.servers
		}
		servers = nobody
	} else {
		u.seen = info
	}
	u.asked, u.servers = true, servers
	u.log.Info("resolvers read", "path", u.path, "upstreams", servers)
	return servers
}

func (u *upstreams) read() ([]netip.AddrPort, error) {
	f, err := os.Open(u.path)
	if errors.Is(err, fs.ErrNotExist) && !u.asked {
		return nobody, err
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseResolvConf(f)
}

// nobody is the list of a machine without nameservers. resolv.conf(5): "If no nameserver entries are
// present, the default is to use the name server on the local machine."
var nobody = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53)}

// parseResolvConf returns the nameservers of a resolv.conf(5) in their order; those that are no
// addresses are passed over, as the C library does.
func parseResolvConf(r io.Reader) ([]netip.AddrPort, error) {
	c, err := dns.ClientConfigFromReader(r)
	if err != nil {
		return nil, err
	}
	var all []netip.AddrPort
	for _, s := range c.Servers {
		a, err := netip.ParseAddr(strings.TrimSpace(s))
		if err != nil {
			continue
		}
		if a.IsUnspecified() { // as for the C library: this machine
			a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		all = append(all, netip.AddrPortFrom(a, 53))
	}
	if len(all) == 0 {
		return nobody, nil
	}
	return all, nil
}
