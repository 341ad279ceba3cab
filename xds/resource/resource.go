// Package resource decodes xDS resources into plain values and says which fields it did not
// honour. It maps bytes to values: no network, no clock, no log. xds/graph, meshsdk/internal/apply
// and the tests of the control plane read the values.
//
// Values are immutable once decoded and safe to share.
package resource

import (
	"net/netip"
	"time"
)

// Type URLs of the resources this client reads.
const (
	ListenerType  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType     = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	ClusterType   = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointsType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
)

// Listener is an envoy.config.listener.v3.Listener: of a client (API set) or of a server (Chains).
type Listener struct {
	Name string
	// API is how calls to this name are made; nil for a server's listener.
	API *HTTP
	// Chains are tried in order; Default is used when none matches. Nil for a client's listener.
	Chains  []Chain
	Default *Chain
}

// HTTP is a HttpConnectionManager. Exactly one of RouteName and Inline is set.
type HTTP struct {
	RouteName string
	Inline    *RouteConfiguration
	// MaxStreamDuration is common_http_protocol_options.max_stream_duration; 0 means none.
	MaxStreamDuration time.Duration
}

// Chain is one way a server takes connections.
type Chain struct {
	// TransportProtocol is "tls", "raw_buffer" or empty for any.
	TransportProtocol string
	TLS               *ServerTLS // nil: plaintext
	HTTP              *HTTP
}

// ServerTLS is a DownstreamTlsContext.
type ServerTLS struct {
	RequireClientCertificate bool
}

// RouteConfiguration is an envoy.config.route.v3.RouteConfiguration.
type RouteConfiguration struct {
	Name         string
	VirtualHosts []VirtualHost
}

// VirtualHost is a set of routes for some domains.
type VirtualHost struct {
	Name    string
	Domains []string // as written: exact, "*.suffix", "prefix.*" or "*"
	Routes  []Route
}

// Route is one entry of a virtual host, tried in order.
type Route struct {
	Name  string
	Match Match
	// Invalid says why the route can never be taken safely (a field inside its match or action is
	// not honoured). A call that it would match, as far as that can be told, fails with no_route:
	// passing on to the next route would match more than its author wrote.
	Invalid string
	// NonForwarding is set in a server's routes.
	NonForwarding bool
	// Clusters is the split; one entry for a plain route.
	Clusters []WeightedCluster
	// Timeout bounds the whole call; 0 means none. Unset in xDS means 15 s
	// (RouteAction.timeout: "If not specified, the default is 15s").
	Timeout time.Duration
	// IdleTimeout ends a call on which nothing moved for so long; 0 means none.
	IdleTimeout time.Duration
	Retry       *Retry
	Origin      Origin
}

// Origin is Route.metadata.filter_metadata["inlay.dev"].
type Origin struct{ Object, Rule, Source string }

// WeightedCluster is one arm of a split.
type WeightedCluster struct {
	Name   string
	Weight uint32
}

// Match is a RouteMatch: exactly one path condition and all headers.
type Match struct {
	Kind    PathKind
	Path    string
	Headers []HeaderMatch // in order; names in lower case; ":method" is the HTTP method
}

// PathKind is how Match.Path is compared.
type PathKind int

// Kinds of path comparison, by the field of RouteMatch.
const (
	Prefix              PathKind = iota // prefix: bytewise; "" and "/" match all
	Exact                               // path
	PathSeparatedPrefix                 // path_separated_prefix: whole segments
	Regex                               // safe_regex: RE2, the whole path
)

// HeaderMatch is an exact comparison of one header's value.
type HeaderMatch struct{ Name, Exact string }

// Retry is a RetryPolicy.
type Retry struct {
	// On holds the words of retry_on that this client honours.
	On []string
	// Codes are retriable_status_codes (HTTP).
	Codes []uint32
	// Attempts is num_retries: further attempts after the first, 0 for none. Unset in xDS means 1.
	Attempts uint32
	PerTry   time.Duration // 0 means none
	// Base and Max of the back-off; unset in xDS means 25 ms and ten times the base.
	Base, Max time.Duration
}

// LB is a cluster's policy.
type LB int

// Policies of load balancing.
const (
	RoundRobin LB = iota
	LeastRequest
)

// Cluster is an envoy.config.cluster.v3.Cluster of type EDS.
type Cluster struct {
	Name string
	// EndpointsName is eds_cluster_config.service_name, else Name.
	EndpointsName  string
	LB             LB
	ConnectTimeout time.Duration // unset in xDS means 5 s
	// MaxRequests is circuit_breakers.thresholds[DEFAULT].max_requests. Unset in xDS means 1024.
	MaxRequests uint32
	// RetryBudgetPercent of calls in flight; 0 when the cluster has no retry_budget.
	RetryBudgetPercent float64
	// RetryMinPerSecond is what the budget always allows; 3 when the cluster does not say.
	RetryMinPerSecond uint32
	// HTTP2 is true when explicit_http_config selects HTTP/2; false is HTTP/1.1.
	HTTP2 bool
	// Transports are tried in order against an endpoint's TransportMatch metadata.
	Transports []TransportMatch
	// TLS is transport_socket: used when no Transports entry matches. nil: plaintext.
	TLS *ClientTLS
	// EmptyReason and SPIFFEID come from inlay.ext.v1.ClusterPolicy; for texts.
	EmptyReason string
	SPIFFEID    string
}

// TransportMatch is one of transport_socket_matches.
type TransportMatch struct {
	Name string
	// Labels must all be equal to the endpoint's metadata "envoy.transport_socket_match".
	Labels map[string]string
	TLS    *ClientTLS // nil: plaintext (raw_buffer)
}

// ClientTLS is an UpstreamTlsContext.
type ClientTLS struct {
	// Peers are match_subject_alt_names, exact: the SPIFFE IDs the other end may have. Never empty:
	// a context without them is rejected, since it would accept every certificate of the bundle.
	Peers []string
	ALPN  []string
}

// Endpoints is a ClusterLoadAssignment.
type Endpoints struct {
	Cluster    string
	Localities []Locality
}

// Locality is one LocalityLbEndpoints. Those without weight are dropped when decoded (gRFC A27:
// a locality without weight gets no traffic).
type Locality struct {
	Region, Zone, SubZone string
	Weight                uint32
	Priority              uint32
	Endpoints             []Endpoint
}

// Endpoint is one LbEndpoint.
type Endpoint struct {
	Addresses []netip.AddrPort // most preferred first; at least one
	Hostname  string
	Weight    uint32 // at least 1
	Health    Health
	// InstanceID is metadata.filter_metadata["inlay.dev"].instance, Labels are
	// metadata.filter_metadata["envoy.lb"].
	InstanceID string
	Labels     map[string]string
	// TransportMatch is metadata.filter_metadata["envoy.transport_socket_match"].
	TransportMatch map[string]string
}

// Health of an endpoint.
type Health int

// States of health. Unknown counts as healthy.
const (
	HealthUnknown Health = iota
	Healthy
	Unhealthy
	Draining
)
