package xdsgen

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// routeConfiguration makes the routes of a port for a kind of client.
func routeConfiguration(k Kind, name string, routes []ir.Route) (*routev3.RouteConfiguration, error) {
	vh := &routev3.VirtualHost{Name: name, Domains: []string{"*"}}
	for i := range routes {
		r, err := route(k, &routes[i])
		if err != nil {
			return nil, fmt.Errorf("virtual host %q: route %d (%s, rule %s): %w", name, i, routes[i].Object, routes[i].Rule, err)
		}
		if r != nil {
			vh.Routes = append(vh.Routes, r)
		}
	}
	return &routev3.RouteConfiguration{Name: name, VirtualHosts: []*routev3.VirtualHost{vh}}, nil
}

// route makes one route, or nil when no call of that kind of client can match it.
func route(k Kind, r *ir.Route) (*routev3.Route, error) {
	match, never := routeMatch(k, &r.Match)
	if never {
		return nil, nil
	}
	action := &routev3.RouteAction{
		// Always set. RouteAction.timeout: "If not specified, the default is 15s".
		Timeout:     durationpb.New(r.Timeout),
		RetryPolicy: retryPolicy(k, r),
	}
	if err := splitBackends(r.Backends, action); err != nil {
		return nil, err
	}
	switch k {
	case SDK:
		// Always set. RouteAction.idle_timeout: "If not specified, there is no per-route idle
		// timeout", and the connection manager's default of 5 m holds.
		action.IdleTimeout = durationpb.New(r.Idle)
	case GRPC:
		// gRFC A31: gRPC takes the bound of a call from max_stream_duration, not from timeout.
		if r.Timeout > 0 {
			action.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{
				MaxStreamDuration: durationpb.New(r.Timeout),
			}
		}
	}
	return &routev3.Route{
		Name:     r.Object + "/" + r.Rule,
		Match:    match,
		Action:   &routev3.Route_Route{Route: action},
		Metadata: origin(r),
	}, nil
}

// origin says where a route came from.
func origin(r *ir.Route) *corev3.Metadata {
	m := map[string]string{"object": r.Object, "rule": r.Rule}
	if r.Source.File != "" {
		m["source"] = r.Source.File + ":" + strconv.Itoa(r.Source.Line)
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{extensionKey: stringStruct(m)}}
}

// routeMatch translates a match. never is true when no call of that kind of client matches it.
func routeMatch(k Kind, m *ir.Match) (_ *routev3.RouteMatch, never bool) {
	out := &routev3.RouteMatch{}
	switch m.PathKind {
	case ir.PathAny:
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/"}
	case ir.PathExact:
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.Path}
	case ir.PathPrefix:
		setPathPrefix(k, m.Path, out)
	case ir.PathSuffix:
		// "/SERVICE/METHOD": any one segment, then the method. Regular expressions match whole
		// paths (RouteMatch.safe_regex: "the entire path (without the query string) must match").
		out.PathSpecifier = safeRegex("/[^/]+/" + regexp.QuoteMeta(lastSegment(m.Path)))
	}
	if m.Method != "" {
		switch {
		case k == SDK:
			out.Headers = append(out.Headers, exactHeader(":method", m.Method))
		case m.Method != "POST":
			// gRPC over HTTP/2: "Request-Headers → Call-Definition: Method → ':method POST'". The
			// client matches no pseudo header, and needs none for POST.
			return nil, true
		}
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, exactHeader(h.Name, h.Value))
	}
	return out, false
}

// setPathPrefix matches whole segments. gRPC clients know no path_separated_prefix and reject the
// resource for it.
func setPathPrefix(k Kind, path string, out *routev3.RouteMatch) {
	switch {
	case k == SDK:
		out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: path}
	case strings.Count(path, "/") == 1:
		// "/SERVICE": a gRPC path always has a method behind it, so that this prefix is the same.
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: path + "/"}
	default:
		out.PathSpecifier = safeRegex(regexp.QuoteMeta(path) + "(/.*)?")
	}
}

