package call

import (
	"fmt"
	"strings"
)

// Result is what an attempt or a call ended with, as the skin saw it.
type Result struct {
	// Reason is ReasonOK, or what happened at the level of the transport: connect_failed, reset,
	// timeout, no_endpoint, upstream_status, cancelled ... Empty counts as OK. When a deadline or a
	// cancellation of the call's or attempt's own context lies behind cancelled, timeout or reset,
	// the engine says so itself (timeout, per_try_timeout, cancelled).
	Reason Reason
	// GRPCCode is the status of a gRPC call; -1 means none. Read for gRPC calls only.
	GRPCCode int
	// HTTPStatus of the response; zero means none.
	HTTPStatus int
	// Refused: the server certainly did not process it (REFUSED_STREAM, GOAWAY below the stream).
	Refused bool
	// Unsent: no byte of the request left.
	Unsent bool
	// Committed: the response has begun or the replay buffer overflowed; the attempt is final.
	Committed bool
	// Detail is a sentence for the caller of the RPC: no address, no key. Empty is fine.
	Detail string
	// Err is the cause. It is in the chain of the error but not in its text.
	Err error
}

// Error is why a call failed. errors.As finds it in every error that the mesh itself makes.
type Error struct {
	// Service is the name that was called, Route the route's name; Route is empty when none matched.
	Service, Route string
	Reason         Reason
	// Outcome is what the last attempt ended with: Reason itself, unless that says why no further
	// attempt was made (retry_exhausted, retry_budget).
	Outcome Reason
	// Attempts that were begun.
	Attempts int
	// Detail says what was found, Hint what to do next; either may be empty.
	Detail, Hint string
	// Err is the cause, nil when the mesh itself decided. It may name addresses, which is why
	// Error() leaves it out.
	Err error

	call *Call
}

// Error is for the caller of an RPC: no address, no key, no stack.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("mesh: ")
	fmt.Fprintf(&b, e.Reason.sentence(), e.Service)
	if e.Detail != "" {
		b.WriteString(": " + e.Detail)
	}
	if e.Attempts > 1 {
		fmt.Fprintf(&b, " (%d attempts)", e.Attempts)
	}
	if e.Hint != "" {
		b.WriteString("; " + e.Hint)
	}
	return b.String()
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Decision explains the call that failed; nil when there was none (Engine.Service).
func (e *Error) Decision() *Decision {
	if e.call == nil {
		return nil
	}
	return e.call.Decision()
}
