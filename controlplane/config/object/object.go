// Package object holds the objects of the configuration as values that remember where each was
// written, and the findings about them. package config and its translators make them, compile
// reads them; config aliases the names that others use.
//
// It decides nothing: no parsing, no resolving of names. It speaks of neither YAML nor Gateway API.
package object

import (
	"net/netip"
	"slices"
	"time"
)

// Pos is a place in a file. The zero Pos is nowhere.
type Pos struct {
	File string
	Line int // 1-based
	Col  int // 1-based, in characters
}

// Set is the whole configuration, without faults. Each list is sorted by namespace, then name
// (routes by kind first), so that equal configurations are equal sets whatever the order of files.
type Set struct {
	Services []Service
	Policies []Policy
	Routes   []Route
	// NetworkPolicies are those of connections; Policies are those of calls.
	NetworkPolicies []NetworkPolicy

	// Refused are the objects that were named and had faults; they are in none of the lists.
	// Incomplete is set when something could not even be named. With either, the set is only good
	// for finding more faults: references that lead to nothing may mean what was refused.
	Refused    []Meta
	Incomplete bool
}

// Len returns the number of objects.
func (s *Set) Len() int {
	return len(s.Services) + len(s.Policies) + len(s.Routes) + len(s.NetworkPolicies)
}

// Meta names an object.
type Meta struct {
	Kind            string // MeshService, TrafficPolicy, NetworkPolicy, HTTPRoute or GRPCRoute
	Namespace, Name string
	Pos             Pos // of the document
}

// String returns KIND/NAMESPACE/NAME.
func (m Meta) String() string { return m.Kind + "/" + m.Namespace + "/" + m.Name }

// Service is a MeshService.
type Service struct {
	Meta
	Ports []Port // in the order of the file; none for a service that only calls
	// Permissive services accept plaintext beside mutual TLS; others, strict ones, do not.
	Permissive bool
	Endpoints  []Endpoint // static ones
	Versions   []Version
}

// Plain reports whether each port is TCP or UDP: calls of the SDK know no such service.
func (s *Service) Plain() bool {
	return !slices.ContainsFunc(s.Ports, func(p Port) bool { return !p.Protocol.Plain() })
}

// Port is a port of a service. A number may be there twice: for UDP, and for one of the others.
type Port struct {
	Number   uint16
	Protocol Protocol
	Pos      Pos
}

// Protocol is GRPC, HTTP, HTTP2, TCP or UDP.
type Protocol string

// Protocols of a port.
const (
	GRPC  Protocol = "GRPC"
	HTTP  Protocol = "HTTP"
	HTTP2 Protocol = "HTTP2"
	TCP   Protocol = "TCP"
	UDP   Protocol = "UDP"
)

// Plain reports whether the protocol is TCP or UDP: nothing is known of what is spoken, so that no
// route and no call of the SDK goes there.
func (p Protocol) Plain() bool { return p == TCP || p == UDP }

// Endpoint is a static endpoint.
type Endpoint struct {
	Address netip.Addr
	// Port is the one that the endpoint listens on; zero means the service's own port numbers.
	Port uint16
	// ServicePort is the port of the service that Port serves; zero with Port zero means each.
	ServicePort uint16
	MeshTLS     bool
	Labels      map[string]string
	Region      string
	Zone        string
	SubZone     string
	Weight      uint32 // at least 1
	Pos         Pos
}

// Version is a named subset of a service's endpoints.
type Version struct {
	Name   string
	Labels map[string]string // every one must be equal
	Pos    Pos
}

// Target is what a policy is for.
type Target struct {
	Service string // in the policy's namespace
	Version string // empty for the whole service
	Pos     Pos
}

// Policy is a TrafficPolicy. A nil field was not written.
type Policy struct {
	Meta
	Target Target
	// Request bounds a whole call, PerTry each attempt of it. Idle ends a call on which nothing
	// moved in either direction for so long (Envoy: RouteAction.idle_timeout). Zero switches the
	// timeout off.
	Request, PerTry, Idle *time.Duration
	Retries               *Retries
	LB                    *LB
	MaxRequests           *uint32 // at least 1
}

// Retries is a retry stanza. A nil field was not written.
type Retries struct {
	Attempts *uint32 // at least 1
	// On holds words (unavailable, connect-failure, ...) in order; nil was not written.
	On []string
	// Codes are HTTP status codes, ascending; with On they are one list in the file.
	Codes         []uint32
	Base, Max     *time.Duration
	BudgetPercent *float64
	MinPerSecond  *uint32
	Pos           Pos
}

// LB is how endpoints are picked.
type LB string

// Policies of load balancing.
const (
	LeastRequest LB = "LeastRequest"
	RoundRobin   LB = "RoundRobin"
)

// Route is an HTTPRoute or a GRPCRoute.
type Route struct {
	Meta
	Parents []Parent // at least one
	Rules   []Rule   // in the order of the file
}

// GRPC reports whether the route is a GRPCRoute.
func (r *Route) GRPC() bool { return r.Kind == "GRPCRoute" }

// Parent is a service whose calls a route decides. It is in the route's namespace.
type Parent struct {
	Service string
	Port    uint16 // zero: every port that the route fits
	Pos     Pos
}

// Rule is one rule of a route.
type Rule struct {
	Name    string  // may be empty
	Matches []Match // any of them; at least one
	// Backends in the order of the file; may be empty.
	Backends []Backend
	// Request and PerTry: nil was not written, zero switches the timeout off.
	Request, PerTry *time.Duration
	Retry           *RouteRetry
	Pos             Pos
}

// Match is all the conditions of one match of a rule. The path is of an HTTPRoute, the gRPC
// service and method of a GRPCRoute.
type Match struct {
	Path        string // begins with a slash; a prefix has no slash at its end, but "/" is one
	Exact       bool   // false: Path is a prefix, segment by segment
	Method      string // HTTP method
	GRPCService string // empty: any
	GRPCMethod  string // empty: any
	Headers     []Header
	Pos         Pos
}

// Header is a header that must be there with exactly this value.
type Header struct{ Name, Value string } // Name in lower case

// Backend is one arm of a split.
type Backend struct {
	Namespace string // never empty
	Service   string
	Version   string // empty for the whole service
	Port      uint16 // zero was not written
	Weight    uint32
	Pos       Pos
}

// RouteRetry is the retry stanza of an HTTPRoute rule. Codes come with connection errors.
type RouteRetry struct {
	Attempts *uint32
	Codes    []uint32 // ascending
	Backoff  *time.Duration
	Pos      Pos
}
