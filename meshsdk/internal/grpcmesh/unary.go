package grpcmesh

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
)

// headers are the outgoing metadata of a call, as a route sees them; they are read when a route
// asks for one.
type headers struct {
	ctx context.Context
	md  atomic.Pointer[metadata.MD]
}

// Get implements route.Headers. gRFC A28: "Metadata keys ending in -bin ... are not visible", those
// that the library sets itself neither, and content-type is "application/grpc".
func (h *headers) Get(name string) (string, bool) {
	switch {
	case name == "content-type":
		return "application/grpc", true
	case strings.HasSuffix(name, "-bin"), strings.HasPrefix(name, "grpc-"), strings.HasPrefix(name, ":"),
		name == "user-agent", name == "te":
		return "", false
	}
	md := h.md.Load()
	if md == nil {
		out, _ := metadata.FromOutgoingContext(h.ctx)
		md = &out
		h.md.Store(md)
	}
	v, ok := (*md)[name]
	if !ok {
		return "", false
	}
	if len(v) == 1 {
		return v[0], true
	}
	return strings.Join(v, ","), true
}

// request describes a call to the engine. The codes in a route's policy are its author's word that
// the method may be repeated, so every call counts as idempotent.
func request(method, authority string, h *headers, opts []grpc.CallOption) call.Request {
	return call.Request{
		Request:      route.Request{Method: http.MethodPost, Path: method, Header: h},
		Authority:    authority,
		GRPC:         true,
		Idempotent:   true,
		WaitForReady: waits(opts),
	}
}

// waits reports whether the call is to wait for ready; the last option wins.
func waits(opts []grpc.CallOption) bool {
	wait := false
	for _, o := range opts {
		if f, ok := o.(grpc.FailFastCallOption); ok {
			wait = !f.FailFast
		}
	}
	return wait
}

// canonical is the method as it is matched and sent. One with no single meaning is left as it is,
// for the engine to refuse.
func canonical(method string) string {
	if path, ok := route.Canonical(method); ok {
		return path
	}
	return method
}

// unaryCall is what a unary call needs beside the engine's Call, in one piece.
type unaryCall struct {
	try
	headers headers
	trace   traceContext
}

// unary is the interceptor of unary calls: the life of a call from Begin to End. A retry calls
// invoker, and with it everything that was given after this interceptor, again.
func (c *Client) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	ch := c.target(cc.Target())
	listener, mesh, err := ch.decide(ctx, c)
	if err != nil {
		return c.undecided(ctx, ch, method, err)
	}
	if !mesh {
		return c.outside(ctx, ch, method, func(ctx context.Context) error {
			return invoker(ctx, method, req, reply, cc, opts...)
		})
	}
	method = canonical(method)
	u := &unaryCall{headers: headers{ctx: ctx}}
	r := request(method, listener, &u.headers, opts)
	cl, err := c.cfg.Engine.Begin(ctx, listener, &r)
	if err != nil {
		return wrap(err)
	}
	defer cl.Unwind()
	u.trace.take(c, cl)
	for t := &u.try; ; t = new(try) {
		a, err := cl.Next()
		if err != nil {
			return finish(cl, exhausted(err), nil)
		}
		t.Context, t.attempt, t.bounded = a, a, true
		var g *Guard
		if cl.Idle() > 0 {
			g = NewGuard(c.cfg.Clock, a)
			g.Idle(cl.Idle())
			t.Context = g.Context()
		}
		err = invoker(u.trace.into(t), method, req, reply, cc, opts...)
		if g != nil {
			t.cut = g.End()
		}
		if err == nil {
			return finish(cl, t.result(nil, true), nil)
		}
		res := t.result(err, t.answered && !foreign(err))
		if !cl.Retry(res) {
			return finish(cl, res, err)
		}
	}
}

// traceContext is the trace context of a call: taken once, added to the metadata of each attempt. It
// is a call.Carrier that holds little, mostly nothing.
type traceContext struct {
	kv []string // names and values in turn
}

// take asks for the trace context of cl.
func (t *traceContext) take(c *Client, cl *call.Call) {
	if c.cfg.Inject != nil {
		c.cfg.Inject(cl, t)
	}
}

// into is ctx with the trace context in its metadata.
func (t *traceContext) into(ctx context.Context) context.Context {
	if len(t.kv) == 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, t.kv...)
}

// Get is the value of key.
func (t *traceContext) Get(key string) string {
	for i := 0; i < len(t.kv); i += 2 {
		if t.kv[i] == strings.ToLower(key) {
			return t.kv[i+1]
		}
	}
	return ""
}

// Set replaces the value of key.
func (t *traceContext) Set(key, value string) {
	key = strings.ToLower(key) // as metadata has it
	for i := 0; i < len(t.kv); i += 2 {
		if t.kv[i] == key {
			t.kv[i+1] = value
			return
		}
	}
	if t.kv == nil {
		t.kv = make([]string, 0, 4) // traceparent, and tracestate or baggage
	}
	t.kv = append(t.kv, key, value)
}

// Keys lists the names.
func (t *traceContext) Keys() []string {
	var keys []string
	for i := 0; i < len(t.kv); i += 2 {
		keys = append(keys, t.kv[i])
	}
	return keys
}
