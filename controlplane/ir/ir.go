// Package ir is the mesh as the control plane means it: services, routes, clusters and endpoints
// with every name resolved and every policy merged. compile makes it, xdsgen and admin read it.
// It speaks of no YAML, no protobuf and no client, and imports nothing of the project.
//
// Values are immutable once compiled and safe to share. Slices are sorted as their comments say,
// so that equal meshes are equal value by value.
package ir

import (
	"net/netip"
	"time"
)

// Mesh is one compiled revision.
type Mesh struct {
	// Revision identifies the configuration (not the endpoints) it was compiled from.
	Revision    string
	TrustDomain string
	// Services by namespace, then name.
	Services []Service
	// NetworkPolicies by namespace, then name.
	NetworkPolicies []NetworkPolicy
}

// Source is where a value was written.
type Source struct {
	File string
	Line int // 1-based; 0 when the value comes from no file
	Col  int // 1-based
}

// Service is one MeshService, declared or registered, or one that a route names and nobody knows.
type Service struct {
	Namespace, Name string
	// Ports in the order of the declaration; the first is what a name without a port means.
	Ports []Port
	MTLS  MTLS
	// Versions in the order of the declaration.
	Versions []Version
	// Unknown is not empty when neither configuration nor registry knows the service; it says so
	// in a sentence. Such a service has clusters without endpoints and no routes.
	Unknown string
	// Declared is false for a service that came to exist by registration.
	Declared bool
	Source   Source
	// VirtualAddresses are the service's own IPs, of each family at most one, IPv4 first. Nil when
	// none were given out: the range is used up, or nobody allocates (a mesh compiled from files
	// alone).
	VirtualAddresses []netip.Addr
	// Workloads that run the service, each set of labels once, in the order of LabelKey.
	Workloads []Workload
}

// Workload is the instances of a service that have equal labels: policies cannot tell them apart.
type Workload struct {
	Labels map[string]string
	// Addresses that connections of these instances come from, ascending, each once. Never loopback.
	Addresses []netip.Addr
}

// MTLS is what a service accepts.
type MTLS int

// Modes of a service.
const (
	Strict     MTLS = iota // mutual TLS only
	Permissive             // mutual TLS and plaintext
)

// Protocol is what a port speaks.
type Protocol int

// Protocols of a port. The first three are spoken inside TLS; the others are plain, have no routes
// and are reached by the service's virtual addresses.
const (
	HTTP  Protocol = iota // HTTP/1.1
	HTTP2                 // HTTP/2
	GRPC                  // gRPC over HTTP/2
	TCP                   // a stream of bytes
	UDP                   // datagrams
)

// Plain reports whether the protocol is TCP or UDP: no mesh TLS, no routes, no call by the SDK.
func (p Protocol) Plain() bool { return p == TCP || p == UDP }

// Version is a named subset of the endpoints.
type Version struct {
	Name   string
	Labels map[string]string // every one must be equal
	Source Source
}

// Port is one port of a service with the routes of calls to it. A number may be there twice: for
// UDP, and for one of the other protocols.
type Port struct {
	Number   uint16
	Protocol Protocol
	// Routes in the order in which they are tried; the last one matches everything unless the
	// configuration's routes deliberately leave gaps (a call then fails with no_route). A plain port
	// has none.
	Routes []Route
	// Clusters of this port: the whole service first, then one for each version, in order.
	Clusters []Cluster
}

// Route is one rule match of a route object.
type Route struct {
	// Object is "HTTPRoute/NAMESPACE/NAME", "GRPCRoute/..." or "MeshService/..." for the default.
	Object string
	// Rule is the rule's name, else its index from 0, with the index of the match behind a dot.
	Rule   string
	Source Source
	Match  Match
	// Backends in the order of the configuration. Empty or of total weight 0: calls fail with
	// no_cluster.
	Backends []Backend
	// Timeout bounds the whole call; 0 means none.
	Timeout time.Duration
	// PerTry bounds each attempt; 0 means none.
	PerTry time.Duration
	// Idle ends a call on which nothing moved for so long; 0 means none.
	Idle time.Duration
	// Retry is nil for none.
	Retry *Retry
}

