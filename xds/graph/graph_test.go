package graph_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

type key struct{ typ, name string }

// source holds resources and tells its watchers, at once and from the goroutine that sets.
type source struct {
	mu       sync.Mutex
	holds    map[key]xds.Resource
	watchers map[key]map[int]xds.Watcher
	n        int
}

func newSource() *source {
	return &source{holds: map[key]xds.Resource{}, watchers: map[key]map[int]xds.Watcher{}}
}

func (s *source) Watch(typ, name string, w xds.Watcher) func() {
	s.mu.Lock()
	k := key{typ, name}
	s.n++
	id := s.n
	if s.watchers[k] == nil {
		s.watchers[k] = map[int]xds.Watcher{}
	}
	s.watchers[k][id] = w
	r, ok := s.holds[k]
	s.mu.Unlock()
	if ok {
		w.Changed(r)
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers[k], id)
	}
}

func (s *source) put(k key, r xds.Resource) {
	s.mu.Lock()
	s.holds[k] = r
	var ws []xds.Watcher
	for _, id := range slices.Sorted(maps.Keys(s.watchers[k])) {
		ws = append(ws, s.watchers[k][id])
	}
	s.mu.Unlock()
	for _, w := range ws {
		w.Changed(r)
	}
}

var version int

func (s *source) set(values ...any) {
	for _, v := range values {
		version++
		r := xds.Resource{Version: fmt.Sprint(version)}
		var k key
		switch v := v.(type) {
		case *resource.Listener:
			k = key{resource.ListenerType, v.Name}
		case *resource.RouteConfiguration:
			k = key{resource.RouteType, v.Name}
		case *resource.Cluster:
			k = key{resource.ClusterType, v.Name}
		case *resource.Endpoints:
			k = key{resource.EndpointsType, v.Cluster}
		}
		r.Decoded = &resource.Decoded{Name: k.name, Value: v}
		s.put(k, r)
	}
}

func (s *source) fail(typ, name string, err error) { s.put(key{typ, name}, xds.Resource{Err: err}) }

