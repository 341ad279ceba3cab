package resource_test

import (
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

func decode[T any](t *testing.T, m proto.Message) (*T, resource.Decoded) {
	t.Helper()
	d, err := resource.Decode(typeOf(m), marshal(t, m))
	if err != nil {
		t.Fatal(err)
	}
	return d.Value.(*T), d
}

func TestEveryFieldReachesItsValue(t *testing.T) {
	all := full()
	ms := time.Millisecond
	route := resource.Route{
		Name:  "split",
		Match: resource.Match{Kind: resource.Prefix, Path: "/a", Headers: []resource.HeaderMatch{{Name: "x-env", Exact: "dev"}}},
		// An arm without weight gets no call.
		Clusters: []resource.WeightedCluster{{Name: "c|v1", Weight: 90}, {Name: "c|v2", Weight: 10}},
		Timeout:  2000 * ms, IdleTimeout: 300 * time.Second,
		Retry: &resource.Retry{On: []string{"unavailable", "connect-failure", "retriable-status-codes"}, Codes: []uint32{503},
			Attempts: 2, PerTry: 1000 * ms, Base: 1000 * ms, Max: 2000 * ms},
		Origin: resource.Origin{Object: "HTTPRoute/default/r", Rule: "0.0", Source: "mesh.yaml:3"},
	}
	own := resource.Route{Match: resource.Match{Kind: resource.Exact, Path: "/b"}, NonForwarding: true}
	rc := func(name string) *resource.RouteConfiguration {
		return &resource.RouteConfiguration{Name: name, VirtualHosts: []resource.VirtualHost{{Name: "v", Domains: []string{"*"}, Routes: []resource.Route{route, own}}}}
	}
	for name, want := range map[string]any{
		"api listener": &resource.Listener{Name: "orders", API: &resource.HTTP{RouteName: "orders", MaxStreamDuration: 9000 * ms}},
		"server listener": &resource.Listener{Name: "inlay/inbound/default/orders/8080", Chains: []resource.Chain{{
			TransportProtocol: "tls", TLS: &resource.ServerTLS{RequireClientCertificate: true}, HTTP: &resource.HTTP{Inline: rc("")}}}},
		"routes": rc("orders"),
		"regex": &resource.RouteConfiguration{Name: "regex", VirtualHosts: []resource.VirtualHost{{Name: "v", Domains: []string{"*"}, Routes: []resource.Route{{
			Match: resource.Match{Kind: resource.Regex, Path: "/[^/]+/Charge"}, NonForwarding: true}}}}},
		"cluster": &resource.Cluster{Name: "c", EndpointsName: "c-eds", LB: resource.LeastRequest, ConnectTimeout: 5 * time.Second, MaxRequests: 7,
			RetryBudgetPercent: 25, RetryMinPerSecond: 3, HTTP2: true, SPIFFEID: "spiffe://t/ns/default/svc/orders",
			Transports: []resource.TransportMatch{{Name: "plain", Labels: map[string]string{"tls": "none"}}},
			TLS:        &resource.ClientTLS{Peers: []string{"spiffe://t/ns/default/svc/orders"}}},
		"http1 cluster": &resource.Cluster{Name: "h1", EndpointsName: "h1", ConnectTimeout: 5 * time.Second, MaxRequests: 1024, RetryMinPerSecond: 3},
		"endpoints": &resource.Endpoints{Cluster: "c", Localities: []resource.Locality{{Region: "r", Zone: "a", Weight: 2, Endpoints: []resource.Endpoint{{
			Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("[::1]:80")}, Hostname: "h", Weight: 4,
			Health: resource.Healthy, InstanceID: "i-1", Labels: map[string]string{"version": "v1"}, TransportMatch: map[string]string{"tls": "mesh"}}}}}},
	} {
		d, err := resource.Decode(typeOf(all[name]), marshal(t, all[name]))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !reflect.DeepEqual(d.Value, want) {
			t.Errorf("%s:\n got %+v\nwant %+v", name, d.Value, want)
		}
		if len(d.NotHonoured) > 0 {
			t.Errorf("%s: not honoured %q, want nothing", name, d.NotHonoured)
		}
	}
}

