package gateway

import (
	"regexp"
	"slices"
	"strings"

	v1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

type httpRoute struct {
	APIVersion string           `json:"apiVersion"`
	Kind       string           `json:"kind"`
	Metadata   check.Metadata   `json:"metadata"`
	Spec       v1.HTTPRouteSpec `json:"spec"`
	Status     any              `json:"status"`
}

// HTTPRoute translates a document of that kind. The route is good only when there are no faults.
func HTTPRoute(t *tree.Tree) (object.Route, []object.Finding) {
	o := check.New(t, "HTTPRoute")
	var in httpRoute
	o.Decode(&in)
	r := object.Route{Meta: o.Meta("HTTPRoute", in.Metadata, false)}
	r.Parents = parents(o, r.Namespace, &in.Spec.CommonRouteSpec)
	refuse(o, "a mesh route is for the service that parentRefs name", "spec", "hostnames")

	rules := in.Spec.Rules
	if o.Tree.Has("spec", "rules") {
		o.Count(len(rules), 1, maxRules, "spec", "rules")
	} else {
		// "+kubebuilder:default={{matches: {{path: {type: "PathPrefix", value: "/"}}}}}"
		rules = []v1.HTTPRouteRule{{}}
	}
	names, total := map[string]int{}, 0
	for i := range rules {
		if !o.Tree.Sound("spec", "rules", i) {
			continue
		}
		total += max(1, len(rules[i].Matches))
		r.Rules = append(r.Rules, httpRule(o, r.Namespace, &rules[i], names, i))
	}
	if total > maxTotal {
		o.Add(object.OutOfRange, []any{"spec", "rules"}, "%d matches in all rules: want at most %d", total, maxTotal)
	}
	return r, o.Findings
}

func httpRule(o *check.Object, ns string, in *v1.HTTPRouteRule, names map[string]int, i int) object.Rule {
	at := func(field ...any) []any { return append([]any{"spec", "rules", i}, field...) }
	out := object.Rule{Name: ruleName(o, in.Name, names, i), Pos: o.Tree.At(at()...)}

	o.Count(len(in.Matches), 0, maxMatches, at("matches")...)
	for j := range in.Matches {
		if o.Tree.Sound(at("matches", j)...) {
			out.Matches = append(out.Matches, httpMatch(o, &in.Matches[j], at("matches", j)))
		}
	}
	if len(out.Matches) == 0 {
		// "If no matches are specified, the default is a prefix path match on "/", which has the
		// effect of matching every HTTP request."
		out.Matches = []object.Match{{Path: "/", Pos: out.Pos}}
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

	if in.Timeouts != nil {
		out.Request = o.GatewayDuration(text(in.Timeouts.Request), at("timeouts", "request")...)
		out.PerTry = o.GatewayDuration(text(in.Timeouts.BackendRequest), at("timeouts", "backendRequest")...)
		// "backendRequest timeout cannot be longer than request timeout"
		if out.Request != nil && out.PerTry != nil && *out.Request > 0 && *out.PerTry > *out.Request {
			o.Add(object.Contradiction, at("timeouts", "backendRequest"), " %s is longer than request %s: want at most that", out.PerTry, out.Request)
		}
	}
	if in.Retry != nil && o.Tree.Sound(at("retry")...) {
		out.Retry = httpRetry(o, in.Retry, at("retry"))
	}
	refuse(o, "", at("sessionPersistence")...)
	return out
}

// pathChars is the pattern of type HTTPPathMatch for Exact and PathPrefix.
var pathChars = regexp.MustCompile(`^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+$`)

func httpMatch(o *check.Object, in *v1.HTTPRouteMatch, path []any) object.Match {
	at := func(field ...any) []any { return append(slices.Clone(path), field...) }
	out := object.Match{Path: "/", Pos: o.Tree.At(path...)}
	o.NoEmpty(path...)
	o.NoEmpty(at("path")...)
	if p := in.Path; p != nil {
		typ := "PathPrefix" // "+kubebuilder:default=PathPrefix"
		if p.Type != nil {
			typ = string(*p.Type)
		}
		if typ == "RegularExpression" {
			o.Add(object.NotBuilt, at("path", "type"), " RegularExpression: %s; accepted: Exact, PathPrefix", later)
		} else if o.Enum(typ, []string{"Exact", "PathPrefix"}, at("path", "type")...) {
			out.Exact = typ == "Exact"
			if p.Value != nil { // "+kubebuilder:default="/""
				httpPath(o, *p.Value, at("path", "value"))
				out.Path = *p.Value
			}
			if !out.Exact && len(out.Path) > 1 {
				// PathPrefix: "When specified, a trailing `/` is ignored."
				out.Path = strings.TrimSuffix(out.Path, "/")
			}
		}
	}
	if in.Method != nil && o.Enum(string(*in.Method), []string{"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}, at("method")...) {
		out.Method = string(*in.Method)
	}
	hs := make([]header, len(in.Headers))
	for i, h := range in.Headers {
		hs[i] = header{text(h.Type), string(h.Name), h.Value}
	}
	out.Headers = headers(o, hs, false, at("headers"))
	refuse(o, "accepted: path, method, headers", at("queryParams")...)
	return out
}

// httpPath applies the rules of type HTTPPathMatch for Exact and PathPrefix.
func httpPath(o *check.Object, s string, path []any) {
	if !o.Length(s, 1024, path...) {
		return
	}
	fault := func(want string) { o.Add(object.BadFormat, path, " %s: %s", check.Quote(s), want) }
	switch {
	case !strings.HasPrefix(s, "/"):
		fault("want a path that begins with /")
	case strings.Contains(s, "//"):
		fault("a path must not hold //")
	case strings.Contains(s, "/./") || strings.Contains(s, "/../") || strings.HasSuffix(s, "/.") || strings.HasSuffix(s, "/.."):
		fault("a path must not hold the segments . and ..")
	case strings.Contains(strings.ToLower(s), "%2f"):
		fault("a path must not hold an encoded slash (%2f)")
	case strings.Contains(s, "#"):
		fault("a path must not hold #")
	case !pathChars.MatchString(s):
		fault("want letters, digits, -._~!$&'()*+,;=:@ and %XX; a query is not part of the path")
	}
}

func httpRetry(o *check.Object, in *v1.HTTPRouteRetry, path []any) *object.RouteRetry {
	at := func(field ...any) []any { return append(slices.Clone(path), field...) }
	out := &object.RouteRetry{Pos: o.Tree.At(path...)}
	first := map[v1.HTTPRouteRetryStatusCode]int{}
	for i, c := range in.Codes {
		if !o.Tree.Sound(at("codes", i)...) {
			continue
		}
		if j, ok := first[c]; ok {
			o.Add(object.Repeated, at("codes", i), " %d: already codes[%d]: want each once", c, j) // "+listType=set"
			continue
		}
		first[c] = i
		if o.Range(int64(c), 400, 599, at("codes", i)...) {
			out.Codes = append(out.Codes, uint32(c))
		}
	}
	slices.Sort(out.Codes)
	if in.Attempts != nil && o.Range(int64(*in.Attempts), 1, 10, at("attempts")...) {
		n := uint32(*in.Attempts)
		out.Attempts = &n
	}
	out.Backoff = o.GatewayDuration(text(in.Backoff), at("backoff")...)
	if out.Backoff != nil && *out.Backoff == 0 {
		o.Add(object.OutOfRange, at("backoff"), " %s: want at least 1ms", *in.Backoff)
	}
	return out
}
