package call_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/xds/graph"
)

func (m *mesh) subscriptions() int { n, _ := m.subs("orders"); return n }
func (m *mesh) releases() int      { _, n := m.subs("orders"); return n }

func reasonOf(t *testing.T, err error) call.Reason {
	t.Helper()
	var own *call.Error
	if !errors.As(err, &own) {
		t.Fatalf("%v is not a *call.Error", err)
	}
	return own.Reason
}

func TestACallWaitsForItsConfiguration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{})
		time.AfterFunc(3*time.Second, func() { m.apply.Apply(orders(1, nil)) })
		start := time.Now()
		c := begin(t, m, t.Context(), get("/"))
		if time.Since(start) != 3*time.Second {
			t.Errorf("it waited %v, want 3 s", time.Since(start))
		}
		succeed(t, c)
	})
}

func TestWaitingEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		within time.Duration // of the caller; 0 none
		cancel time.Duration
		after  time.Duration
		want   call.Reason
	}{
		"after 15 s when the caller has no deadline": {after: 15 * time.Second, want: call.ReasonConfigMissing},
		"after 15 s when the caller has a later one": {within: time.Minute, after: 15 * time.Second, want: call.ReasonConfigMissing},
		"at the caller's deadline when it is sooner": {within: time.Second, after: time.Second, want: call.ReasonConfigMissing},
		"when the caller gives up":                   {cancel: time.Second, after: time.Second, want: call.ReasonCancelled},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				why := errors.New("no control plane at 10.1.2.3:15012")
				m := newMesh(t, call.Config{Missing: func() (string, error) { return "start one", why }})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if tc.within > 0 {
					ctx, cancel = context.WithTimeout(ctx, tc.within)
					defer cancel()
				}
				if tc.cancel > 0 {
					time.AfterFunc(tc.cancel, cancel)
				}
				start := time.Now()
				_, err := m.Service(ctx, "orders")
				if got := reasonOf(t, err); got != tc.want || time.Since(start) != tc.after {
					t.Errorf("after %v: %v; want %s after %v", time.Since(start), err, tc.want, tc.after)
				}
				if tc.want == call.ReasonConfigMissing && !errors.Is(err, why) {
					t.Errorf("%v does not hold why there is no configuration", err)
				}
				if tc.want == call.ReasonConfigMissing && !strings.HasSuffix(err.Error(), "no configuration at all; start one") {
					t.Errorf("%q does not end in the hint", err)
				}
				if strings.Contains(err.Error(), "10.1.2.3") {
					t.Errorf("%q names an address", err)
				}
			})
		})
	}
}

func TestCloseEndsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{})
		for name, req := range map[string]*call.Request{"configuration": get("/"), "an endpoint": {Request: get("/").Request, WaitForReady: true}} {
			m := m
			if name == "an endpoint" {
				m = newMesh(t, call.Config{}, orders(0, nil))
			}
			failed := make(chan error)
			start := time.Now()
			go func() {
				_, err := m.Engine.Begin(t.Context(), "orders", req)
				failed <- err
			}()
			synctest.Wait()
			m.Engine.Close()
			m.Engine.Close()
			if err := <-failed; reasonOf(t, err) != call.ReasonDraining || time.Since(start) != 0 {
				t.Errorf("%s: %v after %v", name, err, time.Since(start))
			}
		}
	})
}

