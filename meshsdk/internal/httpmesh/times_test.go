package httpmesh_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/httpmesh"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestTimes(t *testing.T) {
	for name, tc := range map[string]struct {
		change   func(*resource.Route)
		handler  func(*server) http.HandlerFunc
		reason   call.Reason // empty: succeeds
		took     time.Duration
		attempts int
	}{
		"request": {
			func(r *resource.Route) { r.Timeout = 2 * time.Second },
			func(*server) http.HandlerFunc {
				return func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
			},
			call.ReasonTimeout, 2 * time.Second, 1,
		},
		"request covers the body": {
			func(r *resource.Route) { r.Timeout = 2 * time.Second },
			func(*server) http.HandlerFunc { return drip(time.Second, 10) },
			call.ReasonTimeout, 2 * time.Second, 1,
		},
		"per try": {
			func(r *resource.Route) {
				r.Retry = &resource.Retry{On: []string{"reset"}, Attempts: 1, PerTry: time.Second, Base: 1, Max: 1}
			},
			func(*server) http.HandlerFunc {
				return func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
			},
			call.ReasonRetryExhausted, 2 * time.Second, 2,
		},
		"per try ends with the response headers": {
			func(r *resource.Route) {
				r.Retry = &resource.Retry{On: []string{"reset"}, Attempts: 1, PerTry: 1500 * time.Millisecond}
			},
			func(*server) http.HandlerFunc { return drip(time.Second, 5) },
			"", 5 * time.Second, 1,
		},
		"idle is moved by the body": {
			func(r *resource.Route) { r.IdleTimeout = 3 * time.Second },
			func(*server) http.HandlerFunc { return drip(2*time.Second, 5) },
			"", 10 * time.Second, 1,
		},
		"idle": {
			func(r *resource.Route) { r.IdleTimeout = 3 * time.Second },
			func(*server) http.HandlerFunc { return drip(4*time.Second, 5) },
			call.ReasonTimeout, 3 * time.Second, 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, h2 := range []bool{false, true} {
				synctest.Test(t, func(t *testing.T) {
					ca, n := newAuthority(t), newNetwork()
					s := &server{}
					s.handler = tc.handler(s)
					s.start(t, n, ca.issue("orders"), h2)
					m := newMesh(t, n, ca.issue("cart"))
					cl := clusterOf(orders, s.endpoint())
					cl.HTTP2 = h2
					routes := withRetry(orders, nil)
					tc.change(&routes[0])
					m.publish(serviceOf("orders", routes, cl))
					start := time.Now()
					req, _ := http.NewRequest(http.MethodGet, "http://orders/", nil)
					_, _, err := m.do(req)
					if took := time.Since(start).Round(10 * time.Millisecond); took != tc.took {
						t.Errorf("h2=%v: took %v, want %v", h2, took, tc.took)
					}
					if tc.reason == "" {
						if err != nil {
							t.Fatalf("h2=%v: %v", h2, err)
						}
					} else {
						wantReason(t, err, tc.reason)
					}
					if rec := m.rec.last(t); rec.Attempts != tc.attempts {
						t.Errorf("h2=%v: %d attempts, want %d", h2, rec.Attempts, tc.attempts)
					}
					var timeout interface{ Timeout() bool }
					if tc.reason == call.ReasonTimeout && (!errors.As(err, &timeout) || !timeout.Timeout()) {
						t.Errorf("h2=%v: %v is no timeout", h2, err)
					}
				})
			}
		})
	}
}

// drip answers n bytes, the first after pause.
func drip(pause time.Duration, n int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		_ = http.NewResponseController(w).Flush()
		for range n {
			select {
			case <-time.After(pause):
			case <-r.Context().Done():
				return
			}
			_, _ = io.WriteString(w, "x")
			_ = http.NewResponseController(w).Flush()
		}
	}
}

// held is a connection on which one write reaches the other end long before it returns, as when the
// writer waits for a socket that takes the last bytes after the caller has given up.
type held struct {
	net.Conn
	next    *atomic.Bool // the next write is the one
	release chan struct{}
}

func (c held) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if c.next.CompareAndSwap(true, false) {
		<-c.release
	}
	return n, err
}

