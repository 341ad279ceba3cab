package call

import (
	"errors"
	"sync"
	"time"
)

// End ends the call: it gives back what the call holds and records it. It returns nil when r is a
// success, else an *Error with the final Reason. Exactly one End belongs to each Begin that
// succeeded; a second one changes nothing and returns what the first did.
func (c *Call) End(r Result) error {
	c.mu.Lock()
	if c.ended {
		err := c.err
		c.mu.Unlock()
		if err == nil {
			return nil
		}
		return err
	}
	c.ended = true
	if r.Reason == "" {
		r.Reason = ReasonOK
	}
	if r.Err != nil {
		c.unwrap(&r)
	}
	var a *Attempt
	if n := len(c.attempts); n > 0 {
		a = c.attempts[n-1]
	}
	c.classify(a, &r)
	outcome := r
	if c.stop != "" && r.Reason != ReasonOK && r.Reason != ReasonTimeout && r.Reason != ReasonCancelled {
		r.Reason = c.stop
	}
	var err *Error
	if r.Reason != ReasonOK {
		err = c.newError(r.Reason, r)
		err.Outcome = outcome.Reason
		c.err = err
	}
	now := c.engine.now()
	if a != nil {
		a.close(outcome, now)
	}
	c.mu.Unlock()
	c.finish(r, err, now)
	if err == nil {
		return nil
	}
	return err
}

// Unwind ends a call that its skin left without End, since something below it panicked: what the call
// holds is given back, and it is recorded. After End it does nothing.
func (c *Call) Unwind() {
	c.mu.Lock()
	ended := c.ended
	c.mu.Unlock()
	if !ended {
		_ = c.End(Result{Reason: ReasonCancelled, GRPCCode: codeCancelled, Committed: true, Detail: "its caller left it by a panic"})
	}
}

// unwrap takes the result out of an error that Next gave to the skin.
func (c *Call) unwrap(r *Result) {
	var own *Error
	if errors.As(r.Err, &own) && own.call == c {
		r.Reason, r.Detail, r.Err = own.Reason, own.Detail, own.Err
	}
}

// newError makes the call's error; c.mu is held or the call is still the engine's own.
func (c *Call) newError(reason Reason, r Result) *Error {
	e := &Error{Service: c.name, Reason: reason, Attempts: len(c.attempts), Detail: r.Detail, Err: r.Err, call: c}
	if c.route != nil {
		e.Route = c.route.Name
	}
	switch reason {
	case ReasonRetryBudget:
		e.Hint = "the service fails too often for every call to be repeated; look at its own errors first"
	case ReasonTimeout, ReasonPerTryTimeout:
		e.Hint = "`inlay explain` shows the timeouts of the route"
	case ReasonConnectFailed, ReasonNoEndpoint:
		e.Hint = "`inlay get endpoints` shows the state of each endpoint"
	}
	return e
}

// records are used again: a record is a quarter of what a call would hold, and nobody needs it once
// EndClient has returned.
var records = sync.Pool{New: func() any { return new(Record) }}

// finish releases and records, once.
func (c *Call) finish(r Result, err *Error, now time.Time) {
	c.mu.Lock()
	c.ended = true
	if err != nil {
		if err.Outcome == "" {
			err.Outcome = err.Reason
		}
		err.call = c
		err.Attempts = len(c.attempts)
		c.err = err
	}
	rec := records.Get().(*Record)
	*rec = Record{
		Direction: "client", Service: c.name, Reason: r.Reason, GRPC: c.req.GRPC,
		GRPCCode: r.GRPCCode, HTTPStatus: r.HTTPStatus, Start: c.start, Duration: now.Sub(c.start),
		Attempts: len(c.attempts), Method: c.req.Method, Path: c.req.Path, call: c,
	}
	if err != nil {
		rec.Err = err
	}
	if c.route != nil {
		rec.Route = c.route.Name
	}
	if !c.req.GRPC {
		rec.GRPCCode = -1
	}
	if n := len(c.attempts); n > 0 {
		a := c.attempts[n-1]
		rec.Peer, rec.MTLS = a.peer, a.mtls
		if a.endpoint != nil {
			rec.Version = a.endpoint.Version
		}
	}
	if c.external {
		rec.Peer = "external"
	}
	c.mu.Unlock()
	if c.limiter != nil {
		c.limiter.Release()
		c.limiter = nil
	}
	c.Unreserve()
	if c.engine.cfg.Observer != nil {
		c.engine.cfg.Observer.EndClient(c, rec)
	}
	*rec = Record{}
	records.Put(rec)
	if t := traceOf(c.ctx); t != nil && t.Done != nil {
		t.Done(c.Decision())
	}
	if c.cancel != nil {
		c.cancel()
	}
}
