package httpmesh_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/httpmesh"
	"github.com/inlay-mesh/inlay/xds/resource"
)

const orders = "orders.default:8080"

// protocols runs f for both, over mesh TLS and in plaintext.
func protocols(t *testing.T, f func(t *testing.T, h2, secure bool)) {
	for _, h2 := range []bool{false, true} {
		for _, secure := range []bool{true, false} {
			t.Run(fmt.Sprintf("h2=%v,mtls=%v", h2, secure), func(t *testing.T) { f(t, h2, secure) })
		}
	}
}

func TestRequest(t *testing.T) {
	protocols(t, func(t *testing.T, h2, secure bool) {
		ca, n := newAuthority(t), newNetwork()
		s := &server{}
		s.handler = func(w http.ResponseWriter, r *http.Request) {
			who := "plaintext"
			if r.TLS != nil {
				id, err := identity.PeerID(*r.TLS)
				if err != nil {
					t.Error(err)
				}
				who = id.String()
			}
			b, _ := io.ReadAll(r.Body)
			w.WriteHeader(http.StatusCreated)
			_, _ = fmt.Fprintf(w, "%s %s %s %s %d %s", r.Method, r.Host, r.RequestURI, who, r.ProtoMajor, b)
		}
		var svid *identity.SVID
		who, major := "plaintext", 1
		if secure {
			svid, who = ca.issue("orders"), ca.id("cart").String()
		}
		if h2 {
			major = 2
		}
		s.start(t, n, svid, h2)
		m := newMesh(t, n, ca.issue("cart"))
		cl := clusterOf(orders, s.endpoint())
		cl.HTTP2 = h2
		m.publish(serviceOf("orders", nil, cl))
		for _, scheme := range []string{"http", "https"} {
			req := httptest.NewRequest(http.MethodPost, scheme+"://orders/v1/7?x=1", strings.NewReader("hello"))
			req.RequestURI = ""
			before := req.Clone(context.Background())
			status, body, err := m.do(req)
			if err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("POST orders /v1/7?x=1 %s %d hello", who, major)
			if status != http.StatusCreated || body != want {
				t.Errorf("%d %q, want 201 %q", status, body, want)
			}
			if req.URL.String() != before.URL.String() || len(req.Header) != len(before.Header) {
				t.Errorf("the request was changed: %v", req)
			}
			rec := m.rec.last(t)
			peer := who
			if secure {
				peer = ca.id("orders").String()
			}
			if rec.Reason != call.ReasonOK || rec.HTTPStatus != 201 || rec.Peer != peer || rec.MTLS != secure {
				t.Errorf("record %+v", rec)
			}
		}
		if s.conns.Load() != 1 {
			t.Errorf("%d connections for two requests, want 1", s.conns.Load())
		}
	})
}

func TestServerOfWrongIdentityIsRefused(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("billing"), false)
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint(ca.id("orders")))))
	_, _, err := m.get("http://orders/")
	wantReason(t, err, call.ReasonConnectFailed)
	for _, id := range []string{ca.id("billing").String(), ca.id("orders").String()} {
		if !strings.Contains(err.Error(), id) {
			t.Errorf("error %q does not name %s", err, id)
		}
	}
	if strings.Contains(err.Error(), "10.0.0.") || s.calls.Load() != 0 {
		t.Errorf("error %q, %d calls", err, s.calls.Load())
	}
}

func TestWithoutIdentityMeshTLSFailsClosed(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"), false)
	m := newMesh(t, n, nil)
	m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint())))
	_, _, err := m.get("http://orders/")
	wantReason(t, err, call.ReasonConnectFailed)
	if !errors.Is(err, identity.ErrNoIdentity) {
		t.Errorf("error %v", err)
	}
}

