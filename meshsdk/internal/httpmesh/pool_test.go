package httpmesh_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestEndpointThatIsDownIsSetAside(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	dead := endpointAt(n.address(), ca.id("orders"))
	s := (&server{name: "alive"}).start(t, n, ca.issue("orders"), false)
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf(orders, dead, s.endpoint())))
	for range 10 {
		req, err := http.NewRequestWithContext(ctxFor(t), http.MethodPost, "http://orders/", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		if _, body, err := m.do(req); err != nil || body != "alive" {
			t.Fatalf("%q, %v", body, err)
		}
	}
	if got := n.dials(dead.Addresses[0]); got == 0 || got >= 5 {
		t.Errorf("the dead endpoint was dialled %d times in 10 requests, want some, with back-off", got)
	}
	if rec := m.rec.last(t); rec.Attempts != 1 {
		t.Errorf("%d attempts", rec.Attempts)
	}
}

func TestConnectionThatTheServerClosedLosesNoRequest(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{name: "ok"}).start(t, n, ca.issue("orders"), false)
	s.http.SetKeepAlivesEnabled(true)
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint())))
	for range 50 {
		req, _ := http.NewRequestWithContext(ctxFor(t), http.MethodPost, "http://orders/", strings.NewReader("x"))
		if _, _, err := m.do(req); err != nil {
			t.Fatal(err)
		}
		// Closes what is idle, at about the time of the next request.
		s.http.SetKeepAlivesEnabled(false)
		s.http.SetKeepAlivesEnabled(true)
	}
	if s.calls.Load() != 50 {
		t.Errorf("%d calls, want 50", s.calls.Load())
	}
}

func TestConnectionsArePooled(t *testing.T) {
	protocols(t, func(t *testing.T, h2, secure bool) {
		synctest.Test(t, func(t *testing.T) {
			ca, n := newAuthority(t), newNetwork()
			s := &server{}
			all := make(chan struct{})
			s.handler = func(http.ResponseWriter, *http.Request) {
				if s.calls.Load() == 10 {
					close(all)
				}
				<-all
			}
			var svid *identity.SVID
			if secure {
				svid = ca.issue("orders")
			}
			s.start(t, n, svid, h2)
			m := newMesh(t, n, ca.issue("cart"))
			cl := clusterOf(orders, s.endpoint())
			cl.HTTP2 = h2
			m.publish(serviceOf("orders", nil, cl))
			get := func() {
				req, _ := http.NewRequest(http.MethodGet, "http://orders/", nil)
				if _, _, err := m.do(req); err != nil {
					t.Error(err)
				}
			}
			var wg sync.WaitGroup
			for range 10 { // at once: the handler answers when all are there
				wg.Go(get)
			}
			wg.Wait()
			want := int64(10)
			if h2 {
				want = 1
			}
			if got := s.conns.Load(); got != want {
				t.Errorf("%d connections for 10 requests at once, want %d", got, want)
			}
			for range 10 {
				get()
			}
			if got := s.conns.Load(); got != want {
				t.Errorf("%d connections after 10 more, want %d", got, want)
			}
			time.Sleep(5 * time.Minute) // of the bubble: idle for long
			get()
			if got := s.conns.Load(); got != want+1 {
				t.Errorf("%d connections after a pause, want %d: the idle ones were closed", got, want+1)
			}
		})
	})
}

func TestRemovedEndpointFinishesItsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, n := newAuthority(t), newNetwork()
		a, b := &server{name: "a"}, &server{name: "b"}
		begun, finish := make(chan struct{}), make(chan struct{})
		a.handler = func(w http.ResponseWriter, _ *http.Request) {
			close(begun)
			<-finish
			_, _ = io.WriteString(w, "a")
		}
		a.start(t, n, ca.issue("orders"), false)
		b.start(t, n, ca.issue("orders"), false)
		closed := make(chan struct{})
		a.http.ConnState = func(_ net.Conn, st http.ConnState) {
			if st == http.StateClosed {
				close(closed)
			}
		}
		m := newMesh(t, n, ca.issue("cart"))
		m.publish(serviceOf("orders", nil, clusterOf(orders, a.endpoint())))
		got := make(chan string, 1)
		go func() {
			req, _ := http.NewRequest(http.MethodGet, "http://orders/", nil)
			_, body, err := m.do(req)
			got <- fmt.Sprint(body, err)
		}()
		<-begun
		m.publish(serviceOf("orders", nil, clusterOf(orders, b.endpoint())))
		req, _ := http.NewRequest(http.MethodGet, "http://orders/", nil)
		if _, body, err := m.do(req); err != nil || body != "b" {
			t.Errorf("%q, %v", body, err)
		}
		close(finish)
		if s := <-got; s != "a<nil>" {
			t.Errorf("the request in flight ended with %q", s)
		}
		start := time.Now()
		<-closed
		if took := time.Since(start); took > time.Second {
			t.Errorf("the connection was closed after %v", took)
		}
	})
}

func TestCloseEndsEverything(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := &server{}
	begun := make(chan struct{})
	s.handler = func(_ http.ResponseWriter, r *http.Request) { close(begun); <-r.Context().Done() }
	s.start(t, n, ca.issue("orders"), false)
	m := newMesh(t, n, ca.issue("cart"))
	m.publish(serviceOf("orders", nil, clusterOf(orders, s.endpoint())))
	failed := make(chan error, 1)
	go func() {
		_, _, err := m.get("http://orders/")
		failed <- err
	}()
	<-begun
	m.client.Close()
	m.client.Close()
	wantReason(t, <-failed, call.ReasonReset)
	_, _, err := m.get("http://orders/")
	wantReason(t, err, call.ReasonDraining)
}

// Three servers restart one after the other, under load and without a word to the configuration:
// no request fails. The policy is for one case: a server of net/http that shuts down drops, without
// an answer, the first request of a connection that was just made.
func TestRollingRestart(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2=%v", h2), func(t *testing.T) {
			ca, n := newAuthority(t), newNetwork()
			svid := ca.issue("orders")
			var servers []*server
			cl := clusterOf(orders)
			for range 3 {
				s := (&server{}).start(t, n, svid, h2)
				servers = append(servers, s)
				cl.All = append(cl.All, s.endpoint())
			}
			cl = clusterOf(orders, cl.All...)
			cl.HTTP2 = h2
			m := newMesh(t, n, ca.issue("cart"))
			m.publish(serviceOf("orders", withRetry(orders, &resource.Retry{On: []string{"reset"}, Attempts: 2, Base: time.Millisecond}), cl))
			stop := make(chan struct{})
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						if _, _, err := m.get("http://orders/"); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			for i, s := range servers {
				for s.calls.Load() < 20 && !t.Failed() {
					_, _, _ = m.get("http://orders/")
				}
				n.down(s.addr)
				if err := s.http.Shutdown(ctxFor(t)); err != nil {
					t.Error(err)
				}
				fresh := (&server{addr: s.addr}).start(t, n, svid, h2)
				servers[i] = fresh
				for fresh.calls.Load() == 0 && !t.Failed() {
					_, _, _ = m.get("http://orders/")
				}
			}
			close(stop)
			wg.Wait()
		})
	}
}
