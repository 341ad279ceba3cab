package call_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// Every attempt ends the same way; how many are made, and what does the caller hear?
func TestRetries(t *testing.T) {
	unavailable := call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 14}
	status := func(n int) call.Result { return call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: n} }
	refused := call.Result{Reason: call.ReasonReset, Refused: true}
	unsent := call.Result{Reason: call.ReasonConnectFailed, Unsent: true}
	for name, tc := range map[string]struct {
		endpoints int
		set       func(*graph.Config)
		req       *call.Request
		each      call.Result
		attempts  int
		want      call.Reason
	}{
		"gRPC: a code of the policy is retried":             {4, retries(nil), rpc("/a/B"), unavailable, 3, call.ReasonRetryExhausted},
		"gRPC: another code is not":                         {4, retries(nil), rpc("/a/B"), call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 13}, 1, call.ReasonUpstreamStatus},
		"gRPC: without a policy no code is":                 {4, nil, rpc("/a/B"), unavailable, 1, call.ReasonUpstreamStatus},
		"HTTP: a status of the policy is retried":           {4, retries(nil), get("/"), status(503), 3, call.ReasonRetryExhausted},
		"HTTP: the gRPC code of a result is not looked at":  {4, retries(nil), get("/"), call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 14, HTTPStatus: 500}, 1, call.ReasonUpstreamStatus},
		"HTTP: work that is not idempotent is not repeated": {4, retries(nil), post("/"), status(503), 1, call.ReasonUpstreamStatus},
		"HTTP: unless it was never sent":                    {4, retries(nil), post("/"), unsent, 3, call.ReasonRetryExhausted},
		"HTTP: or refused before it was processed":          {4, retries(nil), post("/"), refused, 3, call.ReasonRetryExhausted},
		"a committed response is final":                     {4, retries(nil), rpc("/a/B"), call.Result{Reason: call.ReasonUpstreamStatus, GRPCCode: 14, Committed: true}, 1, call.ReasonUpstreamStatus},
		"one endpoint is tried again by a policy":           {1, retries(nil), rpc("/a/B"), unavailable, 3, call.ReasonRetryExhausted},
		"without a policy refused work goes once more":      {4, nil, post("/"), refused, 2, call.ReasonReset},
		"even to the only endpoint":                         {1, nil, post("/"), refused, 2, call.ReasonReset},
		"without a policy unsent work tries others":         {3, nil, post("/"), unsent, 3, call.ReasonConnectFailed},
		"but not for ever":                                  {9, nil, post("/"), unsent, 4, call.ReasonConnectFailed},
		"and not the same one":                              {1, nil, post("/"), unsent, 1, call.ReasonConnectFailed},
		"a reset may have been processed":                   {3, nil, get("/"), call.Result{Reason: call.ReasonReset}, 1, call.ReasonReset},
		"a denied call is not retried":                      {3, retries(nil), rpc("/a/B"), call.Result{Reason: call.ReasonDenied, GRPCCode: 7}, 1, call.ReasonDenied},
		"a success is not retried":                          {3, retries(nil), rpc("/a/B"), call.Result{}, 1, call.ReasonOK},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMesh(t, call.Config{}, orders(tc.endpoints, tc.set))
				c := begin(t, m, t.Context(), tc.req)
				seen := map[*endpoint.Endpoint]bool{}
				attempts := 0
				for {
					attempts++
					_, ep := try(t, c)
					if seen[ep] && len(seen) < tc.endpoints {
						t.Error("an endpoint was tried twice while another was left")
					}
					seen[ep] = true
					if !c.Retry(tc.each) {
						break
					}
				}
				err := c.End(tc.each)
				if attempts != tc.attempts {
					t.Errorf("%d attempts, want %d", attempts, tc.attempts)
				}
				rec := m.last(t)
				if rec.Reason != tc.want || rec.Attempts != tc.attempts || (err == nil) != (tc.want == call.ReasonOK) {
					t.Errorf("%v: recorded %+v, want %s", err, rec, tc.want)
				}
				var own *call.Error
				if errors.As(err, &own) && (own.Reason != tc.want || own.Attempts != tc.attempts || len(own.Decision().Attempts) != tc.attempts) {
					t.Errorf("error %+v", own)
				}
				for ep := range seen {
					if ep.State.InFlight() != 0 {
						t.Error("an endpoint is left with an attempt in flight")
					}
				}
			})
		})
	}
}

func TestBackoffLiesBetweenAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		top := func() uint64 { return 100 * uint64(time.Millisecond) } // the upper end of the first bound
		m := newMesh(t, call.Config{Rand: top}, orders(2, retries(func(r *resource.Retry) {
			r.Base, r.Max = 100*time.Millisecond, 150*time.Millisecond
		})))
		fail := call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: 503}
		start := time.Now()
		c := begin(t, m, t.Context(), get("/"))
		try(t, c)
		c.Retry(fail)
		try(t, c)
		if d := time.Since(start); d != 100*time.Millisecond {
			t.Errorf("the second attempt began after %v, want 100 ms", d)
		}
		c.Retry(fail)
		try(t, c)
		if d := time.Since(start); d != 200*time.Millisecond {
			t.Errorf("the third attempt began after %v, want 200 ms", d)
		}
		_ = c.End(fail)

		// A deadline during the wait: the failure at hand is returned at once.
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		start = time.Now()
		c = begin(t, m, ctx, get("/"))
		try(t, c)
		if c.Retry(fail) {
			t.Error("a retry is promised that would begin after the deadline")
		}
		_ = c.End(fail)
		if rec := m.last(t); rec.Reason != call.ReasonUpstreamStatus || time.Since(start) != 0 {
			t.Errorf("after %v: %+v", time.Since(start), rec)
		}

		// The caller gives up during the wait.
		ctx, cancel = context.WithCancel(t.Context())
		c = begin(t, m, ctx, get("/"))
		try(t, c)
		if !c.Retry(fail) {
			t.Fatal("no retry")
		}
		time.AfterFunc(10*time.Millisecond, cancel)
		_, err := c.Next()
		if err == nil {
			t.Fatal("an attempt begins after the caller gave up")
		}
		var own *call.Error
		if err = c.End(call.Result{Reason: call.ReasonReset, Err: err}); !errors.As(err, &own) || own.Reason != call.ReasonCancelled || !errors.Is(err, context.Canceled) {
			t.Errorf("End says %v, want cancelled", err)
		}
	})
}

func TestPerTryTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{Rand: func() uint64 { return 0 }}, orders(3, func(c *graph.Config) {
			retries(func(r *resource.Retry) { r.PerTry = 500 * time.Millisecond })(c)
			c.Routes.VirtualHosts[0].Routes[0].Timeout = 1200 * time.Millisecond
		}))
		c := begin(t, m, t.Context(), rpc("/a/B"))
		for i := range 3 {
			a, _ := try(t, c)
			if a.Number() != i {
				t.Errorf("attempt %d calls itself %d", i, a.Number())
			}
			<-a.Done()
			// gRPC reports the attempt's deadline as status 4.
			again := c.Retry(call.Result{Reason: call.ReasonTimeout, GRPCCode: 4, Err: a.Err()})
			if want := i < 2; again != want {
				t.Fatalf("attempt %d: retry %v, want %v", i, again, want)
			}
		}
		_ = c.End(call.Result{Reason: call.ReasonTimeout, GRPCCode: 4})
		rec := m.last(t)
		if rec.Reason != call.ReasonTimeout || rec.Attempts != 3 || rec.Duration != 1200*time.Millisecond {
			t.Errorf("two tries of 500 ms and one cut short by the call's 1.2 s: %+v", rec)
		}
		outcomes := rec.Decision().Attempts
		if outcomes[0].Outcome != "per_try_timeout" || outcomes[0].Took != 500*time.Millisecond || outcomes[2].Outcome != "timeout" {
			t.Errorf("attempts %+v", outcomes)
		}
	})
}

