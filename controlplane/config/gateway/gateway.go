// Package gateway translates HTTPRoute and GRPCRoute of the Gateway API into routes. package
// config calls it for each such document.
//
// The Go types of the Gateway API check nothing: the limits live in its CRDs. This package applies
// those of the fields it honours, and refuses every other field and value by name; it ignores
// none. Status is another's output and is not read.
package gateway

import (
	"regexp"
	"slices"
	"strings"

	v1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
)

// Version is the apiVersion of the kinds translated here.
const Version = v1.GroupName + "/v1"

const later = "waits for a later release"

// Limits of the CRDs, by the kubebuilder markers of apis/v1.
const (
	maxParents  = 32
	maxRules    = 16
	maxMatches  = 64
	maxTotal    = 128 // "the total number of matches across all rules in a route must be less than 128" (rule: <= 128)
	maxBackends = 16
	maxHeaders  = 16
	maxWeight   = 1_000_000
)

// refuse reports a field that is written and not honoured yet.
func refuse(o *check.Object, accepted string, path ...any) {
	if o.Tree.Has(path...) {
		msg := later
		if accepted != "" {
			msg += "; " + accepted
		}
		o.AddKey(object.NotBuilt, path, "%s", msg)
	}
}

// parents translates the parentRefs of a route in namespace ns.
func parents(o *check.Object, ns string, spec *v1.CommonRouteSpec) []object.Parent {
	refuse(o, "accepted: parentRefs to a Service", "spec", "useDefaultGateways")
	if !o.Required(`the service whose calls it routes, such as [{group: "", kind: Service, name: orders}]`, "spec", "parentRefs") {
		return nil
	}
	o.Count(len(spec.ParentRefs), 1, maxParents, "spec", "parentRefs")
	var out []object.Parent
	for i := range spec.ParentRefs {
		if p, ok := parent(o, ns, &spec.ParentRefs[i], i); ok {
			out = append(out, p)
		}
	}
	// "If one ParentRef sets `port`, all ParentRefs referencing the same object must also set `port`",
	// each to another value.
	for i, p := range out {
		for _, q := range out[:i] {
			if p.Service == q.Service && (p.Port == q.Port || p.Port == 0 || q.Port == 0) {
				o.Findings = append(o.Findings, object.At(p.Pos, object.Repeated,
					"%s: spec.parentRefs: service %q is already at line %d: want one reference without port, or each with its own port", o.Label, p.Service, q.Pos.Line))
				break
			}
		}
	}
	return out
}

func parent(o *check.Object, ns string, ref *v1.ParentReference, i int) (object.Parent, bool) {
	at := func(field ...any) []any { return append([]any{"spec", "parentRefs", i}, field...) }
	if !o.Tree.Sound(at()...) {
		return object.Parent{}, false
	}
	before := len(o.Findings)
	group, kind := "gateway.networking.k8s.io", "Gateway" // "+kubebuilder:default" of both
	if ref.Group != nil {
		group = string(*ref.Group)
	}
	if ref.Kind != nil {
		kind = string(*ref.Kind)
	}
	switch {
	case ref.Kind == nil:
		o.Add(object.MissingField, at("kind"), `missing, which means Gateway: want {group: "", kind: Service}; Gateways wait for a later release`)
	case kind == "Service" && ref.Group == nil:
		o.Add(object.ParentGroup, at("group"), `left out, which means gateway.networking.k8s.io: write group: "" (taken as that)`)
	case kind == "Service" && (group == "" || group == "core"):
	case kind == "Service":
		o.Add(object.BadEnum, at("group"), ` %s: a Service is of group "" (or core)`, check.Quote(group))
	case kind == "MeshService":
		o.Add(object.BadEnum, at("kind"), ` "MeshService": want {group: "", kind: Service}, which is the MeshService of that name`)
	default:
		o.Add(object.NotBuilt, at("kind"), ` %s: %s; accepted: {group: "", kind: Service}`, check.Quote(kind), later)
	}
	if ref.Namespace != nil && o.Namespace(string(*ref.Namespace), at("namespace")...) && string(*ref.Namespace) != ns {
		// GEP-1294: a parentRef into another namespace makes a "consumer" route, which is only for
		// callers of the route's namespace. Taking it for a producer route would let one
		// namespace route the calls of all others.
		o.Add(object.NotBuilt, at("namespace"), " %q: a route for a service of another namespace (a consumer route) %s; put the route into namespace %q", *ref.Namespace, later, *ref.Namespace)
	}
	refuse(o, "accepted: port", at("sectionName")...)
	out := object.Parent{Service: string(ref.Name), Port: portNumber(o, ref.Port, at("port")), Pos: o.Tree.At(at()...)}
	if o.Required("the service's name", at("name")...) {
		o.ServiceName(out.Service, at("name")...)
	}
	return out, !object.HasFaults(o.Findings[before:]) && o.Tree.Sound(at("name")...)
}

