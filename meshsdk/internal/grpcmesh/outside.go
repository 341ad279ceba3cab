package grpcmesh

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// outside makes a unary call to a name that is not of the mesh: as gRPC would, but counted.
func (c *Client) outside(ctx context.Context, ch *channel, method string, invoke func(context.Context) error) error {
	cl, err := c.beginOutside(ctx, ch, method)
	if err != nil {
		return err
	}
	a, _ := cl.Next()
	var trace traceContext
	trace.take(c, cl)
	err = invoke(trace.into(a))
	_ = cl.End(outsideResult(err))
	return err
}

// beginOutside begins a call to the outside, or refuses it.
func (c *Client) beginOutside(ctx context.Context, ch *channel, method string) (*call.Call, error) {
	h := &headers{ctx: ctx}
	r := request(method, ch.name, h, nil)
	cl := c.cfg.Engine.BeginExternal(ctx, ch.name, &r)
	if c.cfg.External != Deny {
		return cl, nil
	}
	res := call.Result{Reason: call.ReasonDenied, GRPCCode: int(codes.PermissionDenied), Unsent: true, Detail: errDenied.Error(), Err: errDenied}
	return nil, wrap(cl.End(res))
}

// outsideResult classifies by the code alone: what lies behind it the mesh has not seen.
func outsideResult(err error) call.Result {
	if err == nil {
		return call.Result{Reason: call.ReasonOK}
	}
	r := call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: int(status.Code(err)), Err: err, Committed: true}
	switch status.Code(err) {
	case codes.Canceled:
		r.Reason = call.ReasonCancelled
	case codes.DeadlineExceeded:
		r.Reason = call.ReasonTimeout
	}
	return r
}

// outsideStream counts a stream to the outside: it ends when gRPC says that it has.
func (c *Client) outsideStream(ctx context.Context, ch *channel, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts []grpc.CallOption) (grpc.ClientStream, error) {
	cl, err := c.beginOutside(ctx, ch, method)
	if err != nil {
		return nil, err
	}
	a, _ := cl.Next()
	opts = append(opts[:len(opts):len(opts)], grpc.OnFinish(func(err error) { _ = cl.End(outsideResult(err)) }))
	var trace traceContext
	trace.take(c, cl)
	s, err := streamer(trace.into(a), desc, cc, method, opts...)
	if err != nil {
		_ = cl.End(outsideResult(err))
	}
	return s, err
}
