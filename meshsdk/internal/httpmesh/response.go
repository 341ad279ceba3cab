package httpmesh

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
)

// ending ends a call with its response.
type ending struct {
	cl     *call.Call
	status int
	guard  *grpcmesh.Guard // nil for the outside
	body   *body           // of the request; nil for the outside
	conn   *conn           // nil for the outside
	raw    bool            // errors pass as they are

	once sync.Once
	err  error
}

// end ends the call, once. err is that of reading the response; nil and io.EOF are none.
func (e *ending) end(err error) error {
	e.once.Do(func() {
		res := call.Result{Reason: call.ReasonOK, GRPCCode: -1, HTTPStatus: e.status, Committed: true}
		if e.status >= 500 {
			res.Reason = call.ReasonUpstreamStatus
		}
		failed := err != nil && err != io.EOF //nolint:errorlint // io.EOF: "Read must return EOF itself, not an error wrapping EOF"
		cut := e.guard.End()
		if err != nil && !failed && !e.raw && (cut != nil || e.cl.Err() != nil) {
			// A server that notices that its caller is gone ends its answer in good order, and that end
			// may be read before the connection is closed here: what was read is not the whole.
			failed, err = true, io.ErrUnexpectedEOF
		}
		if failed {
			res.Reason, res.Err, res.Detail = call.ReasonReset, err, "while reading the response: "+grpcmesh.Describe(err)
			if ctxErr := e.cl.Err(); ctxErr != nil {
				res.Err = errors.Join(ctxErr, err)
			}
		}
		if cut != nil && failed {
			res.Reason, res.Detail = *cut, "nothing moved while reading the response"
		}
		if e.body != nil {
			e.body.end(failed)
		}
		end := e.cl.End(res)
		if failed {
			e.err = timely(end)
		}
		if e.conn != nil {
			e.conn.pool.done(e.conn)
		}
	})
	return e.err
}

// wrapBody makes e end with the body of resp: when it was read or closed, at once when it is empty.
func wrapBody(resp *http.Response, e *ending) {
	if resp.Body == nil || resp.Body == http.NoBody {
		_ = e.end(nil)
		return
	}
	b := &responseBody{inner: resp.Body, ending: e, unwatch: func() bool { return false }}
	resp.Body = b
	if resp.StatusCode == http.StatusSwitchingProtocols {
		if w, ok := b.inner.(io.Writer); ok {
			resp.Body = &upgraded{responseBody: b, Writer: w}
		}
		return
	}
	// A caller may leave a response by ending its context and nothing else: net/http then lets go of
	// the connection, and what the call holds must not stay taken.
	b.unwatch = context.AfterFunc(e.cl, func() { _ = e.end(context.Cause(e.cl)) })
}

// responseBody is the body of a response; reading it keeps an idle call alive.
type responseBody struct {
	inner   io.ReadCloser
	ending  *ending
	unwatch func() bool
}

func (b *responseBody) Read(p []byte) (int, error) {
	n, err := b.inner.Read(p)
	b.ending.guard.Move()
	if err == nil {
		return n, nil
	}
	b.unwatch()
	if failed := b.ending.end(err); failed != nil && !b.ending.raw {
		return n, failed
	}
	return n, err
}

// Close ends the call; what was not read is no failure.
func (b *responseBody) Close() error {
	b.unwatch()
	err := b.inner.Close()
	_ = b.ending.end(nil)
	return err
}

// upgraded is the body of a 101: the connection itself (net/http, Response.Body: "As of Go 1.12, the
// Body will also implement io.Writer on a successful "101 Switching Protocols" response").
type upgraded struct {
	*responseBody
	io.Writer
}
