package resource

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// Defaults of the routes' fields, by Envoy's documentation of them.
const (
	defaultTimeout  = 15 * time.Second      // RouteAction.timeout
	defaultAttempts = 1                     // RetryPolicy.num_retries
	defaultBase     = 25 * time.Millisecond // RetryPolicy.retry_back_off
	defaultMaxTimes = 10                    // RetryBackOff.max_interval: "The default is 10 times the base_interval"
)

// RetryWords are the words of retry_on that this client honours; others are listed in NotHonoured.
var RetryWords = []string{
	"connect-failure", "refused-stream", "reset", "5xx", "gateway-error", "retriable-status-codes",
	"cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable",
}

func (d *decoder) routeConfiguration(m *xdspb.RouteConfiguration, at *path) (*RouteConfiguration, error) {
	d.loose(m, at)
	rc := &RouteConfiguration{Name: m.GetName()}
	for i, vh := range m.GetVirtualHosts() {
		at := at.item("virtual_hosts", i)
		d.loose(vh, at)
		if len(vh.GetDomains()) == 0 {
			return nil, fmt.Errorf("virtual host %q: no domains: want at least one", vh.GetName())
		}
		v := VirtualHost{Name: vh.GetName(), Domains: slices.Clone(vh.GetDomains())}
		for j, r := range vh.GetRoutes() {
			route, err := d.route(r, at.item("routes", j))
			if err != nil {
				return nil, fmt.Errorf("virtual host %q: route %d: %w", vh.GetName(), j, err)
			}
			v.Routes = append(v.Routes, *route)
		}
		rc.VirtualHosts = append(rc.VirtualHosts, v)
	}
	return rc, nil
}

// route decodes one route. What makes it unsafe to take, but not the others, becomes Invalid.
func (d *decoder) route(m *xdspb.Route, at *path) (*Route, error) {
	d.loose(m, at)
	r := &Route{Name: m.GetName()}
	var faults []error
	if m.GetMatch() == nil {
		return nil, errors.New("match is not set: want a path condition")
	}
	faults = append(faults, d.match(m.GetMatch(), at.field("match"), &r.Match))

	switch a := m.GetAction().(type) {
	case *xdspb.Route_Route:
		fault, err := d.action(a.Route, at.field("route"), r)
		if err != nil {
			return nil, err
		}
		faults = append(faults, fault)
	case *xdspb.Route_NonForwardingAction:
		faults = append(faults, d.strict(a.NonForwardingAction, at.field("non_forwarding_action")))
		r.NonForwarding = true
	default:
		faults = append(faults, errors.New("the action is not one this client takes: want route or non_forwarding_action"))
	}

	if err := errors.Join(faults...); err != nil {
		r.Invalid = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	if m.GetMetadata() != nil {
		d.loose(m.GetMetadata(), at.field("metadata"))
	}
	if own := m.GetMetadata().GetFilterMetadata()[metadataKey]; own != nil {
		d.origin(own, at.field("metadata").field(metadataKey), r)
	}
	return r, nil
}

// origin reads where the route was written. The key "invalid" is how a sender says that a route
// must not be taken, and why.
func (d *decoder) origin(s *structpb.Struct, at *path, r *Route) {
	for _, k := range sortedKeys(s.GetFields()) {
		v, ok := s.GetFields()[k].GetKind().(*structpb.Value_StringValue)
		switch {
		case ok && k == "object":
			r.Origin.Object = v.StringValue
		case ok && k == "rule":
			r.Origin.Rule = v.StringValue
		case ok && k == "source":
			r.Origin.Source = v.StringValue
		case ok && k == "invalid" && v.StringValue != "":
			r.Invalid = v.StringValue
		default:
			d.ignored(at.field(k))
		}
	}
}

// checkRegex says why a pattern cannot be matched. Go's engine is RE2's and takes linear time; the
// bound on its length is this client's own.
func checkRegex(pattern string) error {
	if pattern == "" || len(pattern) > maxRegex {
		return fmt.Errorf("%d bytes: want 1 to %d", len(pattern), maxRegex)
	}
	_, err := regexp.Compile(pattern)
	return err
}

const maxRegex = 4096

// match fills out with the conditions that are understood and returns why others are not.
func (d *decoder) match(m *xdspb.RouteMatch, at *path, out *Match) error {
	errs := []error{d.strict(m, at)}
	switch p := m.GetPathSpecifier().(type) {
	case *xdspb.RouteMatch_Prefix:
		out.Kind, out.Path = Prefix, p.Prefix
	case *xdspb.RouteMatch_Path:
		out.Kind, out.Path = Exact, p.Path
	case *xdspb.RouteMatch_PathSeparatedPrefix:
		out.Kind, out.Path = PathSeparatedPrefix, p.PathSeparatedPrefix
		// RouteMatch.path_separated_prefix: "Expect the value to not contain ? or # and not to end
		// in /".
		if p.PathSeparatedPrefix == "" || strings.ContainsAny(p.PathSeparatedPrefix, "?#") || strings.HasSuffix(p.PathSeparatedPrefix, "/") {
			errs = append(errs, fmt.Errorf("%s: path_separated_prefix %q: want one without ? and # that does not end in /", at, p.PathSeparatedPrefix))
			out.Kind, out.Path = Prefix, strings.TrimRight(p.PathSeparatedPrefix, "/")
		}
	case *xdspb.RouteMatch_SafeRegex:
		// RouteMatch.safe_regex: "the entire path (without the query string) must match the regex".
		out.Kind, out.Path = Regex, p.SafeRegex.GetRegex()
		if err := checkRegex(out.Path); err != nil || len(unknown(p.SafeRegex.ProtoReflect())) > 0 {
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: safe_regex %q: %w", at, out.Path, err))
			}
			out.Kind, out.Path = Prefix, "" // as far as can be told, the route matches
		}
	default:
		errs = append(errs, fmt.Errorf("%s: the path condition is not one this client knows: want prefix, path, path_separated_prefix or safe_regex", at))
	}
	for i, h := range m.GetHeaders() {
		if len(unknown(h.ProtoReflect())) > 0 || len(unknown(h.GetStringMatch().ProtoReflect())) > 0 {
			continue // strict has said so; left out: as far as can be told, the route matches
		}
		exact, ok := h.GetStringMatch().GetMatchPattern().(*xdspb.StringMatcher_Exact)
		if h.GetName() == "" || !ok {
			errs = append(errs, fmt.Errorf("%s: header %q: want a name and string_match.exact", at.item("headers", i), h.GetName()))
			continue
		}
		out.Headers = append(out.Headers, HeaderMatch{Name: strings.ToLower(h.GetName()), Exact: exact.Exact})
	}
	return errors.Join(errs...)
}