func TestANameIsSubscribedOnceAndReleasedWhenUnused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{})
		m.apply.Apply(orders(1, nil))
		for range 3 {
			succeed(t, begin(t, m, t.Context(), get("/")))
		}
		if m.subscriptions() != 1 {
			t.Fatalf("subscribed %d times, want once", m.subscriptions())
		}
		for range 10 { // in use: a call every 40 s
			time.Sleep(40 * time.Second)
			succeed(t, begin(t, m, t.Context(), get("/")))
		}
		if m.releases() != 0 {
			t.Fatal("released while in use")
		}
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if m.releases() != 0 {
			t.Error("released less than 60 s after the last call")
		}
		time.Sleep(32 * time.Second)
		synctest.Wait()
		if m.releases() != 1 {
			t.Error("not released 91 s after the last call")
		}
		succeed(t, begin(t, m, t.Context(), get("/")))
		if m.subscriptions() != 2 {
			t.Error("not subscribed again by the next call")
		}
		m.Close()
		m.Close()
		if m.releases() != 2 {
			t.Error("Close does not release")
		}
		if _, err := m.Service(t.Context(), "orders"); reasonOf(t, err) != call.ReasonDraining {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{})
		var got []*call.Service
		cancel := m.Watch("orders", func(s *call.Service) { got = append(got, s) })
		if len(got) != 0 || m.subscriptions() != 1 {
			t.Fatalf("before there is any: %d, subscribed %d times", len(got), m.subscriptions())
		}
		m.apply.Apply(orders(1, nil))
		m.apply.Apply(orders(1, nil)) // the same again
		m.apply.Apply(orders(2, nil), &graph.Config{Name: "pay", Err: graph.ErrNotExist})
		if len(got) != 2 || len(got[1].Clusters["orders.default:80"].All) != 2 {
			t.Fatalf("heard of %d services, want 2: a change that is none is not told", len(got))
		}
		late := 0
		defer m.Watch("orders", func(*call.Service) { late++ })()
		if late != 1 {
			t.Error("a later watch does not hear what is known at once")
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if m.releases() != 0 {
			t.Error("released while watched")
		}
		cancel()
		cancel()
		m.apply.Apply(orders(3, nil))
		if len(got) != 2 || late != 2 {
			t.Errorf("after cancel heard %d, the other %d", len(got), late)
		}
	})
}

func TestFollowHearsOfTheRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{})
		m.apply.Apply(orders(1, nil))
		var got []*call.Service
		cancel := m.Follow("orders", func(s *call.Service) { got = append(got, s) })
		defer cancel()
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if len(got) != 2 || got[0] == nil || got[1] != nil || m.releases() != 1 {
			t.Errorf("heard %v, released %d times; want a service, then nil", got, m.releases())
		}
	})
}

// A cached configuration comes while Subscribe still runs.
func TestSubscribeMayPublish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m *mesh
		m = newMesh(t, call.Config{Subscribe: func(string) func() {
			m.apply.Apply(orders(1, nil))
			return func() { m.apply.Remove("orders") }
		}})
		c := begin(t, m, t.Context(), get("/"))
		succeed(t, c)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if len(m.Snapshot().Services) != 0 {
			t.Error("the release did not remove the service")
		}
		succeed(t, begin(t, m, t.Context(), get("/")))
	})
}

func TestNearestNames(t *testing.T) {
	m := newMesh(t, call.Config{Known: func() []string { return []string{"payments", "payment", "orders.shop", "cart"} }},
		orders(1, nil), &graph.Config{Name: "paymets", Err: graph.ErrNotExist}, &graph.Config{Name: "zzzzzzz", Err: graph.ErrNotExist})
	_, err := m.Service(t.Context(), "paymets")
	if want := `did you mean "payments" or "payment"?`; !strings.HasSuffix(err.Error(), want) {
		t.Errorf("%q, want the hint %q", err, want)
	}
	if _, err = m.Service(t.Context(), "zzzzzzz"); !strings.Contains(err.Error(), "inlay get services") {
		t.Errorf("%q, want the command that lists names", err)
	}
}

// Calls, updates, watches and sweeps at once: for the race detector, and that nothing is left over.
func TestManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{Observer: silent{}}, orders(3, retries(nil)))
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		done := make(chan int)
		for range 8 {
			go func() {
				n := 0
				for ctx.Err() == nil {
					c, err := m.Begin(t.Context(), "orders", get("/"))
					if err != nil {
						t.Error(err)
						break
					}
					for {
						a, err := c.Next()
						if err != nil {
							break
						}
						if ep := c.Cluster().Set.Pick(a.Tried()); ep != nil {
							a.Picked(ep)
						}
						time.Sleep(time.Millisecond)
						if !c.Retry(call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: 503}) {
							break
						}
					}
					c.Decision()
					succeed(t, c)
					n++
				}
				done <- n
			}()
		}
		go func() {
			for i := 0; ctx.Err() == nil; i++ {
				m.apply.Apply(orders(2+i%3, retries(nil)))
				m.Watch("orders", func(*call.Service) {})()
				time.Sleep(7 * time.Millisecond)
			}
			done <- 1
		}()
		total := 0
		for range 9 {
			total += <-done
		}
		cl := m.Snapshot().Services["orders"].Clusters["orders.default:80"]
		if cl.Limiter.InFlight() != 0 {
			t.Errorf("%d calls are left in flight of %d", cl.Limiter.InFlight(), total)
		}
		for _, ep := range cl.All {
			if ep.State.InFlight() != 0 {
				t.Errorf("endpoint %s is left with %d", ep.Key, ep.State.InFlight())
			}
		}
	})
}
