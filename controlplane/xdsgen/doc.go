// Package xdsgen turns a compiled mesh into standard Envoy resources, and for node agents into their
// own, one view for each kind of client and identity class. serve publishes what it gives, admin asks it what a kind of client
// makes of a route, and `inlay compile` writes it to a snapshot.
//
// It is pure and deterministic: the same mesh gives the same bytes and the same versions. It never
// reads a clock or the network, and it never puts a resource into a view that Envoy's own
// validation refuses, nor one that the kind of client cannot enforce whole.
package xdsgen

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// Type URLs of the resources that are generated.
const (
	ListenerType  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType     = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	ClusterType   = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointsType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

	// NodeServiceType and NodePoliciesType are the node agent's own; see inlay/node/v1/state.proto.
	NodeServiceType  = "type.googleapis.com/inlay.node.v1.Service"
	NodePoliciesType = "type.googleapis.com/inlay.node.v1.Policies"
)

// Kind is a kind of client: what it can enforce decides what it is given.
type Kind int

// Kinds of clients.
const (
	SDK  Kind = iota // meshsdk
	GRPC             // a stock gRPC client or server that speaks xDS
	Node             // the agent of a node: every service and its policies, no routes
	kinds
)

// Kinds lists every kind.
func Kinds() []Kind { return []Kind{SDK, GRPC, Node} }

// Callers lists the kinds that make calls: routes are served to these.
func Callers() []Kind { return []Kind{SDK, GRPC} }

// String is "sdk", "grpc" or "node", as in admin's answers.
func (k Kind) String() string {
	switch k {
	case SDK:
		return "sdk"
	case GRPC:
		return "grpc"
	case Node:
		return "node"
	}
	return fmt.Sprintf("kind(%d)", int(k))
}

// View says for whom resources are made.
type View struct {
	Kind Kind
	// Namespace is where names without a namespace resolve.
	Namespace string
	// Service is the identity class together with Namespace. Empty for a caller without an
	// identity: it is given no inbound listener.
	Service string
}

// Resource is one encoded resource. It is immutable and shared by all who are served it.
type Resource struct {
	Type, Name string
	// Version is a hash of the content: equal versions are equal bytes.
	Version string
	Any     *anypb.Any
	// Instances are the ids of the healthy instances in an endpoints resource, and in a service of
	// the node agent's, ascending; nil for every other type.
	Instances []string

	// from is what a listener was made of beside its name.
	from string
}

// Set is everything that one view holds.
type Set struct {
	View View
	// Resources by type URL, then name.
	Resources map[string]map[string]*Resource
	// Withheld says of a name why it exists and is not served to this view.
	Withheld map[string]string
}

// Fault is one resource that could not be made. It is in the chain of the errors of Generate and
// New; the other resources are not touched by it.
type Fault struct {
	Kind       Kind
	Type, Name string
	Err        error
}

// Error names the resource and what is wrong with it.
func (f *Fault) Error() string {
	return fmt.Sprintf("%s view: %s %q: %v", f.Kind, typeNoun(f.Type), f.Name, f.Err)
}

// Unwrap returns what is wrong.
func (f *Fault) Unwrap() error { return f.Err }

func typeNoun(typeURL string) string {
	switch typeURL {
	case ListenerType:
		return "listener"
	case RouteType:
		return "route configuration"
	case ClusterType:
		return "cluster"
	case EndpointsType:
		return "endpoints"
	case NodeServiceType:
		return "service"
	case NodePoliciesType:
		return "policies"
	}
	return typeURL
}

// Generate returns what view v of mesh m holds. The error joins one Fault for each resource that
// was left out; the Set is complete but for these and never nil.
func Generate(m *ir.Mesh, v View) (*Set, error) {
	if v.Kind < 0 || v.Kind >= kinds {
		return &Set{View: v}, fmt.Errorf("view of kind %d: want %v", int(v.Kind), Kinds())
	}
	views, _ := New(m, nil)
	// Faults of the other kind are of no interest to this view.
	var mine []error
	for _, f := range views.faults {
		if f.key.Kind == v.Kind {
			mine = append(mine, f.fault)
		}
	}
	return views.Set(v), errors.Join(mine...)
}
