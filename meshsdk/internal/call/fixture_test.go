package call_test

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/apply"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// orders is the configuration of one service with n endpoints; set changes it.
func orders(n int, set func(*graph.Config)) *graph.Config {
	eps := &resource.Endpoints{Cluster: "orders.default:80", Localities: []resource.Locality{{Weight: 1}}}
	for i := range n {
		eps.Localities[0].Endpoints = append(eps.Localities[0].Endpoints, resource.Endpoint{
			Addresses: []netip.AddrPort{netip.MustParseAddrPort(fmt.Sprintf("10.0.0.%d:80", i+1))}, Weight: 1,
			Labels: map[string]string{"version": "v1"},
		})
	}
	cfg := &graph.Config{
		Name: "orders", Version: "7",
		Listener: &resource.Listener{Name: "orders", API: &resource.HTTP{RouteName: "orders.default:80"}},
		Routes: &resource.RouteConfiguration{VirtualHosts: []resource.VirtualHost{{
			Name: "orders", Domains: []string{"*"},
			Routes: []resource.Route{{
				Match:    resource.Match{Path: "/"},
				Clusters: []resource.WeightedCluster{{Name: "orders.default:80", Weight: 1}},
				Origin:   resource.Origin{Object: "HTTPRoute/default/orders", Rule: "0", Source: "mesh.yaml:7"},
			}},
		}}},
		Clusters: map[string]*graph.Cluster{"orders.default:80": {
			Name:      "orders.default:80",
			Resource:  &resource.Cluster{Name: "orders.default:80", LB: resource.LeastRequest, MaxRequests: 1024, RetryMinPerSecond: 3},
			Endpoints: eps,
		}},
	}
	if set != nil {
		set(cfg)
	}
	return cfg
}

// mesh is an engine that is fed by hand and remembers what it observed.
type mesh struct {
	*call.Engine
	apply *apply.Applier

	mu         sync.Mutex
	records    []call.Record
	subscribed map[string]int
	released   map[string]int
}

func newMesh(t testing.TB, cfg call.Config, configs ...*graph.Config) *mesh {
	m := &mesh{subscribed: map[string]int{}, released: map[string]int{}}
	if cfg.Observer == nil {
		cfg.Observer = m
	}
	if cfg.Subscribe == nil {
		cfg.Subscribe = m.subscribe
	}
	m.Engine = call.New(cfg)
	m.apply = apply.New(apply.Config{Publish: m.Publish})
	m.apply.Apply(configs...)
	t.Cleanup(m.Close)
	return m
}

func (m *mesh) subscribe(name string) func() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.subscribed[name]++
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.released[name]++
	}
}

// subs is how often name was subscribed to and released.
func (m *mesh) subs(name string) (subscribed, released int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.subscribed[name], m.released[name]
}

func (m *mesh) BeginClient(ctx context.Context, c *call.Call) context.Context { return ctx }

func (m *mesh) EndClient(c *call.Call, rec *call.Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.records = append(m.records, *rec)
}

// last is the record of the call that ended last.
func (m *mesh) last(t *testing.T) call.Record {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.records) == 0 {
		t.Fatal("no call was recorded")
	}
	return m.records[len(m.records)-1]
}

func get(path string) *call.Request {
	return &call.Request{Request: route.Request{Method: "GET", Path: path}, Idempotent: true}
}

func post(path string) *call.Request {
	return &call.Request{Request: route.Request{Method: "POST", Path: path}}
}

func rpc(path string) *call.Request {
	return &call.Request{Request: route.Request{Method: "POST", Path: path}, GRPC: true, Idempotent: true}
}

func begin(t *testing.T, m *mesh, ctx context.Context, req *call.Request) *call.Call {
	t.Helper()
	c, err := m.Begin(ctx, "orders", req)
	if err != nil {
		t.Fatalf("Begin: %v", err)
	}
	return c
}

// try makes one attempt that picks by the cluster's own set.
func try(t *testing.T, c *call.Call) (*call.Attempt, *endpoint.Endpoint) {
	t.Helper()
	a, err := c.Next()
	if err != nil {
		t.Fatalf("Next: %v", err)
	}
	ep := c.Cluster().Set.Pick(a.Tried())
	if ep == nil {
		t.Fatal("nothing to pick")
	}
	a.Picked(ep)
	return a, ep
}

func retries(set func(*resource.Retry)) func(*graph.Config) {
	return func(cfg *graph.Config) {
		r := &resource.Retry{Attempts: 2, On: []string{"unavailable", "connect-failure", "refused-stream", "503"}, Base: 10 * time.Millisecond, Max: 20 * time.Millisecond}
		if set != nil {
			set(r)
		}
		cfg.Routes.VirtualHosts[0].Routes[0].Retry = r
	}
}

// succeed ends a call well.
func succeed(t testing.TB, c *call.Call) {
	t.Helper()
	if err := c.End(call.Result{}); err != nil {
		t.Errorf("End of a success: %v", err)
	}
}
