package differential

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// table is what one service's calls are routed by: HTTPRoutes or GRPCRoutes, never both.
type table struct {
	service string
	http    bool
	rules   []rule
}

// rule is one rule of a route object. Objects are named so that their order is that of rules.
type rule struct {
	object   string
	matches  []match // none: every call
	backends []backend
}

// match is a GRPCRouteMatch, or an HTTPRouteMatch when the table is of these.
type match struct {
	service, method string // GRPC; either may be empty
	prefix          bool   // HTTP: how path is compared
	path            string // HTTP; empty: not said
	verb            string // HTTP method; empty: any
	headers         [][2]string
}

// backend is one target of a split by its name in targets.
type backend struct {
	target string
	weight int
}

// probe is one call.
type probe struct {
	path    string
	headers [][2]string
}

// targets are what rules may send calls to, and the servers behind each: they do not overlap, so
// that the answer of a server tells the target. nobody has no servers and is in no file.
var targets = map[string][]string{
	"a.v1": {"a-v1"}, "a.v2": {"a-v2"},
	"b.v1": {"b-v1"}, "b.v2": {"b-v2-x", "b-v2-y"},
	"c":      {"c-x", "c-y", "c-z"},
	"d":      {"d"}, // an instance of the SDK, with mesh TLS and plaintext on one port
	"nobody": nil,
}

var (
	targetNames  = []string{"a.v1", "a.v2", "b.v1", "b.v2", "c", "d", "nobody"}
	serviceNames = []string{"shop.A", "shop.B", "shop.AB", "shop.a", "Bare"}
	methodNames  = []string{"Get", "Set", "GetAll", "get"}
	headerPool   = [][2]string{{"x-a", "1"}, {"X-A", "2"}, {"x-a", "1,2"}, {"x-b", "yes"}, {"user-agent", "probe"}}
	probePool    = [][2]string{{"x-a", "1"}, {"x-a", "2"}, {"x-b", "yes"}, {"X-B", "yes"}, {"x-b", "no"}, {"x-c", "1"}}
)

func one[T any](r *rand.Rand, of []T) T { return of[r.IntN(len(of))] }

func randomTable(r *rand.Rand, service string) table {
	t := table{service: service, http: r.IntN(4) == 0}
	for o := range 1 + r.IntN(3) {
		for range 1 + r.IntN(3) {
			u := rule{object: fmt.Sprintf("%s-%d", service, o)}
			for range r.IntN(3) {
				u.matches = append(u.matches, randomMatch(r, t.http))
			}
			names := slices.Clone(targetNames)
			r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
			for i := range []int{0, 1, 1, 1, 1, 2, 2, 3}[r.IntN(8)] {
				u.backends = append(u.backends, backend{names[i], []int{0, 1, 1, 1, 2, 5, 90}[r.IntN(7)]})
			}
			t.rules = append(t.rules, u)
		}
	}
	return t
}

func randomMatch(r *rand.Rand, http bool) match {
	var m match
	if http {
		switch r.IntN(4) {
		case 0:
			m.path = "/" + one(r, serviceNames) + "/" + one(r, methodNames)
		case 1:
			m.path, m.prefix = "/"+one(r, serviceNames), true
		case 2:
			m.path, m.prefix = "/"+one(r, serviceNames)+"/"+one(r, methodNames), true
		}
		m.verb = one(r, []string{"", "", "", "POST", "GET"})
	} else {
		switch r.IntN(4) {
		case 0:
			m.service = one(r, serviceNames)
		case 1:
			m.method = one(r, methodNames)
		case 2:
			m.service, m.method = one(r, serviceNames), one(r, methodNames)
		}
	}
	for range []int{0, 0, 0, 1, 2}[r.IntN(5)] {
		h := one(r, headerPool)
		if !slices.ContainsFunc(m.headers, func(x [2]string) bool { return strings.EqualFold(x[0], h[0]) }) {
			m.headers = append(m.headers, h)
		}
	}
	return m
}

func randomProbe(r *rand.Rand) probe {
	p := probe{path: "/" + one(r, serviceNames) + "/" + one(r, methodNames)}
	for range r.IntN(3) {
		p.headers = append(p.headers, one(r, probePool))
	}
	return p
}

// yaml writes the table as route objects of its service, which it also declares when own is set.
func (t table) yaml(root endpoint) string {
	var b strings.Builder
	fmt.Fprintf(&b, "---\napiVersion: inlay.dev/v1alpha1\nkind: MeshService\nmetadata: {name: %s}\nspec:\n  mtls: permissive\n  ports: [{port: 8080, protocol: GRPC}]\n  endpoints: [{address: %s, port: %d}]\n",
		t.service, root.addr.Addr(), root.addr.Port())
	kind := "GRPCRoute"
	if t.http {
		kind = "HTTPRoute"
	}
	object := ""
	for _, u := range t.rules {
		if u.object != object {
			object = u.object
			fmt.Fprintf(&b, "---\napiVersion: gateway.networking.k8s.io/v1\nkind: %s\nmetadata: {name: %s}\nspec:\n  parentRefs: [{group: \"\", kind: Service, name: %s}]\n  rules:\n", kind, object, t.service)
		}
		fmt.Fprintf(&b, "  - backendRefs: [")
		for i, x := range u.backends {
			if i > 0 {
				b.WriteString(", ")
			}
			group, kind := `""`, "Service"
			if strings.Contains(x.target, ".") {
				group, kind = "inlay.dev", "ServiceVersion"
			}
			fmt.Fprintf(&b, "{group: %s, kind: %s, name: %s, port: 8080, weight: %d}", group, kind, x.target, x.weight)
		}
		b.WriteString("]\n")
		if len(u.matches) > 0 {
			b.WriteString("    matches:\n")
		}
		for _, m := range u.matches {
			fmt.Fprintf(&b, "    - {%s}\n", m.yaml())
		}
	}
	return b.String()
}

func (m match) yaml() string {
	var fields []string
	if m.service != "" || m.method != "" {
		var in []string
		if m.service != "" {
			in = append(in, "service: "+m.service)
		}
		if m.method != "" {
			in = append(in, "method: "+m.method)
		}
		fields = append(fields, "method: {"+strings.Join(in, ", ")+"}")
	}
	if m.path != "" {
		kind := "Exact"
		if m.prefix {
			kind = "PathPrefix"
		}
		fields = append(fields, fmt.Sprintf("path: {type: %s, value: %s}", kind, m.path))
	}
	if m.verb != "" {
		fields = append(fields, "method: "+m.verb)
	}
	if len(m.headers) > 0 {
		var in []string
		for _, h := range m.headers {
			in = append(in, fmt.Sprintf("{name: %s, value: %q}", h[0], h[1]))
		}
		fields = append(fields, "headers: ["+strings.Join(in, ", ")+"]")
	}
	if len(fields) == 0 {
		fields = []string{"headers: []"}
	}
	return strings.Join(fields, ", ")
}

// arms is what the Gateway API says of a call: the split of the rule that takes it, without the
// backends of weight 0. ok is false when no rule does.
func (t table) arms(p probe) (_ []backend, ok bool) {
	type candidate struct {
		m     match
		order int
		rule  *rule
	}
	var found []candidate
	for i := range t.rules {
		u := &t.rules[i]
		matches := u.matches
		if len(matches) == 0 {
			matches = []match{{}}
		}
		for _, m := range matches {
			if t.matches(m, p) {
				found = append(found, candidate{m, len(found), u})
			}
		}
	}
	if len(found) == 0 {
		return nil, false
	}
	best := slices.MinFunc(found, func(a, b candidate) int {
		if t.http {
			return cmp.Or(cmp.Compare(a.m.pathRank(), b.m.pathRank()), cmp.Compare(len(b.m.path), len(a.m.path)),
				cmp.Compare(min(len(b.m.verb), 1), min(len(a.m.verb), 1)), cmp.Compare(len(b.m.headers), len(a.m.headers)), cmp.Compare(a.order, b.order))
		}
		return cmp.Or(cmp.Compare(len(b.m.service), len(a.m.service)), cmp.Compare(len(b.m.method), len(a.m.method)),
			cmp.Compare(len(b.m.headers), len(a.m.headers)), cmp.Compare(a.order, b.order))
	})
	var arms []backend
	for _, b := range best.rule.backends {
		if b.weight > 0 {
			arms = append(arms, b)
		}
	}
	return arms, true
}

// pathRank puts exact paths before prefixes.
func (m match) pathRank() int {
	if m.path != "" && !m.prefix {
		return 0
	}
	return 1
}

func (t table) matches(m match, p probe) bool {
	_, rest, _ := strings.Cut(p.path, "/")
	service, method, _ := strings.Cut(rest, "/")
	switch {
	case m.service != "" && m.service != service, m.method != "" && m.method != method:
		return false
	case m.path != "" && !m.prefix && m.path != p.path:
		return false
	case m.prefix && p.path != m.path && !strings.HasPrefix(p.path, m.path+"/"):
		return false
	case m.verb != "" && m.verb != "POST": // gRPC over HTTP/2: ":method POST"
		return false
	}
	for _, h := range m.headers {
		var values []string
		for _, x := range p.headers {
			if strings.EqualFold(x[0], h[0]) {
				values = append(values, x[1])
			}
		}
		// gRFC A28 and RFC 9110: repeated values of a header are one value, joined by commas.
		if len(values) == 0 || strings.Join(values, ",") != h[1] {
			return false
		}
	}
	return true
}