func TestRetriesAreCounted(t *testing.T) {
	failing := func(status, times int) func(*server) http.HandlerFunc {
		return func(s *server) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				b, _ := io.ReadAll(r.Body)
				if s.calls.Load() <= int64(times) {
					w.WriteHeader(status)
				}
				_, _ = w.Write(b)
			}
		}
	}
	on503 := &resource.Retry{On: []string{"503"}, Attempts: 2, Base: time.Millisecond}
	for name, tc := range map[string]struct {
		policy     *resource.Retry
		handler    func(*server) http.HandlerFunc
		method     string
		body       func() io.Reader
		header     string
		wantCalls  int64
		wantStatus int
		wantReason call.Reason
	}{
		"none without a policy":               {nil, failing(503, 9), "GET", nil, "", 1, 503, call.ReasonUpstreamStatus},
		"up to the attempts":                  {on503, failing(503, 9), "GET", nil, "", 3, 503, call.ReasonRetryExhausted},
		"until one succeeds":                  {on503, failing(503, 1), "GET", nil, "", 2, 200, call.ReasonOK},
		"only the status that is named":       {on503, failing(502, 9), "GET", nil, "", 1, 502, call.ReasonUpstreamStatus},
		"a status below 500 that is named":    {&resource.Retry{On: []string{"429"}, Attempts: 1}, failing(429, 1), "GET", nil, "", 2, 200, call.ReasonOK},
		"a POST is not repeated":              {on503, failing(503, 1), "POST", func() io.Reader { return strings.NewReader("abc") }, "", 1, 503, call.ReasonUpstreamStatus},
		"a POST with Idempotency-Key is":      {on503, failing(503, 1), "POST", func() io.Reader { return strings.NewReader("abc") }, "k", 2, 200, call.ReasonOK},
		"a stream that can be kept is":        {on503, failing(503, 2), "PUT", func() io.Reader { return io.LimitReader(zeros{}, 100<<10) }, "", 3, 200, call.ReasonOK},
		"a stream that is too large is not":   {on503, failing(503, 1), "PUT", func() io.Reader { return io.LimitReader(zeros{}, 300<<10) }, "", 1, 503, call.ReasonUpstreamStatus},
		"one that can be had again is, large": {on503, failing(503, 1), "PUT", func() io.Reader { return bytes.NewReader(make([]byte, 300<<10)) }, "", 2, 200, call.ReasonOK},
	} {
		t.Run(name, func(t *testing.T) {
			for _, h2 := range []bool{false, true} {
				ca, n := newAuthority(t), newNetwork()
				s := &server{}
				s.handler = tc.handler(s)
				s.start(t, n, ca.issue("orders"), h2)
				m := newMesh(t, n, ca.issue("cart"))
				cl := clusterOf(orders, s.endpoint())
				cl.HTTP2 = h2
				m.publish(serviceOf("orders", withRetry(orders, tc.policy), cl))
				var body io.Reader
				if tc.body != nil {
					body = tc.body()
				}
				req, err := http.NewRequestWithContext(ctxFor(t), tc.method, "http://orders/x", body)
				if err != nil {
					t.Fatal(err)
				}
				if tc.header != "" {
					req.Header.Set("Idempotency-Key", tc.header)
				}
				status, got, err := m.do(req)
				if err != nil {
					t.Fatal(err)
				}
				if status != tc.wantStatus || s.calls.Load() != tc.wantCalls {
					t.Errorf("h2=%v: status %d after %d calls, want %d after %d", h2, status, s.calls.Load(), tc.wantStatus, tc.wantCalls)
				}
				if tc.body != nil && status == 200 {
					if want, _ := io.ReadAll(tc.body()); got != string(want) {
						t.Errorf("h2=%v: %d bytes arrived, want %d", h2, len(got), len(want))
					}
				}
				if rec := m.rec.last(t); rec.Reason != tc.wantReason || rec.Attempts != int(tc.wantCalls) || m.rec.count() != 1 {
					t.Errorf("h2=%v: record %+v, %d records", h2, rec, m.rec.count())
				}
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestFailuresOfTheMesh(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	m := newMesh(t, n, ca.issue("cart"))
	full := clusterOf("full.default:80", endpointAt(n.address()))
	full.Limiter.SetMax(0)
	h2 := clusterOf("h2.default:80", endpointAt(n.address()))
	h2.HTTP2 = true
	m.publish(
		serviceOf("dead", nil, clusterOf("dead.default:80", endpointAt(n.address()))),
		serviceOf("full", nil, full),
		serviceOf("h2", nil, h2),
		&call.Service{Name: "ghost", Err: errors.New("not there"), NotExist: true},
	)
	for target, want := range map[string]struct {
		reason call.Reason
		text   string
	}{
		"http://dead/":      {call.ReasonConnectFailed, "connection refused"},
		"http://full/":      {call.ReasonCircuitOpen, "limit of 0"},
		"http://ghost/":     {call.ReasonNoRoute, "no service of that name"},
		"http://dead//x":    {call.ReasonNoRoute, "single meaning"},
		"http://dead/a%2fb": {call.ReasonNoRoute, "single meaning"},
	} {
		_, _, err := m.get(target)
		wantReason(t, err, want.reason)
		if !strings.Contains(err.Error(), want.text) || strings.Contains(err.Error(), "10.0.0.") {
			t.Errorf("%s: error %q, want %q and no address in it", target, err, want.text)
		}
		if m.rec.last(t).Reason != want.reason {
			t.Errorf("%s: recorded as %v", target, m.rec.last(t).Reason)
		}
	}
	body := &closing{Reader: strings.NewReader("x")}
	req, _ := http.NewRequest(http.MethodConnect, "http://dead/", body)
	before := m.rec.count()
	_, err := m.client.RoundTrip(req)
	wantReason(t, err, call.ReasonNoRoute)
	if !strings.Contains(err.Error(), "CONNECT") || !body.closed || m.rec.count() != before+1 || m.rec.last(t).Reason != call.ReasonNoRoute {
		t.Errorf("CONNECT: %v, body closed: %v, record %+v", err, body.closed, m.rec.last(t))
	}
	req, _ = http.NewRequest(http.MethodGet, "http://h2/", nil)
	req.Header.Set("Upgrade", "websocket")
	if _, err := m.client.RoundTrip(req); err == nil || !strings.Contains(err.Error(), "websocket") {
		t.Errorf("Upgrade over HTTP/2: %v", err)
	}
	for _, target := range []string{"http://dead/", "http://ghost/"} {
		body := &closing{Reader: strings.NewReader("x")}
		req, _ := http.NewRequestWithContext(ctxFor(t), http.MethodPost, target, body)
		if _, err := m.client.RoundTrip(req); err == nil || !body.closed {
			t.Errorf("%s: %v, body closed: %v", target, err, body.closed)
		}
	}
}

type closing struct {
	io.Reader
	closed bool
}

func (c *closing) Close() error { c.closed = true; return nil }

// net/http sends a header under whatever name it has in the map, and servers read names without
// regard to case: a route must see what they see.
func TestHeadersAreMatchedAsTheyAreSent(t *testing.T) {
	n := newNetwork()
	s := &server{handler: func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, strings.Join(r.Header.Values("X-Env"), ","))
	}}
	s.start(t, n, nil, false)
	m := newMesh(t, n, nil)
	m.publish(serviceOf("orders", []resource.Route{
		{Name: "never", Match: resource.Match{Headers: []resource.HeaderMatch{{Name: "x-env", Exact: "beta"}}}},
		{Name: "both", Match: resource.Match{Headers: []resource.HeaderMatch{{Name: "x-env", Exact: "a,b"}}}},
		{Name: "rest", Clusters: []resource.WeightedCluster{{Name: orders, Weight: 1}}},
	}, clusterOf(orders, s.endpoint())))
	for name, tc := range map[string]struct {
		header http.Header
		route  string
	}{
		"canonical":         {http.Header{"X-Env": {"beta"}}, "never"},
		"as it was written": {http.Header{"x-env": {"beta"}}, "never"},
		"in capitals":       {http.Header{"X-ENV": {"beta"}}, "never"},
		"repeated":          {http.Header{"X-Env": {"a", "b"}}, "both"},
		"in two spellings":  {http.Header{"X-Env": {"beta"}, "x-env": {"other"}}, "rest"},
		"another":           {http.Header{"x-env": {"alpha"}}, "rest"},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(ctxFor(t), http.MethodGet, "http://orders/", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = tc.header
			_, _, _ = m.do(req)
			if got := m.rec.last(t).Route; got != tc.route {
				t.Errorf("route %q, want %q", got, tc.route)
			}
		})
	}
}

func TestPathIsSentAsItWasMatched(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.handler = func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.RequestURI) }
	s.start(t, n, ca.issue("orders"), false)
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint())))
	for sent, want := range map[string]string{
		"http://orders":                "/",
		"http://orders/a/../b":         "/b",
		"http://orders/%61?q=%2f":      "/a?q=%2f",
		"http://orders/a%20b":          "/a%20b",
		"http://ORDERS.Default./x":     "/x",
		"http://orders.mesh/caf%c3%a9": "/caf%C3%A9",
	} {
		m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint())), serviceOf("orders.default", nil, clusterOf(orders, s.endpoint())))
		if _, got, err := m.get(sent); err != nil || got != want {
			t.Errorf("%s arrived as %q, %v, want %q", sent, got, err, want)
		}
	}
}

