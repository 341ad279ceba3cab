package httpmesh

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
)

// serverSeen is a ServerObserver that keeps the last call.
type serverSeen struct {
	ended int
	call  call.ServerCall
	last  call.Result
}

func (s *serverSeen) BeginServer(ctx context.Context, c *call.ServerCall, _ call.Carrier) context.Context {
	s.call = *c
	return ctx
}

func (s *serverSeen) EndServer(_ context.Context, _ *call.ServerCall, r call.Result) {
	s.ended++
	s.last = r
}

func TestMiddlewareRecords(t *testing.T) {
	for name, tc := range map[string]struct {
		handler http.HandlerFunc
		status  int
		reason  call.Reason
		panics  bool
	}{
		"nothing written":      {func(http.ResponseWriter, *http.Request) {}, 200, call.ReasonOK, false},
		"a client's mistake":   {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, 404, call.ReasonOK, false},
		"a failure":            {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, 503, call.ReasonUpstreamStatus, false},
		"an early hint before": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(103); w.WriteHeader(201) }, 201, call.ReasonOK, false},
		"a reader":             {func(w http.ResponseWriter, _ *http.Request) { io.Copy(w, strings.NewReader("x")) }, 200, call.ReasonOK, false},
		"a flush": {func(w http.ResponseWriter, _ *http.Request) {
			if err := http.NewResponseController(w).Flush(); err != nil {
				panic(err)
			}
		}, 200, call.ReasonOK, false},
		"a panic before the header": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 0, call.ReasonReset, true},
		"a panic after it":          {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200); panic(http.ErrAbortHandler) }, 200, call.ReasonReset, true},
	} {
		t.Run(name, func(t *testing.T) {
			o := new(serverSeen)
			gate := tcpmesh.NewGate()
			h := Middleware(ServerConfig{Observer: o, Service: func() string { return "orders.default" }, Gate: gate}, tc.handler)
			func() {
				defer func() {
					if got := recover() != nil; got != tc.panics {
						t.Errorf("panicked %v, want %v", got, tc.panics)
					}
				}()
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/v1", nil))
			}()
			if o.ended != 1 || o.last.HTTPStatus != tc.status || o.last.Reason != tc.reason || gate.InFlight() != 0 {
				t.Errorf("%d ends, %+v, want %d %s", o.ended, o.last, tc.status, tc.reason)
			}
			if o.call.Service != "orders.default" || o.call.Path != "/v1" || o.call.Peer != "plaintext" || o.call.MTLS {
				t.Errorf("call %+v", o.call)
			}
		})
	}
}

func TestMiddlewareStripsIdentityAndLeavesTheRequestAlone(t *testing.T) {
	var seen http.Header
	h := Middleware(ServerConfig{Observer: new(serverSeen), Service: func() string { return "" }, Gate: tcpmesh.NewGate()},
		http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = r.Header }))
	req := httptest.NewRequest("GET", "/", nil)
	for _, name := range tcpmesh.HTTPIdentityHeaders {
		req.Header.Add(name, "me")
		req.Header.Add(name, "me again")
	}
	req.Header.Set("X-Kept", "1")
	before := len(req.Header)
	h.ServeHTTP(httptest.NewRecorder(), req)
	if len(seen) != 1 || seen.Get("X-Kept") != "1" {
		t.Errorf("the handler saw %v", seen)
	}
	if len(req.Header) != before {
		t.Errorf("the caller's request was changed: %v", req.Header)
	}
}

func TestMiddlewareTakesTheStatusOfGRPC(t *testing.T) {
	o := new(serverSeen)
	h := Middleware(ServerConfig{Observer: o, Service: func() string { return "" }, Gate: tcpmesh.NewGate()},
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "Grpc-Status")
			w.WriteHeader(200)
			w.Header().Set("Grpc-Status", "14")
		}))
	req := httptest.NewRequest("POST", "/a.B/C", nil)
	req.ProtoMajor = 2
	req.Header.Set("Content-Type", "application/grpc+proto")
	h.ServeHTTP(httptest.NewRecorder(), req)
	if !o.call.GRPC || o.last.GRPCCode != 14 || o.last.Reason != call.ReasonUpstreamStatus {
		t.Errorf("%+v %+v", o.call, o.last)
	}
}