// watched lists what is watched, as "listener a, cluster b".
func (s *source) watched() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for k, ws := range s.watchers {
		if len(ws) > 0 {
			out = append(out, resource.Kind(k.typ)+" "+k.name)
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// seen keeps the configurations as they are told.
type seen struct{ configs []*graph.Config }

func (s *seen) tell(c *graph.Config) { s.configs = append(s.configs, c) }

// String is the newest as text: routes, then clusters with the number of their endpoints.
func (s *seen) String() string {
	if len(s.configs) == 0 {
		return "nothing"
	}
	c := s.configs[len(s.configs)-1]
	if c.Err != nil {
		return "error: " + c.Err.Error()
	}
	var out []string
	for _, n := range slices.Sorted(maps.Keys(c.Clusters)) {
		cl := c.Clusters[n]
		switch {
		case cl.Err != nil:
			out = append(out, n+"=error")
		default:
			total := 0
			for _, l := range cl.Endpoints.Localities {
				total += len(l.Endpoints)
			}
			out = append(out, fmt.Sprintf("%s=%d", n, total))
		}
	}
	return strings.Join(out, " ")
}

func (s *seen) want(t *testing.T, step, text string, calls int) {
	t.Helper()
	if got := s.String(); got != text || len(s.configs) != calls {
		t.Errorf("%s: shown %q in %d calls, want %q in %d", step, got, len(s.configs), text, calls)
	}
}

func listener(name, routes string) *resource.Listener {
	return &resource.Listener{Name: name, API: &resource.HTTP{RouteName: routes}}
}

func routes(name string, clusters ...string) *resource.RouteConfiguration {
	rc := &resource.RouteConfiguration{Name: name, VirtualHosts: []resource.VirtualHost{{Domains: []string{"*"}}}}
	for _, c := range clusters {
		rc.VirtualHosts[0].Routes = append(rc.VirtualHosts[0].Routes, resource.Route{Clusters: []resource.WeightedCluster{{Name: c, Weight: 1}}})
	}
	return rc
}

func cluster(name string) *resource.Cluster {
	return &resource.Cluster{Name: name, EndpointsName: name}
}

func endpoints(name string, n int) *resource.Endpoints {
	return &resource.Endpoints{Cluster: name, Localities: []resource.Locality{{Weight: 1, Endpoints: make([]resource.Endpoint, n)}}}
}

func TestCompleteOrNothing(t *testing.T) {
	s := newSource()
	var got seen
	cancel := graph.New(s).Watch("orders", got.tell)
	got.want(t, "nothing known", "nothing", 0)
	s.set(listener("orders", "r"))
	got.want(t, "listener", "nothing", 0)
	s.set(routes("r", "a", "b"))
	got.want(t, "routes", "nothing", 0)
	s.set(cluster("a"), endpoints("a", 1), cluster("b"))
	got.want(t, "all but one", "nothing", 0)
	s.set(endpoints("b", 2))
	got.want(t, "all", "a=1 b=2", 1)
	cancel()
	cancel()
	if w := s.watched(); w != "" {
		t.Errorf("after cancel %q is watched", w)
	}
	s.set(endpoints("b", 9))
	got.want(t, "after cancel", "a=1 b=2", 1)
}

// gRFC A74: an update of the route configuration that names a new cluster is shown only when that
// cluster and its endpoints are decided; until then calls see the routes before it, and endpoints
// of this moment.
func TestNewClusterIsAwaited(t *testing.T) {
	s := newSource()
	var got seen
	s.set(listener("orders", "r"), routes("r", "a"), cluster("a"), endpoints("a", 1))
	cancel := graph.New(s).Watch("orders", got.tell)
	defer cancel()
	got.want(t, "start", "a=1", 1)
	unchanged := got.configs[0].Clusters["a"]
	s.set(routes("r", "a", "b"))
	got.want(t, "new cluster unknown", "a=1", 1)
	s.set(endpoints("a", 5))
	got.want(t, "endpoints of a shown cluster meanwhile", "a=5", 2)
	s.set(endpoints("a", 1))
	s.set(cluster("b"))
	got.want(t, "its endpoints unknown", "a=1", 3)
	s.set(endpoints("b", 2))
	got.want(t, "decided", "a=1 b=2", 4)
	if got.configs[2].Clusters["a"] != got.configs[3].Clusters["a"] || unchanged == got.configs[3].Clusters["a"] {
		t.Error("a cluster keeps its pointer exactly while it does not change")
	}
	s.set(routes("r", "b"))
	got.want(t, "a is not needed", "b=2", 5)
	if w := s.watched(); w != "cluster b, endpoints b, listener orders, route configuration r" {
		t.Errorf("watched: %s", w)
	}
	// A candidate that is taken back leaves nothing behind.
	s.set(routes("r", "c"), routes("r", "b"))
	if w := s.watched(); strings.Contains(w, "cluster c") {
		t.Errorf("watched: %s", w)
	}
}

func TestMissingPiecesAreDecisionsToo(t *testing.T) {
	gone := fmt.Errorf("x: %w", graph.ErrNotExist)
	s := newSource()
	var got seen
	s.set(listener("orders", "r"), routes("r", "a", "b"), cluster("a"), endpoints("a", 1))
	cancel := graph.New(s).Watch("orders", got.tell)
	defer cancel()
	s.fail(resource.ClusterType, "b", gone)
	got.want(t, "cluster does not exist", "a=1 b=error", 1)
	if err := got.configs[0].Clusters["b"].Err; !errors.Is(err, graph.ErrNotExist) || !strings.Contains(err.Error(), `cluster "b"`) {
		t.Errorf("cluster error: %v", err)
	}
	s.set(cluster("b"))
	got.want(t, "it exists, endpoints open: what was decided stays", "a=1 b=error", 1)
	s.fail(resource.EndpointsType, "b", gone)
	got.want(t, "endpoints do not exist", "a=1 b=error", 2)
	s.set(endpoints("b", 3))
	got.want(t, "endpoints exist", "a=1 b=3", 3)
	s.fail(resource.EndpointsType, "b", errors.New("bad update"))
	got.want(t, "a fault after a good value", "a=1 b=3", 3)
	s.fail(resource.RouteType, "r", gone)
	got.want(t, "routes do not exist", `error: route configuration "r": x: resource does not exist`, 4)
	if w := s.watched(); w != "listener orders, route configuration r" {
		t.Errorf("watched: %s", w)
	}
	s.set(routes("r", "a"))
	got.want(t, "routes are back", "a=1", 5)
	s.fail(resource.ListenerType, "orders", gone)
	got.want(t, "listener does not exist", `error: listener "orders": x: resource does not exist`, 6)
	if w := s.watched(); w != "listener orders" {
		t.Errorf("watched: %s", w)
	}
	s.fail(resource.ListenerType, "orders", errors.New("bad"))
	got.want(t, "another fault", `error: listener "orders": bad`, 7)
}

func TestOtherRouteConfigurationIsAwaited(t *testing.T) {
	s := newSource()
	var got seen
	s.set(listener("orders", "r"), routes("r", "a"), cluster("a"), endpoints("a", 1))
	cancel := graph.New(s).Watch("orders", got.tell)
	defer cancel()
	s.set(listener("orders", "r2"))
	got.want(t, "routes unknown", "a=1", 1)
	s.set(endpoints("a", 2))
	got.want(t, "endpoints meanwhile", "a=2", 2)
	s.set(routes("r2", "b"), cluster("b"), endpoints("b", 7))
	got.want(t, "complete", "b=7", 3)
}

func TestClusterThatChangesItsEndpointsName(t *testing.T) {
	s := newSource()
	var got seen
	s.set(listener("orders", "r"), routes("r", "a"), cluster("a"), endpoints("a", 1))
	cancel := graph.New(s).Watch("orders", got.tell)
	defer cancel()
	s.set(&resource.Cluster{Name: "a", EndpointsName: "a2"})
	got.want(t, "new endpoints unknown", "a=1", 1)
	s.set(endpoints("a2", 4))
	got.want(t, "known", "a=4", 2)
	if w := s.watched(); strings.Contains(w, "endpoints a,") {
		t.Errorf("watched: %s", w)
	}
}

func TestServerAndInlineListenersNeedNothingElse(t *testing.T) {
	s := newSource()
	var server, inline seen
	s.set(&resource.Listener{Name: "in", Chains: []resource.Chain{{TransportProtocol: "tls"}}},
		&resource.Listener{Name: "inline", API: &resource.HTTP{Inline: routes("", "a")}}, cluster("a"), endpoints("a", 1))
	defer graph.New(s).Watch("in", server.tell)()
	defer graph.New(s).Watch("inline", inline.tell)()
	if len(server.configs) != 1 || server.configs[0].Listener.Name != "in" || server.configs[0].Routes != nil || server.configs[0].Clusters != nil {
		t.Errorf("server listener: %+v", server.configs)
	}
	inline.want(t, "inline routes", "a=1", 1)
}

func TestCancelFromWithin(t *testing.T) {
	s := newSource()
	n := 0
	var cancel func()
	cancel = graph.New(s).Watch("in", func(*graph.Config) { n++; cancel() })
	s.set(&resource.Listener{Name: "in"})
	s.set(&resource.Listener{Name: "in"})
	if n != 1 || s.watched() != "" {
		t.Errorf("%d calls, watched %q; want 1 and nothing", n, s.watched())
	}
}

// A Source may tell watchers of different resources at the same time.
func TestCallsAreInOrderAndOneAtATime(t *testing.T) {
	s := newSource()
	s.set(listener("orders", "r"), routes("r", "a", "b"), cluster("a"), cluster("b"), endpoints("a", 0), endpoints("b", 0))
	var mu sync.Mutex // TryLock tells of a concurrent call
	var last string
	cancel := graph.New(s).Watch("orders", func(c *graph.Config) {
		if !mu.TryLock() {
			t.Error("two calls at once")
			return
		}
		defer mu.Unlock()
		last = (&seen{[]*graph.Config{c}}).String()
	})
	defer cancel()
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b"} {
		wg.Go(func() {
			for i := range 100 {
				s.put(key{resource.EndpointsType, name}, xds.Resource{Decoded: &resource.Decoded{Value: endpoints(name, i)}})
			}
		})
	}
	wg.Wait()
	if last != "a=99 b=99" {
		t.Errorf("last told %q, want the last state of both", last)
	}
}
