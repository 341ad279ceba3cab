package registry

import (
	"net/netip"
	"time"
)

// Instance is one live copy of a service as it registered. It is a value: safe to share, never
// written after Snapshot handed it out.
type Instance struct {
	ID                 string
	Namespace, Service string
	// Version is the label "version"; also in Labels.
	Version  string
	Labels   map[string]string
	Locality Locality
	Weight   uint32 // at least 1
	// Ports may be empty: such an instance serves nobody and is a workload that policies know.
	Ports []PortBinding
	// Addresses that its connections come from, ascending, each once; may be empty.
	Addresses  []netip.Addr
	MeshTLS    bool
	Draining   bool
	SDKVersion string // empty for a program without the SDK
	RunID      string
	// Identity is the SPIFFE ID of who registered it.
	Identity string
	// Expires is when the lease ends unless renewed.
	Expires time.Time
}

// Locality is where an instance runs.
type Locality struct{ Region, Zone, SubZone string }

// PortBinding says where a port of the service is served by this instance.
type PortBinding struct {
	Port uint16
	// Protocol is "GRPC", "HTTP", "HTTP2", "TCP" or "UDP".
	Protocol  string
	Addresses []netip.AddrPort
}

// UDP reports whether the port takes datagrams; each other protocol is over TCP.
func (b PortBinding) UDP() bool { return b.Protocol == "UDP" }

// Snapshot is every instance at one moment, by namespace, service and instance id.
type Snapshot struct {
	Instances []Instance
	// Addresses are the virtual ones of services. Nil when nobody allocates them: it is the
	// caller's to fill in.
	Addresses Addresses
}

// Addresses says which virtual addresses services have.
type Addresses interface {
	// Of returns those of a service, IPv4 first; none when the range is used up.
	Of(namespace, service string) []netip.Addr
	// Range names what the addresses are taken from, for texts.
	Range() string
}
