package apply

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/meshsdk/internal/balance"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/limit"
	"github.com/inlay-mesh/inlay/meshsdk/internal/retry"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// cluster is one cluster with what outlives its updates.
type cluster struct {
	from  *graph.Cluster // what value was made of
	value *call.Cluster
	keys  []string // of its endpoints, one for each claim on a state
	users int      // listeners that have it

	limiter *limit.Limiter
	budget  *retry.Budget
	cursor  *balance.Cursor
}

// sharedState is the state of one endpoint key with the number of claims on it.
type sharedState struct {
	state  *endpoint.State
	claims int
}

// cluster gives the value for in: the same as before when nothing changed. Listeners that share a
// cluster share its value; the newest one wins.
func (a *Applier) cluster(name string, in *graph.Cluster) *call.Cluster {
	c := a.clusters[name]
	if c == nil {
		c = &cluster{cursor: new(balance.Cursor)}
		a.clusters[name] = c
	} else if equal(c.from, in) {
		c.from = in
		return c.value
	}
	before := c.keys
	c.from = in
	c.value, c.keys = a.build(name, in, c)
	a.releaseStates(before) // after build: what stays is never let go
	return c.value
}

func equal(a, b *graph.Cluster) bool {
	if a == b {
		return true
	}
	if (a.Err == nil) != (b.Err == nil) || a.Err != nil && a.Err.Error() != b.Err.Error() {
		return false
	}
	return (a.Resource == b.Resource || reflect.DeepEqual(a.Resource, b.Resource)) &&
		(a.Endpoints == b.Endpoints || reflect.DeepEqual(a.Endpoints, b.Endpoints))
}

func (a *Applier) build(name string, in *graph.Cluster, c *cluster) (*call.Cluster, []string) {
	out := &call.Cluster{Name: name, Host: hostOf(name), Version: versionOf(name), ConnectTimeout: 5 * time.Second}
	var maxRequests uint32 = 1024
	var budget retry.BudgetConfig
	policy := balance.RoundRobin
	if r := in.Resource; in.Err == nil && r != nil {
		out.HTTP2 = r.HTTP2
		if r.ConnectTimeout > 0 {
			out.ConnectTimeout = r.ConnectTimeout
		}
		out.EmptyReason, out.SPIFFEID = r.EmptyReason, r.SPIFFEID
		maxRequests = r.MaxRequests
		budget = retry.BudgetConfig{Percent: r.RetryBudgetPercent, MinPerSecond: int64(r.RetryMinPerSecond)}
		if r.RetryMinPerSecond == 0 {
			budget.MinPerSecond = -1 // 0 is what its author wrote
		}
		if r.LB == resource.LeastRequest {
			policy = balance.LeastRequest
		}
	}
	if c.limiter == nil {
		c.limiter = limit.New(maxRequests)
		c.budget = retry.NewBudget(budget, a.cfg.Now())
	} else if in.Err == nil {
		c.limiter.SetMax(maxRequests)
		c.budget.Set(budget)
	}
	out.Limiter, out.Budget = c.limiter, c.budget
	var keys []string
	switch {
	case in.Err != nil:
		out.Err = in.Err
	case in.Resource == nil:
		out.Err = fmt.Errorf("cluster %q: no resource", name)
	default:
		out.All = a.endpoints(in)
		for _, ep := range out.All {
			keys = append(keys, ep.Key)
		}
	}
	out.Set = balance.NewSet(balance.Config{Policy: policy, Cursor: c.cursor, Rand: a.cfg.Rand}, out.All)
	return out, keys
}