// action fills r from a RouteAction. The fault invalidates the route, the error rejects the
// resource.
func (d *decoder) action(m *xdspb.RouteAction, at *path, r *Route) (fault, err error) {
	var faults []error
	// The retry policy and max_stream_duration are bounds, not choices of where a call goes (gRFC
	// A44: "We ignore all other attributes in Envoy RetryPolicy."). Everything else is strict.
	faults = append(faults, d.unknownIn(m, at)...)
	switch c := m.GetClusterSpecifier().(type) {
	case *xdspb.RouteAction_Cluster:
		if c.Cluster == "" {
			return nil, errors.New("cluster is empty: want a cluster's name")
		}
		r.Clusters = []WeightedCluster{{Name: c.Cluster, Weight: 1}}
	case *xdspb.RouteAction_WeightedClusters:
		faults = append(faults, d.strict(c.WeightedClusters, at.field("weighted_clusters")))
		if r.Clusters, err = split(c.WeightedClusters); err != nil {
			return nil, err
		}
	default:
		faults = append(faults, fmt.Errorf("%s: how the cluster is chosen is not known to this client: want cluster or weighted_clusters", at))
	}

	if r.Timeout, err = d.timeout(m, at); err != nil {
		return nil, err
	}
	if r.IdleTimeout, err = duration("idle_timeout", m.GetIdleTimeout()); err != nil {
		return nil, err
	}
	if rp := m.GetRetryPolicy(); rp != nil {
		if r.Retry, err = d.retry(rp, at.field("retry_policy")); err != nil {
			return nil, fmt.Errorf("retry_policy: %w", err)
		}
	}
	return errors.Join(faults...), nil
}

func (d *decoder) unknownIn(m *xdspb.RouteAction, at *path) []error {
	var errs []error
	for _, num := range unknown(m.ProtoReflect()) {
		at := at.field(fmt.Sprintf("#%d", num))
		d.ignored(at)
		errs = append(errs, fmt.Errorf("field %s of RouteAction is not honoured by this client", at))
	}
	return errs
}

