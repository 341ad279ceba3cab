package xdsgen

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Names on the wire that carry a meaning.
const (
	inboundPrefix = "inlay/inbound/"
	// serverPrefix begins the name that a gRPC server asks for, by the template
	// server_listener_resource_name_template of the bootstrap.
	serverPrefix = "grpc/server?xds.resource.listening_address="
	// NoBackendCluster is the empty cluster of routes whose backends have no weight.
	NoBackendCluster = "inlay/no-backend"
)

// InboundListener is the name of the listener of an SDK's server.
func InboundListener(namespace, service string, port uint16) string {
	return inboundPrefix + namespace + "/" + service + "/" + strconv.Itoa(int(port))
}

// ServerListener is the name of the listener of a gRPC server that listens on addr (ip:port).
func ServerListener(addr string) string { return serverPrefix + addr }

// routeName is SERVICE.NAMESPACE:PORT: the name of a route configuration and of the cluster of
// the whole service.
func routeName(service, namespace string, port uint16) string {
	return service + "." + namespace + ":" + strconv.Itoa(int(port))
}

// serverAddress takes the listening address out of a gRPC server's listener name.
func serverAddress(name string) (host string, port uint16, err error) {
	addr, ok := strings.CutPrefix(name, serverPrefix)
	if !ok {
		return "", 0, fmt.Errorf("listener %q: want %sIP:PORT", name, serverPrefix)
	}
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, fmt.Errorf("listening address %q: %w", addr, err)
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return "", 0, fmt.Errorf("listening address %q: want an IP address before the port", addr)
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil || n == 0 {
		return "", 0, fmt.Errorf("listening address %q: port %q: want 1 to 65535", addr, p)
	}
	return host, uint16(n), nil
}

// scopeOf is who shares a listener of this name: everybody (""), the callers of one namespace, or
// one identity class ("NAMESPACE/SERVICE").
func scopeOf(v View, typeURL, name string) string {
	if typeURL != ListenerType {
		return ""
	}
	if strings.HasPrefix(name, inboundPrefix) || strings.HasPrefix(name, serverPrefix) {
		return v.Namespace + "/" + v.Service
	}
	host, _, _ := strings.Cut(name, ":")
	if strings.Contains(host, ".") {
		return "" // SERVICE.NAMESPACE; a service name holds no dot
	}
	return v.Namespace
}
