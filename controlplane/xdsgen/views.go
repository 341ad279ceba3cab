package xdsgen

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// Views is every view of one mesh: what kinds share is encoded once. It is immutable and safe for
// concurrent use.
type Views struct {
	mesh   *ir.Mesh
	tables [kinds]*table
	faults []keyFault
	// closed says of a cluster why it is not served to gRPC clients.
	closed   map[string]string
	services map[string]*ir.Service // by NAMESPACE/NAME
	policies *policyIndex
	encoded  int
}

type keyFault struct {
	key   Key
	fault *Fault
}

// table holds the resources of one kind by scope (see scopeOf) and name. Only listeners have
// scopes: clusters, endpoints and routes are the same for every class of a kind.
type table struct {
	shared    map[string]map[string]*Resource // clusters, endpoints, routes by type URL and name
	listeners map[string]map[string]*Resource // by scope and name
	withheld  map[string]map[string]string    // listeners by scope and name; clusters and routes under ""
}

// Key names a resource within every view at once: the same name means another listener in another
// namespace.
type Key struct {
	Kind  Kind
	Scope string
	Type  string
	Name  string
}

// KeyOf is the key of the resource that a client of view v means by a name.
func KeyOf(v View, typeURL, name string) Key {
	return Key{Kind: v.Kind, Scope: scopeOf(v, typeURL, name), Type: typeURL, Name: name}
}

// New makes every view of m. prev may be nil; else it is the result for an earlier mesh, from
// which resources of equal content are taken instead of being encoded again, and from which the
// last good one stays in place of one that cannot be made now. The error joins a *Fault for each of
// these; the Views are never nil.
func New(m *ir.Mesh, prev *Views) (*Views, error) {
	g := &generator{
		Views: &Views{mesh: m, closed: map[string]string{}, services: make(map[string]*ir.Service, len(m.Services)), policies: newPolicyIndex(m)},
		prev:  newReuse(prev),
	}
	g.samePolicies = prev != nil && prev.policies.same(g.policies)
	for k := range g.tables {
		g.tables[k] = &table{
			shared:    map[string]map[string]*Resource{},
			listeners: map[string]map[string]*Resource{},
			withheld:  map[string]map[string]string{},
		}
		types := []string{RouteType, ClusterType, EndpointsType}
		if Kind(k) == Node {
			types = []string{NodeServiceType, NodePoliciesType}
		}
		for _, typeURL := range types {
			size := 0 // they grow by copying, which is half of the work of a publish without a change
			if prev != nil {
				size = len(prev.tables[k].shared[typeURL])
			}
			g.tables[k].shared[typeURL] = make(map[string]*Resource, size)
		}
	}
	names := make([]string, len(m.Services))
	for i := range m.Services {
		s := &m.Services[i]
		names[i] = NodeName(s.Namespace, s.Name)
		g.services[names[i]] = s
		for j := range s.Ports {
			if s.Ports[j].Protocol.Plain() {
				continue
			}
			if why := withheldFromGRPC(s, s.Ports[j].Number, s.Ports[j].Protocol); why != "" {
				for c := range s.Ports[j].Clusters {
					g.closed[s.Ports[j].Clusters[c].Name] = why
				}
			}
		}
	}
	for i := range m.Services {
		g.service(names[i], &m.Services[i])
	}
	for _, k := range Callers() {
		g.missing(k)
	}
	var errs []error
	for _, f := range g.faults {
		errs = append(errs, f.fault)
	}
	return g.Views, errors.Join(errs...)
}

// Encoded is how many resources New had to encode; the others were taken from the earlier Views.
func (v *Views) Encoded() int { return v.encoded }

// Mesh is what the Views were made of.
func (v *Views) Mesh() *ir.Mesh { return v.mesh }

// Lookup returns the resource that a client of view w means by a name, or nil with the reason why
// it is withheld, or nil and no reason when there is no such thing.
func (v *Views) Lookup(w View, typeURL, name string) (*Resource, string) {
	if w.Kind < 0 || w.Kind >= kinds {
		return nil, ""
	}
	if why := WithheldType(w, typeURL); why != "" {
		return nil, why
	}
	if typeURL == ListenerType && strings.HasPrefix(name, serverPrefix) {
		return v.server(w, name)
	}
	if typeURL == NodePoliciesType && v.tables[Node].shared[typeURL][name] == nil {
		return v.unknownPolicies(name)
	}
	t := v.tables[w.Kind]
	scope := scopeOf(w, typeURL, name)
	if typeURL == ListenerType {
		r, why := t.listeners[scope][name], t.withheld[scope][name]
		if r == nil && why == "" {
			why = v.plainPort(w.Namespace, name)
		}
		return r, why
	}
	return t.shared[typeURL][name], t.withheld[""][name]
}

// server makes the listener of a gRPC server on demand: its name holds an address that only the
// server knows.
func (v *Views) server(w View, name string) (*Resource, string) {
	if w.Kind != GRPC {
		return nil, ""
	}
	if w.Service == "" {
		return nil, "a server's listener needs an identity, and this client has shown none; " +
			"start it below `inlay run` and connect by the unix socket"
	}
	s := v.services[w.Namespace+"/"+w.Service]
	switch {
	case s == nil:
		return nil, fmt.Sprintf("service %s.%s is not in the mesh", w.Service, w.Namespace)
	case s.MTLS == ir.Strict:
		return nil, fmt.Sprintf("service %s.%s takes mutual TLS only, which a stock gRPC server is not given yet; "+
			"serve it through the SDK or set spec.mtls: permissive", w.Service, w.Namespace)
	}
	l, err := serverListener(name)
	if err != nil {
		return nil, err.Error()
	}
	r, err := encode(ListenerType, name, l)
	if err != nil {
		return nil, err.Error()
	}
	return r, ""
}