func portNumber(o *check.Object, p *v1.PortNumber, path []any) uint16 {
	if p == nil || !o.Range(int64(*p), 1, 65535, path...) {
		return 0
	}
	return uint16(*p)
}

// ruleNames reports names that are malformed or used twice.
func ruleName(o *check.Object, name *v1.SectionName, first map[string]int, i int) string {
	if name == nil {
		return ""
	}
	path := []any{"spec", "rules", i, "name"}
	o.Subdomain(string(*name), path...)
	// "This name MUST be unique within a Route if it is set."
	if j, ok := first[string(*name)]; ok {
		o.Add(object.Repeated, path, " %q: already rules[%d]: want each once", *name, j)
	} else {
		first[string(*name)] = i
	}
	return string(*name)
}

var (
	// headerName is the pattern of type HeaderName.
	headerName = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+\\-.^_\x60|~]+$")
	// headerValue holds what a header can carry; anything else would never match.
	// RFC 9110, section 5.5: "A field value does not include leading or trailing whitespace."
	headerValue = regexp.MustCompile(`^[!-~]([\t -~]*[!-~])?$`)
)

// header is a header match of either kind of route.
type header struct {
	typ         *string
	name, value string
}

func headers(o *check.Object, in []header, grpc bool, path []any) []object.Header {
	o.Count(len(in), 0, maxHeaders, path...)
	var out []object.Header
	first := map[string]int{}
	for i, h := range in {
		at := func(field ...any) []any { return append(append(slices.Clone(path), i), field...) }
		if !o.Tree.Sound(at()...) {
			continue
		}
		exact(o, h.typ, at("type"))
		name := strings.ToLower(h.name)
		if o.Required("the header's name", at("name")...) {
			switch {
			case len(h.name) > 256 || !headerName.MatchString(h.name):
				o.Add(object.BadFormat, at("name"), " %s: want a header name of 1 to 256 letters, digits and hyphens", check.Quote(h.name))
			case name == "host":
				o.Add(object.NotBuilt, at("name"), " %q: matching on the host %s", h.name, later)
			case grpc && strings.HasSuffix(name, "-bin"):
				// Stock gRPC clients take binary metadata away before they match, so the match
				// could never hold there.
				o.Add(object.NotBuilt, at("name"), " %q: binary metadata is not matched; want a name without -bin at its end", h.name)
			}
		}
		if o.Required("the header's value", at("value")...) && o.Length(h.value, 4096, at("value")...) && !headerValue.MatchString(h.value) {
			o.Add(object.BadFormat, at("value"), " %s: want 1 to 4096 characters of printable ASCII, spaces and tabs only between them", check.Quote(h.value))
		}
		if j, ok := first[name]; ok {
			if in[j].name == h.name {
				// "+listType=map +listMapKey=name"
				o.Add(object.Repeated, at("name"), " %q: already headers[%d]: want each once", h.name, j)
			} else {
				// "Subsequent entries with an equivalent header name MUST be ignored."
				o.Add(object.HeaderIgnored, at("name"), " %q: the same header as headers[%d], which alone counts: remove one", h.name, j)
			}
			continue
		}
		first[name] = i
		out = append(out, object.Header{Name: name, Value: h.value})
	}
	return out
}

