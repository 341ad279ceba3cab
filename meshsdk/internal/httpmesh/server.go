package httpmesh

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
)

// ServerConfig is what the server side of a Mesh needs.
type ServerConfig struct {
	// Observer hears of each call. Required.
	Observer call.ServerObserver
	// Service that answers, "name.namespace"; called at each call, it returns at once.
	Service func() string
	// Gate counts calls and refuses them once it is closed. Required.
	Gate *tcpmesh.Gate
}

// Middleware makes next a handler of the mesh: it takes identity headers off, records the call,
// and refuses it once the gate is closed. It reads who calls from the connection, so below a
// listener that is not of the mesh nobody has an identity.
func Middleware(cfg ServerConfig, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := &struct { // what a call needs, in one piece
			call.ServerCall
			recorder
			carrier
		}{
			ServerCall: call.ServerCall{
				Service: cfg.Service(),
				Method:  r.Method,
				Path:    r.URL.Path,
				GRPC:    r.ProtoMajor == 2 && isGRPC(r.Header.Get("Content-Type")),
				Peer:    "plaintext",
			},
			recorder: recorder{ResponseWriter: w, gate: cfg.Gate},
			carrier:  carrier{header: r.Header},
		}
		sc, rec := &s.ServerCall, &s.recorder
		if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
			if c, ok := tcpmesh.FromAddr(a); ok {
				sc.Peer, sc.MTLS = c.PeerName()
			}
		}
		ctx := cfg.Observer.BeginServer(r.Context(), sc, &s.carrier)
		if !cfg.Gate.Enter() {
			// RFC 9110, section 15.6.4: "the server is currently unable to handle the request due to a
			// temporary overload or scheduled maintenance".
			http.Error(rec, "mesh: the server is draining; call another instance", http.StatusServiceUnavailable)
			cfg.Observer.EndServer(ctx, sc, call.Result{Reason: call.ReasonDraining, GRPCCode: -1, HTTPStatus: rec.status, Refused: true})
			return
		}
		r = r.WithContext(ctx) // a shallow copy: the header map is still the server's own
		stripIdentity(r)
		returned := false
		defer func() {
			res := serverResult(ctx, rec, sc.GRPC, returned)
			cfg.Observer.EndServer(ctx, sc, res)
			cfg.Gate.Leave()
		}()
		next.ServeHTTP(rec, r)
		returned = true
	})
}

func isGRPC(contentType string) bool {
	rest, ok := strings.CutPrefix(contentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// identityHeaders are in the spelling that net/http gives headers that come in.
var identityHeaders = func() []string {
	var keys []string
	for _, h := range tcpmesh.HTTPIdentityHeaders {
		keys = append(keys, http.CanonicalHeaderKey(h))
	}
	return keys
}()

// stripIdentity takes the headers off by which somebody could claim to be somebody. The map is
// replaced only when there is one.
func stripIdentity(r *http.Request) {
	cloned := false
	for _, key := range identityHeaders {
		if _, ok := r.Header[key]; !ok {
			continue
		}
		if !cloned {
			r.Header, cloned = r.Header.Clone(), true
		}
		delete(r.Header, key)
	}
}

// serverResult is how a handler's end is recorded; returned is false after a panic.
func serverResult(ctx context.Context, rec *recorder, grpc, returned bool) call.Result {
	res := call.Result{Reason: call.ReasonOK, GRPCCode: -1, HTTPStatus: rec.status}
	if res.HTTPStatus == 0 {
		// net/http: "If WriteHeader is not called explicitly, the first call to Write will trigger an
		// implicit WriteHeader(http.StatusOK)"; so does the return of the handler.
		res.HTTPStatus = http.StatusOK
	}
	if grpc {
		if n, err := strconv.Atoi(rec.Header().Get("Grpc-Status")); err == nil {
			res.GRPCCode = n
		}
	}
	switch {
	case !returned && rec.status == 0:
		res.Reason, res.HTTPStatus = call.ReasonReset, 0 // net/http closes the connection
	case !returned:
		res.Reason = call.ReasonReset
	case res.HTTPStatus < 500 && res.GRPCCode <= 0:
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		res.Reason = call.ReasonTimeout
	case ctx.Err() != nil:
		res.Reason = call.ReasonCancelled
	default:
		res.Reason = call.ReasonUpstreamStatus
	}
	return res
}

// recorder notes the status of a response and passes everything on. http.ResponseController finds
// what lies under it by Unwrap.
type recorder struct {
	http.ResponseWriter
	gate   *tcpmesh.Gate
	status int // 0 until the header is written
}

func (w *recorder) WriteHeader(code int) {
	if w.status == 0 && (code >= 200 || code == http.StatusSwitchingProtocols) {
		w.status = code
		// Keep-alive ends with the drain; for HTTP/2 net/http turns this into a GOAWAY.
		if w.gate.Closed() && code != http.StatusSwitchingProtocols {
			w.Header().Set("Connection", "close")
		}
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *recorder) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(p)
}

// WriteString spares the copy where the server can.
func (w *recorder) WriteString(s string) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	return io.WriteString(w.ResponseWriter, s)
}

// ReadFrom keeps sendfile reachable.
func (w *recorder) ReadFrom(src io.Reader) (int64, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	return io.Copy(w.ResponseWriter, src)
}

// Flush is here for handlers that ask for http.Flusher; it does nothing where the server cannot.
func (w *recorder) Flush() {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

// Hijack is here for handlers that ask for http.Hijacker. A hijacked connection counts as in flight
// until the handler returns.
func (w *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil && w.status == 0 {
		w.status = http.StatusSwitchingProtocols
	}
	return c, rw, err
}

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }
