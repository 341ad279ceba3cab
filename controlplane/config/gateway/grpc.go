package gateway

import (
	"regexp"
	"slices"

	v1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

type grpcRoute struct {
	APIVersion string           `json:"apiVersion"`
	Kind       string           `json:"kind"`
	Metadata   check.Metadata   `json:"metadata"`
	Spec       v1.GRPCRouteSpec `json:"spec"`
	Status     any              `json:"status"`
}

// GRPCRoute translates a document of that kind. The route is good only when there are no faults.
func GRPCRoute(t *tree.Tree) (object.Route, []object.Finding) {
	o := check.New(t, "GRPCRoute")
	var in grpcRoute
	o.Decode(&in)
	r := object.Route{Meta: o.Meta("GRPCRoute", in.Metadata, false)}
	r.Parents = parents(o, r.Namespace, &in.Spec.CommonRouteSpec)
	refuse(o, "a mesh route is for the service that parentRefs name", "spec", "hostnames")

	o.Count(len(in.Spec.Rules), 0, maxRules, "spec", "rules")
	if len(in.Spec.Rules) == 0 && o.Tree.Sound("spec", "rules") {
		o.Add(object.NoRules, []any{"spec", "rules"}, "no rules: every call to its parents fails with no_route")
	}
	names, total := map[string]int{}, 0
	for i := range in.Spec.Rules {
		if !o.Tree.Sound("spec", "rules", i) {
			continue
		}
		total += len(in.Spec.Rules[i].Matches)
		r.Rules = append(r.Rules, grpcRule(o, r.Namespace, &in.Spec.Rules[i], names, i))
	}
	if total > maxTotal {
		o.Add(object.OutOfRange, []any{"spec", "rules"}, "%d matches in all rules: want at most %d", total, maxTotal)
	}
	return r, o.Findings
}

func grpcRule(o *check.Object, ns string, in *v1.GRPCRouteRule, names map[string]int, i int) object.Rule {
	at := func(field ...any) []any { return append([]any{"spec", "rules", i}, field...) }
	out := object.Rule{Name: ruleName(o, in.Name, names, i), Pos: o.Tree.At(at()...)}

	o.Count(len(in.Matches), 0, maxMatches, at("matches")...)
	for j := range in.Matches {
		if o.Tree.Sound(at("matches", j)...) {
			out.Matches = append(out.Matches, grpcMatch(o, &in.Matches[j], at("matches", j)))
		}
	}
	if len(out.Matches) == 0 {
		// "If no matches are specified, the implementation MUST match every gRPC request."
		out.Matches = []object.Match{{Pos: out.Pos}}
	}

	var types []string
	for _, f := range in.Filters {
		types = append(types, string(f.Type))
	}
	filters(o, types, i)

	refs := make([]v1.BackendRef, len(in.BackendRefs))
	for j := range in.BackendRefs {
		refs[j] = in.BackendRefs[j].BackendRef
	}
	out.Backends = backends(o, ns, refs, i)
	refuse(o, "", at("sessionPersistence")...)
	return out
}

// Patterns of type GRPCMethodMatch for Exact.
var (
	grpcService = regexp.MustCompile(`^(?i)\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*$`)
	grpcMethod  = regexp.MustCompile(`^[A-Za-z_][A-Za-z_0-9]*$`)
)

func grpcMatch(o *check.Object, in *v1.GRPCRouteMatch, path []any) object.Match {
	at := func(field ...any) []any { return append(slices.Clone(path), field...) }
	out := object.Match{Pos: o.Tree.At(path...)}
	o.NoEmpty(path...)
	o.NoEmpty(at("method")...)
	if m := in.Method; m != nil && o.Tree.Sound(at("method")...) {
		exact(o, text(m.Type), at("method", "type"))
		if m.Service != nil {
			out.GRPCService = *m.Service
		}
		if m.Method != nil {
			out.GRPCMethod = *m.Method
		}
		// "At least one of Service and Method MUST be a non-empty string."
		if out.GRPCService == "" && out.GRPCMethod == "" && o.Tree.Sound(at("method", "service")...) && o.Tree.Sound(at("method", "method")...) {
			o.Add(object.MissingField, at("method"), "neither service nor method: want one or both")
		}
		if m.Type != nil && *m.Type != v1.GRPCMethodMatchExact {
			return out // the patterns below are for Exact
		}
		if s := out.GRPCService; s != "" && o.Length(s, 1024, at("method", "service")...) && !grpcService.MatchString(s) {
			o.Add(object.BadFormat, at("method", "service"), " %s: want the full name of a gRPC service, such as pay.v1.Pay", check.Quote(s))
		}
		if s := out.GRPCMethod; s != "" && o.Length(s, 1024, at("method", "method")...) && !grpcMethod.MatchString(s) {
			o.Add(object.BadFormat, at("method", "method"), " %s: want the name of a gRPC method, such as Charge", check.Quote(s))
		}
	}
	hs := make([]header, len(in.Headers))
	for i, h := range in.Headers {
		hs[i] = header{text(h.Type), string(h.Name), h.Value}
	}
	out.Headers = headers(o, hs, true, at("headers"))
	return out
}