func TestRejectedResources(t *testing.T) {
	listener := func(edit func(*xdspb.HttpConnectionManager)) proto.Message {
		m := &xdspb.HttpConnectionManager{RouteSpecifier: &xdspb.HttpConnectionManager_Rds{Rds: &xdspb.Rds{RouteConfigName: "r", ConfigSource: adsSource()}},
			HttpFilters: []*xdspb.HttpFilter{{Name: "router", ConfigType: &xdspb.HttpFilter_TypedConfig{TypedConfig: pack(routerType, &xdspb.Router{})}}}}
		edit(m)
		return &xdspb.Listener{Name: "l", ApiListener: &xdspb.ApiListener{ApiListener: pack(hcmType, m)}}
	}
	server := func(chains ...*xdspb.FilterChain) proto.Message {
		return &xdspb.Listener{Name: "l", FilterChains: chains}
	}
	chain := func(transport string, ts *xdspb.TransportSocket) *xdspb.FilterChain {
		return &xdspb.FilterChain{FilterChainMatch: &xdspb.FilterChainMatch{TransportProtocol: transport}, TransportSocket: ts,
			Filters: []*xdspb.Filter{{Name: "http", ConfigType: &xdspb.Filter_TypedConfig{TypedConfig: hcm(&xdspb.HttpConnectionManager{
				RouteSpecifier: &xdspb.HttpConnectionManager_RouteConfig{RouteConfig: &xdspb.RouteConfiguration{}}})}}}}
	}
	route := func(edit func(*xdspb.Route)) proto.Message {
		r := &xdspb.Route{Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}}, Action: &xdspb.Route_Route{Route: &xdspb.RouteAction{
			ClusterSpecifier: &xdspb.RouteAction_Cluster{Cluster: "c"}}}}
		edit(r)
		return &xdspb.RouteConfiguration{Name: "r", VirtualHosts: []*xdspb.VirtualHost{{Domains: []string{"*"}, Routes: []*xdspb.Route{r}}}}
	}
	cluster := func(edit func(*xdspb.Cluster)) proto.Message {
		c := full()["http1 cluster"].(*xdspb.Cluster)
		edit(c)
		return c
	}
	endpoints := func(edit func(*xdspb.LocalityLbEndpoints), more ...*xdspb.LocalityLbEndpoints) proto.Message {
		m := full()["endpoints"].(*xdspb.ClusterLoadAssignment)
		edit(m.Endpoints[0])
		m.Endpoints = append(m.Endpoints, more...)
		return m
	}
	upstream := func(c *xdspb.CommonTlsContext) *xdspb.TransportSocket {
		return socket(pack(upTLSType, &xdspb.UpstreamTlsContext{CommonTlsContext: c}))
	}
	for name, tc := range map[string]struct {
		m    proto.Message
		want string
	}{
		"no name":              {&xdspb.Cluster{}, "name is empty"},
		"no filters (A39)":     {listener(func(m *xdspb.HttpConnectionManager) { m.HttpFilters = nil }), "http_filters is empty"},
		"unknown filter (A39)": {listener(func(m *xdspb.HttpConnectionManager) { m.HttpFilters[0].ConfigType = nil }), "not supported"},
		"filter after router": {listener(func(m *xdspb.HttpConnectionManager) {
			m.HttpFilters = append(m.HttpFilters, &xdspb.HttpFilter{Name: "b", IsOptional: true})
		}), "after the router"},
		"filter name twice": {listener(func(m *xdspb.HttpConnectionManager) { m.HttpFilters = append(m.HttpFilters, m.HttpFilters[0]) }), "no other filter"},
		"no router": {listener(func(m *xdspb.HttpConnectionManager) {
			m.HttpFilters = []*xdspb.HttpFilter{{Name: "b", IsOptional: true}}
		}), "want the router there"},
		"no routes":          {listener(func(m *xdspb.HttpConnectionManager) { m.RouteSpecifier = nil }), "neither rds nor route_config"},
		"rds without name":   {listener(func(m *xdspb.HttpConnectionManager) { m.GetRds().RouteConfigName = "" }), "route_config_name is empty"},
		"rds from elsewhere": {listener(func(m *xdspb.HttpConnectionManager) { m.GetRds().ConfigSource = nil }), "want ads or self"},
		"xff hops (A41)": {listener(func(m *xdspb.HttpConnectionManager) {
			m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 19, protowire.VarintType), 1))
		}), "field #19"},
		"listener of neither kind":   {&xdspb.Listener{Name: "l"}, "neither api_listener nor a filter chain"},
		"unknown transport protocol": {server(chain("quic", nil)), `"quic"`},
		"two equal chains (A36)":     {server(chain("tls", nil), chain("tls", nil)), "same match"},
		"no network filter":          {server(&xdspb.FilterChain{}), "0 network filters"},
		"server TLS without certificate (A29)": {server(chain("tls", socket(pack(downTLSType, &xdspb.DownstreamTlsContext{})))),
			"tls_certificate_provider_instance"},
		"client certificate without CA (A29)": {server(chain("tls", socket(pack(downTLSType, &xdspb.DownstreamTlsContext{RequireClientCertificate: wrapperspb.Bool(true),
			CommonTlsContext: &xdspb.CommonTlsContext{TlsCertificateProviderInstance: &xdspb.CertificateProviderPluginInstance{}}})))), "nothing would check"},
		"no match":              {route(func(r *xdspb.Route) { r.Match = nil }), "match is not set"},
		"no domains":            {&xdspb.RouteConfiguration{Name: "r", VirtualHosts: []*xdspb.VirtualHost{{}}}, "no domains"},
		"negative timeout":      {route(func(r *xdspb.Route) { r.GetRoute().Timeout = seconds(-1) }), "negative"},
		"timeout out of range":  {route(func(r *xdspb.Route) { r.GetRoute().IdleTimeout = seconds(math.MaxInt64) }), "idle_timeout"},
		"timeout of 1000 years": {route(func(r *xdspb.Route) { r.GetRoute().IdleTimeout = seconds(1000 * 365 * 86400) }), "too long"},
		"total weight 0 (A28)":  {route(func(r *xdspb.Route) { r.GetRoute().ClusterSpecifier = &xdspb.RouteAction_WeightedClusters{} }), "total weight 0"},
		"back-off max under min": {route(func(r *xdspb.Route) {
			r.GetRoute().RetryPolicy = &xdspb.RetryPolicy{RetryBackOff: &xdspb.RetryBackOff{BaseInterval: seconds(2), MaxInterval: seconds(1)}}
		}), "at least base_interval"},
		"total weight overflows": {route(func(r *xdspb.Route) {
			r.GetRoute().ClusterSpecifier = &xdspb.RouteAction_WeightedClusters{WeightedClusters: &xdspb.WeightedCluster{Clusters: []*xdspb.ClusterWeight{
				{Name: "a", Weight: wrapperspb.UInt32(math.MaxUint32)}, {Name: "b", Weight: wrapperspb.UInt32(1)}}}}
		}), "total weight 4294967296"},
		"cluster of DNS": {cluster(func(c *xdspb.Cluster) {
			c.ClusterDiscoveryType = &xdspb.Cluster_Type{Type: xdspb.DiscoveryType_DISCOVERY_TYPE_STRICT_DNS}
		}), "want EDS"},
		"cluster without source": {cluster(func(c *xdspb.Cluster) { c.EdsClusterConfig = nil }), "eds_cluster_config"},
		"policy not known":       {cluster(func(c *xdspb.Cluster) { c.LbPolicy = xdspb.LbPolicy_LB_POLICY_MAGLEV }), "lb_policy"},
		"budget over 100": {cluster(func(c *xdspb.Cluster) {
			c.CircuitBreakers = &xdspb.CircuitBreakers{Thresholds: []*xdspb.Thresholds{{RetryBudget: &xdspb.RetryBudget{BudgetPercent: &xdspb.Percent{Value: math.NaN()}}}}}
		}), "budget_percent"},
		"TLS for any peer":         {cluster(func(c *xdspb.Cluster) { c.TransportSocket = upstream(commonTLS()) }), "every certificate of the bundle"},
		"TLS for an empty name":    {cluster(func(c *xdspb.Cluster) { c.TransportSocket = upstream(commonTLS("")) }), "exact with a SPIFFE ID"},
		"TLS without verification": {cluster(func(c *xdspb.Cluster) { c.TransportSocket = upstream(&xdspb.CommonTlsContext{}) }), "how the peer is verified"},
		"transport not known":      {cluster(func(c *xdspb.Cluster) { c.TransportSocket = socket(&anypb.Any{TypeUrl: "x"}) }), `type "x"`},
		"match on a number": {cluster(func(c *xdspb.Cluster) {
			c.TransportSocketMatches = []*xdspb.TransportSocketMatch{{Name: "m", TransportSocket: socket(&anypb.Any{TypeUrl: rawType}),
				Match: &structpb.Struct{Fields: map[string]*structpb.Value{"a": structpb.NewNumberValue(1)}}}}
		}), "want a string value"},
		"priority gap (A27)":   {endpoints(func(l *xdspb.LocalityLbEndpoints) { l.Priority = 1 }), "no locality of priority 0"},
		"locality twice (A27)": {endpoints(func(*xdspb.LocalityLbEndpoints) {}, &xdspb.LocalityLbEndpoints{Locality: &xdspb.Locality{Region: "r", Zone: "a"}, LoadBalancingWeight: wrapperspb.UInt32(1)}), "stands twice"},
		"address twice (A27)": {endpoints(func(l *xdspb.LocalityLbEndpoints) {
			l.LbEndpoints[0].GetEndpoint().AdditionalAddresses[0].Address = address("10.0.0.1", 80)
		}), "10.0.0.1:80 stands twice"},
		"locality weights too big": {endpoints(func(*xdspb.LocalityLbEndpoints) {}, &xdspb.LocalityLbEndpoints{LoadBalancingWeight: wrapperspb.UInt32(math.MaxUint32)}), "total weight"},
		"host name as address":     {endpoints(func(l *xdspb.LocalityLbEndpoints) { l.LbEndpoints[0].GetEndpoint().Address = address("orders", 1) }), "want an IP address"},
		"port too big":             {endpoints(func(l *xdspb.LocalityLbEndpoints) { l.LbEndpoints[0].GetEndpoint().Address = address("1.2.3.4", 65536) }), "port 65536"},
		"no address":               {endpoints(func(l *xdspb.LocalityLbEndpoints) { l.LbEndpoints[0].HostIdentifier = nil }), "want endpoint"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := resource.Decode(typeOf(tc.m), marshal(t, tc.m))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %+v, %v; want an error with %q", d.Value, err, tc.want)
			}
		})
	}
	if _, err := resource.Decode("type.googleapis.com/other", nil); err == nil || !strings.Contains(err.Error(), resource.RouteType) {
		t.Errorf("unknown type: got %v; want an error that names the accepted types", err)
	}
	if _, err := resource.Decode(resource.RouteType, []byte{0xff}); err == nil {
		t.Error("bytes that are no protobuf were accepted")
	}
}