// plainPort says why no call goes to a name that means a plain port, SERVICE[.NAMESPACE][:PORT];
// empty when it means none. It is asked of names without a listener, and not written down for each.
func (v *Views) plainPort(namespace, name string) string {
	name, port, _ := strings.Cut(name, ":")
	service, other, ok := strings.Cut(name, ".")
	if ok {
		namespace = other
	}
	s := v.services[NodeName(namespace, service)]
	if s == nil || s.Unknown != "" {
		return ""
	}
	for i := range s.Ports {
		if p := &s.Ports[i]; p.Protocol.Plain() && (port == "" || port == strconv.Itoa(int(p.Number))) {
			return fmt.Sprintf("port %d of service %s.%s is plain TCP or UDP, which carries no calls; programs connect to its virtual address", p.Number, s.Name, s.Namespace)
		}
	}
	return ""
}

// OnDemand says whether a name may have no resource of its own until somebody asks for it: the
// listener of a gRPC server, and the policies of a service that is not known. Such resources are in
// no Set and in no Changed.
func OnDemand(typeURL, name string) bool {
	return typeURL == ListenerType && strings.HasPrefix(name, serverPrefix) || typeURL == NodePoliciesType
}

// MayDiffer says whether the resource that is made on demand for a key may be another one than in
// prev; nil is no earlier mesh. What Changed tells of need not be told here.
func (v *Views) MayDiffer(prev *Views, k Key) bool {
	if prev == nil || k.Type != NodePoliciesType {
		return true
	}
	was, is := prev.tables[Node].shared[k.Type][k.Name], v.tables[Node].shared[k.Type][k.Name]
	if is != nil {
		return was == nil // it was made on demand, and now need not be
	}
	if was != nil {
		return true
	}
	if prev.policies.same(v.policies) {
		return false
	}
	namespace, service, _ := strings.Cut(k.Name, "/")
	return !samePolicies(prev.policies.lookup(namespace, service), v.policies.lookup(namespace, service))
}

// Set returns everything that view w holds. The caller may keep and change the maps.
func (v *Views) Set(w View) *Set {
	out := &Set{View: w, Resources: map[string]map[string]*Resource{}, Withheld: map[string]string{}}
	if w.Kind < 0 || w.Kind >= kinds {
		return out
	}
	t := v.tables[w.Kind]
	for typeURL, byName := range t.shared {
		out.Resources[typeURL] = maps.Clone(byName)
	}
	if w.Kind == Node {
		return out
	}
	listeners := map[string]*Resource{}
	for _, scope := range Scopes(w) {
		maps.Copy(listeners, t.listeners[scope])
		maps.Copy(out.Withheld, t.withheld[scope])
	}
	out.Resources[ListenerType] = listeners
	return out
}

// Changed lists the keys that are new, different or gone in v as against prev (nil for nothing),
// in no order. It compares versions, not bytes.
func (v *Views) Changed(prev *Views) []Key {
	var keys []Key
	for _, k := range Kinds() {
		var before *table
		if prev != nil {
			before = prev.tables[k]
		} else {
			before = &table{}
		}
		now := v.tables[k]
		for _, typeURL := range []string{ClusterType, EndpointsType, RouteType, NodeServiceType, NodePoliciesType} {
			keys = diff(keys, Key{Kind: k, Type: typeURL}, before.shared[typeURL], now.shared[typeURL])
		}
		for scope := range now.listeners {
			keys = diff(keys, Key{Kind: k, Scope: scope, Type: ListenerType}, before.listeners[scope], now.listeners[scope])
		}
		for scope := range before.listeners {
			if _, ok := now.listeners[scope]; !ok {
				keys = diff(keys, Key{Kind: k, Scope: scope, Type: ListenerType}, before.listeners[scope], nil)
			}
		}
	}
	return keys
}

func diff(keys []Key, k Key, before, now map[string]*Resource) []Key {
	for name, r := range now {
		if old := before[name]; old != r && (old == nil || old.Version != r.Version) {
			k.Name = name
			keys = append(keys, k)
		}
	}
	for name := range before {
		if now[name] == nil {
			k.Name = name
			keys = append(keys, k)
		}
	}
	return keys
}

// Healthy says whether an instance is a healthy endpoint of any service.
func (v *Views) Healthy(instanceID string) bool {
	// Every endpoint that is served to anybody is in the service of its port, plain ones too.
	for _, r := range v.tables[Node].shared[NodeServiceType] {
		if r.Holds(instanceID) {
			return true
		}
	}
	return false
}

// Holds says whether a resource with endpoints has an instance among its healthy ones.
func (r *Resource) Holds(instanceID string) bool {
	_, ok := slices.BinarySearch(r.Instances, instanceID)
	return ok
}

// Scopes lists the scopes that the listeners of view w come from; the key of every listener that w
// can ask for has one of them.
func Scopes(w View) []string {
	scopes := []string{"", w.Namespace}
	if w.Service != "" {
		scopes = append(scopes, w.Namespace+"/"+w.Service)
	}
	return scopes
}
