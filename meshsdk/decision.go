package meshsdk

import "github.com/inlay-mesh/inlay/meshsdk/internal/call"

// Decision explains one call: the route and rule that matched with the file and line it came from,
// the routes skipped and why, the cluster and its endpoints, those excluded and why, the attempts
// with their timings, the limits hit and the Reason. It is a value: nothing changes it later.
type Decision = call.Decision

// The parts of a Decision.
type (
	RouteChoice  = call.RouteChoice
	SkippedRoute = call.SkippedRoute
	ClusterShare = call.ClusterShare
	EndpointView = call.EndpointView
	AttemptView  = call.AttemptView
)

// Error is why a call failed inside the mesh, found by errors.As in what gRPC calls, RoundTrip and
// http.Client return. A status or response that the other service's handler chose is not an Error.
// Its text names no address and no key; Unwrap gives the cause, which may.
type Error = call.Error

// AccessRecord is what is known of a call when it has ended.
type AccessRecord = call.Record

// Reason is why a call ended as it did: one list for errors, access records, metric labels and the
// CLI. Readers must tolerate new ones.
type Reason = call.Reason

// Reasons.
const (
	ReasonOK              = call.ReasonOK
	ReasonNoRoute         = call.ReasonNoRoute         // the mesh has no such name, or no route of it matches
	ReasonNoCluster       = call.ReasonNoCluster       // the route leads to nothing that exists
	ReasonNoEndpoint      = call.ReasonNoEndpoint      // the cluster has no endpoint that can be picked
	ReasonConnectFailed   = call.ReasonConnectFailed   // no connection could be made or trusted
	ReasonReset           = call.ReasonReset           // the connection broke before the answer was whole
	ReasonTimeout         = call.ReasonTimeout         // the call's deadline passed
	ReasonPerTryTimeout   = call.ReasonPerTryTimeout   // the last attempt's own time ran out
	ReasonRetryExhausted  = call.ReasonRetryExhausted  // the last attempt that the policy allows failed too
	ReasonRetryBudget     = call.ReasonRetryBudget     // a retry was due, the cluster's budget was spent
	ReasonCircuitOpen     = call.ReasonCircuitOpen     // too many calls in flight to the cluster
	ReasonRateLimited     = call.ReasonRateLimited     // more calls than a rate limit allows
	ReasonShed            = call.ReasonShed            // the server is overloaded
	ReasonDenied          = call.ReasonDenied          // a policy forbids it
	ReasonUnauthenticated = call.ReasonUnauthenticated // the caller did not prove who it is
	ReasonFault           = call.ReasonFault           // injected on purpose
	ReasonUpstreamStatus  = call.ReasonUpstreamStatus  // the server's handler answered with a failure
	ReasonDraining        = call.ReasonDraining        // the server is about to leave
	ReasonCancelled       = call.ReasonCancelled       // the caller gave up
	ReasonConfigMissing   = call.ReasonConfigMissing   // no configuration came in time
)

// Reasons lists all, in the order above.
func Reasons() []Reason { return call.Reasons() }