func TestRouteTimeouts(t *testing.T) {
	for name, tc := range map[string]struct {
		action *xdspb.RouteAction
		want   time.Duration
	}{
		`"If not specified, the default is 15s"`:     {&xdspb.RouteAction{}, 15 * time.Second},
		"0 means none":                               {&xdspb.RouteAction{Timeout: seconds(0)}, 0},
		"max_stream_duration alone (A31)":            {&xdspb.RouteAction{MaxStreamDuration: &xdspb.MaxStreamDuration{MaxStreamDuration: seconds(4)}}, 4 * time.Second},
		"grpc_timeout_header_max is preferred (A31)": {&xdspb.RouteAction{MaxStreamDuration: &xdspb.MaxStreamDuration{MaxStreamDuration: seconds(4), GrpcTimeoutHeaderMax: seconds(3)}}, 3 * time.Second},
		"the shorter of both":                        {&xdspb.RouteAction{Timeout: seconds(2), MaxStreamDuration: &xdspb.MaxStreamDuration{MaxStreamDuration: seconds(4)}}, 2 * time.Second},
		"one of both is none":                        {&xdspb.RouteAction{Timeout: seconds(0), MaxStreamDuration: &xdspb.MaxStreamDuration{MaxStreamDuration: seconds(4)}}, 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			tc.action.ClusterSpecifier = &xdspb.RouteAction_Cluster{Cluster: "c"}
			rc, _ := decode[resource.RouteConfiguration](t, oneRoute(&xdspb.Route{Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}}, Action: &xdspb.Route_Route{Route: tc.action}}))
			if got := rc.VirtualHosts[0].Routes[0].Timeout; got != tc.want {
				t.Errorf("timeout %v, want %v", got, tc.want)
			}
		})
	}
}