func lastSegment(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

func safeRegex(re string) *routev3.RouteMatch_SafeRegex {
	return &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: re}}
}

func exactHeader(name, value string) *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{
		Name: name,
		HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &matcherv3.StringMatcher{
			MatchPattern: &matcherv3.StringMatcher_Exact{Exact: value},
		}},
	}
}

// splitBackends sets the cluster or the split. Backends that are invalid keep their weight, so
// that the others keep their share. A split without weight is illegal (WeightedCluster: "The sum of
// all weights must be greater than 0", and gRPC rejects the resource), and of the two ways to fail
// such calls an empty cluster is the one that both kinds of client know: direct_response is no
// action of gRFC A28, and a client's text could not say why.
func splitBackends(backends []ir.Backend, action *routev3.RouteAction) error {
	var total uint64
	var arms []*routev3.WeightedCluster_ClusterWeight
	for i := range backends {
		total += uint64(backends[i].Weight)
		arms = append(arms, &routev3.WeightedCluster_ClusterWeight{
			Name: backends[i].Cluster, Weight: wrapperspb.UInt32(backends[i].Weight),
		})
	}
	switch {
	case total == 0:
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: NoBackendCluster}
	case total > math.MaxUint32:
		return fmt.Errorf("total weight %d: want at most %d", total, uint32(math.MaxUint32))
	case len(arms) == 1:
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: arms[0].Name}
	default:
		action.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{
			WeightedClusters: &routev3.WeightedCluster{Clusters: arms},
		}
	}
	return nil
}

// retriedByGRPC are the conditions of gRFC A44: "gRPC will support only the following values".
var retriedByGRPC = map[ir.RetryOn]bool{
	ir.OnCancelled: true, ir.OnDeadlineExceeded: true, ir.OnInternal: true,
	ir.OnResourceExhausted: true, ir.OnUnavailable: true,
}

// retryPolicy is nil when nothing is retried and no attempt is bounded.
func retryPolicy(k Kind, r *ir.Route) *routev3.RetryPolicy {
	if k == GRPC {
		return grpcRetryPolicy(r.Retry)
	}
	out := &routev3.RetryPolicy{NumRetries: wrapperspb.UInt32(0)}
	if r.PerTry > 0 {
		out.PerTryTimeout = durationpb.New(r.PerTry)
	}
	if r.Retry == nil {
		if r.PerTry == 0 {
			return nil
		}
		return out
	}
	words := make([]string, 0, len(r.Retry.On)+1)
	for _, on := range r.Retry.On {
		words = append(words, string(on))
	}
	if len(r.Retry.Codes) > 0 {
		words = append(words, "retriable-status-codes")
		out.RetriableStatusCodes = r.Retry.Codes
	}
	out.RetryOn = strings.Join(words, ",")
	out.NumRetries = wrapperspb.UInt32(r.Retry.Attempts)
	out.RetryBackOff = backOff(r.Retry)
	return out
}

// grpcRetryPolicy holds what a stock client does. It is nil for none: gRFC A44 has the resource
// rejected for num_retries below 1.
func grpcRetryPolicy(r *ir.Retry) *routev3.RetryPolicy {
	if r == nil || r.Attempts == 0 {
		return nil
	}
	var words []string
	for _, on := range r.On {
		if retriedByGRPC[on] {
			words = append(words, string(on))
		}
	}
	if len(words) == 0 {
		return nil
	}
	return &routev3.RetryPolicy{
		RetryOn:      strings.Join(words, ","),
		NumRetries:   wrapperspb.UInt32(r.Attempts),
		RetryBackOff: backOff(r),
	}
}

func backOff(r *ir.Retry) *routev3.RetryPolicy_RetryBackOff {
	if r.Base <= 0 {
		return nil
	}
	// RetryBackOff.max_interval: "must be greater than or equal to the base_interval".
	out := &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(r.Base)}
	if r.Max > 0 {
		out.MaxInterval = durationpb.New(max(r.Max, r.Base, time.Millisecond))
	}
	return out
}
