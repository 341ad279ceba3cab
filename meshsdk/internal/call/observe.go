package call

import (
	"context"
	"time"
)

// Observer hears of every call of this process. Implementations are safe for concurrent use and
// never block.
type Observer interface {
	// BeginClient returns ctx, with a span in it when one is wanted. c has Method, Path and Service,
	// not yet a route.
	BeginClient(ctx context.Context, c *Call) context.Context
	// EndClient is called once for each BeginClient. rec is the engine's again when it returns: it
	// must be copied to be kept.
	EndClient(c *Call, rec *Record)
}

// Record is what is known of a call when it has ended.
type Record struct {
	// Direction is "client" or "server".
	Direction string
	// Service is the name called (client), or the service that answers (server).
	Service string
	// Route is the route's name; empty when none matched and at a server.
	Route string
	// Peer is the SPIFFE ID of the other end, "plaintext", "external", or empty when no connection
	// was made.
	Peer string
	// Version is the version label of the endpoint that answered; client only.
	Version string
	Reason  Reason
	GRPC    bool
	// GRPCCode is -1 when there is none, HTTPStatus 0.
	GRPCCode, HTTPStatus int
	Start                time.Time
	Duration             time.Duration
	Attempts             int
	// MTLS says that both ends of the connection proved their SPIFFE IDs.
	MTLS         bool
	Method, Path string
	Err          error

	call *Call
}

// Decision explains a client's call; nil at a server. It is built when asked for.
func (r *Record) Decision() *Decision {
	if r.call == nil {
		return nil
	}
	return r.call.Decision()
}

// Summary is Decision without the routes that were skipped and the endpoints; nil at a server.
func (r *Record) Summary() *Decision {
	if r.call == nil {
		return nil
	}
	return r.call.Summary()
}

// Failed reports whether the call counts as failed.
func (r *Record) Failed() bool { return r.Reason != ReasonOK }

// Carrier holds propagated trace context: gRPC metadata or HTTP headers. It is the shape of
// propagation.TextMapCarrier.
type Carrier interface {
	Get(key string) string
	Set(key, value string)
	Keys() []string
}

// ServerCall is one call that a server of this process answers. The skin fills it; one ServerCall
// serves one call.
type ServerCall struct {
	// Service that answers, as "name.namespace" or as the mesh names it.
	Service      string
	Method, Path string
	GRPC         bool
	// Peer is the caller's SPIFFE ID, or "plaintext".
	Peer string
	MTLS bool
	// Start is set by BeginServer when zero.
	Start time.Time
	// Observed is the observer's own: what BeginServer puts there, EndServer finds.
	Observed any
}

// ServerObserver hears of every call that a server of this process answers.
type ServerObserver interface {
	// BeginServer returns ctx, with a span that continues the trace in from when one is wanted. from
	// may be nil.
	BeginServer(ctx context.Context, s *ServerCall, from Carrier) context.Context
	// EndServer is called once for each BeginServer, with the context that it returned.
	EndServer(ctx context.Context, s *ServerCall, r Result)
}

// Clock is the time that waits, timeouts and records are measured with.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }
