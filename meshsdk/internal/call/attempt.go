package call

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/retry"
)

// Attempt is one try of a call. It is the context.Context of the try: the call's, cut when the
// per-try timeout passes before Commit. The first one lies inside its Call and costs no allocation.
type Attempt struct {
	call    *Call
	ctx     context.Context
	cancel  context.CancelCauseFunc // nil when there is no per-try timeout
	expired atomic.Bool             // the per-try timeout has passed before Commit
	number  int32
	start   time.Time
	perTry  time.Duration // zero when there is no per-try timeout

	// Guarded by call.mu.
	disarm   func() bool        // stops the timer of the per-try timeout; nil when it counts no longer
	endpoint *endpoint.Endpoint // the last one picked
	peer     string
	took     time.Duration
	outcome  Reason
	detail   string
	holding  bool // endpoint's State is acquired
	mtls     bool
	closed   bool
}

// attemptKey finds the attempt in a context that comes from it.
type attemptKey struct{}

// FromContext gives the attempt that ctx comes from, nil when none: a picker finds out whose call
// it picks for.
func FromContext(ctx context.Context) *Attempt {
	a, _ := ctx.Value(attemptKey{}).(*Attempt)
	return a
}

// Next begins an attempt; before a further one it waits the back-off. It fails, with an *Error that
// the skin hands to End as Result.Err, only when the call's context is done. The attempt is closed
// by Retry or End.
func (c *Call) Next() (*Attempt, error) {
	c.mu.Lock()
	number := len(c.attempts)
	if number == 0 {
		a := &c.first
		a.start = c.start
		c.attempts = append(c.attemptsBuf[:0], a)
		c.open(a)
		c.mu.Unlock()
		return a, nil
	}
	delay := c.delay
	c.mu.Unlock()
	if err := c.sleep(delay); err != nil {
		return nil, err
	}
	a := &Attempt{call: c, number: int32(number), start: c.engine.now()}
	c.mu.Lock()
	defer c.mu.Unlock()
	// gRFC A44: "each retry attempt will re-pick a subchannel that routes to the upstream cluster from
	// the most up-to-date picker": an instance that came up meanwhile can be tried.
	if now, ok := c.engine.view.Load().names[c.name]; ok && c.cluster != nil {
		if cl := now.service.Clusters[c.cluster.Name]; cl != nil && cl.Err == nil {
			c.cluster = cl
		}
	}
	c.attempts = append(c.attempts, a)
	c.open(a)
	return a, nil
}

// open starts the time of an attempt; c.mu is held.
func (c *Call) open(a *Attempt) {
	a.ctx = c.ctx
	if c.route == nil || c.route.Retry == nil || c.route.Retry.PerTry <= 0 {
		return
	}
	d := c.route.Retry.PerTry
	if sooner, ok := c.ctx.Deadline(); ok && !a.start.Add(d).Before(sooner) {
		return
	}
	a.perTry = d
	// Not a context with a deadline: that could not be taken back.
	a.ctx, a.cancel = context.WithCancelCause(c.ctx)
	a.disarm = c.engine.clock.AfterFunc(d, a.expire)
}

// expire is the per-try timeout.
func (a *Attempt) expire() {
	a.call.mu.Lock()
	late := a.disarm == nil
	if !late {
		a.disarm = nil
		a.expired.Store(true)
	}
	a.call.mu.Unlock()
	if !late {
		a.cancel(context.DeadlineExceeded)
	}
}

// Commit takes the per-try timeout back: the answer has begun and may take the time of the whole
// call. A skin that learns of the answer only when it is complete has no use for it. It may be
// called again; after the timeout it changes nothing.
func (a *Attempt) Commit() {
	a.call.mu.Lock()
	defer a.call.mu.Unlock()
	a.stop()
}

// stop ends the per-try timeout; call.mu is held.
func (a *Attempt) stop() {
	if a.disarm != nil {
		a.disarm()
		a.disarm = nil
	}
}

// Until is when the attempt is cut unless Commit comes first; ok is false without a per-try timeout,
// and with Config.Clock, whose times mean nothing to anybody else.
func (a *Attempt) Until() (end time.Time, ok bool) {
	return a.start.Add(a.perTry), a.perTry > 0 && !a.call.engine.timed
}

func (c *Call) sleep(d time.Duration) *Error {
	if d > 0 && c.ctx.Err() == nil {
		woken := make(chan struct{})
		stop := c.engine.clock.AfterFunc(d, func() { close(woken) })
		select {
		case <-woken:
		case <-c.ctx.Done():
			stop()
		}
	}
	if c.Err() == nil {
		return nil
	}
	reason := ReasonTimeout
	if errors.Is(c.Err(), context.Canceled) {
		reason = ReasonCancelled
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.newError(reason, Result{Err: context.Cause(c.ctx), Detail: "while waiting to try again"})
}

// Call that the attempt belongs to.
func (a *Attempt) Call() *Call { return a.call }

// Number counts from 0.
func (a *Attempt) Number() int { return int(a.number) }

// Deadline, Done, Err and Value make an Attempt the context of its try. The deadline is that of the
// call: what is told of an earlier one, a server for instance, could not be told of Commit.
func (a *Attempt) Deadline() (time.Time, bool) { return a.ctx.Deadline() }

// Done is closed when the attempt must end.
func (a *Attempt) Done() <-chan struct{} { return a.ctx.Done() }

// Err says why Done is closed.
func (a *Attempt) Err() error {
	if a.expired.Load() || a.call.expired.Load() {
		return context.DeadlineExceeded
	}
	return a.ctx.Err()
}

// Value gives the values of the call's context, and the attempt itself to FromContext.
func (a *Attempt) Value(key any) any {
	if _, ok := key.(attemptKey); ok {
		return a
	}
	return a.ctx.Value(key)
}

// Tried are the endpoints that the call has picked before; read only, for balance.Set.Pick.
func (a *Attempt) Tried() []*endpoint.Endpoint {
	c := a.call
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tried
}

// Picked counts ep as the attempt's endpoint and acquires its State until Release, another Picked
// or the end of the attempt. gRPC picks again within one attempt when it retries transparently.
func (a *Attempt) Picked(ep *endpoint.Endpoint) {
	c := a.call
	c.mu.Lock()
	defer c.mu.Unlock()
	a.release()
	if a.closed {
		return // a pick that came back after the call had given up
	}
	a.endpoint, a.holding = ep, true
	ep.State.Acquire()
	if n := len(c.tried); n == 0 || c.tried[n-1] != ep {
		if c.tried == nil {
			c.tried = c.triedBuf[:0]
		}
		c.tried = append(c.tried, ep)
	}
}

// Release ends the attempt's claim on the endpoint that was picked; further calls do nothing.
func (a *Attempt) Release() {
	a.call.mu.Lock()
	defer a.call.mu.Unlock()
	a.release()
}

func (a *Attempt) release() {
	if a.holding {
		a.holding = false
		a.endpoint.State.Release()
	}
}

// Connected notes who is at the other end: its SPIFFE ID, or "plaintext", and whether both ends
// proved theirs.
func (a *Attempt) Connected(peer string, mtls bool) {
	a.call.mu.Lock()
	defer a.call.mu.Unlock()
	a.peer, a.mtls = peer, mtls
}

// close ends the attempt; c.mu is held.
func (a *Attempt) close(r Result, at time.Time) {
	if a.closed {
		return
	}
	a.closed = true
	a.release()
	a.took = at.Sub(a.start)
	a.outcome, a.detail = r.Reason, r.Detail
	a.stop()
	if a.cancel != nil {
		a.cancel(nil)
	}
}

// Bounds of the retries that no policy asks for.
const (
	// maxUnsent: work that never left may go to another endpoint, up to so many times.
	maxUnsent = 3
	// maxRefused: gRFC A6, transparent retries: what the server refused without processing it is
	// sent again once.
	maxRefused = 1
)

// Retry closes the attempt and reports whether Next may be called for another one. False leaves the
// call to End, with the same Result.
//
// Without a policy only work that certainly was not processed is repeated: what never left goes to
// another endpoint while there is one (at most 3 times), what the server refused is sent again once
// (gRFC A6 calls these transparent). With a policy that names the failure, up to its Attempts, when
// the request is idempotent or certainly was not processed and the cluster's budget has room. A
// committed response is final.
func (c *Call) Retry(r Result) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.attempts) == 0 || c.ended {
		return false
	}
	a := c.attempts[len(c.attempts)-1]
	if r.Reason == "" {
		r.Reason = ReasonOK
	}
	c.classify(a, &r)
	at := c.engine.now()
	a.close(r, at)
	if r.Reason == ReasonOK || r.Committed || c.Err() != nil || c.external || c.route == nil {
		return false
	}
	untouched := r.Unsent || r.Refused || r.Reason == ReasonConnectFailed || r.Reason == ReasonNoEndpoint
	failure := retry.Failure{
		Connect:    r.Reason == ReasonConnectFailed || r.Reason == ReasonNoEndpoint,
		Refused:    r.Refused,
		NoAnswer:   r.Reason == ReasonReset,
		PerTry:     r.Reason == ReasonPerTryTimeout,
		HTTPStatus: r.HTTPStatus,
		GRPCCode:   -1,
	}
	if c.req.GRPC {
		failure.GRPCCode, failure.HTTPStatus = r.GRPCCode, 0
	}
	p := c.route.Retry
	if !p.Matches(failure) {
		switch {
		case !untouched:
			return false
		case r.Refused && c.transparent >= maxRefused, c.transparent >= maxUnsent, !r.Refused && !c.another():
			return false
		}
		c.transparent++
		c.delay = 0
		return true
	}
	switch {
	case !untouched && !c.req.Idempotent:
		c.notes = append(c.notes, c.req.Method+" is not repeated: it may have been processed and is not idempotent")
		return false
	case c.retries >= p.Attempts:
		c.stop = ReasonRetryExhausted
		return false
	}
	delay := p.Backoff.Delay(int(c.retries), c.engine.cfg.Rand())
	if end, ok := c.ctx.Deadline(); ok && !at.Add(delay).Before(end) {
		// The next attempt would begin after the deadline: the failure at hand says more than a
		// timeout would.
		c.notes = append(c.notes, "no time left for another attempt")
		return false
	}
	if !c.cluster.Budget.Take(at) {
		c.stop = ReasonRetryBudget
		c.notes = append(c.notes, "retry budget of cluster "+c.cluster.Name+" is spent")
		return false
	}
	c.retries++
	c.delay = delay
	return true
}