// Match is what a call must be; all set conditions hold together.
type Match struct {
	// Path and its kind; PathAny has none.
	Path     string
	PathKind PathKind
	// Method is the HTTP method, exact; empty means any.
	Method string
	// Headers in the order of the configuration; names in lower case.
	Headers []HeaderMatch
}

// PathKind is how Match.Path is compared.
type PathKind int

// Kinds of path comparison.
const (
	PathAny    PathKind = iota
	PathExact           // the whole path
	PathPrefix          // segments: /a matches /a and /a/b, not /ab; never ends in a slash; "/" is PathAny
	// PathSuffix matches the last segment: gRPC routes that name a method and no service.
	PathSuffix
)

// HeaderMatch is an exact comparison.
type HeaderMatch struct{ Name, Value string }

// Backend is one arm of a split.
type Backend struct {
	// Cluster names one in some Port.Clusters of the mesh.
	Cluster string
	Weight  uint32
	// Invalid says why no call can succeed there; it keeps its weight all the same.
	Invalid string
	Source  Source
}

// Retry is when and how often a failed attempt is tried again.
type Retry struct {
	// Attempts is how many times a call may be tried again after its first attempt.
	Attempts uint32
	// On holds conditions in the order of the configuration.
	On []RetryOn
	// Codes are the HTTP status codes that are tried again, ascending.
	Codes []uint32
	// Base and Max of the back-off.
	Base, Max time.Duration
}

// RetryOn is a retry condition in the words of Envoy's x-envoy-retry-on and -grpc-on.
type RetryOn string

// Retry conditions.
const (
	OnConnectFailure    RetryOn = "connect-failure"
	OnRefusedStream     RetryOn = "refused-stream"
	OnReset             RetryOn = "reset"
	OnCancelled         RetryOn = "cancelled"
	OnDeadlineExceeded  RetryOn = "deadline-exceeded"
	OnInternal          RetryOn = "internal"
	OnResourceExhausted RetryOn = "resource-exhausted"
	OnUnavailable       RetryOn = "unavailable"
)

// Cluster is the endpoints of one port of a service, or of one version of it, with their policy.
type Cluster struct {
	// Name is SERVICE.NAMESPACE:PORT, with |VERSION for a version, and with /udp behind it for UDP.
	Name               string
	Namespace, Service string
	Port               uint16
	Version            string // empty for the whole service
	Protocol           Protocol
	MTLS               MTLS
	// SPIFFEID of the service; callers accept no other.
	SPIFFEID string
	Policy   ClusterPolicy
	// EmptyReason says why a cluster has no endpoints by configuration; empty otherwise.
	EmptyReason string
	// Endpoints by instance id, then address. Those that nobody may call are included, with
	// Unreachable set: admin shows them, xdsgen leaves them out.
	Endpoints []Endpoint
}

// ClusterPolicy is the merged TrafficPolicy of a cluster.
type ClusterPolicy struct {
	LB LB
	// MaxRequests in flight; 0 means the default of 1024.
	MaxRequests uint32
	// RetryBudgetPercent of calls in flight that may be retries; with RetryMinPerSecond always.
	RetryBudgetPercent float64
	RetryMinPerSecond  uint32
	// Source of the policy; zero for defaults.
	Source Source
}

// LB is how an endpoint is picked.
type LB int

// Policies of load balancing.
const (
	LeastRequest LB = iota // the less loaded of two random ones
	RoundRobin
)

// Endpoint is one instance at one port.
type Endpoint struct {
	InstanceID string
	// Addresses, most preferred first; at least one.
	Addresses []netip.AddrPort
	Locality  Locality
	// LocalityWeight is the share of the whole locality; 0 means 1 for each endpoint in it.
	LocalityWeight uint32
	// Weight within the locality, at least 1.
	Weight uint32
	// Priority 0 is used first.
	Priority uint32
	Health   Health
	Labels   map[string]string
	// MeshTLS says that the endpoint itself speaks mesh TLS.
	MeshTLS bool
	// Unreachable says why nobody may call it (strict service, no mesh TLS); empty otherwise.
	Unreachable string
	// Static is true for an endpoint from configuration.
	Static bool
	Source Source
}

// Locality is where an endpoint is.
type Locality struct{ Region, Zone, SubZone string }

// Health of an endpoint.
type Health int

// States of health.
const (
	Healthy Health = iota
	Draining
	Unhealthy
)
