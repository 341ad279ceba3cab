// Package call is the life of one call as one chain: find the configuration, match a route, take a
// place under the limit, attempt, retry, record.
//
// The skins (grpcmesh, httpmesh) drive it: Begin, Next, Retry, End. apply gives it snapshots,
// telemetry observes it. It knows neither gRPC nor net/http, sends nothing itself and starts no
// goroutine a call; the only effects here are waiting, timers and counting.
package call

// Reason is why a call ended as it did: one list for errors, access records, metric labels, CLI and
// UI. Readers must tolerate new ones.
type Reason string

// Reasons.
const (
	ReasonOK              Reason = "ok"
	ReasonNoRoute         Reason = "no_route"        // the mesh has no such name, or no route of it matches
	ReasonNoCluster       Reason = "no_cluster"      // the route leads to nothing that exists
	ReasonNoEndpoint      Reason = "no_endpoint"     // the cluster has no endpoint that can be picked
	ReasonConnectFailed   Reason = "connect_failed"  // no connection could be made or trusted
	ReasonReset           Reason = "reset"           // the connection broke before the answer was whole
	ReasonTimeout         Reason = "timeout"         // the call's deadline passed
	ReasonPerTryTimeout   Reason = "per_try_timeout" // the last attempt's own time ran out
	ReasonRetryExhausted  Reason = "retry_exhausted" // the last attempt that the policy allows failed too
	ReasonRetryBudget     Reason = "retry_budget"    // a retry was due, the cluster's budget was spent
	ReasonCircuitOpen     Reason = "circuit_open"    // too many calls in flight to the cluster
	ReasonRateLimited     Reason = "rate_limited"    // more calls than a rate limit allows
	ReasonShed            Reason = "shed"            // the server is overloaded
	ReasonDenied          Reason = "denied"          // a policy forbids it
	ReasonUnauthenticated Reason = "unauthenticated" // the caller did not prove who it is
	ReasonFault           Reason = "fault"           // injected on purpose
	ReasonUpstreamStatus  Reason = "upstream_status" // the server's handler answered with a failure
	ReasonDraining        Reason = "draining"        // the server is about to leave
	ReasonCancelled       Reason = "cancelled"       // the caller gave up
	ReasonConfigMissing   Reason = "config_missing"  // no configuration came in time
)

// Reasons lists all, in the order of the documentation.
func Reasons() []Reason {
	return []Reason{
		ReasonOK, ReasonNoRoute, ReasonNoCluster, ReasonNoEndpoint, ReasonConnectFailed, ReasonReset,
		ReasonTimeout, ReasonPerTryTimeout, ReasonRetryExhausted, ReasonRetryBudget, ReasonCircuitOpen,
		ReasonRateLimited, ReasonShed, ReasonDenied, ReasonUnauthenticated, ReasonFault,
		ReasonUpstreamStatus, ReasonDraining, ReasonCancelled, ReasonConfigMissing,
	}
}

// sentence is what an error says of a reason, with %q for the service.
func (r Reason) sentence() string {
	switch r {
	case ReasonNoRoute:
		return "no route for %q"
	case ReasonNoCluster:
		return "no cluster for %q"
	case ReasonNoEndpoint:
		return "no ready endpoint for %q"
	case ReasonConnectFailed:
		return "cannot connect to %q"
	case ReasonReset:
		return "connection to %q was reset"
	case ReasonTimeout:
		return "deadline passed while calling %q"
	case ReasonPerTryTimeout:
		return "attempt to call %q timed out"
	case ReasonRetryExhausted:
		return "all attempts to call %q failed"
	case ReasonRetryBudget:
		return "call to %q failed and the retry budget is spent"
	case ReasonCircuitOpen:
		return "too many calls in flight to %q"
	case ReasonRateLimited:
		return "rate limit of %q is reached"
	case ReasonShed:
		return "%q is overloaded"
	case ReasonDenied:
		return "call to %q is denied"
	case ReasonUnauthenticated:
		return "%q does not know who calls"
	case ReasonFault:
		return "fault injected into call to %q"
	case ReasonUpstreamStatus:
		return "%q answered with a failure"
	case ReasonDraining:
		return "%q is draining"
	case ReasonCancelled:
		return "call to %q was cancelled"
	case ReasonConfigMissing:
		return "no configuration for %q"
	}
	return "call to %q failed (" + string(r) + ")"
}
