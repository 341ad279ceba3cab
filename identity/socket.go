package identity

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
)

// runHint is what a user does about a process that has no identity.
const runHint = "start the program with: inlay run --service NAME -- CMD"

// ParseSocket reads the address of a Workload API: a URI as in SPIFFE_ENDPOINT_SOCKET, or an
// absolute path. It returns what net.Dial takes.
//
// SPIFFE Workload Endpoint, section 4: "The scheme MUST be set to either `unix` or `tcp`".
func ParseSocket(s string) (network, address string, err error) {
	if s == "" {
		return "", "", errors.New("SPIFFE_ENDPOINT_SOCKET is not set: want unix:///PATH; " + runHint)
	}
	if filepath.IsAbs(s) {
		return "unix", filepath.Clean(s), nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return "", "", fmt.Errorf("workload API socket: %w: want unix:///PATH", err)
	}
	if u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return "", "", fmt.Errorf("workload API socket %q: want no user, query or fragment", s)
	}
	switch u.Scheme {
	case "unix":
		// "the authority component MUST NOT be set, and the path component MUST be set to the
		// absolute path". unix:/path is that path without the empty authority.
		path := u.Path
		if u.Host != "" || !strings.HasPrefix(path, "/") || path == "/" {
			return "", "", fmt.Errorf("workload API socket %q: want an absolute path without host: unix:///PATH", s)
		}
		return "unix", filepath.Clean(path), nil
	case "tcp":
		// "the host component of the authority MUST be set to an IP address"
		addr, err := netip.ParseAddrPort(u.Host)
		if err != nil || u.Path != "" || addr.Port() == 0 {
			return "", "", fmt.Errorf("workload API socket %q: want tcp://IP:PORT without path", s)
		}
		return "tcp", addr.String(), nil
	}
	return "", "", fmt.Errorf("workload API socket %q: scheme %q: want unix:///PATH or tcp://IP:PORT", s, u.Scheme)
}
