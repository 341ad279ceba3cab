package apply_test

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/apply"
	"github.com/inlay-mesh/inlay/meshsdk/internal/balance"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

const (
	strictPeer = "spiffe://inlay.local/ns/default/svc/orders"
	all        = "orders.default:80"
	v2         = "orders.default:80|v2"
)

// config of a listener over the clusters all and v2; every call makes equal values anew, as a
// decoder would.
func config(listener string, addrs ...string) *graph.Config {
	cluster := func(name string) *graph.Cluster {
		eps := resource.Locality{Region: "r", Zone: "a", Weight: 3}
		for i, a := range addrs {
			eps.Endpoints = append(eps.Endpoints, resource.Endpoint{
				Addresses: []netip.AddrPort{netip.MustParseAddrPort(a)}, Weight: uint32(i + 1), InstanceID: fmt.Sprint("i", i),
				Labels: map[string]string{"version": "v2"}, TransportMatch: map[string]string{"tls": "mesh"},
			})
		}
		return &graph.Cluster{
			Name: name,
			Resource: &resource.Cluster{
				Name: name, LB: resource.LeastRequest, ConnectTimeout: time.Second, MaxRequests: 10, HTTP2: true,
				RetryBudgetPercent: 20, SPIFFEID: strictPeer,
				Transports: []resource.TransportMatch{{
					Name: "mesh", Labels: map[string]string{"tls": "mesh"},
					TLS: &resource.ClientTLS{Peers: []string{strictPeer}, ALPN: []string{"h2"}},
				}},
			},
			Endpoints: &resource.Endpoints{Cluster: name, Localities: []resource.Locality{eps}},
		}
	}
	return &graph.Config{
		Name: listener, Version: "1", Listener: &resource.Listener{Name: listener, API: &resource.HTTP{}},
		Routes: &resource.RouteConfiguration{VirtualHosts: []resource.VirtualHost{{Domains: []string{"*"}, Routes: []resource.Route{{
			Match:    resource.Match{Path: "/"},
			Clusters: []resource.WeightedCluster{{Name: all, Weight: 9}, {Name: v2, Weight: 1}},
		}}}}},
		Clusters: map[string]*graph.Cluster{all: cluster(all), v2: cluster(v2)},
	}
}

// collect gives an applier and a way to read the newest snapshot and how many there were.
func collect() (*apply.Applier, func() (*call.Snapshot, int)) {
	var snaps []*call.Snapshot
	a := apply.New(apply.Config{Publish: func(s *call.Snapshot) { snaps = append(snaps, s) }})
	return a, func() (*call.Snapshot, int) { return snaps[len(snaps)-1], len(snaps) }
}

func TestAServiceIsBuiltWhole(t *testing.T) {
	a, snap := collect()
	a.Apply(config("orders", "10.0.0.1:80", "10.0.0.2:80"))
	s, _ := snap()
	svc := s.Services["orders"]
	if svc.Err != nil || svc.Version != "1" || len(svc.Routes.Routes()) != 1 || !reflect.DeepEqual(svc.Hosts, []string{"orders", all}) {
		t.Fatalf("service %+v", svc)
	}
	c := svc.Clusters[v2]
	if c.Host != all || c.Version != "v2" || !c.HTTP2 || c.ConnectTimeout != time.Second || c.SPIFFEID != strictPeer ||
		c.Limiter.Max() != 10 || c.Set.Len() != 2 || c.Set.Policy() != balance.LeastRequest {
		t.Errorf("cluster %+v", c)
	}
	ep := c.All[1]
	if ep.InstanceID != "i1" || ep.Version != "v2" || ep.Locality() != "r/a" || ep.LocalityWeight != 3 || ep.Weight != 2 ||
		ep.TLS == nil || ep.TLS.Peers[0].String() != strictPeer || ep.Excluded != "" || ep.State == nil {
		t.Errorf("endpoint %+v", ep)
	}
	if other := svc.Clusters[all].All[1]; other.State != ep.State || other.Key != ep.Key {
		t.Error("the same endpoint in two clusters has two states")
	}
}

