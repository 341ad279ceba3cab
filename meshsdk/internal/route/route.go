// Package route chooses the route of a call: the virtual host of a name, and in it the first route
// whose conditions all hold.
//
// apply builds a Table from a route configuration, call matches with it. It maps values to values:
// no clock, no network, no random source (a split over clusters is drawn by call). A Table is
// immutable; matching takes no lock and allocates nothing.
package route

import (
	"regexp"
	"strings"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/retry"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// Request is what of a call is matched.
type Request struct {
	// Method is the HTTP method; POST for gRPC. The header name ":method" matches it.
	Method string
	// Path is the canonical path without query, exactly as it is forwarded. See Canonical.
	Path string
	// Header may be nil: no headers.
	Header Headers
}

// Headers are the headers of a call as they are forwarded. Names are asked for in lower case;
// values of a repeated header come joined with ",". For gRPC, Get hides names that end in "-bin"
// and those that the library itself sets, but gives "content-type" as "application/grpc"
// (gRFC A28).
type Headers interface {
	Get(name string) (value string, ok bool)
}

// Route is one route of a table.
type Route struct {
	// Name is the metric label: Object/Rule, else the name in the route configuration, else its
	// place as "route-2".
	Name string
	// Object, Rule and Source say where it was written; empty for a foreign control plane.
	Object, Rule, Source string
	// Invalid is not empty when calls that match must fail: see resource.Route.Invalid.
	Invalid string
	// Clusters is the split, Total the sum of its weights; zero when no call can be sent anywhere.
	Clusters []Weighted
	Total    uint64
	// Timeout bounds the whole call, Idle a call on which nothing moves; zero means none.
	Timeout, Idle time.Duration
	// Retry is nil for none.
	Retry *retry.Policy

	match resource.Match
	regex *regexp.Regexp // of match.Path, whole path; nil for other kinds
}

// Weighted is one arm of a split.
type Weighted struct {
	Cluster string
	Weight  uint32
}

// Cluster gives the cluster of an arm drawn with rnd, a uniform 64-bit value; empty when the
// weights sum to zero.
func (r *Route) Cluster(rnd uint64) string {
	if r.Total == 0 {
		return ""
	}
	if len(r.Clusters) == 1 {
		return r.Clusters[0].Cluster
	}
	// Envoy, WeightedCluster: "The router selects an upstream cluster based on the weights."
	at := rnd % r.Total
	for _, c := range r.Clusters {
		if at < uint64(c.Weight) {
			return c.Cluster
		}
		at -= uint64(c.Weight)
	}
	return ""
}

// Label says the conditions of the route, for texts.
func (r *Route) Label() string {
	var b strings.Builder
	switch m := r.match; m.Kind {
	case resource.Exact:
		b.WriteString("path = " + m.Path)
	case resource.PathSeparatedPrefix:
		b.WriteString("path under " + m.Path)
	case resource.Regex:
		b.WriteString("path matches " + m.Path)
	default:
		b.WriteString("path starts with " + m.Path)
	}
	for _, h := range r.match.Headers {
		want := h.Exact
		if secret[h.Name] {
			want = "(not shown)"
		}
		b.WriteString(", " + h.Name + " = " + want)
	}
	return b.String()
}

// Skipped is a route that was tried before the one that matched, and why it did not.
type Skipped struct {
	Route *Route
	Why   string
}