// exact reports a type of comparison other than Exact.
func exact(o *check.Object, typ *string, path []any) {
	switch {
	case typ == nil || *typ == "Exact":
	case *typ == "RegularExpression":
		o.Add(object.NotBuilt, path, " RegularExpression: %s; accepted: Exact", later)
	default:
		o.Enum(*typ, []string{"Exact"}, path...)
	}
}

// backends translates the backendRefs of rule i of a route in namespace ns.
func backends(o *check.Object, ns string, refs []v1.BackendRef, i int) []object.Backend {
	list := []any{"spec", "rules", i, "backendRefs"}
	o.Count(len(refs), 0, maxBackends, list...)
	var out []object.Backend
	var total uint32
	for j := range refs {
		at := func(field string) []any { return append(slices.Clone(list), j, field) }
		if !o.Tree.Sound(append(slices.Clone(list), j)...) {
			continue
		}
		refuse(o, "", at("filters")...)
		b := backend(o, ns, &refs[j], at)
		b.Pos = o.Tree.At(append(slices.Clone(list), j)...)
		total += b.Weight
		out = append(out, b)
	}
	if total == 0 && o.Tree.Sound(list...) {
		o.Add(object.NoBackends, list, "no backend with a weight above 0: every call that the rule matches fails with no_cluster")
	}
	return out
}

func backend(o *check.Object, ns string, ref *v1.BackendRef, at func(string) []any) object.Backend {
	group, kind := "", "Service" // "+kubebuilder:default" of both
	if ref.Group != nil {
		group = string(*ref.Group)
	}
	if ref.Kind != nil {
		kind = string(*ref.Kind)
	}
	b := object.Backend{Namespace: ns, Weight: 1}
	named := o.Required("the name of the service, or SERVICE.VERSION", at("name")...)
	switch {
	case kind == "Service" && (group == "" || group == "core"):
		if named && o.ServiceName(string(ref.Name), at("name")...) {
			b.Service = string(ref.Name)
		}
	case kind == "Service":
		o.Add(object.BadEnum, at("group"), ` %s: a Service is of group "" (or core)`, check.Quote(group))
	case kind == "ServiceVersion" && group == "inlay.dev":
		if named {
			b.Service, b.Version = o.VersionName(string(ref.Name), at("name")...)
		}
	case kind == "ServiceVersion":
		o.Add(object.BadEnum, at("group"), ` %s: a ServiceVersion is of group inlay.dev`, check.Quote(group))
	default:
		o.Enum(kind, []string{"Service", "ServiceVersion"}, at("kind")...)
	}
	if ref.Namespace != nil && o.Namespace(string(*ref.Namespace), at("namespace")...) {
		// GEP-1294: "Routes of either type can send traffic to backendRefs in any namespace ...
		// this is allowed without a ReferenceGrant."
		b.Namespace = string(*ref.Namespace)
	}
	b.Port = portNumber(o, ref.Port, at("port"))
	if ref.Weight != nil && o.Range(int64(*ref.Weight), 0, maxWeight, at("weight")...) {
		b.Weight = uint32(*ref.Weight)
	}
	return b
}

// filters refuses each filter by its type.
func filters(o *check.Object, types []string, i int) {
	for j, typ := range types {
		path := []any{"spec", "rules", i, "filters", j}
		if typ == "" {
			typ = "a filter without type"
		}
		o.Add(object.NotBuilt, path, "%s: %s; no filters are accepted yet", typ, later)
	}
}

func text[T ~string](p *T) *string {
	if p == nil {
		return nil
	}
	s := string(*p)
	return &s
}
