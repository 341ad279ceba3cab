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
	Version    string
	Labels     map[string]string
	Locality   Locality
	Weight     uint32 // at least 1
	Ports      []PortBinding
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
	// Protocol is "GRPC", "HTTP" or "HTTP2".
	Protocol  string
	Addresses []netip.AddrPort
}

// Snapshot is every instance at one moment, by namespace, service and instance id.
type Snapshot struct {
	Instances []Instance
}