// What was being written when the time of the attempt ran out may have been processed. (With HTTP/1.1
// net/http closes the connection and waits for the write.)
func TestPerTryTimeoutDuringAWriteRepeatsIdempotentOnesOnly(t *testing.T) {
	for method, want := range map[string]int64{http.MethodPost: 1, http.MethodPut: 2} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				var calls atomic.Int64
				var next atomic.Bool
				release := make(chan struct{})
				var eps []*endpoint.Endpoint
				for range 2 {
					s := &server{handler: func(_ http.ResponseWriter, r *http.Request) {
						if r.Method != http.MethodGet {
							calls.Add(1)
							<-r.Context().Done()
						}
					}}
					eps = append(eps, s.start(t, n, nil, true).endpoint())
				}
				m := newMesh(t, n, nil, func(c *httpmesh.Config) {
					c.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
						conn, err := n.dial(ctx, network, addr)
						return held{conn, &next, release}, err
					}
				})
				cl := clusterOf(orders, eps...)
				cl.HTTP2 = true
				m.publish(serviceOf("orders", withRetry(orders, &resource.Retry{On: []string{"reset"}, Attempts: 1, PerTry: time.Second}), cl))
				for range 2 { // connect both
					if _, _, err := m.get("http://orders/"); err != nil {
						t.Fatal(err)
					}
				}
				next.Store(true)
				req, err := http.NewRequestWithContext(ctxFor(t), method, "http://orders/", nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := m.do(req); err == nil {
					t.Error("no error")
				}
				synctest.Wait()
				if got := calls.Load(); got != want {
					t.Errorf("handlers ran %d times, want %d", got, want)
				}
				close(release)
				m.client.Close()
			})
		})
	}
}

func TestARetryDoesNotWaitForTheBodyOfWhatFailed(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork()
			s := &server{}
			s.handler = func(w http.ResponseWriter, r *http.Request) {
				if s.calls.Load() == 1 {
					w.Header().Set("Content-Length", "10")
					w.WriteHeader(http.StatusServiceUnavailable)
					_ = http.NewResponseController(w).Flush()
					<-r.Context().Done()
				}
			}
			s.start(t, n, nil, h2)
			m := newMesh(t, n, nil)
			cl := clusterOf(orders, s.endpoint())
			cl.HTTP2 = h2
			m.publish(serviceOf("orders", withRetry(orders, &resource.Retry{On: []string{"503"}, Attempts: 1, Base: 1, Max: 1}), cl))
			start := time.Now()
			status, _, err := m.get("http://orders/")
			if took := time.Since(start); err != nil || status != 200 || took > time.Second {
				t.Errorf("h2=%v: %d, %v after %v", h2, status, err, took)
			}
			m.client.Close()
		})
	}
}

func TestAResponseThatIsLeftIsRecorded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := &server{handler: drip(time.Hour, 2)}
		s.start(t, n, nil, false)
		m := newMesh(t, n, nil)
		cl := clusterOf(orders, s.endpoint())
		m.publish(serviceOf("orders", nil, cl))
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://orders/", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := m.client.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if got := cl.Limiter.InFlight(); got != 1 {
			t.Errorf("%d calls in flight while the response is read", got)
		}
		cancel() // and no Close
		synctest.Wait()
		if got := cl.Limiter.InFlight(); got != 0 || m.rec.count() != 1 || m.rec.last(t).Reason != call.ReasonCancelled {
			t.Errorf("%d calls in flight, %d records", got, m.rec.count())
		}
		if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.Canceled) {
			t.Errorf("reading on: %v", err)
		}
		_ = resp.Body.Close()
		m.client.Close()
	})
}

func TestConnectTimeoutIsTheClusters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, n := newAuthority(t), newNetwork()
		m := newMesh(t, n, ca.issue("cart"), func(c *httpmesh.Config) {
			c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
		})
		m.publish(serviceOf("orders", nil, clusterOf(orders, endpointAt(n.address()))))
		start := time.Now()
		req, _ := http.NewRequest(http.MethodGet, "http://orders/", nil)
		_, _, err := m.do(req)
		wantReason(t, err, call.ReasonConnectFailed)
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("took %v, want 5 s", took)
		}
	})
}

// slowClose is a connection that closes a second after it was told to: time for the other end,
// which TLS has told already, to finish in good order.
type slowClose struct{ net.Conn }

func (c slowClose) Close() error {
	time.Sleep(time.Second) // in the time of the bubble
	return c.Conn.Close()
}

// A response that its server ended because the call was cut is not the whole response.
func TestAnEndAfterTheCutIsNoSuccess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, n := newAuthority(t), newNetwork()
		s := &server{}
		s.handler = func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
		s.start(t, n, ca.issue("orders"), false)
		m := newMesh(t, n, ca.issue("cart"), func(c *httpmesh.Config) {
			dial := c.Dial
			c.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := dial(ctx, network, addr)
				return slowClose{conn}, err
			}
		})
		routes := withRetry(orders, nil)
		routes[0].IdleTimeout = 3 * time.Second
		m.publish(serviceOf("orders", routes, clusterOf(orders, s.endpoint())))
		req, _ := http.NewRequest(http.MethodGet, "http://orders/", nil)
		_, text, err := m.do(req)
		wantReason(t, err, call.ReasonTimeout)
		if text != "half" {
			t.Errorf("read %q, want half", text)
		}
	})
}
