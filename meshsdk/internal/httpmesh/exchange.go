package httpmesh

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
)

// maxStale is how often one attempt takes another connection when the one it took from the pool
// turns out to have been closed by the server before anything was written.
const maxStale = 5

// maxDiscard is how long the rest of a response is waited for that is thrown away.
const maxDiscard = time.Second

// exchange is one request on its way: the attempts of a call.
type exchange struct {
	transport *Transport
	cl        *call.Call
	req       *http.Request // the caller's; stays as it is
	url       *url.URL      // as all attempts send it
	header    http.Header   // likewise
	body      body
}

// newExchange makes what all attempts send.
func newExchange(t *Transport, cl *call.Call, req *http.Request, path string) *exchange {
	x := &exchange{transport: t, cl: cl, req: req, url: req.URL, header: t.inject(cl, req.Header), body: body{cl: cl, req: req}}
	if path != req.URL.EscapedPath() {
		x.url = withPath(req.URL, path)
	}
	return x
}

// run makes attempts until one has a response to give, or the call fails.
func (x *exchange) run() (*http.Response, error) {
	if x.cl.Cluster().HTTP2 && len(x.req.Header["Upgrade"]) > 0 {
		return nil, x.fail(call.Result{
			Reason: call.ReasonConnectFailed, GRPCCode: -1, Unsent: true, Err: errUpgrade, Detail: errUpgrade.Error(),
		})
	}
	for {
		a, err := x.cl.Next()
		if err != nil {
			return nil, x.fail(exhausted(err))
		}
		ctx := context.Context(a)
		var g *grpcmesh.Guard // nil where calls have no such time
		if idle := x.cl.Idle(); idle > 0 {
			g = grpcmesh.NewGuard(x.transport.cfg.Clock, a)
			g.Idle(idle)
			ctx = g.Context()
		}
		resp, c, res := x.attempt(ctx, a, g)
		if resp == nil {
			if cut := g.End(); cut != nil {
				res.Reason, res.Detail = *cut, ""
			}
			if x.cl.Retry(res) {
				continue
			}
			return nil, x.fail(res)
		}
		a.Commit()
		if res.Reason != call.ReasonOK && x.body.again() && x.cl.Retry(res) {
			// Beside the next attempt: the rest of the response may never come.
			drop := func() {
				stop := x.transport.cfg.Clock.AfterFunc(maxDiscard, func() { _ = resp.Body.Close() })
				discard(resp)
				stop()
				c.pool.done(c)
				g.End()
			}
			if !x.transport.spawn(drop) {
				_ = resp.Body.Close() // with the Transport
			}
			continue
		}
		resp.Request = x.req
		resp.TLS = c.tls
		e := &ending{cl: x.cl, guard: g, status: resp.StatusCode, body: &x.body, conn: c}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			// The connection is the caller's now, and no time of ours runs on it.
			g.End()
		}
		wrapBody(resp, e)
		return resp, nil
	}
}

// fail ends a call without response.
func (x *exchange) fail(res call.Result) error {
	x.body.end(true)
	return timely(x.cl.End(res))
}

func exhausted(err error) call.Result {
	r := call.Result{Reason: call.ReasonTimeout, GRPCCode: -1, Err: err}
	var e *call.Error
	if errors.As(err, &e) {
		r.Reason = e.Reason
	}
	return r
}

// discard makes the connection of a response that nobody reads free again, when that is cheap.
func discard(resp *http.Response) {
	if resp.ContentLength >= 0 && resp.ContentLength <= 64<<10 {
		_, _ = io.Copy(io.Discard, resp.Body)
	}
	_ = resp.Body.Close()
}

// attempt sends the request once. Without a response res says why.
func (x *exchange) attempt(ctx context.Context, a *call.Attempt, g *grpcmesh.Guard) (*http.Response, *conn, call.Result) {
	for stale := 0; ; stale++ {
		grant, res := x.connect(ctx, a)
		if grant.conn == nil {
			return nil, nil, res
		}
		c := grant.conn
		answered := c.wire.read.Load()
		resp, res := x.send(ctx, c, g)
		if resp != nil {
			return resp, c, res
		}
		c.pool.done(c)
		a.Release()
		// RFC 9112, 9.3.1: "when an inbound connection is closed prematurely, a client MAY open a new
		// connection and automatically retransmit an aborted sequence of requests if all of those
		// requests have idempotent methods". A connection from the pool may have been closed by the
		// server just then: what was not sent is sent on another one, and so is what may be repeated and
		// got not a byte of answer. With HTTP/2 the server says what it has processed.
		silent := !c.pool.id.h2 && c.wire.read.Load() == answered && x.cl.Request().Idempotent
		if !grant.reused || stale == maxStale || res.Committed || ctx.Err() != nil || !res.Unsent && !silent {
			return nil, nil, res
		}
	}
}

