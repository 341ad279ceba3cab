package xdsgen

import (
	"maps"
	"reflect"
	"slices"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// reuse finds in earlier Views what need not be encoded again: the values of the intermediate
// representation are compared, since equal values give equal bytes.
type reuse struct {
	views    *Views // nil finds nothing
	clusters map[string]*ir.Cluster
	ports    map[string]*ir.Port
	// stale are keys whose earlier resource is older than the earlier mesh: the last good one.
	stale map[Key]bool
}

func newReuse(prev *Views) *reuse {
	u := &reuse{views: prev, clusters: map[string]*ir.Cluster{}, ports: map[string]*ir.Port{}, stale: map[Key]bool{}}
	if prev == nil {
		return u
	}
	for i := range prev.mesh.Services {
		s := &prev.mesh.Services[i]
		for j := range s.Ports {
			p := &s.Ports[j]
			if p.Protocol.Plain() {
				continue // nothing is made of it, and its names may be those of other things
			}
			u.ports[routeName(s.Name, s.Namespace, p.Number)] = p
			for n := range p.Clusters {
				u.clusters[p.Clusters[n].Name] = &p.Clusters[n]
			}
		}
	}
	for _, f := range prev.faults {
		u.stale[f.key] = true
	}
	return u
}

// last is the earlier resource of a key, whatever it was made of.
func (u *reuse) last(key Key) *Resource {
	if u.views == nil {
		return nil
	}
	t := u.views.tables[key.Kind]
	if key.Type == ListenerType {
		return t.listeners[key.Scope][key.Name]
	}
	return t.shared[key.Type][key.Name]
}

func (u *reuse) routes(key Key, routes []ir.Route) *Resource {
	old := u.ports[key.Name]
	if old == nil || u.stale[key] || !sameRoutes(old.Routes, routes) {
		return nil
	}
	return u.last(key)
}

func (u *reuse) cluster(key Key, c *ir.Cluster) *Resource {
	old := u.clusters[key.Name]
	if old == nil || u.stale[key] || u.wasClosed(key) {
		return nil
	}
	was := withIdentity(*old, u.views.mesh.TrustDomain)
	if was.Name != c.Name || was.Protocol != c.Protocol || was.MTLS != c.MTLS || was.SPIFFEID != c.SPIFFEID ||
		was.Policy != c.Policy || was.EmptyReason != c.EmptyReason {
		return nil
	}
	return u.last(key)
}

func (u *reuse) endpoints(key Key, endpoints []ir.Endpoint) *Resource {
	old := u.clusters[key.Name]
	if old == nil || u.stale[key] || u.wasClosed(key) || !sameEndpoints(old.Endpoints, endpoints) {
		return nil
	}
	return u.last(key)
}

// wasClosed is true when the earlier resource of a key is the empty one of a closed cluster, which
// is made of other values than the mesh's.
func (u *reuse) wasClosed(key Key) bool {
	return key.Kind == GRPC && u.views.closed[key.Name] != ""
}

func sameRoutes(a, b []ir.Route) bool {
	if len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) {
		return true
	}
	return reflect.DeepEqual(a, b)
}

func sameEndpoints(a, b []ir.Endpoint) bool {
	if len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) {
		return true
	}
	return slices.EqualFunc(a, b, func(x, y ir.Endpoint) bool {
		return x.InstanceID == y.InstanceID && x.Health == y.Health && x.Weight == y.Weight &&
			x.Priority == y.Priority && x.LocalityWeight == y.LocalityWeight && x.MeshTLS == y.MeshTLS &&
			x.Static == y.Static && (x.Unreachable == "") == (y.Unreachable == "") && x.Locality == y.Locality &&
			slices.Equal(x.Addresses, y.Addresses) && maps.Equal(x.Labels, y.Labels)
	})
}
