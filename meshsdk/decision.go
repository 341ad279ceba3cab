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

// Reasons. Each is documented where it is produced: see ARCHITECTURE.md, section 4.
const (
	ReasonOK              = call.ReasonOK
	ReasonNoRoute         = call.ReasonNoRoute
	ReasonNoCluster       = call.ReasonNoCluster
	ReasonNoEndpoint      = call.ReasonNoEndpoint
	ReasonConnectFailed   = call.ReasonConnectFailed
	ReasonReset           = call.ReasonReset
	ReasonTimeout         = call.ReasonTimeout
	ReasonPerTryTimeout   = call.ReasonPerTryTimeout
	ReasonRetryExhausted  = call.ReasonRetryExhausted
	ReasonRetryBudget     = call.ReasonRetryBudget
	ReasonCircuitOpen     = call.ReasonCircuitOpen
	ReasonRateLimited     = call.ReasonRateLimited
	ReasonShed            = call.ReasonShed
	ReasonDenied          = call.ReasonDenied
	ReasonUnauthenticated = call.ReasonUnauthenticated
	ReasonFault           = call.ReasonFault
	ReasonUpstreamStatus  = call.ReasonUpstreamStatus
	ReasonDraining        = call.ReasonDraining
	ReasonCancelled       = call.ReasonCancelled
	ReasonConfigMissing   = call.ReasonConfigMissing
)

// Reasons lists all, in the order above.
func Reasons() []Reason { return call.Reasons() }
