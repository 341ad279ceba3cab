package call

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/limit"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
)

// Request is what a skin knows of a call when it begins. The deadline is that of the context.
type Request struct {
	// Request has Method, Path (as route.Canonical gives it) and Header as they are forwarded.
	route.Request
	// Authority the caller asked for; for texts and the skins.
	Authority string
	GRPC      bool
	// Idempotent: safe to send again after it may have been processed. A skin sets it for GET, HEAD,
	// OPTIONS, TRACE, PUT, DELETE (RFC 9110, 9.2.2) or a request with an Idempotency-Key, and for
	// gRPC always: the codes in a route's policy are the author's word that it may be repeated.
	Idempotent bool
	// WaitForReady: wait for an endpoint until the deadline instead of failing with no_endpoint.
	WaitForReady bool
}

// Call is one call, from Begin to End. It is the context.Context of the whole call: the caller's,
// with the span of the observer and the deadline of the route. Its methods may be called from
// several goroutines; attempts follow one another.
type Call struct {
	// Observed is the observer's own: what BeginClient puts there, EndClient finds.
	Observed any

	ctx      context.Context
	cancel   context.CancelFunc // nil when the call has no timeout of its own
	engine   *Engine
	name     string
	req      Request
	service  *Service
	route    *route.Route
	limiter  *limit.Limiter // not nil while a place is taken
	start    time.Time
	expired  atomic.Bool // the call's own timeout, measured with Config.Clock, has passed
	external bool

	mu          sync.Mutex // guards what follows
	cluster     *Cluster
	attempts    []*Attempt
	attemptsBuf [1]*Attempt
	first       Attempt
	tried       []*endpoint.Endpoint
	triedBuf    [2]*endpoint.Endpoint
	transparent int32         // retries that no policy asked for
	retries     uint32        // retries by the policy
	delay       time.Duration // before the next attempt
	stop        Reason        // why a retry that was due is not made
	notes       []string      // limits that were hit, for the decision
	held        int64         // bytes in the replay buffer
	ended       bool
	err         *Error
}

// Begin waits for configuration, matches the route, draws the cluster by weight once and takes a
// place under the cluster's limit. Errors are *Error and have been recorded; without an error the
// call needs exactly one End.
func (e *Engine) Begin(ctx context.Context, name string, req *Request) (*Call, error) {
	c := &Call{engine: e, name: name, req: *req, start: e.now(), ctx: ctx}
	c.first.call = c
	if e.cfg.Observer != nil {
		c.ctx = e.cfg.Observer.BeginClient(ctx, c)
	}
	if err := c.begin(); err != nil {
		c.finish(Result{Reason: err.Reason, GRPCCode: -1, Err: err.Err}, err, e.now())
		return nil, err
	}
	return c, nil
}

// BeginExternal begins a call that leaves the mesh: it has no route, limit or retry, and is
// recorded with peer "external" and host as its service. It needs one End; Next gives its context.
func (e *Engine) BeginExternal(ctx context.Context, host string, req *Request) *Call {
	c := &Call{engine: e, name: host, req: *req, start: e.now(), ctx: ctx, external: true}
	c.first.call = c
	if e.cfg.Observer != nil {
		c.ctx = e.cfg.Observer.BeginClient(ctx, c)
	}
	return c
}

// DetailUndecided is said of a call that ended before it was known whether its name is of the mesh.
const DetailUndecided = "while waiting to learn the namespaces of the mesh"

// Refuse records a call to name that its skin does not begin, and gives the error that r says.
func (e *Engine) Refuse(ctx context.Context, name string, req *Request, r Result) error {
	c := e.BeginExternal(ctx, name, req)
	c.external = false
	return c.End(r)
}