// endpoints flattens the localities; each endpoint gets the TLS of the first transport that its
// metadata matches.
func (a *Applier) endpoints(in *graph.Cluster) []*endpoint.Endpoint {
	if in.Endpoints == nil {
		return nil
	}
	transports := newTransports(in.Resource)
	among := 0
	for i := range in.Endpoints.Localities {
		among += len(in.Endpoints.Localities[i].Endpoints)
	}
	var all []*endpoint.Endpoint
	for i := range in.Endpoints.Localities {
		loc := &in.Endpoints.Localities[i]
		for j := range loc.Endpoints {
			from := &loc.Endpoints[j]
			if len(from.Addresses) == 0 {
				continue // cannot be decoded; nothing to call
			}
			tls, fault := transports.choose(from.TransportMatch)
			ep := &endpoint.Endpoint{
				Key:        endpoint.Key(from.Addresses[0], tls),
				Addresses:  from.Addresses,
				InstanceID: from.InstanceID,
				Labels:     from.Labels,
				Version:    from.Labels["version"],
				Region:     loc.Region, Zone: loc.Zone, SubZone: loc.SubZone,
				LocalityWeight: loc.Weight, Weight: max(from.Weight, 1), Priority: loc.Priority,
				TLS:      tls,
				Excluded: excluded(from.Health),
			}
			if fault != "" {
				ep.Excluded = fault
			}
			ep.State = a.claim(ep.Key, among)
			all = append(all, ep)
		}
	}
	return all
}

// excluded: gRFC A27, "If the health_status field has any value other than HEALTHY or UNKNOWN, the
// entry will be ignored."
func excluded(h resource.Health) string {
	switch h {
	case resource.Unhealthy:
		return "unhealthy"
	case resource.Draining:
		return "draining"
	}
	return ""
}

// claim gives the state of a key, for one endpoint of one cluster; releaseStates gives it back.
func (a *Applier) claim(key string, among int) *endpoint.State {
	s := a.states[key]
	if s == nil {
		s = &sharedState{state: endpoint.NewState(among)}
		a.states[key] = s
	}
	s.claims++
	return s.state
}

func (a *Applier) releaseStates(keys []string) {
	for _, k := range keys {
		if s := a.states[k]; s != nil {
			if s.claims--; s.claims == 0 {
				delete(a.states, k)
			}
		}
	}
}

// transports are the ways of connecting of one cluster, each made once.
type transports struct {
	matches []transport
	other   transport
}

type transport struct {
	labels map[string]string
	tls    *endpoint.TLS
	fault  string // why an endpoint that matches must not be called
}

func newTransports(r *resource.Cluster) transports {
	var t transports
	for _, m := range r.Transports {
		tls, fault := clientTLS(m.TLS)
		t.matches = append(t.matches, transport{labels: m.Labels, tls: tls, fault: fault})
	}
	t.other.tls, t.other.fault = clientTLS(r.TLS)
	return t
}

// choose takes the first that fits. Envoy, Cluster.transport_socket_matches: one "with empty match
// criteria ... always match any endpoint"; for an endpoint that fits none "the socket configuration
// fallbacks to use the tls_context or transport_socket specified in this cluster".
func (t *transports) choose(labels map[string]string) (*endpoint.TLS, string) {
	for _, m := range t.matches {
		fits := true
		for k, v := range m.labels {
			if got, ok := labels[k]; !ok || got != v {
				fits = false
				break
			}
		}
		if fits {
			return m.tls, m.fault
		}
	}
	return t.other.tls, t.other.fault
}

// clientTLS parses the peers. One that is no SPIFFE ID can match nobody; without any that can, the
// endpoint is excluded rather than called with another check.
func clientTLS(in *resource.ClientTLS) (*endpoint.TLS, string) {
	if in == nil {
		return nil, ""
	}
	out := &endpoint.TLS{ALPN: in.ALPN}
	var bad string
	for _, p := range in.Peers {
		id, err := spiffeid.FromString(p)
		if err != nil {
			bad = p
			continue
		}
		out.Peers = append(out.Peers, id)
	}
	slices.SortFunc(out.Peers, func(x, y spiffeid.ID) int { return cmp.Compare(x.String(), y.String()) })
	if len(out.Peers) == 0 {
		return out, fmt.Sprintf("its TLS accepts no SPIFFE ID (%q)", bad)
	}
	return out, ""
}