// connect picks an endpoint and takes a place on a connection to it. Endpoints that cannot be
// connected to are set aside and the next one is picked, until none is left.
func (x *exchange) connect(ctx context.Context, a *call.Attempt) (grant, call.Result) {
	t := x.transport
	cluster := x.cl.Cluster()
	avoid := a.Tried()
	if t.aside.n.Load() > 0 {
		avoid = slices.Clip(avoid)
		now := t.cfg.Clock.Now()
		for _, ep := range cluster.Set.Endpoints() {
			if t.aside.has(keyOf(ep, cluster), now) {
				avoid = append(avoid, ep)
			}
		}
	}
	var failed []*endpoint.Endpoint
	res := call.Result{Reason: call.ReasonNoEndpoint, GRPCCode: -1, Unsent: true, Detail: cluster.EmptyReason}
	for {
		ep := cluster.Set.Pick(avoid)
		if ep == nil || slices.Contains(failed, ep) {
			return grant{}, res
		}
		p := t.pool(ep, cluster)
		if p == nil {
			return grant{}, call.Result{Reason: call.ReasonDraining, GRPCCode: -1, Unsent: true, Err: errClosed, Detail: errClosed.Error()}
		}
		a.Picked(ep)
		got := p.get(ctx)
		if got.err == nil {
			a.Connected(got.conn.peer, got.conn.tls != nil)
			return got, res
		}
		res = call.Result{Reason: call.ReasonConnectFailed, GRPCCode: -1, Unsent: true, Err: got.err, Detail: grpcmesh.Describe(got.err)}
		if ctx.Err() != nil {
			res.Reason, res.Detail = call.ReasonCancelled, "while connecting" // the engine tells a deadline from it
			return grant{}, res
		}
		failed = append(failed, ep)
		avoid = append(slices.Clip(avoid), ep)
	}
}

// send makes one round trip on c.
func (x *exchange) send(ctx context.Context, c *conn, g *grpcmesh.Guard) (*http.Response, call.Result) {
	content, err := x.body.next(g)
	if err != nil {
		c.cc.Release()
		return nil, call.Result{Reason: call.ReasonCancelled, GRPCCode: -1, Err: err, Committed: true, Detail: "the body of the request cannot be read again"}
	}
	var wrote *atomic.Bool // HTTP/2 shares the connection: what was written says nothing of one request
	traced := ctx
	if c.pool.id.h2 {
		wrote = new(atomic.Bool)
		traced = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteHeaders: func() { wrote.Store(true) }})
		x.url = withScheme(x.url, c.tls != nil)
	}
	out := x.req.WithContext(traced)
	out.URL, out.Header, out.Body = x.url, x.header, content
	before := c.wire.written.Load()
	resp, err := c.cc.RoundTrip(out)
	if err == nil {
		return resp, x.status(resp.StatusCode)
	}
	res := call.Result{Reason: call.ReasonReset, GRPCCode: -1, Err: err, Detail: grpcmesh.Describe(err), Committed: !x.body.again()}
	switch {
	case x.body.failed() != nil:
		// The caller's own body: its error is the caller's to see, and repeating does not help.
		res.Reason, res.Committed, res.Detail = call.ReasonCancelled, true, "the body of the request could not be read"
		res.Err = errors.Join(x.body.failed(), err)
	case c.pool.id.h2:
		// net/http gives up on a context without waiting for a write that is under way.
		res.Unsent = !wrote.Load() && ctx.Err() == nil
		res.Refused = refused(err)
	default:
		res.Unsent = c.wire.written.Load() == before
	}
	if ctxErr := ctx.Err(); ctxErr != nil {
		res.Err = errors.Join(ctxErr, err)
	}
	return nil, res
}

// status says what a response means to the engine. The caller gets it in any case.
func (x *exchange) status(code int) call.Result {
	res := call.Result{Reason: call.ReasonOK, GRPCCode: -1, HTTPStatus: code}
	p := x.cl.Route().Retry
	if code >= 500 || p != nil && slices.Contains(p.Codes, uint32(code)) {
		res.Reason = call.ReasonUpstreamStatus
	}
	return res
}

// streamError has the shape of net/http's own error of a stream, whose As method fills it.
type streamError struct {
	StreamID uint32
	Code     uint32
	Cause    error
}

func (streamError) Error() string { return "stream error" }

// refused reports whether HTTP/2 says that the server has not processed the request: RFC 9113, 8.7,
// the error code REFUSED_STREAM, and 6.8 for streams above that of a GOAWAY. net/http keeps both
// errors to itself: the one fills a struct of its shape, the other has words only.
func refused(err error) bool {
	const refusedStream = 0x7
	var se streamError
	if errors.As(err, &se) {
		return se.Code == refusedStream
	}
	s := err.Error()
	return strings.Contains(s, "graceful shutdown GOAWAY") || strings.Contains(s, "client conn not usable")
}
