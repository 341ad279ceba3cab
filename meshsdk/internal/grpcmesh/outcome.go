package grpcmesh

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// result says what an attempt ended with, from the error of gRPC and what the picker noted.
// answered says that response headers came, which commits the call to the attempt.
func (t *try) result(err error, answered bool) call.Result {
	if err == nil || ended(err) {
		return call.Result{Reason: call.ReasonOK, Committed: true}
	}
	code := status.Code(err)
	r := call.Result{GRPCCode: int(code), Err: err, Committed: answered, Detail: t.detail}
	if t.cause != nil {
		r.Err = errors.Join(t.cause, err)
	}
	if t.cut != nil {
		r.Reason, r.GRPCCode, r.Detail = *t.cut, int(codes.DeadlineExceeded), ""
		return r
	}
	switch {
	case t.reason != "" && (code == codes.Unavailable || t.waiting):
		r.Reason, r.Unsent = t.reason, true
		// No endpoint of the cluster has a connection: only a policy, with its back-off, makes
		// another attempt worth while.
		r.Committed = t.attempt.Call().Route().Retry == nil
	case t.trailer:
		r.Reason, r.Detail = call.ReasonUpstreamStatus, ""
	case code == codes.Canceled && (t.Err() != nil || closing(err)):
		r.Reason = call.ReasonCancelled
		if errors.Is(t.Err(), context.DeadlineExceeded) {
			// The server, which was told of the deadline, reset the stream just before this end did.
			r.Reason, r.GRPCCode = call.ReasonTimeout, int(codes.DeadlineExceeded)
		}
		r.Err = errors.Join(r.Err, t.Err()) // for errors.Is
	case code == codes.DeadlineExceeded && t.Err() != nil:
		r.Reason = call.ReasonTimeout
		r.Err = errors.Join(r.Err, t.Err())
		if t.waiting || t.reason != "" {
			r.Unsent = true
			if r.Detail == "" {
				r.Detail = "no connection was ready in time"
			}
		}
	case !t.sent && code == codes.Unavailable && t.picked && !strings.Contains(err.Error(), "failed to validate authority"):
		// The connection was lost before a stream was opened on it.
		r.Reason, r.Unsent = call.ReasonReset, true
	case !t.sent:
		// gRPC refused to send: call credentials that failed, an authority that the other end is not,
		// a resolver that cannot be built. Another attempt would end the same, and its text says why.
		r.Reason, r.Committed = call.ReasonUpstreamStatus, true
	case t.received:
		r.Reason = call.ReasonUpstreamStatus
		if broken(err) {
			r.Reason = call.ReasonReset
		}
	case code == codes.Unavailable, broken(err):
		r.Reason, r.Refused = call.ReasonReset, refused(err)
	default:
		// As above: gRPC opened the stream and then could not encode the message.
		r.Reason, r.Committed = call.ReasonUpstreamStatus, true
	}
	return r
}

// broken reports whether a status is about the connection: gRPC makes it itself then, and says so in
// words only.
func broken(err error) bool {
	msg := status.Convert(err).Message()
	for _, own := range []string{"stream terminated by RST_STREAM", "error reading from server", "transport is closing", "connection error"} {
		if strings.Contains(msg, own) {
			return true
		}
	}
	return false
}

// foreign reports whether a status was made of an answer that is not gRPC, an error page of something
// in between: as gRPC sees it, no headers of a response came. That the content-type is wrong is said
// in words only.
func foreign(err error) bool {
	msg := status.Convert(err).Message()
	return strings.Contains(msg, "missing HTTP content-type") || strings.Contains(msg, "received unexpected content-type")
}

// refused reports whether the server has certainly not processed a call of which nothing was
// received. RFC 9113, 8.7: "The REFUSED_STREAM error code can be included in a RST_STREAM frame to
// indicate that the stream is being closed prior to any processing having occurred." gRPC has then
// tried once more by itself.
func refused(err error) bool {
	msg := status.Convert(err).Message()
	return strings.HasSuffix(msg, "REFUSED_STREAM") || strings.Contains(msg, "the connection is draining")
}

// callError is what the caller of an RPC gets: the status that the field would give, and the
// mesh's *call.Error for errors.As.
type callError struct {
	status *status.Status
	mesh   error
}

func (e *callError) Error() string { return e.status.Err().Error() }

// GRPCStatus is what status.FromError and status.Code read.
func (e *callError) GRPCStatus() *status.Status { return e.status }

// Unwrap gives the *call.Error.
func (e *callError) Unwrap() error { return e.mesh }

// finish ends the call and gives the error for the caller; nil for a success. err is gRPC's, nil
// when there is none.
func finish(c *call.Call, r call.Result, err error) error {
	if r.Reason == call.ReasonUpstreamStatus && err != nil {
		// The status of the server passes as it is: code, message and details.
		return &callError{status: status.Convert(err), mesh: c.End(r)}
	}
	failed := c.End(r)
	if failed == nil {
		return nil
	}
	return wrap(failed)
}

// wrap gives an error of the mesh its gRPC status.
func wrap(failed error) error {
	var e *call.Error
	if !errors.As(failed, &e) {
		return failed
	}
	code := codeOf(e.Outcome) // why no further attempt was made is no code of its own
	return &callError{status: status.New(code, e.Error()), mesh: failed}
}

// codeOf is the code that the field uses. gRFC A27 and A32 fail with UNAVAILABLE what finds no
// route, cluster, endpoint or place under the limit; https://grpc.io/docs/guides/status-codes/
// for the others.
func codeOf(r call.Reason) codes.Code {
	switch r {
	case call.ReasonOK:
		return codes.OK
	case call.ReasonTimeout, call.ReasonPerTryTimeout:
		return codes.DeadlineExceeded
	case call.ReasonCancelled:
		return codes.Canceled
	case call.ReasonRateLimited:
		return codes.ResourceExhausted
	case call.ReasonDenied:
		return codes.PermissionDenied
	case call.ReasonUnauthenticated:
		return codes.Unauthenticated
	}
	return codes.Unavailable
}

// exhausted is the Result for a Next that failed.
func exhausted(err error) call.Result {
	r := call.Result{Reason: call.ReasonTimeout, GRPCCode: int(codes.DeadlineExceeded), Err: err}
	var e *call.Error
	if errors.As(err, &e) {
		r.Reason, r.GRPCCode = e.Reason, int(codeOf(e.Reason))
	}
	return r
}