func oneRoute(r *xdspb.Route) *xdspb.RouteConfiguration {
	return &xdspb.RouteConfiguration{Name: "r", VirtualHosts: []*xdspb.VirtualHost{{Domains: []string{"*"}, Routes: []*xdspb.Route{r}}}}
}

func TestInvalidRouteStaysBroadAndDoesNotRejectOthers(t *testing.T) {
	action := &xdspb.Route_Route{Route: &xdspb.RouteAction{ClusterSpecifier: &xdspb.RouteAction_Cluster{Cluster: "c"}}}
	for name, r := range map[string]*xdspb.Route{
		"path by regex":       {Match: &xdspb.RouteMatch{}, Action: action},
		"redirect":            {Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}}},
		"cluster by header":   {Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}}, Action: &xdspb.Route_Route{Route: &xdspb.RouteAction{}}},
		"header presence":     {Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}, Headers: []*xdspb.HeaderMatcher{{Name: "h"}}}, Action: action},
		"header without name": {Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}, Headers: []*xdspb.HeaderMatcher{{HeaderMatchSpecifier: &xdspb.HeaderMatcher_StringMatch{StringMatch: exact("x")}}}}, Action: action},
		"prefix with slash":   {Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: "/"}}, Action: action},
	} {
		t.Run(name, func(t *testing.T) {
			m := oneRoute(r)
			m.VirtualHosts[0].Routes = append(m.VirtualHosts[0].Routes, &xdspb.Route{Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Path{Path: "/ok"}}, Action: action})
			rc, _ := decode[resource.RouteConfiguration](t, m)
			got := rc.VirtualHosts[0].Routes
			if got[0].Invalid == "" || got[0].Match.Kind != resource.Prefix || got[0].Match.Path != "" || len(got[0].Match.Headers) != 0 {
				t.Errorf("route %+v: want invalid, and a match of all that it may mean", got[0])
			}
			if got[1].Invalid != "" {
				t.Errorf("the good route is invalid: %s", got[1].Invalid)
			}
		})
	}
}