func TestSplitByWeight(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	v1 := (&server{name: "v1"}).start(t, n, ca.issue("orders"), true)
	v2 := (&server{name: "v2"}).start(t, n, ca.issue("orders"), true)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	engine := call.New(call.Config{Rand: splitmix(seed)})
	t.Cleanup(engine.Close)
	m := newMesh(t, n, ca.issue("cart"), func(c *httpmesh.Config) { c.Engine = engine })
	a, b := clusterOf("a", v1.endpoint()), clusterOf("b", v2.endpoint())
	a.HTTP2, b.HTTP2 = true, true
	engine.Publish(snapshotOf(serviceOf("orders", []resource.Route{{Clusters: []resource.WeightedCluster{{Name: "a", Weight: 90}, {Name: "b", Weight: 10}}}}, a, b)))
	const calls = 2000
	for range calls {
		if _, _, err := m.get("http://orders/"); err != nil {
			t.Fatal(err)
		}
	}
	share := float64(v2.calls.Load()) / calls
	if sigma := math.Sqrt(0.1 * 0.9 / calls); math.Abs(share-0.1) > 5*sigma || v1.calls.Load()+v2.calls.Load() != calls {
		t.Errorf("%d and %d calls, want 10 %% for v2 within %v", v1.calls.Load(), v2.calls.Load(), 5*sigma)
	}
}

