// Package apply turns the configuration of each listener into the snapshot that calls read.
//
// xds/graph hands it one complete configuration at a time; it publishes to call.Engine. What did
// not change is kept: an equal cluster is the same *call.Cluster, and limits, budgets, round-robin
// marks and the load of endpoints live on under a changed one. It never connects and reads no
// network; the clock only dates budgets.
package apply

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// Config of an Applier.
type Config struct {
	// Publish takes each snapshot, in order and never twice at once; call.Engine.Publish.
	Publish func(*call.Snapshot)
	// Rand gives uniform 64-bit values to the endpoint sets and is safe for concurrent use; nil
	// means math/rand/v2.
	Rand func() uint64
	// Now dates retry budgets; nil means time.Now. It must be the clock of the engine.
	Now func() time.Time
	Log *slog.Logger // nil discards
}

// Applier holds the configuration of all listeners in use. It is safe for concurrent use; Publish
// runs under its lock.
type Applier struct {
	cfg Config

	mu       sync.Mutex // guards what follows, and the order of Publish
	services map[string]*call.Service
	sources  map[string]*graph.Config // what services were made of
	clusters map[string]*cluster      // by name, shared by listeners
	states   map[string]*sharedState  // by endpoint key
}

// New returns an applier without services.
func New(cfg Config) *Applier {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 100}))
	}
	return &Applier{
		cfg:      cfg,
		services: make(map[string]*call.Service),
		sources:  make(map[string]*graph.Config),
		clusters: make(map[string]*cluster),
		states:   make(map[string]*sharedState),
	}
}

// Apply makes configurations the current ones of their listeners and publishes once. It is meant
// for listeners of clients; one without routes becomes a service that says so.
func (a *Applier) Apply(configs ...*graph.Config) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, cfg := range configs {
		svc := a.service(cfg)
		if old := a.services[cfg.Name]; old != nil && same(old, svc) {
			// Nothing that a call could see changed: watches need not hear of it.
			a.swap(cfg.Name, cfg)
			continue
		}
		a.services[cfg.Name] = svc
		a.swap(cfg.Name, cfg)
	}
	a.publish()
}

// Remove forgets a listener that is not subscribed to any more, and publishes.
func (a *Applier) Remove(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.services[name] == nil {
		return
	}
	delete(a.services, name)
	a.swap(name, nil)
	a.publish()
}

func (a *Applier) publish() {
	if a.cfg.Publish != nil {
		a.cfg.Publish(&call.Snapshot{Services: maps.Clone(a.services)})
	}
}

// swap moves the claims of a listener on clusters from what it was made of to cfg; nil for none.
func (a *Applier) swap(name string, cfg *graph.Config) {
	old := a.sources[name]
	if cfg != nil {
		a.sources[name] = cfg
		for c := range cfg.Clusters {
			a.clusters[c].users++
		}
	} else {
		delete(a.sources, name)
	}
	if old == nil {
		return
	}
	for c := range old.Clusters {
		cl := a.clusters[c]
		if cl.users--; cl.users == 0 {
			delete(a.clusters, c)
			a.releaseStates(cl.keys)
		}
	}
}

// service builds the service of one configuration. Each of its clusters has been seen to.
func (a *Applier) service(cfg *graph.Config) *call.Service {
	svc := &call.Service{Name: cfg.Name, Version: cfg.Version, Err: cfg.Err}
	built := make(map[string]*call.Cluster, len(cfg.Clusters))
	for _, name := range slices.Sorted(maps.Keys(cfg.Clusters)) {
		built[name] = a.cluster(name, cfg.Clusters[name])
	}
	if svc.Err != nil {
		svc.NotExist = errors.Is(svc.Err, graph.ErrNotExist)
		return svc
	}
	if cfg.Routes == nil {
		svc.Err = fmt.Errorf("listener %q is not for calls: it has no route configuration", cfg.Name)
		return svc
	}
	host := route.Host(cfg.Routes.VirtualHosts, cfg.Name)
	if host == nil {
		// gRFC A28: "If no matching VirtualHost is found, ... the xDS resolver will return an error to
		// the client channel." Here each call says no_route.
		a.cfg.Log.Warn("no virtual host for the name", "service", cfg.Name, "route configuration", cfg.Routes.Name, "virtual hosts", len(cfg.Routes.VirtualHosts))
	}
	svc.Routes = a.table(cfg, host)
	svc.Clusters = built
	hosts := map[string]bool{cfg.Name: true}
	for _, c := range built {
		hosts[c.Host] = true
	}
	svc.Hosts = slices.Sorted(maps.Keys(hosts))
	return svc
}

// table keeps the old table when the virtual host is the same.
func (a *Applier) table(cfg *graph.Config, host *resource.VirtualHost) *route.Table {
	old, before := a.services[cfg.Name], a.sources[cfg.Name]
	if old == nil || old.Routes == nil || before == nil || before.Routes == nil {
		return route.New(bounded(host, cfg))
	}
	was := route.Host(before.Routes.VirtualHosts, cfg.Name)
	if reflect.DeepEqual(bounded(was, before), bounded(host, cfg)) {
		return old.Routes
	}
	return route.New(bounded(host, cfg))
}

// bounded gives the virtual host with max_stream_duration of the listener as the upper bound of
// each route's timeout. Envoy, HttpProtocolOptions.max_stream_duration: "If the time limit is reached
// the stream will be reset independent of any other timeouts."
func bounded(host *resource.VirtualHost, cfg *graph.Config) *resource.VirtualHost {
	if host == nil || cfg.Listener == nil || cfg.Listener.API == nil || cfg.Listener.API.MaxStreamDuration <= 0 {
		return host
	}
	most := cfg.Listener.API.MaxStreamDuration
	copied := *host
	copied.Routes = slices.Clone(host.Routes)
	for i := range copied.Routes {
		if t := &copied.Routes[i].Timeout; *t == 0 || *t > most {
			*t = most
		}
	}
	return &copied
}

// same reports whether a call could tell old from new.
func same(old, new *call.Service) bool {
	if old.Version != new.Version || old.NotExist != new.NotExist || (old.Err == nil) != (new.Err == nil) {
		return false
	}
	if old.Err != nil {
		return old.Err.Error() == new.Err.Error()
	}
	return old.Routes == new.Routes && maps.Equal(old.Clusters, new.Clusters)
}

// hostOf is the name of a cluster without "|VERSION".
func hostOf(cluster string) string {
	host, _, _ := strings.Cut(cluster, "|")
	return host
}

func versionOf(cluster string) string {
	_, version, _ := strings.Cut(cluster, "|")
	return version
}
