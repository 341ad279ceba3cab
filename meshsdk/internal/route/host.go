package route

import (
	"strings"

	"github.com/inlay-mesh/inlay/xds/resource"
)

// Host gives the virtual host for name, nil when none has it. A port in name is ignored
// unless a domain has the same, and case does not matter. The kinds of domain are preferred as Envoy's VirtualHost.domains says:
// "1. Exact domain names: www.foo.com. 2. Suffix domain wildcards: *.foo.com or *-bar.foo.com.
// 3. Prefix domain wildcards: foo.* or foo-*. 4. Special wildcard * matching any domain.", and
// "The longest wildcards match first."
func Host(hosts []resource.VirtualHost, name string) *resource.VirtualHost {
	name = strings.ToLower(name)
	full := name
	name = withoutPort(name)
	var best *resource.VirtualHost
	const none = 6
	bestKind, bestLen := none, 0
	for i := range hosts {
		for _, d := range hosts[i].Domains {
			d = strings.ToLower(d)
			kind := none
			switch {
			case d == "*":
				kind = 5
			case strings.HasPrefix(d, "*"):
				// domains: "The wildcard will not match the empty string."
				if tail := d[1:]; len(name) > len(tail) && strings.HasSuffix(name, tail) {
					kind = 3
				}
			case strings.HasSuffix(d, "*"):
				if head := d[:len(d)-1]; len(name) > len(head) && strings.HasPrefix(name, head) {
					kind = 4
				}
			case d == full:
				kind = 0 // the very name, with its port if it has one
			case d == name:
				kind = 1
			case full == name && withoutPort(d) == name:
				kind = 2 // no port was asked for
			}
			if kind < bestKind || kind == bestKind && kind != none && len(d) > bestLen {
				best, bestKind, bestLen = &hosts[i], kind, len(d)
			}
		}
	}
	return best
}

// withoutPort cuts ":port"; an IPv6 literal without brackets is left as it is.
func withoutPort(host string) string {
	i := strings.LastIndexByte(host, ':')
	if i < 0 || strings.IndexByte(host[:i], ':') >= 0 && !strings.HasSuffix(host[:i], "]") {
		return host
	}
	for _, c := range host[i+1:] {
		if c < '0' || c > '9' {
			return host
		}
	}
	return host[:i]
}
