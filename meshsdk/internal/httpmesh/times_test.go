package httpmesh_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
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
