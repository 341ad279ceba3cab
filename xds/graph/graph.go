package graph

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// ErrNotExist is in the chain of Config.Err and Cluster.Err when the control plane said, by word
// or by silence, that there is no such resource.
var ErrNotExist = xds.ErrNotExist

// Source is where resources come from: *xds.Client.
type Source interface {
	// Watch tells w of a resource, in order and one call at a time.
	Watch(typeURL, name string, w xds.Watcher) (cancel func())
}

// Graph makes Configs of what a Source has. It is safe for concurrent use.
type Graph struct{ source Source }

// New returns a graph over a source; nothing is watched until Watch.
func New(source Source) *Graph { return &Graph{source} }

// Watch tells f of the configuration of one listener: first when all of it has been decided, then
// whenever a later state is complete. While a change is incomplete f keeps seeing the routes
// before it, with the endpoints of this moment. f is called in order and never concurrently with
// itself, from goroutines of the Source: it must not block. After cancel returns, no call of f
// starts; one that has started may be under way. cancel may be called from within f.
func (g *Graph) Watch(listener string, f func(*Config)) (cancel func()) {
	w := &watch{source: g.source, name: listener, tell: f, clusters: map[string]*clusterNode{}}
	w.post(func() { w.listener = watchNode[*resource.Listener](w, resource.ListenerType, listener) })
	return w.stop
}

// watch is the state of one Graph.Watch. Everything but the inbox is touched by whoever drains the
// inbox, one at a time; so no lock is held while the Source or f is called.
type watch struct {
	source Source
	name   string
	tell   func(*Config)

	mu       sync.Mutex
	inbox    []func()
	draining bool
	stopped  bool

	listener *node[*resource.Listener]
	routes   *node[*resource.RouteConfiguration] // of the listener's route name; nil without one
	clusters map[string]*clusterNode
	shown    *Config // as told last
	// kept is the newest listener and routes that were complete; they are shown until later ones are.
	kept *pair
}

// pair is a listener with its routes.
type pair struct {
	version  string
	listener *resource.Listener
	routes   *resource.RouteConfiguration
}

// node is one watched resource: undecided until decided is set.
type node[T any] struct {
	name    string
	cancel  func()
	value   T // the last good one
	good    bool
	err     error // why there is no value
	version string
}

func (n *node[T]) decided() bool { return n.good || n.err != nil }

// clusterNode is a cluster with its endpoints.
type clusterNode struct {
	cluster   *node[*resource.Cluster]
	endpoints *node[*resource.Endpoints]
	// current is the newest complete state; nil until there is one.
	current *Cluster
}

// post runs f and then looks at what is complete. If another goroutine is at it already, that one
// does both.
func (w *watch) post(f func()) {
	w.mu.Lock()
	w.inbox = append(w.inbox, f)
	if w.draining {
		w.mu.Unlock()
		return
	}
	w.draining = true
	for len(w.inbox) > 0 {
		in := w.inbox
		w.inbox = nil
		stopped := w.stopped
		w.mu.Unlock()
		for _, f := range in {
			f()
		}
		if !stopped {
			w.evaluate()
		}
		w.mu.Lock()
	}
	w.draining = false
	w.mu.Unlock()
}

// stop ends the watch.
func (w *watch) stop() {
	w.mu.Lock()
	was := w.stopped
	w.stopped = true
	w.mu.Unlock()
	if was {
		return
	}
	w.post(func() {
		if w.listener != nil {
			w.listener.cancel()
		}
		w.dropRoutes()
		w.dropClusters(nil)
	})
}

func (w *watch) isStopped() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stopped
}

// watchNode starts to watch a resource.
func watchNode[T any](w *watch, typeURL, name string) *node[T] {
	n := &node[T]{name: name}
	n.cancel = w.source.Watch(typeURL, name, xds.WatcherFunc(func(r xds.Resource) {
		w.post(func() { n.take(typeURL, r) })
	}))
	return n
}

// take takes news of a resource.
func (n *node[T]) take(typeURL string, r xds.Resource) {
	if r.Err == nil && r.Decoded != nil {
		if v, ok := r.Decoded.Value.(T); ok {
			n.value, n.good, n.err, n.version = v, true, nil, r.Version
			return
		}
		r.Err = fmt.Errorf("decoded as %T", r.Decoded.Value)
	}
	// A fault after a good value keeps the good one; that the resource is gone does not.
	if n.good && !errors.Is(r.Err, ErrNotExist) {
		return
	}
	var none T
	n.value, n.good, n.version = none, false, ""
	n.err = fmt.Errorf("%s %q: %w", resource.Kind(typeURL), n.name, r.Err)
}

func (w *watch) dropRoutes() {
	if w.routes != nil {
		w.routes.cancel()
		w.routes = nil
	}
}

// dropClusters unwatches the clusters that are not in keep.
func (w *watch) dropClusters(keep map[string]bool) {
	for name, c := range w.clusters {
		if keep[name] {
			continue
		}
		c.cluster.cancel()
		if c.endpoints != nil {
			c.endpoints.cancel()
		}
		delete(w.clusters, name)
	}
}

