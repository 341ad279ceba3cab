package call

import "time"

// Decision explains one call. Its fields are those of inlay.report.v1.Decision, and its JSON names
// too. It is a value of its own: nothing changes it later.
type Decision struct {
	Service  string `json:"service"`
	Revision string `json:"revision,omitempty"`
	// Route is nil when none matched.
	Route *RouteChoice `json:"route,omitempty"`
	// Skipped are the routes that were tried before, in order.
	Skipped []SkippedRoute `json:"skipped,omitempty"`
	Cluster string         `json:"cluster,omitempty"`
	// Candidates are the arms of the route's split.
	Candidates []ClusterShare `json:"candidates,omitempty"`
	// Endpoints of the chosen cluster.
	Endpoints []EndpointView `json:"endpoints,omitempty"`
	Attempts  []AttemptView  `json:"attempts,omitempty"`
	// Limits that were hit, in sentences.
	Limits []string `json:"limits,omitempty"`
	// Reason is empty while the call runs.
	Reason Reason `json:"reason,omitempty"`
	Detail string `json:"detail,omitempty"`
	// RequestTimeout and PerTryTimeout are zero for none.
	RequestTimeout time.Duration `json:"requestTimeout,omitempty"`
	PerTryTimeout  time.Duration `json:"perTryTimeout,omitempty"`
	MaxRetries     uint32        `json:"maxRetries,omitempty"`
}

// RouteChoice is a route with where it came from.
type RouteChoice struct {
	Object string `json:"object,omitempty"`
	Rule   string `json:"rule,omitempty"`
	Source string `json:"source,omitempty"`
	// Name is the metric label; Match says its conditions.
	Name  string `json:"name,omitempty"`
	Match string `json:"match,omitempty"`
}

// SkippedRoute is a route that did not match, and why.
type SkippedRoute struct {
	Route RouteChoice `json:"route"`
	Why   string      `json:"why"`
}

// ClusterShare is one arm of a split.
type ClusterShare struct {
	Cluster string `json:"cluster"`
	Weight  uint32 `json:"weight"`
	// Invalid says why calls to it fail; empty when they do not.
	Invalid string `json:"invalid,omitempty"`
}

// EndpointView is one endpoint of the chosen cluster.
type EndpointView struct {
	Address    string            `json:"address"`
	InstanceID string            `json:"instanceId,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Locality   string            `json:"locality,omitempty"`
	Priority   uint32            `json:"priority"`
	// Excluded says why it cannot be picked; empty when it can.
	Excluded string `json:"excluded,omitempty"`
	// TLS is "mtls" with the accepted SPIFFE IDs, or "plaintext".
	TLS string `json:"tls"`
}

// AttemptView is one try.
type AttemptView struct {
	// Endpoint is its address; empty when none was picked.
	Endpoint string        `json:"endpoint,omitempty"`
	Start    time.Time     `json:"start"`
	Took     time.Duration `json:"took"`
	Outcome  string        `json:"outcome"`
	// Peer is the SPIFFE ID that answered, or "plaintext".
	Peer string `json:"peer,omitempty"`
}
