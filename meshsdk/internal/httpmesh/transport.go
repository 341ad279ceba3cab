package httpmesh

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
)

// Clock tells time; nil is the real one.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// Config of a Transport.
type Config struct {
	// Engine runs the calls. Required.
	Engine *call.Engine
	// Identity proves who we are. Nil: endpoints that want mesh TLS are not reached.
	Identity identity.Source
	// Dial makes the connections to endpoints, and to the outside when Base is nil. Nil means
	// net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// InMesh gives the listener of a name of the mesh; ok is false for the outside. It may wait; err
	// says that ctx ended first. grpcmesh.Parse is what it is made of. Nil: every name is outside.
	InMesh func(ctx context.Context, host string) (listener string, ok bool, err error)
	// External is for the names that are not.
	External grpcmesh.ExternalPolicy
	// Inject writes the trace context of ctx into what is sent; nil injects nothing.
	Inject func(ctx context.Context, to call.Carrier)
	// Base makes requests to the outside as it is, and lends connections of the mesh its bounds:
	// IdleConnTimeout, MaxConnsPerHost (for one endpoint), MaxIdleConnsPerHost (default 100),
	// ResponseHeaderTimeout, ExpectContinueTimeout, MaxResponseHeaderBytes, the buffer sizes, HTTP2,
	// DisableKeepAlives and DisableCompression. Nil means a copy of http.DefaultTransport.
	Base  *http.Transport
	Log   *slog.Logger // nil discards
	Clock Clock
}

// Transport is an http.RoundTripper. Requests to a name of the mesh, by http or https alike, go
// through the mesh; all others go over Base. It is safe for concurrent use.
type Transport struct {
	cfg    Config
	h1, h2 *http.Transport
	ctx    context.Context // of connecting; ends with Close
	cancel context.CancelFunc

	followed sync.Map // listener -> struct{}: what the engine tells changes of
	aside    aside

	mu     sync.Mutex                  // guards what follows; taken before the lock of a pool
	pools  map[poolKey]*pool           // those that requests use
	every  map[*pool]struct{}          // the retired ones as well, until they are empty
	live   map[string]map[poolKey]bool // listener -> what it can use now
	stops  map[string]func()           // listener -> end of following it
	sweep  func() bool                 // stops the timer; nil when none is due
	closed bool

	spawning sync.Mutex     // guards wg.Go against Close; the last lock taken
	wg       sync.WaitGroup // goroutines that connect and close
}

// New returns a Transport of cfg. Nothing is connected before the first request.
func New(cfg Config) *Transport {
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	if cfg.InMesh == nil {
		cfg.InMesh = func(context.Context, string) (string, bool, error) { return "", false, nil }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Base == nil {
		cfg.Base = http.DefaultTransport.(*http.Transport).Clone()
		cfg.Base.DialContext = cfg.Dial
	}
	t := &Transport{
		cfg: cfg, pools: make(map[poolKey]*pool), every: make(map[*pool]struct{}), live: make(map[string]map[poolKey]bool), stops: make(map[string]func()),
	}
	t.aside.clock = cfg.Clock
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.h1, t.h2 = inner(cfg.Base), inner(cfg.Base)
	t.h1.Protocols.SetHTTP1(true)
	t.h2.Protocols.SetUnencryptedHTTP2(true) // TLS is made by dial, before HTTP begins
	if t.h2.HTTP2 == nil {
		// Notices an endpoint that vanished without a word.
		t.h2.HTTP2 = &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second}
	}
	return t
}

// inner is a transport that makes connections of the mesh and pools none.
func inner(base *http.Transport) *http.Transport {
	return &http.Transport{
		DialContext:            dialFromContext,
		Protocols:              new(http.Protocols),
		HTTP2:                  base.HTTP2,
		DisableKeepAlives:      base.DisableKeepAlives,
		DisableCompression:     base.DisableCompression,
		ResponseHeaderTimeout:  base.ResponseHeaderTimeout,
		ExpectContinueTimeout:  base.ExpectContinueTimeout,
		MaxResponseHeaderBytes: base.MaxResponseHeaderBytes,
		WriteBufferSize:        base.WriteBufferSize,
		ReadBufferSize:         base.ReadBufferSize,
	}
}

var (
	errDenied  = errors.New("it is not a name of the mesh, and calls to the outside are refused (WithFallback)")
	errConnect = errors.New("CONNECT asks for a proxy, and there is none in the mesh: call the service by its name")
	errUpgrade = errors.New("the service speaks HTTP/2, which has no Upgrade (websocket): declare its port with protocol HTTP")
	errOpaque  = errors.New("the URL is opaque: want http://NAME/PATH")
)

// RoundTrip sends req and gives the response, whatever its status: what the server answered is no
// error. Failures of the mesh are *call.Error. The request is not changed; its body is closed.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL == nil || req.Header == nil || req.URL.Scheme != "http" && req.URL.Scheme != "https" {
		return t.cfg.Base.RoundTrip(req) // for its errors and registered protocols
	}
	listener, mesh, err := t.cfg.InMesh(req.Context(), req.URL.Host)
	switch {
	case err != nil: // the engine tells a deadline from it
		return nil, t.refuse(req, req.URL.Host, call.ReasonCancelled, call.DetailUndecided, err)
	case !mesh:
		return t.outside(req)
	case req.Method == http.MethodConnect:
		return nil, t.refuse(req, listener, call.ReasonNoRoute, errConnect.Error(), errConnect)
	case req.URL.Opaque != "":
		return nil, t.refuse(req, listener, call.ReasonNoRoute, errOpaque.Error(), errOpaque)
	}
	path := req.URL.EscapedPath()
	if canonical, ok := route.Canonical(path); ok {
		path = canonical
	}
	r := request(req, path)
	cl, err := t.cfg.Engine.Begin(req.Context(), listener, &r)
	if err != nil {
		closeBody(req)
		return nil, timely(err)
	}
	t.follow(listener)
	return newExchange(t, cl, req, path).run()
}

// refuse ends a request that does not become a call.
func (t *Transport) refuse(req *http.Request, service string, reason call.Reason, detail string, err error) error {
	closeBody(req)
	r := request(req, req.URL.EscapedPath())
	return timely(t.cfg.Engine.Refuse(req.Context(), service, &r, call.Result{Reason: reason, GRPCCode: -1, Unsent: true, Detail: detail, Err: err}))
}

// request describes req to the engine.
func request(req *http.Request, path string) call.Request {
	host := hostOf(req)
	return call.Request{
		Request:    route.Request{Method: method(req), Path: path, Header: &headers{header: req.Header, host: host}},
		Authority:  host,
		Idempotent: idempotent(req),
	}
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close()
	}
}

func method(req *http.Request) string {
	if req.Method == "" {
		return http.MethodGet
	}
	return req.Method
}

func hostOf(req *http.Request) string {
	if req.Host != "" {
		return req.Host
	}
	return req.URL.Host
}

// idempotent: RFC 9110, 9.2.2: "Of the request methods defined by this specification, PUT, DELETE,
// and safe request methods are idempotent", and the header that net/http takes for the caller's word.
func idempotent(req *http.Request) bool {
	switch req.Method {
	case "", http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	_, one := req.Header["Idempotency-Key"]
	_, other := req.Header["X-Idempotency-Key"]
	return one || other
}

// headers are those of a request, as a route sees them.
type headers struct {
	header http.Header
	host   string
}

// Get implements route.Headers. net/http sends a header under the very name it has in the map, and
// servers read names without regard to case (RFC 9110, 5.1: "Field names are case-insensitive"), so
// every spelling counts. Of one name in several spellings the order is as it happens, in the map and
// on the wire: it matches nothing but by chance, and the one in canonical spelling stands first here.
func (h *headers) Get(name string) (string, bool) {
	if name == ":authority" || name == "host" {
		return h.host, true
	}
	key := http.CanonicalHeaderKey(name)
	v, ok := h.header[key]
	for other, more := range h.header {
		if len(other) == len(key) && other != key && strings.EqualFold(other, key) {
			v, ok = append(v[:len(v):len(v)], more...), true
		}
	}
	if !ok {
		return "", false
	}
	if len(v) == 1 {
		return v[0], true
	}
	return strings.Join(v, ","), true
}

// outside makes a request to a name that is not of the mesh: as Base would, but counted.
func (t *Transport) outside(req *http.Request) (*http.Response, error) {
	r := request(req, req.URL.EscapedPath())
	cl := t.cfg.Engine.BeginExternal(req.Context(), req.URL.Host, &r)
	if t.cfg.External == grpcmesh.Deny {
		closeBody(req)
		return nil, cl.End(call.Result{Reason: call.ReasonDenied, GRPCCode: -1, Unsent: true, Detail: errDenied.Error(), Err: errDenied})
	}
	a, _ := cl.Next()
	out := req.WithContext(a)
	out.Header = t.inject(cl, req.Header)
	resp, err := t.cfg.Base.RoundTrip(out)
	if err != nil {
		res := call.Result{Reason: call.ReasonConnectFailed, GRPCCode: -1, Err: err, Detail: grpcmesh.Describe(err)}
		if a.Err() != nil {
			res.Reason = call.ReasonCancelled // the engine tells a deadline from it
		}
		_ = cl.End(res)
		return nil, err
	}
	resp.Request = req
	wrapBody(resp, &ending{cl: cl, status: resp.StatusCode, raw: true})
	return resp, nil
}

// inject gives h with the trace context of cl: h itself, which is the caller's, when there is none.
func (t *Transport) inject(cl *call.Call, h http.Header) http.Header {
	if t.cfg.Inject == nil {
		return h
	}
	to := carrier{header: h, foreign: true}
	t.cfg.Inject(cl, &to)
	return to.header
}

// carrier is headers as a call.Carrier. Those of somebody else are copied when the first one is set.
type carrier struct {
	header  http.Header
	foreign bool
}

// canonical is http.CanonicalHeaderKey, which allocates for names that are no common headers.
func canonical(key string) string {
	switch key {
	case "traceparent":
		return "Traceparent"
	case "tracestate":
		return "Tracestate"
	case "baggage":
		return "Baggage"
	}
	return http.CanonicalHeaderKey(key)
}

// Get is the first value of key.
func (c *carrier) Get(key string) string {
	if v := c.header[canonical(key)]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// Set replaces the values of key.
func (c *carrier) Set(key, value string) {
	if c.foreign {
		c.header, c.foreign = c.header.Clone(), false
	}
	c.header[canonical(key)] = []string{value}
}

// Keys lists the names.
func (c *carrier) Keys() []string { return slices.Collect(maps.Keys(c.header)) }

// withPath is u with another escaped path.
func withPath(u *url.URL, escaped string) *url.URL {
	out := *u
	out.Path, out.RawPath = escaped, ""
	if plain, err := url.PathUnescape(escaped); err == nil && plain != escaped {
		out.Path, out.RawPath = plain, escaped
	}
	return &out
}

// withScheme is u with the scheme that HTTP/2 names in each request; it copies u only to change it.
func withScheme(u *url.URL, secure bool) *url.URL {
	scheme := "http"
	if secure {
		scheme = "https"
	}
	if u.Scheme == scheme {
		return u
	}
	out := *u
	out.Scheme = scheme
	return &out
}

// timeoutError makes url.Error.Timeout true, as a timeout of net/http itself does.
type timeoutError struct{ error }

func (e *timeoutError) Timeout() bool   { return true }
func (e *timeoutError) Temporary() bool { return true }
func (e *timeoutError) Unwrap() error   { return e.error }

func timely(err error) error {
	var e *call.Error
	if errors.As(err, &e) && (e.Reason == call.ReasonTimeout || e.Reason == call.ReasonPerTryTimeout) {
		return &timeoutError{err}
	}
	return err
}

// aside holds the endpoints that could not be connected to, each until its back-off is over.
type aside struct {
	clock Clock
	n     atomic.Int64 // entries, so that nothing is locked while there are none
	mu    sync.Mutex
	until map[poolKey]*outage
}

type outage struct {
	fails int
	until time.Time
}

// add sets an endpoint aside after a failed connect: 100 ms, then longer up to 3 s. It reports
// whether the endpoint was fine before.
func (a *aside) add(k poolKey) (first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.until == nil {
		a.until = make(map[poolKey]*outage)
	}
	o := a.until[k]
	if o == nil {
		o = &outage{}
		a.until[k] = o
		a.n.Add(1)
		first = true
	}
	wait := 3 * time.Second
	if o.fails < 6 {
		wait = min(wait, 100*time.Millisecond<<o.fails)
	}
	o.fails++
	o.until = a.clock.Now().Add(wait)
	return first
}

// remove ends it after a connect that succeeded, or with the endpoint, and reports whether it was
// aside.
func (a *aside) remove(k poolKey) bool {
	if a.n.Load() == 0 {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.until[k] == nil {
		return false
	}
	delete(a.until, k)
	a.n.Add(-1)
	return true
}

func (a *aside) has(k poolKey, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	o := a.until[k]
	return o != nil && now.Before(o.until)
}
