package call

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
)

// Trace hooks the decision of the calls whose context carries it.
type Trace struct {
	// Done is called once a call, when it has ended, in its goroutine. Nil is fine.
	Done func(*Decision)
}

type traceKey struct{}

// WithTrace returns ctx with t in it.
func WithTrace(ctx context.Context, t *Trace) context.Context {
	return context.WithValue(ctx, traceKey{}, t)
}

func traceOf(ctx context.Context) *Trace {
	t, _ := ctx.Value(traceKey{}).(*Trace)
	return t
}

// Decision explains the call as far as it has come. It is built anew at each call of it: nothing is
// kept for it on the way but the attempts.
func (c *Call) Decision() *Decision { return c.decision(true) }

// Summary is Decision without the routes that were skipped and the endpoints: it costs the same
// however large the configuration is, so a span can carry it.
func (c *Call) Summary() *Decision { return c.decision(false) }

func (c *Call) decision(whole bool) *Decision {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := describe(c.name, c.service, &c.req, c.route, c.cluster, whole)
	for _, a := range c.attempts {
		v := AttemptView{Start: a.start, Took: a.took, Outcome: string(a.outcome), Peer: a.peer}
		if a.endpoint != nil {
			v.Endpoint = a.endpoint.Addresses[0].String()
		}
		if a.detail != "" {
			v.Outcome += ": " + a.detail
		}
		if !a.closed {
			v.Outcome, v.Took = "running", c.engine.now().Sub(a.start)
		}
		d.Attempts = append(d.Attempts, v)
	}
	d.Limits = append(d.Limits, c.notes...)
	if c.ended {
		d.Reason = ReasonOK
	}
	if c.err != nil {
		d.Reason, d.Detail = c.err.Reason, c.err.Detail
		if c.err.Reason == ReasonCircuitOpen {
			d.Limits = append(d.Limits, c.err.Detail)
		}
	}
	return d
}

// Explain says what a call would do now; nothing is sent and nothing counted. For a split the
// cluster with the greatest weight is shown, the others stand in Candidates. The request's path may
// be in any spelling. The error is an *Error when the name has no configuration; a call that would
// fail later is a Decision with its Reason.
func (e *Engine) Explain(ctx context.Context, name string, req Request) (*Decision, error) {
	svc, failed := e.service(ctx, name)
	if failed != nil {
		return nil, failed
	}
	path, ok := route.Canonical(req.Path)
	if !ok {
		return &Decision{
			Service: name, Revision: svc.Version, Reason: ReasonNoRoute,
			Detail: fmt.Sprintf("path %q has no single meaning and is refused", req.Path),
		}, nil
	}
	req.Path = path
	c := &Call{engine: e, name: name, req: req}
	if failed = c.match(svc); failed == nil {
		heaviest := slices.MaxFunc(c.route.Clusters, func(a, b route.Weighted) int { return cmp.Compare(a.Weight, b.Weight) })
		_, failed = c.check(heaviest.Cluster)
	}
	d := describe(name, svc, &req, c.route, c.cluster, true)
	d.Reason = ReasonOK
	if failed != nil {
		d.Reason, d.Detail = failed.Reason, failed.Detail
	} else if l := c.cluster.Limiter; l != nil && l.InFlight() >= int64(l.Max()) {
		d.Reason = ReasonCircuitOpen
		d.Limits = append(d.Limits, fmt.Sprintf("limit of %d calls in flight to cluster %q is reached", l.Max(), c.cluster.Name))
	}
	return d, nil
}

func describe(name string, svc *Service, req *Request, r *route.Route, cl *Cluster, whole bool) *Decision {
	d := &Decision{Service: name}
	if svc == nil {
		return d
	}
	d.Revision = svc.Version
	if whole && svc.Routes != nil {
		_, skipped := svc.Routes.Explain(req.Request)
		for _, s := range skipped {
			d.Skipped = append(d.Skipped, SkippedRoute{Route: ChoiceOf(s.Route), Why: s.Why})
		}
	}
	if r != nil {
		chosen := ChoiceOf(r)
		d.Route = &chosen
		d.RequestTimeout = r.Timeout
		if r.Retry != nil {
			d.PerTryTimeout, d.MaxRetries = r.Retry.PerTry, r.Retry.Attempts
		}
		for _, w := range r.Clusters {
			share := ClusterShare{Cluster: w.Cluster, Weight: w.Weight}
			switch c := svc.Clusters[w.Cluster]; {
			case c == nil:
				share.Invalid = "not in the configuration"
			case c.Err != nil:
				share.Invalid = c.Err.Error()
			case c.EmptyReason != "":
				share.Invalid = c.EmptyReason
			}
			d.Candidates = append(d.Candidates, share)
		}
	}
	if cl != nil {
		d.Cluster = cl.Name
		if whole {
			for _, ep := range cl.All {
				d.Endpoints = append(d.Endpoints, ViewOf(ep))
			}
		}
	}
	return d
}

// ChoiceOf is a route as decisions and dumps show it.
func ChoiceOf(r *route.Route) RouteChoice {
	return RouteChoice{Object: r.Object, Rule: r.Rule, Source: r.Source, Name: r.Name, Match: r.Label()}
}

// ViewOf is an endpoint as decisions and dumps show it.
func ViewOf(ep *endpoint.Endpoint) EndpointView {
	v := EndpointView{
		Address: ep.Addresses[0].String(), InstanceID: ep.InstanceID, Labels: maps.Clone(ep.Labels),
		Locality: ep.Locality(), Priority: ep.Priority, Excluded: ep.Excluded, TLS: "plaintext",
	}
	if ep.TLS != nil {
		ids := make([]string, len(ep.TLS.Peers))
		for i, p := range ep.TLS.Peers {
			ids[i] = p.String()
		}
		v.TLS = "mtls " + strings.Join(ids, ", ")
	}
	return v
}
