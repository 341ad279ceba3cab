package route

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/inlay-mesh/inlay/meshsdk/internal/retry"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// Table is the routes of one virtual host, indexed by path. It is immutable.
//
// The order of the route configuration is the meaning: the first route that matches is taken
// (Envoy, VirtualHost.routes: "The list of routes that will be matched, in order, for incoming
// requests. The first route that matches will be used."). The index only spares looking at routes
// whose path cannot match: exact paths by a map, prefixes by a tree of their bytes; among those of one
// path, the value of one header by a map again. What remains is compared in order of place.
type Table struct {
	host   string
	routes []*Route
	exact  map[string]*places
	prefix *node   // nil when no route is by prefix
	regex  []int32 // in order; these are tried one by one
}

// New builds the table of a virtual host; nil gives an empty table that matches nothing.
func New(vh *resource.VirtualHost) *Table {
	t := &Table{}
	if vh == nil {
		return t
	}
	t.host = vh.Name
	for i := range vh.Routes {
		r := fromResource(i, &vh.Routes[i])
		at := int32(len(t.routes))
		t.routes = append(t.routes, r)
		switch r.match.Kind {
		case resource.Exact:
			if t.exact == nil {
				t.exact = make(map[string]*places)
			}
			if t.exact[r.match.Path] == nil {
				t.exact[r.match.Path] = new(places)
			}
			t.exact[r.match.Path].add(at, r)
		case resource.Regex:
			t.regex = append(t.regex, at)
		default:
			if t.prefix == nil {
				t.prefix = new(node)
			}
			n := t.prefix.insert(prefixOf(r.match))
			if r.match.Kind == resource.PathSeparatedPrefix {
				n.segments.add(at, r)
			} else {
				n.any.add(at, r)
			}
		}
	}
	return t
}

// prefixOf is the bytes that a path must start with. "" and "/" both match every path, and
// path_separated_prefix "/a/" means what "/a" means.
func prefixOf(m resource.Match) string {
	if m.Kind == resource.PathSeparatedPrefix {
		return strings.TrimRight(m.Path, "/")
	}
	if m.Path == "/" {
		return ""
	}
	return m.Path
}

func fromResource(i int, in *resource.Route) *Route {
	r := &Route{
		Name:    in.Name,
		Object:  in.Origin.Object,
		Rule:    in.Origin.Rule,
		Source:  in.Origin.Source,
		Invalid: in.Invalid,
		Timeout: in.Timeout,
		Idle:    in.IdleTimeout,
		Retry:   retry.FromResource(in.Retry),
		match:   in.Match,
	}
	if in.Invalid == "" && in.NonForwarding {
		r.Invalid = "the route answers at the server and forwards nothing"
	}
	switch {
	case r.Object != "" && r.Rule != "":
		r.Name = r.Object + "/" + r.Rule
	case r.Object != "":
		r.Name = r.Object
	case r.Name == "":
		r.Name = fmt.Sprintf("route-%d", i)
	}
	if in.Match.Kind == resource.Regex {
		// Envoy, RouteMatch.safe_regex: "the entire path (without the query string) must match the
		// regex."
		re, err := regexp.Compile("^(?:" + in.Match.Path + ")$")
		if err != nil { // not from Decode, which checks it
			r.Invalid = fmt.Sprintf("regular expression %q: %v", in.Match.Path, err)
			re = regexp.MustCompile("")
		}
		r.regex = re
	}
	r.match.Headers = slices.Clone(in.Match.Headers)
	for j := range r.match.Headers {
		r.match.Headers[j].Name = strings.ToLower(r.match.Headers[j].Name)
	}
	for _, c := range in.Clusters {
		r.Clusters = append(r.Clusters, Weighted{Cluster: c.Name, Weight: c.Weight})
		r.Total += uint64(c.Weight)
	}
	return r
}

// Host is the name of the virtual host; empty when there is none.
func (t *Table) Host() string { return t.host }

// Routes in order; read only.
func (t *Table) Routes() []*Route { return t.routes }

// Match gives the first route that matches, nil when none does. A route with Invalid set is given
// like any other: the caller must fail the call, since passing on to the next one would match more
// than the route's author wrote.
func (t *Table) Match(req Request) *Route {
	best := int32(len(t.routes))
	if p := t.exact[req.Path]; p != nil {
		best = t.least(p, best, &req)
	}
	for n, rest := t.prefix, req.Path; n != nil; {
		best = t.least(&n.any, best, &req)
		if rest == "" || rest[0] == '/' {
			// Envoy, RouteMatch.path_separated_prefix: "If specified, the route is a
			// path-separated prefix rule meaning that the :path header (without the query string)
			// must either exactly match the path_separated_prefix or have it as a prefix, followed
			// by /".
			best = t.least(&n.segments, best, &req)
		}
		n, rest = n.child(rest)
	}
	for _, at := range t.regex {
		if at >= best {
			break
		}
		if r := t.routes[at]; r.regex.MatchString(req.Path) && r.headers(&req) {
			best = at
			break
		}
	}
	if best == int32(len(t.routes)) {
		return nil
	}
	return t.routes[best]
}

// places are routes that have their path condition in common.
type places struct {
	plain []int32 // without conditions on headers, in order
	keyed []keyed // one for each header that some of the others ask for
}

// keyed are the places of routes that ask for one header, by the value they ask for.
type keyed struct {
	name string
	at   map[string][]int32 // in order
}

