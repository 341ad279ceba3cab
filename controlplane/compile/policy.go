package compile

import (
	"time"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/ir"
)

const (
	defaultBase = 25 * time.Millisecond
	// maxOfBase is the longest back-off where only the base is written.
	// Envoy's RetryBackOff.max_interval: "The default is 10 times the base_interval".
	maxOfBase = 10
)

// merged is what policies say, field by field; the first of them wins. Nil fields were not written.
type merged struct {
	request, perTry, idle *time.Duration
	attempts              *uint32
	on                    []string // nil: not written
	codes                 []uint32
	base, max             *time.Duration
	budget                *float64
	minPerSecond          *uint32
	lb                    *object.LB
	maxRequests           *uint32
	source                object.Pos
}

// merge takes policies, the strongest first; nil ones say nothing.
func merge(policies ...*object.Policy) merged {
	var m merged
	for _, p := range policies {
		if p == nil {
			continue
		}
		if m.source == (object.Pos{}) {
			m.source = p.Pos
		}
		first(&m.request, p.Request)
		first(&m.perTry, p.PerTry)
		first(&m.idle, p.Idle)
		first(&m.lb, p.LB)
		first(&m.maxRequests, p.MaxRequests)
		r := p.Retries
		if r == nil {
			continue
		}
		first(&m.attempts, r.Attempts)
		if m.on == nil && r.On != nil {
			m.on, m.codes = r.On, r.Codes
		}
		if m.base == nil && m.max == nil { // the two belong together
			m.base, m.max = r.Base, r.Max
		}
		first(&m.budget, r.BudgetPercent)
		first(&m.minPerSecond, r.MinPerSecond)
	}
	return m
}

func first[T any](to **T, from *T) {
	if *to == nil {
		*to = from
	}
}

func value[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

// cluster is the policy of a cluster.
func (m *merged) cluster() ir.ClusterPolicy {
	out := ir.ClusterPolicy{
		LB:                 ir.LeastRequest,
		MaxRequests:        value(m.maxRequests, defaultMaxRequests),
		RetryBudgetPercent: value(m.budget, defaultBudgetPercent),
		RetryMinPerSecond:  value(m.minPerSecond, defaultMinPerSecond),
		Source:             ir.Source(m.source),
	}
	if value(m.lb, object.LeastRequest) == object.RoundRobin {
		out.LB = ir.RoundRobin
	}
	return out
}

// backoff is base and max with what is missing filled in.
func (m *merged) backoff() (base, max time.Duration) {
	switch {
	case m.base == nil && m.max == nil:
		return defaultBase, maxOfBase * defaultBase
	case m.max == nil:
		return *m.base, maxOfBase * *m.base
	case m.base == nil:
		return min(defaultBase, *m.max), *m.max
	}
	return *m.base, *m.max
}

// retry is what the policies alone say. A stanza that names neither attempts nor conditions only
// sets the budget and switches no retries on.
func (m *merged) retry() *ir.Retry {
	if m.attempts == nil && m.on == nil {
		return nil
	}
	out := &ir.Retry{Attempts: value(m.attempts, defaultAttempts)}
	out.Base, out.Max = m.backoff()
	if m.on == nil {
		// Only what was not sent is tried again by default.
		out.On = []ir.RetryOn{ir.OnConnectFailure, ir.OnRefusedStream}
		return out
	}
	for _, w := range m.on {
		out.On = append(out.On, ir.RetryOn(w))
	}
	out.Codes = m.codes
	return out
}

// routeRetry is a route's own stanza over the policies.
func (m *merged) routeRetry(r *object.RouteRetry) *ir.Retry {
	out := &ir.Retry{
		Attempts: value(r.Attempts, value(m.attempts, defaultAttempts)),
		// HTTPRouteRetry: "Implementations SHOULD retry on connection errors (disconnect, reset,
		// timeout, TCP failure) if a retry stanza is configured."
		On:    []ir.RetryOn{ir.OnConnectFailure, ir.OnRefusedStream, ir.OnReset},
		Codes: r.Codes,
	}
	out.Base, out.Max = m.backoff()
	if r.Backoff != nil {
		out.Base, out.Max = *r.Backoff, maxOfBase**r.Backoff
	}
	return out
}

// perCall reports whether a policy says anything about timeouts or retries of a call.
func perCall(p *object.Policy) bool {
	if p == nil {
		return false
	}
	r := p.Retries
	return p.Request != nil || p.PerTry != nil || p.Idle != nil || r != nil && (r.Attempts != nil || r.On != nil || r.Base != nil || r.Max != nil)
}