func (c *Call) begin() *Error {
	e := c.engine
	if same, ok := route.Canonical(c.req.Path); !ok || same != c.req.Path {
		// What is matched must be what is forwarded; the skin has not seen to it.
		return &Error{
			Service: c.name, Reason: ReasonNoRoute, Detail: fmt.Sprintf("path %q has no single meaning", c.req.Path),
			Hint: "send a path without \"//\", \"..\", \"%2F\", \"\\\" and raw special bytes",
		}
	}
	svc, err := e.service(c.ctx, c.name)
	if err != nil {
		return err
	}
	at := c.start
	for {
		changed, err := c.choose(svc)
		if err == nil {
			break
		}
		if err.Reason != ReasonNoEndpoint || !c.req.WaitForReady {
			return err
		}
		// Wait for ready, as gRPC has it: queued until the configuration brings an endpoint or the
		// deadline passes.
		select {
		case <-changed:
		case <-c.ctx.Done():
			if errors.Is(c.ctx.Err(), context.Canceled) {
				err.Reason = ReasonCancelled
			} else {
				err.Reason = ReasonTimeout
			}
			err.Err = context.Cause(c.ctx)
			return err
		}
		if svc, err = e.service(c.ctx, c.name); err != nil {
			return err
		}
		at = e.now()
	}
	if !c.cluster.Limiter.Acquire() {
		return &Error{
			Service: c.name, Route: c.route.Name, Reason: ReasonCircuitOpen,
			Detail: fmt.Sprintf("limit of %d to cluster %q", c.cluster.Limiter.Max(), c.cluster.Name),
			Hint:   "raise limits.maxRequests of its TrafficPolicy, or add instances",
		}
	}
	c.limiter = c.cluster.Limiter
	c.cluster.Budget.Call(at)
	if t := c.route.Timeout; t > 0 {
		c.ctx, c.cancel = e.within(c.ctx, t, at, &c.expired)
	}
	return nil
}

// choose matches the route and draws the cluster. changed is closed when another try may differ.
func (c *Call) choose(svc *Service) (changed <-chan struct{}, err *Error) {
	if err := c.match(svc); err != nil {
		return nil, err
	}
	if len(c.route.Clusters) == 1 {
		return c.check(c.route.Clusters[0].Cluster)
	}
	return c.check(c.route.Cluster(c.engine.cfg.Rand()))
}

// match finds the route.
func (c *Call) match(svc *Service) *Error {
	c.service = svc
	c.route = svc.Routes.Match(c.req.Request)
	switch r := c.route; {
	case r == nil:
		return &Error{
			Service: c.name, Reason: ReasonNoRoute, Detail: fmt.Sprintf("nothing matches %s %s", c.req.Method, c.req.Path),
			Hint: "`inlay explain` shows each route that was tried and why it did not match",
		}
	case r.Invalid != "":
		return &Error{
			Service: c.name, Route: r.Name, Reason: ReasonNoRoute,
			Detail: "the route that matches cannot be honoured by this client: " + r.Invalid,
		}
	case r.Total == 0:
		return &Error{
			Service: c.name, Route: r.Name, Reason: ReasonNoCluster,
			Detail: "the weights of the route sum to 0", Hint: "give one of its backendRefs a weight",
		}
	}
	return nil
}

// check takes the cluster that was drawn when calls can be sent to it.
func (c *Call) check(drawn string) (changed <-chan struct{}, err *Error) {
	c.cluster = c.service.Clusters[drawn]
	switch {
	case c.cluster == nil:
		return nil, &Error{
			Service: c.name, Route: c.route.Name, Reason: ReasonNoCluster,
			Detail: fmt.Sprintf("cluster %q is not in the configuration", drawn),
		}
	case c.cluster.Err != nil:
		return nil, &Error{
			Service: c.name, Route: c.route.Name, Reason: ReasonNoCluster, Err: c.cluster.Err,
			Detail: fmt.Sprintf("cluster %q does not exist or is not valid", drawn),
			Hint:   "`inlay get clients` shows what was rejected and why",
		}
	case c.cluster.Set.Len() > 0:
		return nil, nil
	}
	e := c.engine
	e.mu.Lock()
	changed = e.changed
	stale := e.snapshot.Services[c.name] != c.service
	e.mu.Unlock()
	if stale { // changed between the load of the service and now: look again at once
		now := make(chan struct{})
		close(now)
		changed = now
	}
	return changed, c.noEndpoint()
}