// add adds a route at place at; places come in rising order.
func (p *places) add(at int32, r *Route) {
	if len(r.match.Headers) == 0 {
		p.plain = append(p.plain, at)
		return
	}
	key := r.match.Headers[0]
	for _, h := range r.match.Headers {
		if h.Name != ":method" { // a method tells few routes apart
			key = h
			break
		}
	}
	for i := range p.keyed {
		if k := &p.keyed[i]; k.name == key.Name {
			k.at[key.Exact] = append(k.at[key.Exact], at)
			return
		}
	}
	p.keyed = append(p.keyed, keyed{name: key.Name, at: map[string][]int32{key.Exact: {at}}})
}

// least is the first place of p, below best, whose headers match; else best.
func (t *Table) least(p *places, best int32, req *Request) int32 {
	if len(p.plain) > 0 && p.plain[0] < best {
		best = p.plain[0]
	}
	for i := range p.keyed {
		if value, ok := req.header(p.keyed[i].name); ok {
			best = t.first(p.keyed[i].at[value], best, req)
		}
	}
	return best
}

// first is the first place of list, below best, whose headers match; else best.
func (t *Table) first(list []int32, best int32, req *Request) int32 {
	for _, at := range list {
		if at >= best {
			break // lists are in order: nothing better follows
		}
		if t.routes[at].headers(req) {
			return at
		}
	}
	return best
}

func (r *Route) headers(req *Request) bool {
	for i := range r.match.Headers {
		h := &r.match.Headers[i]
		if got, ok := req.header(h.Name); !ok || got != h.Exact {
			return false
		}
	}
	return true
}

func (q *Request) header(name string) (string, bool) {
	if name == ":method" {
		return q.Method, true
	}
	if q.Header == nil {
		return "", false
	}
	return q.Header.Get(name)
}

// Explain is Match one route after the other, with the reason for each that did not match. It
// allocates and is for decisions that somebody reads.
func (t *Table) Explain(req Request) (match *Route, skipped []Skipped) {
	for _, r := range t.routes {
		why := r.why(&req)
		if why == "" {
			return r, skipped
		}
		skipped = append(skipped, Skipped{Route: r, Why: why})
	}
	return nil, skipped
}

// why says which condition fails; empty when all hold.
func (r *Route) why(req *Request) string {
	p, want := req.Path, prefixOf(r.match)
	switch r.match.Kind {
	case resource.Exact:
		if p != r.match.Path {
			return fmt.Sprintf("path %q is not %q", p, r.match.Path)
		}
	case resource.PathSeparatedPrefix:
		if rest, ok := strings.CutPrefix(p, want); !ok || rest != "" && rest[0] != '/' {
			return fmt.Sprintf("path %q is neither %q nor under it", p, want)
		}
	case resource.Regex:
		if !r.regex.MatchString(p) {
			return fmt.Sprintf("path %q does not match %q", p, r.match.Path)
		}
	default:
		if !strings.HasPrefix(p, want) {
			return fmt.Sprintf("path %q does not start with %q", p, r.match.Path)
		}
	}
	for _, h := range r.match.Headers {
		got, ok := req.header(h.Name)
		switch {
		case got == h.Exact && ok:
		case secret[h.Name]:
			return fmt.Sprintf("header %s is absent or has another value", h.Name)
		case !ok:
			return fmt.Sprintf("header %s is absent, want %q", h.Name, h.Exact)
		default:
			return fmt.Sprintf("%s is %q, want %q", h.Name, got, h.Exact)
		}
	}
	return ""
}

// secret are headers whose values prove who somebody is: a Decision and a dump are printed and logged.
var secret = map[string]bool{
	"authorization": true, "proxy-authorization": true, "cookie": true, "x-api-key": true, "x-auth-token": true,
	"x-csrf-token": true, "x-amz-security-token": true, "x-goog-iap-jwt-assertion": true,
}

// node is one node of the tree of prefixes: the places of the routes whose prefix ends here, and
// the ways on, by their first byte.
type node struct {
	edge     string // the bytes from the parent to here; empty at the root only
	any      places // prefix
	segments places // path_separated_prefix
	labels   string // the first byte of each child's edge, in the order of children
	children []*node
}

// child is the child that rest leads to, with what of rest is beyond it; nil when none.
func (n *node) child(rest string) (*node, string) {
	if rest == "" {
		return nil, ""
	}
	i := strings.IndexByte(n.labels, rest[0])
	if i < 0 {
		return nil, ""
	}
	c := n.children[i]
	if len(rest) < len(c.edge) || rest[:len(c.edge)] != c.edge {
		return nil, ""
	}
	return c, rest[len(c.edge):]
}

// insert gives the node for prefix, which it makes if need be.
func (n *node) insert(prefix string) *node {
	for prefix != "" {
		i := strings.IndexByte(n.labels, prefix[0])
		if i < 0 {
			c := &node{edge: prefix}
			n.labels += prefix[:1]
			n.children = append(n.children, c)
			n, prefix = c, ""
			continue
		}
		c := n.children[i]
		common := 0
		for common < len(prefix) && common < len(c.edge) && prefix[common] == c.edge[common] {
			common++
		}
		if common < len(c.edge) { // split the edge
			mid := &node{edge: c.edge[:common], labels: c.edge[common : common+1], children: []*node{c}}
			c.edge = c.edge[common:]
			n.children[i] = mid
			c = mid
		}
		n, prefix = c, prefix[common:]
	}
	return n
}
