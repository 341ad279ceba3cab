package object

import "net/netip"

// NetworkPolicy is a NetworkPolicy.
type NetworkPolicy struct {
	Meta
	// Subject selects workloads of the policy's namespace.
	Subject Selector
	Audit   bool
	// Ingress and Egress in the order of the file; at least one of them has a rule.
	Ingress, Egress []NetworkRule
}

// Selector selects workloads; all set conditions hold together.
type Selector struct {
	Namespace string // never empty
	Service   string // empty means each
	Labels    map[string]string
	// NamespaceWritten is false where the namespace is the policy's own by default.
	NamespaceWritten bool
	Pos              Pos
}

// NetworkRule is one rule of a direction.
type NetworkRule struct {
	Name  string // may be empty
	Deny  bool
	Peers []Peer // any of them; empty means everybody
	Ports []PortRange
	// Errno is that of a refused connect(), such as "ECONNREFUSED"; empty means EPERM.
	Errno string
	Pos   Pos
}

// Peer is the other end of a connection: exactly one of the three is set.
type Peer struct {
	Workloads *Selector
	CIDR      netip.Prefix // valid when set; host bits are zero
	Except    []netip.Prefix
	Entity    Entity // empty when not set
	Pos       Pos
}

// Entity is a class of peers.
type Entity string

// Entities.
const (
	Host  Entity = "host"
	World Entity = "world"
	Mesh  Entity = "mesh"
)

// PortRange is some ports of a protocol. First and Last both zero mean every port; ICMP has none.
type PortRange struct {
	Protocol    Transport
	First, Last uint16
	Pos         Pos
}

// Transport is a protocol above IP.
type Transport string

// Transports.
const (
	TransportTCP  Transport = "TCP"
	TransportUDP  Transport = "UDP"
	TransportICMP Transport = "ICMP"
)
