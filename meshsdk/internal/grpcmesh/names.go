package grpcmesh

import (
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/inlay-mesh/inlay/identity"
)

// Suffix ends the names that belong to the mesh whatever stands before it.
const Suffix = ".mesh"

// Parse tells the names of the mesh from those of the outside, and gives the listener that a name
// of the mesh asks for. target is a host with or without port, or "xds:///" and such a host.
//
// Names of the mesh are a single label ("orders"; not "localhost"), NAME.NAMESPACE for own and the
// namespaces that namespaces gives (nil gives none), whatever ends in Suffix, and "xds:///".
// Everything else is outside: other hosts, IP addresses, and what is no host at all, such as a name
// with user information or an empty label.
//
// The listener is canonical: lower case, without trailing dot and Suffix, the port without leading
// zeros. "Orders.", "orders" and "orders.mesh" are one name; "orders:8080" is another, since the
// port is part of the name of a listener. "orders:http" and "orders:70000" are names of the mesh that
// do not exist, since what stands before the port decides: gRPC and net/http would call them.
func Parse(target string, namespaces func() []string, own string) (listener string, mesh bool) {
	rest, xds := cutXDS(target)
	host, port, ok := splitPort(rest)
	if !ok {
		return "", false
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	short, suffixed := strings.CutSuffix(host, Suffix)
	if suffixed {
		host = short
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return "", false
	}
	labels := strings.Split(host, ".")
	for _, l := range labels {
		if !isLabel(l) {
			return "", false
		}
	}
	switch {
	case xds || suffixed:
	case numeric(labels[len(labels)-1]):
		// "127.1" and "2130706433" are IPv4 addresses to many resolvers (inet_aton): what may be an
		// address is none of ours.
		return "", false
	case len(labels) == 1:
		if host == "localhost" { // RFC 6761, 6.3: it names the loopback addresses
			return "", false
		}
	case len(labels) == 2:
		ns := labels[1]
		if identity.CheckName(labels[0]) != nil || ns == "localhost" {
			return "", false
		}
		if ns != own && (namespaces == nil || !slices.Contains(namespaces(), ns)) {
			return "", false
		}
	default:
		return "", false
	}
	if port != "" {
		host += ":" + port
	}
	return host, true
}

// cutXDS takes "xds:///" or "xds:" off. With an authority ("xds://traffic.example/orders") the name
// is that of another control plane and not ours.
func cutXDS(target string) (rest string, xds bool) {
	if len(target) < 4 || !strings.EqualFold(target[:4], "xds:") {
		return target, false
	}
	u, err := url.Parse(target)
	if err != nil || u.Host != "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", false
	}
	if u.Opaque != "" {
		if _, err := strconv.ParseUint(u.Opaque, 10, 16); err == nil {
			return target, false // the service "xds" and a port
		}
		return u.Opaque, true
	}
	return strings.TrimPrefix(u.Path, "/"), true
}

// splitPort gives the host and the port, empty when there is none. RFC 3986, 3.2.3: normalizers
// "should omit the port component and its ':' delimiter if port is empty". A port that is no number
// of a port is given as it is. ok is false for an IPv6 literal and for what is no port at all.
func splitPort(s string) (host, port string, ok bool) {
	if s == "" || s[0] == '[' {
		return "", "", false
	}
	host, port, found := strings.Cut(s, ":")
	if !found {
		return host, "", true
	}
	if p, err := strconv.ParseUint(port, 10, 16); err == nil && p != 0 {
		return host, strconv.FormatUint(p, 10), true
	}
	port = strings.ToLower(port)
	return host, port, port == "" || isLabel(port)
}

// isLabel admits the underscore beside what identity.CheckName admits: "my_db" cannot be a service,
// but it is a single label, and those never leave the mesh by mistake.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// numeric reports whether a resolver may read the label as part of an IPv4 address: decimal, or
// hexadecimal with 0x (WHATWG URL, "ends in a number checker").
func numeric(label string) bool {
	hex, ok := strings.CutPrefix(label, "0x")
	if !ok {
		return strings.Trim(label, "0123456789") == ""
	}
	return strings.Trim(hex, "0123456789abcdef") == ""
}

// hostsOf are the hosts that belong to a service, without port: NAME.NAMESPACE, the same with
// Suffix, and NAME alone where own, the namespace of this workload, is its namespace. Empty own is
// unknown and counts as the same.
func hostsOf(namespace, service, own string) []string {
	full := service + "." + namespace
	hosts := []string{full, full + Suffix}
	if own == "" || own == namespace {
		hosts = append(hosts, service, service+Suffix)
	}
	return hosts
}

// clusterHost is the host of the service that a cluster belongs to, by the cluster's name
// SERVICE.NAMESPACE:PORT or SERVICE.NAMESPACE:PORT|VERSION; ok is false for a name of another form.
func clusterHost(cluster string) (namespace, service string, ok bool) {
	name, _, _ := strings.Cut(cluster, "|")
	name, _, _ = strings.Cut(name, ":")
	service, namespace, ok = strings.Cut(name, ".")
	if !ok || identity.CheckName(service) != nil || identity.CheckName(namespace) != nil {
		return "", "", false
	}
	return namespace, service, true
}

// bareHost is an authority as hostsOf spells it: lower case, no port, no trailing dot.
func bareHost(authority string) string {
	host, _, _ := strings.Cut(authority, ":")
	return strings.TrimSuffix(strings.ToLower(host), ".")
}