func TestWhatDidNotChangeIsKept(t *testing.T) {
	a, snap := collect()
	a.Apply(config("orders", "10.0.0.1:80", "10.0.0.2:80"))
	before, n := snap()
	a.Apply(config("orders", "10.0.0.1:80", "10.0.0.2:80"))
	after, m := snap()
	if m != n+1 || before.Services["orders"] != after.Services["orders"] {
		t.Error("an equal configuration is not the same service")
	}

	// Another version with another endpoint in one cluster.
	next := config("orders", "10.0.0.1:80", "10.0.0.2:80")
	next.Version = "2"
	next.Clusters[v2] = config("orders", "10.0.0.2:80", "10.0.0.3:80").Clusters[v2]
	next.Clusters[v2].Resource.MaxRequests = 77
	old := before.Services["orders"]
	old.Clusters[v2].Limiter.Acquire()
	old.Clusters[v2].All[1].State.Acquire() // 10.0.0.2
	a.Apply(next)
	after, _ = snap()
	svc := after.Services["orders"]
	if svc == old || svc.Version != "2" || svc.Routes != old.Routes {
		t.Error("an equal route configuration is not the same table in the next version")
	}
	if svc.Clusters[all] != old.Clusters[all] {
		t.Error("a cluster that did not change is another value")
	}
	changed := svc.Clusters[v2]
	if changed == old.Clusters[v2] || changed.Limiter != old.Clusters[v2].Limiter || changed.Budget != old.Clusters[v2].Budget ||
		changed.Limiter.Max() != 77 || changed.Limiter.InFlight() != 1 {
		t.Errorf("a changed cluster does not keep its limiter and budget with the new bound: %+v", changed)
	}
	if changed.All[0].State.InFlight() != 1 {
		t.Error("the endpoint that stayed lost its load")
	}

	// What nobody has any more is forgotten, what comes back begins at rest.
	a.Apply(config("orders", "10.0.0.9:80"))
	a.Apply(config("orders", "10.0.0.2:80"))
	after, _ = snap()
	if after.Services["orders"].Clusters[v2].All[0].State.InFlight() != 0 {
		t.Error("an endpoint that had left comes back with its old load")
	}
	a.Remove("orders")
	a.Remove("orders")
	a.Apply(config("orders", "10.0.0.2:80"))
	after, _ = snap()
	if l := after.Services["orders"].Clusters[v2].Limiter; l.InFlight() != 0 {
		t.Error("a cluster that nobody used any more kept its limiter")
	}
}

func TestListenersShareTheirClusters(t *testing.T) {
	a, snap := collect()
	a.Apply(config("orders", "10.0.0.1:80"), config("orders.default", "10.0.0.1:80"))
	s, n := snap()
	if n != 1 {
		t.Errorf("%d snapshots for one Apply", n)
	}
	if s.Services["orders"].Clusters[all] != s.Services["orders.default"].Clusters[all] {
		t.Error("two names of a service have two limits")
	}
	limiter := s.Services["orders"].Clusters[all].Limiter
	a.Remove("orders")
	s, _ = snap()
	if s.Services["orders"] != nil || s.Services["orders.default"].Clusters[all].Limiter != limiter {
		t.Error("the other name's cluster went with the one removed")
	}
	a.Apply(config("orders.default", "10.0.0.1:80", "10.0.0.2:80"))
	s, _ = snap()
	if s.Services["orders.default"].Clusters[all].Limiter != limiter {
		t.Error("the limiter did not outlive the removal of the other name")
	}
}

func TestSnapshotsAreNotChangedLater(t *testing.T) {
	a, snap := collect()
	a.Apply(config("orders", "10.0.0.1:80"))
	s, _ := snap()
	a.Apply(config("pay", "10.0.0.1:80"))
	a.Remove("orders")
	if len(s.Services) != 1 || s.Services["orders"] == nil || len(s.Services["orders"].Clusters[all].All) != 1 {
		t.Error("an older snapshot changed")
	}
}