func TestLenience(t *testing.T) {
	t.Run("optional unknown filter is skipped and listed", func(t *testing.T) {
		m := &xdspb.HttpConnectionManager{RouteSpecifier: &xdspb.HttpConnectionManager_Rds{Rds: &xdspb.Rds{RouteConfigName: "r", ConfigSource: adsSource()}}}
		hcm(m)
		m.HttpFilters = slices.Insert(m.HttpFilters, 0, &xdspb.HttpFilter{Name: "x", IsOptional: true})
		l, d := decode[resource.Listener](t, &xdspb.Listener{Name: "l", ApiListener: &xdspb.ApiListener{ApiListener: pack(hcmType, m)}})
		if l.API.RouteName != "r" || !slices.Equal(d.NotHonoured, []string{"api_listener.api_listener.http_filters[0]"}) {
			t.Errorf("got %+v, %q", l.API, d.NotHonoured)
		}
	})
	t.Run("words of retry_on that are not supported are listed", func(t *testing.T) {
		rc, d := decode[resource.RouteConfiguration](t, oneRoute(&xdspb.Route{Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}}, Action: &xdspb.Route_Route{Route: &xdspb.RouteAction{
			ClusterSpecifier: &xdspb.RouteAction_Cluster{Cluster: "c"}, RetryPolicy: &xdspb.RetryPolicy{RetryOn: "retriable-4xx, unavailable"}}}}))
		want := &resource.Retry{On: []string{"unavailable"}, Attempts: 1, Base: 25 * time.Millisecond, Max: 250 * time.Millisecond}
		if got := rc.VirtualHosts[0].Routes[0].Retry; !reflect.DeepEqual(got, want) {
			t.Errorf("retry %+v, want %+v", got, want)
		}
		if !slices.Equal(d.NotHonoured, []string{"virtual_hosts[0].routes[0].route.retry_policy.retry_on.retriable-4xx"}) {
			t.Errorf("not honoured %q", d.NotHonoured)
		}
	})
	t.Run("the match of the default filter chain is ignored", func(t *testing.T) {
		m := full()["server listener"].(*xdspb.Listener)
		m.DefaultFilterChain = proto.Clone(m.FilterChains[0]).(*xdspb.FilterChain)
		m.DefaultFilterChain.FilterChainMatch.TransportProtocol = "quic"
		l, d := decode[resource.Listener](t, m)
		if l.Default == nil || l.Default.TransportProtocol != "" || !slices.Contains(d.NotHonoured, "default_filter_chain.filter_chain_match") {
			t.Errorf("default chain %+v, not honoured %q", l.Default, d.NotHonoured)
		}
	})
	t.Run("a bound on each attempt needs no retries", func(t *testing.T) {
		rc, _ := decode[resource.RouteConfiguration](t, oneRoute(&xdspb.Route{Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{}}, Action: &xdspb.Route_Route{Route: &xdspb.RouteAction{
			ClusterSpecifier: &xdspb.RouteAction_Cluster{Cluster: "c"}, RetryPolicy: &xdspb.RetryPolicy{NumRetries: wrapperspb.UInt32(0), PerTryTimeout: seconds(1)}}}}))
		if got := rc.VirtualHosts[0].Routes[0].Retry; got == nil || got.Attempts != 0 || got.PerTry != time.Second || got.On != nil {
			t.Errorf("retry %+v", got)
		}
	})
	t.Run("localities without weight are dropped (A27)", func(t *testing.T) {
		e, _ := decode[resource.Endpoints](t, &xdspb.ClusterLoadAssignment{ClusterName: "c", Endpoints: []*xdspb.LocalityLbEndpoints{
			{Priority: 5}, {LoadBalancingWeight: wrapperspb.UInt32(1)}}})
		if len(e.Localities) != 1 {
			t.Errorf("localities %+v, want one", e.Localities)
		}
	})
	t.Run("unset weight of an endpoint is 1, unknown health is unhealthy", func(t *testing.T) {
		m := full()["endpoints"].(*xdspb.ClusterLoadAssignment)
		m.Endpoints[0].LbEndpoints[0].LoadBalancingWeight = nil
		m.Endpoints[0].LbEndpoints[0].HealthStatus = 77
		e, d := decode[resource.Endpoints](t, m)
		if ep := e.Localities[0].Endpoints[0]; ep.Weight != 1 || ep.Health != resource.Unhealthy {
			t.Errorf("endpoint %+v", ep)
		}
		if !slices.Equal(d.NotHonoured, []string{"endpoints[0].lb_endpoints[0].health_status"}) {
			t.Errorf("not honoured %q", d.NotHonoured)
		}
	})
	t.Run("the list of fields not honoured is bounded", func(t *testing.T) {
		m := &xdspb.RouteConfiguration{Name: "r"}
		for range 100 {
			vh := &xdspb.VirtualHost{Domains: []string{"*"}}
			vh.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, unknownNumber, protowire.VarintType), 1))
			m.VirtualHosts = append(m.VirtualHosts, vh)
		}
		_, d := decode[resource.RouteConfiguration](t, m)
		if n := len(d.NotHonoured); n != 64 || d.NotHonoured[63] != "and 37 more" {
			t.Errorf("%d entries, the last %q; want 64 and %q", n, d.NotHonoured[n-1], "and 37 more")
		}
	})
}