// A server that knows the deadline may say DEADLINE_EXCEEDED itself, at the very moment, or reset the stream,
// which gRPC reports by either code.
func TestADeadlineThatTheServerReportsIsOurs(t *testing.T) {
	for name, late := range map[string]call.Result{
		"a status":              {Reason: call.ReasonUpstreamStatus, GRPCCode: 4},
		"a reset":               {Reason: call.ReasonReset, GRPCCode: 4},
		"a reset, as cancelled": {Reason: call.ReasonReset, GRPCCode: 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMesh(t, call.Config{Rand: func() uint64 { return 0 }}, orders(3, func(c *graph.Config) {
					retries(func(r *resource.Retry) { r.PerTry = time.Second })(c)
					c.Routes.VirtualHosts[0].Routes[0].Timeout = 1500 * time.Millisecond
				}))
				c := begin(t, m, t.Context(), rpc("/a/B"))
				try(t, c)
				time.Sleep(300 * time.Millisecond)
				if late.Reason == call.ReasonUpstreamStatus && c.Retry(late) { // of a reset the policy speaks
					t.Error("a DEADLINE_EXCEEDED of the server's own is retried without a word of the policy")
				}
				_ = c.End(late)
				if rec := m.last(t); rec.Reason != late.Reason {
					t.Errorf("reason %s, want %s", rec.Reason, late.Reason)
				}
				c = begin(t, m, t.Context(), rpc("/a/B"))
				try(t, c)
				if time.Sleep(time.Second); !c.Retry(late) {
					t.Error("the attempt's deadline, reported by the server, is not a per-try timeout")
				}
				try(t, c)
				time.Sleep(500 * time.Millisecond)
				_ = c.End(late)
				if rec := m.last(t); rec.Reason != call.ReasonTimeout || rec.Decision().Attempts[0].Outcome != "per_try_timeout" {
					t.Errorf("%+v", rec)
				}
			})
		})
	}
}

// A stream whose answer has begun outlives the time of its attempt; what ends it later is not that.
func TestPerTryTimeoutEndsWithTheFirstAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(1, retries(func(r *resource.Retry) { r.PerTry = time.Second })))
		c := begin(t, m, t.Context(), rpc("/a/B"))
		a, _ := try(t, c)
		time.Sleep(999 * time.Millisecond)
		a.Commit()
		time.Sleep(time.Minute)
		a.Commit() // again is fine
		if a.Err() != nil {
			t.Errorf("the attempt ends with %v after its answer has begun", a.Err())
		}
		_ = c.End(call.Result{Reason: call.ReasonReset, GRPCCode: 14, Committed: true})
		if rec := m.last(t); rec.Reason != call.ReasonReset {
			t.Errorf("reason %s, want reset", rec.Reason)
		}
		if a.Err() == nil {
			t.Error("the context of an attempt outlives its call")
		}
	})
}

// An answer that begins when the time has passed comes too late, and says so whatever the skin saw.
func TestCommitAfterThePerTryTimeoutChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(1, retries(func(r *resource.Retry) { r.PerTry = time.Second })))
		c := begin(t, m, t.Context(), rpc("/a/B"))
		a, _ := try(t, c)
		<-a.Done()
		a.Commit()
		if !errors.Is(a.Err(), context.DeadlineExceeded) {
			t.Errorf("the attempt ends with %v, want DeadlineExceeded", a.Err())
		}
		_ = c.End(call.Result{Reason: call.ReasonCancelled, GRPCCode: 1, Committed: true})
		if rec := m.last(t); rec.Reason != call.ReasonPerTryTimeout || rec.GRPCCode != 4 {
			t.Errorf("reason %s, code %d; want per_try_timeout, 4", rec.Reason, rec.GRPCCode)
		}
	})
}

