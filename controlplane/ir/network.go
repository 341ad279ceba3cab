package ir

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// NetworkPolicy says who may connect to workloads, and where these may connect. A direction that an
// allow rule of an enforced policy selects is otherwise denied; deny rules come first.
type NetworkPolicy struct {
	Namespace, Name string
	Source          Source
	// Subject selects the workloads; its namespace is the policy's.
	Subject Selector
	// Audit policies deny nothing; what they would deny is told.
	Audit bool
	// Ingress and Egress in the order of the configuration.
	Ingress, Egress []NetworkRule
}

// Selector selects workloads of the mesh; all set conditions hold together.
type Selector struct {
	Namespace string // never empty
	Service   string // empty means each
	Labels    map[string]string
}

// NetworkRule allows or denies some peers on some ports.
type NetworkRule struct {
	// Name of the rule, else its index from 0.
	Name   string
	Source Source
	Deny   bool
	// Peers, any of them; empty means everybody.
	Peers []NetworkPeer
	// Ports, any of them; empty means every port of every protocol.
	Ports []PortRange
	// Errno that a refused connect() returns, as numbered by Linux; 0 means EPERM.
	Errno uint32
}

// NetworkPeer is the other end of a connection: one of three kinds.
type NetworkPeer struct {
	// Workloads, when its namespace is not empty.
	Workloads Selector
	// CIDR with what is left out of it, when valid. Its host bits are zero.
	CIDR   netip.Prefix
	Except []netip.Prefix
	// Entity, when not NoEntity.
	Entity Entity
}

// Entity is a class of peers.
type Entity int

// Entities.
const (
	NoEntity Entity = iota
	Host            // a process of the same machine that is no workload
	World           // everybody outside the mesh and the machine
	MeshPeer        // every workload
)

// Transport is a protocol above IP.
type Transport int

// Transports.
const (
	AnyTransport Transport = iota
	TransportTCP
	TransportUDP
	TransportICMP // that of either family
)

// PortRange is some ports of a protocol, first to last; both 0 means each. ICMP has none.
type PortRange struct {
	Protocol    Transport
	First, Last uint16
}

// LabelKey writes labels as one text, equal for equal labels and for no others: by it workloads are
// told apart and ordered.
func LabelKey(labels map[string]string) string {
	if len(labels) == 0 {
		return ""
	}
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		b.WriteString(k)
		b.WriteByte(0)
		b.WriteString(labels[k])
		b.WriteByte(0)
	}
	return b.String()
}