func TestInboundListenerName(t *testing.T) {
	if got := resource.InboundListener("default", "orders", 8080); got != "inlay/inbound/default/orders/8080" {
		t.Error(got)
	}
}

// fuzz checks that what is accepted survives encode and decode unchanged.
func fuzz(f *testing.F, typeURL string) {
	for _, m := range full() {
		if typeOf(m) == typeURL {
			f.Add(marshal(f, m))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := resource.Decode(typeURL, b)
		if err != nil {
			return
		}
		gotType, again, err := resource.Encode(d.Value)
		if err != nil || gotType != typeURL {
			t.Fatalf("encode: %s, %v", gotType, err)
		}
		d2, err := resource.Decode(typeURL, again)
		if err != nil {
			t.Fatalf("decode of what encode made: %v", err)
		}
		if d2.Name != d.Name || !reflect.DeepEqual(d.Value, d2.Value) {
			t.Fatalf("changed:\n%+v\n%+v", d.Value, d2.Value)
		}
	})
}

func FuzzDecodeListener(f *testing.F)  { fuzz(f, resource.ListenerType) }
func FuzzDecodeRoutes(f *testing.F)    { fuzz(f, resource.RouteType) }
func FuzzDecodeCluster(f *testing.F)   { fuzz(f, resource.ClusterType) }
func FuzzDecodeEndpoints(f *testing.F) { fuzz(f, resource.EndpointsType) }