// The end of an attempt is told apart from the deadline, which is the call's and cannot be moved.
func TestTheEndOfAnAttemptIsNotItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(1, func(c *graph.Config) {
			retries(func(r *resource.Retry) { r.PerTry = time.Second })(c)
			c.Routes.VirtualHosts[0].Routes[0].Timeout = 10 * time.Second
		}))
		start := time.Now()
		c := begin(t, m, t.Context(), rpc("/a/B"))
		a, _ := try(t, c)
		if end, ok := a.Until(); !ok || end.Sub(start) != time.Second {
			t.Errorf("the attempt ends after %v (%v), want 1s", end.Sub(start), ok)
		}
		if end, ok := a.Deadline(); !ok || end.Sub(start) != 10*time.Second {
			t.Errorf("its deadline is after %v (%v), want 10s", end.Sub(start), ok)
		}
		succeed(t, c)
	})
}

func TestRetryBudgetIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{Rand: func() uint64 { return 0 }}, orders(3, func(c *graph.Config) {
			retries(nil)(c)
			c.Clusters["orders.default:80"].Resource.RetryBudgetPercent = 20
			c.Clusters["orders.default:80"].Resource.RetryMinPerSecond = 1
		}))
		fail := call.Result{Reason: call.ReasonUpstreamStatus, HTTPStatus: 503}
		attempts, refused := 0, 0
		const calls = 1000
		for range calls {
			c := begin(t, m, t.Context(), get("/"))
			for {
				attempts++
				try(t, c)
				if !c.Retry(fail) {
					break
				}
			}
			_ = c.End(fail)
			if m.last(t).Reason == call.ReasonRetryBudget {
				refused++
			}
			// An update in the middle must not fill the budget again.
			m.apply.Apply(orders(3, func(c *graph.Config) {
				retries(nil)(c)
				c.Clusters["orders.default:80"].Resource.RetryBudgetPercent = 20
				c.Clusters["orders.default:80"].Resource.RetryMinPerSecond = 1
			}))
		}
		// At one instant: 20 % of the calls, and the floor of one second.
		if attempts > calls+calls/5+1 || attempts < calls+calls/5-5 || refused < calls/2 {
			t.Errorf("%d attempts for %d calls that all fail, %d refused by the budget; want at most 1201", attempts, calls, refused)
		}
	})
}

// An instance that came up while a call waited to try again gets the second attempt.
func TestRetryUsesTheNewestEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, call.Config{}, orders(1, retries(nil)))
		c := begin(t, m, t.Context(), get("/"))
		_, first := try(t, c)
		m.apply.Apply(orders(2, retries(nil)))
		if !c.Retry(call.Result{Reason: call.ReasonConnectFailed}) {
			t.Fatal("no retry")
		}
		if _, second := try(t, c); second.Key == first.Key {
			t.Error("the second attempt went to the endpoint that just failed, not to the new one")
		}
		succeed(t, c)
	})
}

// gRPC picks again within an attempt when it retries transparently: each endpoint is counted once.
func TestPickingAgainWithinAnAttempt(t *testing.T) {
	m := newMesh(t, call.Config{}, orders(2, nil))
	c := begin(t, m, t.Context(), rpc("/a/B"))
	a, first := try(t, c)
	second := c.Cluster().Set.Pick(a.Tried())
	a.Picked(second)
	if first == second || first.State.InFlight() != 0 || second.State.InFlight() != 1 {
		t.Errorf("in flight: first %d, second %d; want 0 and 1", first.State.InFlight(), second.State.InFlight())
	}
	a.Release()
	a.Release()
	if second.State.InFlight() != 0 {
		t.Errorf("in flight after two releases: %d, want 0", second.State.InFlight())
	}
	succeed(t, c)
	a.Picked(first) // a pick that was under way when the call ended
	if first.State.InFlight() != 0 {
		t.Error("a pick after the end counts for ever")
	}
}