func TestErrors(t *testing.T) {
	a, snap := collect()
	broken := config("broken", "10.0.0.1:80")
	broken.Clusters[v2] = &graph.Cluster{Name: v2, Err: errors.New("never valid")}
	server := config("inlay/inbound/default/orders/80")
	server.Routes = nil
	a.Apply(
		&graph.Config{Name: "none", Err: fmt.Errorf("listener %q: %w", "none", graph.ErrNotExist)},
		&graph.Config{Name: "bad", Err: errors.New("route 2: regex")},
		broken, server,
	)
	s, _ := snap()
	if svc := s.Services["none"]; svc.Err == nil || !svc.NotExist {
		t.Errorf("a listener that does not exist: %+v", svc)
	}
	if svc := s.Services["bad"]; svc.Err == nil || svc.NotExist {
		t.Errorf("a listener that was never valid: %+v", svc)
	}
	if svc := s.Services["inlay/inbound/default/orders/80"]; svc.Err == nil {
		t.Error("a server's listener can be called")
	}
	svc := s.Services["broken"]
	if svc.Err != nil || svc.Clusters[v2].Err == nil || svc.Clusters[v2].Set.Len() != 0 || svc.Clusters[v2].Limiter == nil {
		t.Errorf("a cluster in error: %+v", svc.Clusters[v2])
	}
	if svc.Clusters[all].Err != nil || svc.Clusters[all].Set.Len() != 1 {
		t.Error("the other cluster suffers from it")
	}
	// It recovers, and keeps limiter and budget.
	limiter := svc.Clusters[v2].Limiter
	a.Apply(config("broken", "10.0.0.1:80"))
	s, _ = snap()
	if c := s.Services["broken"].Clusters[v2]; c.Err != nil || c.Set.Len() != 1 || c.Limiter != limiter || limiter.Max() != 10 {
		t.Errorf("after it became valid: %+v", c)
	}
}

func TestTransportsAndHealth(t *testing.T) {
	cfg := config("orders", "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80")
	eps := cfg.Clusters[all].Endpoints.Localities[0].Endpoints
	cfg.Clusters[all].Resource.Transports = append(cfg.Clusters[all].Resource.Transports,
		resource.TransportMatch{Name: "wrong", Labels: map[string]string{"tls": "odd"}, TLS: &resource.ClientTLS{Peers: []string{"not an id"}}})
	eps[1].TransportMatch = nil
	eps[2].Health = resource.Draining
	eps[3].Health = resource.Unhealthy
	eps[4].TransportMatch = map[string]string{"tls": "odd", "more": "labels"}
	a, snap := collect()
	a.Apply(cfg)
	s, _ := snap()
	c := s.Services["orders"].Clusters[all]
	for i, want := range []struct {
		mtls     bool
		excluded bool
	}{{true, false}, {false, false}, {true, true}, {true, true}, {true, true}} {
		if ep := c.All[i]; (ep.TLS != nil) != want.mtls || (ep.Excluded != "") != want.excluded {
			t.Errorf("endpoint %d: TLS %v, excluded %q; want %+v", i, ep.TLS, ep.Excluded, want)
		}
	}
	if c.Set.Len() != 2 {
		t.Errorf("%d endpoints can be picked, want 2", c.Set.Len())
	}
}

func TestMaxStreamDurationBoundsRoutes(t *testing.T) {
	cfg := config("orders", "10.0.0.1:80")
	cfg.Listener.API.MaxStreamDuration = time.Second
	routes := cfg.Routes.VirtualHosts[0].Routes
	routes = append(routes, routes[0], routes[0])
	routes[1].Timeout, routes[2].Timeout = time.Minute, time.Millisecond
	cfg.Routes.VirtualHosts[0].Routes = routes
	a, snap := collect()
	a.Apply(cfg)
	s, _ := snap()
	for i, want := range []time.Duration{time.Second, time.Second, time.Millisecond} {
		if got := s.Services["orders"].Routes.Routes()[i].Timeout; got != want {
			t.Errorf("route %d: timeout %v, want %v", i, got, want)
		}
	}
	if routes[0].Timeout != 0 {
		t.Error("the decoded route configuration was changed")
	}
}