func (c *Call) noEndpoint() *Error {
	err := &Error{Service: c.name, Route: c.route.Name, Reason: ReasonNoEndpoint}
	switch n := len(c.cluster.All); {
	case c.cluster.EmptyReason != "":
		err.Detail = c.cluster.EmptyReason
	case n == 0:
		err.Detail = fmt.Sprintf("cluster %q has no endpoints", c.cluster.Name)
		err.Hint = "`inlay get endpoints` shows which instances registered; start one with `inlay run`"
	default:
		err.Detail = fmt.Sprintf("none of the %d endpoints of cluster %q can be picked: %s", n, c.cluster.Name, c.cluster.All[0].Excluded)
	}
	return err
}

// within bounds ctx to d from at. With the real clock the context says its deadline, so that gRPC
// sends it on; with another one only AfterFunc can tell, and expired notes that it did.
func (e *Engine) within(ctx context.Context, d time.Duration, at time.Time, expired *atomic.Bool) (context.Context, context.CancelFunc) {
	if !e.timed {
		end := at.Add(d)
		if sooner, ok := ctx.Deadline(); ok && !end.Before(sooner) {
			return ctx, nil
		}
		return context.WithDeadline(ctx, end)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := e.clock.AfterFunc(d, func() {
		expired.Store(true)
		cancel(context.DeadlineExceeded)
	})
	return ctx, func() { stop(); cancel(nil) }
}

// Deadline, Done, Err and Value make a Call the context of the whole call.
func (c *Call) Deadline() (time.Time, bool) { return c.ctx.Deadline() }

// Done is closed when the call must end.
func (c *Call) Done() <-chan struct{} { return c.ctx.Done() }

// Err says why Done is closed.
func (c *Call) Err() error {
	if c.expired.Load() {
		return context.DeadlineExceeded
	}
	return c.ctx.Err()
}

// Value gives the values of the caller's context and of the observer.
func (c *Call) Value(key any) any { return c.ctx.Value(key) }

// Name is the name that was called.
func (c *Call) Name() string { return c.name }

// Request as the skin gave it.
func (c *Call) Request() *Request { return &c.req }

// Start of the call.
func (c *Call) Start() time.Time { return c.start }

// Service is the configuration that the call was begun with.
func (c *Call) Service() *Service { return c.service }

// Route that matched.
func (c *Call) Route() *route.Route { return c.route }

// Cluster that was drawn. Its endpoints are those of the newest snapshot at the last Next; the
// route and its policy stay those of Begin.
func (c *Call) Cluster() *Cluster {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cluster
}

// Idle ends a call on which nothing moved for so long; zero means none. The skin keeps that time.
func (c *Call) Idle() time.Duration {
	if c.route == nil {
		return 0
	}
	return c.route.Idle
}

// Reserve accounts for n more bytes kept to repeat the call. False means that the call or the Mesh
// is over its bound, or that the call has ended: nothing was reserved, and the skin must commit to the
// attempt it has. It never blocks. Unreserve gives all of it back before End does.
func (c *Call) Reserve(n int) bool {
	e, more := c.engine, int64(n)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.held+more > e.cfg.ReplayPerCall {
		return false
	}
	if e.held.Add(more) > e.cfg.ReplayTotal {
		e.held.Add(-more)
		return false
	}
	c.held += more
	return true
}

// Unreserve gives back all that Reserve took: the call is committed and its buffer dropped.
func (c *Call) Unreserve() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held != 0 { // nearly every call holds nothing, and the counter is everybody's
		c.engine.held.Add(-c.held)
		c.held = 0
	}
}