func TestOutside(t *testing.T) {
	n := newNetwork()
	out := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Header.Get("Traceparent")) }))
	defer out.Close()
	base := out.Client().Transport.(*http.Transport)
	inject := func(c *httpmesh.Config) {
		c.Base = base
		c.Inject = func(_ context.Context, to call.Carrier) { to.Set("traceparent", "00-1") }
	}
	m := newMesh(t, n, nil, inject)
	req, _ := http.NewRequestWithContext(ctxFor(t), http.MethodGet, out.URL, nil)
	if _, body, err := m.do(req); err != nil || body != "00-1" {
		t.Fatalf("%q, %v", body, err)
	}
	if len(req.Header) != 0 {
		t.Errorf("the request was changed: %v", req.Header)
	}
	if rec := m.rec.last(t); rec.Peer != "external" || rec.Reason != call.ReasonOK || rec.HTTPStatus != 200 {
		t.Errorf("record %+v", rec)
	}
	denied := newMesh(t, n, nil, inject, func(c *httpmesh.Config) { c.External = grpcmesh.Deny })
	_, _, err := denied.get(out.URL)
	wantReason(t, err, call.ReasonDenied)
	if !strings.Contains(err.Error(), "WithFallback") {
		t.Errorf("error %q", err)
	}
}

func TestUpgrade(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.handler = func(w http.ResponseWriter, _ *http.Request) {
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		line, _ := rw.ReadString('\n')
		_, _ = io.WriteString(c, "got "+line)
	}
	s.start(t, n, ca.issue("orders"), false)
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint())))
	req, _ := http.NewRequestWithContext(ctxFor(t), http.MethodGet, "http://orders/", nil)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "echo")
	resp, err := m.client.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols || m.rec.count() != 0 {
		t.Fatalf("status %d, %d records", resp.StatusCode, m.rec.count())
	}
	rw, ok := resp.Body.(io.ReadWriteCloser)
	if !ok {
		t.Fatalf("body %T cannot be written", resp.Body)
	}
	if _, err := io.WriteString(rw, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(rw).ReadString('\n'); err != nil || line != "got hello\n" {
		t.Errorf("%q, %v", line, err)
	}
	_ = rw.Close()
	if rec := m.rec.last(t); rec.HTTPStatus != 101 || rec.Reason != call.ReasonOK {
		t.Errorf("record %+v", rec)
	}
}

func TestResponseThatBreaksOffIsReset(t *testing.T) {
	protocols(t, func(t *testing.T, h2, secure bool) {
		ca, n := newAuthority(t), newNetwork()
		s := &server{}
		s.handler = func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
		var svid *identity.SVID
		if secure {
			svid = ca.issue("orders")
		}
		s.start(t, n, svid, h2)
		m := newMesh(t, n, ca.issue("cart"))
		cl := clusterOf(orders, s.endpoint())
		cl.HTTP2 = h2
		m.publish(serviceOf("orders", withRetry(orders, &resource.Retry{On: []string{"reset"}, Attempts: 3}), cl))
		_, body, err := m.get("http://orders/")
		wantReason(t, err, call.ReasonReset)
		if body != "half" || s.calls.Load() != 1 {
			t.Errorf("body %q, %d calls", body, s.calls.Load())
		}
	})
}

func TestBodyThatFailsIsTheCallersToSee(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.handler = func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }
	s.start(t, n, ca.issue("orders"), false)
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", withRetry(orders, &resource.Retry{On: []string{"reset"}, Attempts: 3}), clusterOf(orders, s.endpoint())))
	own := errors.New("disk is on fire")
	body := &closing{Reader: io.MultiReader(strings.NewReader("some"), failing{own})}
	req, _ := http.NewRequestWithContext(ctxFor(t), http.MethodPut, "http://orders/", body)
	_, _, err := m.do(req)
	if !errors.Is(err, own) {
		t.Errorf("error %v, want %v in it", err, own)
	}
	if rec := m.rec.last(t); rec.Attempts != 1 {
		t.Errorf("%d attempts", rec.Attempts)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestTwoMeshesTwoIdentities(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	s.handler = func(w http.ResponseWriter, r *http.Request) {
		id, _ := identity.PeerID(*r.TLS)
		_, _ = io.WriteString(w, id.String())
	}
	s.start(t, n, ca.issue("orders"), false)
	for _, name := range []string{"cart", "billing", "cart"} {
		m := newMesh(t, n, ca.issue(name))
		m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint())))
		if _, who, err := m.get("http://orders/"); err != nil || who != ca.id(name).String() {
			t.Errorf("%s was seen as %q, %v", name, who, err)
		}
	}
}