// timeout is the bound of a whole call.
//
// RouteAction.timeout: "If not specified, the default is 15s. [...] A value of 0 will disable the
// route's timeout." gRFC A31: if grpc_timeout_header_max "is present, then [...]
// max_stream_duration is ignored", and either bounds a call. Where a sender sets both kinds, as one
// that speaks to Envoy and gRPC alike does, the shorter holds.
func (d *decoder) timeout(m *xdspb.RouteAction, at *path) (time.Duration, error) {
	timeout, err := duration("timeout", m.GetTimeout())
	if err != nil {
		return 0, err
	}
	msd := m.GetMaxStreamDuration()
	field, bound := "max_stream_duration", msd.GetMaxStreamDuration()
	if msd.GetGrpcTimeoutHeaderMax() != nil {
		field, bound = "grpc_timeout_header_max", msd.GetGrpcTimeoutHeaderMax()
	}
	stream, err := duration(field, bound)
	if err != nil {
		return 0, fmt.Errorf("max_stream_duration: %w", err)
	}
	if msd != nil {
		d.loose(msd, at.field("max_stream_duration"))
	}
	switch {
	case m.GetTimeout() == nil && bound == nil:
		return defaultTimeout, nil
	case m.GetTimeout() == nil:
		return stream, nil
	case timeout == 0 || (stream > 0 && stream < timeout):
		return stream, nil
	}
	return timeout, nil
}

func split(m *xdspb.WeightedCluster) ([]WeightedCluster, error) {
	var out []WeightedCluster
	var total uint64
	for i, c := range m.GetClusters() {
		if c.GetName() == "" {
			return nil, fmt.Errorf("weighted cluster %d: the name is empty", i)
		}
		w := c.GetWeight().GetValue()
		total += uint64(w)
		if w > 0 { // an arm without weight gets no call
			out = append(out, WeightedCluster{Name: c.GetName(), Weight: w})
		}
	}
	// Envoy refuses a split whose weights add up to 0 or to more than 32 bits, and so does gRPC.
	if total == 0 || total > math.MaxUint32 {
		return nil, fmt.Errorf("weighted clusters: total weight %d: want 1 to %d", total, uint32(math.MaxUint32))
	}
	return out, nil
}

func (d *decoder) retry(m *xdspb.RetryPolicy, at *path) (*Retry, error) {
	d.loose(m, at)
	r := &Retry{Attempts: defaultAttempts, Base: defaultBase}
	for word := range strings.SplitSeq(m.GetRetryOn(), ",") {
		word = strings.TrimSpace(word)
		switch {
		case word == "" || slices.Contains(r.On, word):
		case slices.Contains(RetryWords, word):
			r.On = append(r.On, word)
		default:
			d.ignored(at.field("retry_on").field(word))
		}
	}
	if n := m.GetNumRetries(); n != nil {
		// 0 is legal in Envoy and means none, with a per_try_timeout that still holds. gRFC A44 says
		// "must not be less than 1"; to reject all routes for a policy that asks for less helps nobody.
		r.Attempts = n.GetValue()
	}
	var err error
	if r.PerTry, err = duration("per_try_timeout", m.GetPerTryTimeout()); err != nil {
		return nil, err
	}
	if b := m.GetRetryBackOff(); b != nil {
		d.loose(b, at.field("retry_back_off"))
		if r.Base, err = duration("retry_back_off.base_interval", b.GetBaseInterval()); err != nil {
			return nil, err
		}
		// RetryBackOff.base_interval: "This parameter is required and must be greater than zero."
		if r.Base == 0 {
			return nil, errors.New("retry_back_off.base_interval is not set or 0s: want more")
		}
		if r.Max, err = duration("retry_back_off.max_interval", b.GetMaxInterval()); err != nil {
			return nil, err
		}
		// RetryBackOff.max_interval: "must be greater than or equal to the base_interval if set".
		if b.GetMaxInterval() != nil && r.Max < r.Base {
			return nil, fmt.Errorf("retry_back_off.max_interval %v: want at least base_interval %v", r.Max, r.Base)
		}
	}
	// gRFC A44: "Values of base_interval or max_interval less than 1ms will be treated as 1ms."
	r.Base = max(r.Base, time.Millisecond)
	if r.Max > 0 {
		r.Max = max(r.Max, time.Millisecond)
	} else {
		if r.Base > math.MaxInt64/(2*defaultMaxTimes) {
			return nil, fmt.Errorf("retry_back_off.base_interval %v: too long", r.Base)
		}
		r.Max = defaultMaxTimes * r.Base
	}
	if slices.Contains(r.On, "retriable-status-codes") {
		r.Codes = nonEmpty(m.GetRetriableStatusCodes())
	} else if len(m.GetRetriableStatusCodes()) > 0 {
		// Envoy reads the codes only when retry_on says retriable-status-codes.
		d.ignored(at.field("retriable_status_codes"))
	}
	// gRFC A44: with no condition that is known "gRPC xDS client will not include a retry policy".
	if len(r.On) == 0 && r.PerTry == 0 {
		return nil, nil
	}
	return r, nil
}