// another reports whether the cluster has an endpoint that was not tried.
func (c *Call) another() bool {
	if c.cluster == nil {
		return false
	}
	for _, ep := range c.cluster.Set.Endpoints() {
		fresh := true
		for _, t := range c.tried {
			if t.Key == ep.Key {
				fresh = false
				break
			}
		}
		if fresh {
			return true
		}
	}
	return false
}

// classify finds out whether a deadline of ours lies behind a failure: gRPC and net/http report it as
// a cancelled or broken call, and a server that was told of it by grpc-timeout may answer with
// DEADLINE_EXCEEDED before this end has noticed.
func (c *Call) classify(a *Attempt, r *Result) {
	told := false // by the server
	switch r.Reason {
	case ReasonCancelled, ReasonTimeout, ReasonPerTryTimeout:
	case ReasonReset:
		// A server may also reset the stream when the time that it was told has passed.
		told = c.req.GRPC && (r.GRPCCode == codeDeadlineExceeded || r.GRPCCode == codeCancelled)
	case ReasonUpstreamStatus:
		if !c.req.GRPC || r.GRPCCode != codeDeadlineExceeded {
			return
		}
		told = true
	default:
		return
	}
	open := a != nil && !a.closed
	end, bounded := c.ctx.Deadline()
	switch err := c.Err(); {
	case errors.Is(err, context.DeadlineExceeded) || told && bounded && c.past(end):
		r.Reason = ReasonTimeout
	case err != nil:
		r.Reason = ReasonCancelled
	case open && (a.expired.Load() || told && !r.Committed && a.disarm != nil && c.past(a.start.Add(a.perTry))):
		r.Reason = ReasonPerTryTimeout
	case a != nil && a.closed && a.outcome != "":
		r.Reason = a.outcome // as Retry found it
	}
	if c.req.GRPC && (r.Reason == ReasonTimeout || r.Reason == ReasonPerTryTimeout) {
		r.GRPCCode = codeDeadlineExceeded
	}
}

// past reports whether end has been reached, be its timer late or not.
func (c *Call) past(end time.Time) bool { return !c.engine.now().Before(end) }

// gRPC statuses of these names.
const (
	codeCancelled        = 1
	codeDeadlineExceeded = 4
)