// evaluate shows what is complete and watches what is missing.
func (w *watch) evaluate() {
	if w.listener == nil || !w.listener.decided() {
		return
	}
	if w.listener.err != nil {
		w.dropRoutes()
		w.fault(w.listener.err)
		return
	}
	for _, name := range slices.Sorted(maps.Keys(w.clusters)) {
		w.clusters[name].settle(w)
	}
	next, done := w.resolve(w.listener.value)
	if !done {
		w.refresh()
		return
	}
	if next == nil {
		return // a fault, told
	}
	wanted := clustersOf(next.routes)
	complete := true
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		if w.clusters[name] == nil {
			w.clusters[name] = &clusterNode{cluster: watchNode[*resource.Cluster](w, resource.ClusterType, name)}
		}
	}
	for name := range wanted {
		complete = complete && w.clusters[name].current != nil
	}
	if !complete {
		// gRFC A74: an update that names a cluster which is not there yet is held back until the
		// cluster and its endpoints are decided.
		w.refresh()
		return
	}
	w.kept = next
	w.refresh()
	w.dropClusters(wanted)
}

// resolve finds the routes of a listener. done is false while they are not decided.
func (w *watch) resolve(l *resource.Listener) (next *pair, done bool) {
	if l.API == nil || l.API.Inline != nil {
		w.dropRoutes()
		next = &pair{version: w.listener.version, listener: l}
		if l.API != nil {
			next.routes = l.API.Inline
		}
		return next, true
	}
	if name := l.API.RouteName; w.routes == nil || w.routes.name != name {
		old := w.routes
		w.routes = watchNode[*resource.RouteConfiguration](w, resource.RouteType, name)
		if old != nil {
			old.cancel()
		}
	}
	switch {
	case !w.routes.decided():
		return nil, false
	case w.routes.err != nil:
		w.fault(w.routes.err)
		return nil, true
	}
	return &pair{version: joinVersions(w.listener.version, w.routes.version), listener: l, routes: w.routes.value}, true
}

// settle brings current up to date. It watches the endpoints that the cluster names now.
func (c *clusterNode) settle(w *watch) {
	if !c.cluster.decided() {
		return
	}
	if c.cluster.err != nil {
		if c.endpoints != nil {
			c.endpoints.cancel()
			c.endpoints = nil
		}
		c.current = keep(c.current, &Cluster{Name: c.cluster.name, Err: c.cluster.err})
		return
	}
	if name := c.cluster.value.EndpointsName; c.endpoints == nil || c.endpoints.name != name {
		old := c.endpoints
		c.endpoints = watchNode[*resource.Endpoints](w, resource.EndpointsType, name)
		if old != nil {
			old.cancel()
		}
	}
	switch {
	case !c.endpoints.decided():
		// What was complete before stays; a first state waits.
	case c.endpoints.err != nil:
		c.current = keep(c.current, &Cluster{Name: c.cluster.name, Err: c.endpoints.err})
	default:
		c.current = keep(c.current, &Cluster{Name: c.cluster.name, Resource: c.cluster.value, Endpoints: c.endpoints.value})
	}
}

// keep returns old when it is the same: who compares pointers sees what did not change.
func keep(old, next *Cluster) *Cluster {
	if old != nil && *old == *next {
		return old
	}
	return next
}

// fault shows that there is no configuration.
func (w *watch) fault(err error) {
	w.kept = nil
	w.dropClusters(nil)
	w.show(&Config{Name: w.name, Err: err})
}

// refresh shows the kept routes with the clusters of this moment.
func (w *watch) refresh() {
	if w.kept == nil {
		return
	}
	cfg := &Config{Name: w.name, Version: w.kept.version, Listener: w.kept.listener, Routes: w.kept.routes}
	if cfg.Routes != nil {
		cfg.Clusters = map[string]*Cluster{}
	}
	for name := range clustersOf(cfg.Routes) {
		cfg.Clusters[name] = w.clusters[name].current
	}
	w.show(cfg)
}

// show tells the watcher unless nothing changed: the very same parts, errors included.
func (w *watch) show(cfg *Config) {
	if old := w.shown; old != nil && any(old.Err) == any(cfg.Err) && old.Version == cfg.Version && old.Listener == cfg.Listener &&
		old.Routes == cfg.Routes && maps.Equal(old.Clusters, cfg.Clusters) {
		return
	}
	w.shown = cfg
	if !w.isStopped() {
		w.tell(cfg)
	}
}

// clustersOf lists the clusters that routes send calls to.
func clustersOf(rc *resource.RouteConfiguration) map[string]bool {
	out := map[string]bool{}
	if rc == nil {
		return out
	}
	for _, vh := range rc.VirtualHosts {
		for _, r := range vh.Routes {
			for _, c := range r.Clusters {
				out[c.Name] = true
			}
		}
	}
	return out
}

func joinVersions(listener, routes string) string {
	if listener == routes {
		return listener
	}
	return listener + "+" + routes
}
