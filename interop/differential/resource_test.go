package differential

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/xds/resource"
)

// sample is a resource of Envoy's own types with what it says in ours.
type sample struct {
	envoy interface {
		proto.Message
		Validate() error
	}
	value       any
	notHonoured []string
}

// maker makes random samples.
type maker struct {
	*rand.Rand
	t *testing.T
}

func (g maker) chance() bool { return g.IntN(2) == 0 }

func (g maker) name(kind string) string { return fmt.Sprintf("%s-%d", kind, g.IntN(1000)) }

// span is a whole number of milliseconds, at least one.
func (g maker) span() time.Duration { return time.Duration(1+g.IntN(100_000)) * time.Millisecond }

func (g maker) pack(m proto.Message) *anypb.Any {
	a, err := anypb.New(m)
	if err != nil {
		g.t.Fatal(err)
	}
	return a
}

func (g maker) ads() *corev3.ConfigSource {
	if g.chance() {
		return &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Self{Self: &corev3.SelfConfigSource{}}}
	}
	return &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}, ResourceApiVersion: corev3.ApiVersion_V3}
}

func exactly(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

func (g maker) provider() *tlsv3.CertificateProviderPluginInstance {
	return &tlsv3.CertificateProviderPluginInstance{InstanceName: g.name("provider")}
}

func texts(m map[string]string) *structpb.Struct {
	s := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range m {
		s.Fields[k] = structpb.NewStringValue(v)
	}
	return s
}

func (g maker) address() (*corev3.Address, netip.AddrPort) {
	ip := netip.AddrFrom4([4]byte{10, byte(g.IntN(256)), byte(g.IntN(256)), byte(g.IntN(256))})
	if g.chance() {
		ip = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(g.IntN(256)), 14: byte(g.IntN(256)), 13: byte(g.IntN(256))})
	}
	ap := netip.AddrPortFrom(ip, uint16(1+g.IntN(65535)))
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ip.String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(ap.Port())}}}}, ap
}

func (g maker) endpoints() sample {
	m := &endpointv3.ClusterLoadAssignment{ClusterName: g.name("cluster")}
	v := &resource.Endpoints{Cluster: m.ClusterName}
	for i := range 1 + g.IntN(3) {
		l := resource.Locality{Region: g.name("r"), Zone: fmt.Sprint("z", i), Weight: uint32(1 + g.IntN(100)), Priority: uint32(g.IntN(1 + min(i, 1)))}
		lm := &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{Region: l.Region, Zone: l.Zone}, LoadBalancingWeight: wrapperspb.UInt32(l.Weight), Priority: l.Priority}
		for range g.IntN(4) {
			a, ap := g.address()
			e := resource.Endpoint{Addresses: []netip.AddrPort{ap}, Weight: 1}
			em := &endpointv3.Endpoint{Address: a}
			lb := &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: em}}
			if g.chance() {
				a, ap := g.address()
				em.AdditionalAddresses = append(em.AdditionalAddresses, &endpointv3.Endpoint_AdditionalAddress{Address: a})
				e.Addresses = append(e.Addresses, ap)
			}
			if g.chance() {
				e.Hostname = g.name("host")
				em.Hostname = e.Hostname
			}
			if g.chance() {
				e.Weight = uint32(1 + g.IntN(1000))
				lb.LoadBalancingWeight = wrapperspb.UInt32(e.Weight)
			}
			// gRFC A27: "If the health_status field has any value other than HEALTHY or UNKNOWN, the
			// entry will be ignored."
			health := []corev3.HealthStatus{corev3.HealthStatus_UNKNOWN, corev3.HealthStatus_HEALTHY, corev3.HealthStatus_UNHEALTHY,
				corev3.HealthStatus_DRAINING, corev3.HealthStatus_TIMEOUT, corev3.HealthStatus_DEGRADED}
			n := g.IntN(len(health))
			lb.HealthStatus = health[n]
			e.Health = []resource.Health{resource.HealthUnknown, resource.Healthy, resource.Unhealthy, resource.Draining, resource.Unhealthy, resource.Unhealthy}[n]
			if g.chance() {
				e.Labels, e.TransportMatch, e.InstanceID = map[string]string{"version": g.name("v")}, map[string]string{"tls": "mesh"}, g.name("i")
				lb.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.lb": texts(e.Labels),
					"envoy.transport_socket_match": texts(e.TransportMatch), "inlay.dev": texts(map[string]string{"instance": e.InstanceID}), "other": texts(map[string]string{"a": "b"})}}
			}
			lm.LbEndpoints, l.Endpoints = append(lm.LbEndpoints, lb), append(l.Endpoints, e)
		}
		m.Endpoints, v.Localities = append(m.Endpoints, lm), append(v.Localities, l)
	}
	if g.chance() { // gRFC A27: without a weight "the endpoints entry is skipped"
		m.Endpoints = append(m.Endpoints, &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{Region: "skipped"}})
	}
	return sample{m, v, nil}
}

func (g maker) tlsSocket() (*corev3.TransportSocket, *resource.ClientTLS) {
	if g.IntN(3) == 0 {
		return &corev3.TransportSocket{Name: "raw", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: g.pack(&rawv3.RawBuffer{})}}, nil
	}
	v := &resource.ClientTLS{}
	check := &tlsv3.CertificateValidationContext{CaCertificateProviderInstance: g.provider()}
	for range 1 + g.IntN(2) {
		id := "spiffe://t/ns/default/svc/" + g.name("s")
		v.Peers = append(v.Peers, id)
		check.MatchSubjectAltNames = append(check.MatchSubjectAltNames, exactly(id)) //nolint:staticcheck // the field that gRFC A29 has clients read
	}
	c := &tlsv3.CommonTlsContext{TlsCertificateProviderInstance: g.provider(), ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: check}}
	if g.chance() {
		v.ALPN = []string{"h2"}
		c.AlpnProtocols = v.ALPN
	}
	return &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: g.pack(&tlsv3.UpstreamTlsContext{CommonTlsContext: c})}}, v
}

func (g maker) cluster() sample {
	s := sample{}
	name := g.name("cluster")
	m := &clusterv3.Cluster{Name: name, ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}, EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: g.ads()}}
	// The defaults by Envoy's words: connect_timeout "will be set to 5s", max_requests "the default
	// is 1024"; the retry floor of 3 is this client's.
	v := &resource.Cluster{Name: name, EndpointsName: name, ConnectTimeout: 5 * time.Second, MaxRequests: 1024, RetryMinPerSecond: 3}
	if g.chance() {
		v.EndpointsName = g.name("eds")
		m.EdsClusterConfig.ServiceName = v.EndpointsName
	}
	if g.chance() {
		m.LbPolicy, v.LB = clusterv3.Cluster_LEAST_REQUEST, resource.LeastRequest
	}
	if g.chance() {
		v.ConnectTimeout = g.span()
		m.ConnectTimeout = durationpb.New(v.ConnectTimeout)
	}
	if g.chance() {
		th := &clusterv3.CircuitBreakers_Thresholds{}
		m.CircuitBreakers = &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{th}}
		if g.chance() {
			v.MaxRequests = uint32(1 + g.IntN(9999))
			th.MaxRequests = wrapperspb.UInt32(v.MaxRequests)
		}
		if g.chance() {
			v.RetryBudgetPercent = 20 // RetryBudget.budget_percent: "This parameter is optional. Defaults to 20%."
			th.RetryBudget = &clusterv3.CircuitBreakers_Thresholds_RetryBudget{}
			if g.chance() {
				v.RetryBudgetPercent = float64(g.IntN(100))
				th.RetryBudget.BudgetPercent = &typev3.Percent{Value: v.RetryBudgetPercent}
			}
			if g.chance() {
				th.RetryBudget.MinRetryConcurrency = wrapperspb.UInt32(5)
				s.notHonoured = append(s.notHonoured, "circuit_breakers.thresholds[0].retry_budget.min_retry_concurrency")
			}
		}
	}
	if g.chance() {
		explicit := &httpv3.HttpProtocolOptions_ExplicitHttpConfig{ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}}}
		if g.chance() {
			v.HTTP2 = true
			explicit.ProtocolConfig = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}}
		}
		m.TypedExtensionProtocolOptions = map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": g.pack(&httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: explicit}})}
	}
	if g.chance() {
		m.TransportSocket, v.TLS = g.tlsSocket()
	}
	for i := range g.IntN(3) {
		ts, tls := g.tlsSocket()
		tm := resource.TransportMatch{Name: fmt.Sprint("match", i), TLS: tls, Labels: map[string]string{"tls": g.name("kind")}}
		m.TransportSocketMatches = append(m.TransportSocketMatches, &clusterv3.Cluster_TransportSocketMatch{Name: tm.Name, Match: texts(tm.Labels), TransportSocket: ts})
		v.Transports = append(v.Transports, tm)
	}
	s.envoy, s.value = m, v
	return s
}

func (g maker) retry() (*routev3.RetryPolicy, *resource.Retry) {
	// RetryPolicy.num_retries: "defaults to 1"; retry_back_off: "The default base interval is 25ms",
	// max_interval: "The default is 10 times the base_interval".
	v := &resource.Retry{On: []string{"unavailable", "reset"}, Attempts: 1, Base: 25 * time.Millisecond, Max: 250 * time.Millisecond}
	m := &routev3.RetryPolicy{}
	if g.chance() {
		v.On, v.Codes = append(v.On, "retriable-status-codes"), []uint32{uint32(400 + g.IntN(200))}
		m.RetriableStatusCodes = v.Codes
	}
	m.RetryOn = strings.Join(v.On, ",")
	if g.chance() {
		v.Attempts = uint32(1 + g.IntN(9))
		m.NumRetries = wrapperspb.UInt32(v.Attempts)
	}
	if g.chance() {
		v.PerTry = g.span()
		m.PerTryTimeout = durationpb.New(v.PerTry)
	}
	if g.chance() {
		v.Base = g.span()
		v.Max = 10 * v.Base
		m.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(v.Base)}
		if g.chance() {
			v.Max = v.Base + g.span()
			m.RetryBackOff.MaxInterval = durationpb.New(v.Max)
		}
	}
	return m, v
}

func (g maker) route() (*routev3.Route, resource.Route) {
	m := &routev3.Route{Name: g.name("route"), Match: &routev3.RouteMatch{}}
	v := resource.Route{Name: m.Name}
	path := "/" + g.name("p")
	v.Match.Kind, v.Match.Path = resource.PathKind(g.IntN(4)), path
	switch v.Match.Kind {
	case resource.Prefix:
		m.Match.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: path}
	case resource.Exact:
		m.Match.PathSpecifier = &routev3.RouteMatch_Path{Path: path}
	case resource.PathSeparatedPrefix:
		m.Match.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: path}
	case resource.Regex:
		m.Match.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: path}}
	}
	for i := range g.IntN(3) {
		h := resource.HeaderMatch{Name: fmt.Sprint("x-", i), Exact: g.name("v")}
		m.Match.Headers = append(m.Match.Headers, &routev3.HeaderMatcher{Name: strings.ToUpper(h.Name), HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: exactly(h.Exact)}})
		v.Match.Headers = append(v.Match.Headers, h)
	}
	if g.IntN(6) == 0 {
		m.Action, v.NonForwarding = &routev3.Route_NonForwardingAction{NonForwardingAction: &routev3.NonForwardingAction{}}, true
		return m, v
	}
	a := &routev3.RouteAction{}
	m.Action = &routev3.Route_Route{Route: a}
	if g.chance() {
		v.Clusters = []resource.WeightedCluster{{Name: g.name("cluster"), Weight: 1}}
		a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: v.Clusters[0].Name}
	} else {
		w := &routev3.WeightedCluster{}
		for i := range 2 + g.IntN(2) {
			c := resource.WeightedCluster{Name: fmt.Sprint("arm-", i), Weight: uint32(1 + g.IntN(100))}
			v.Clusters = append(v.Clusters, c)
			w.Clusters = append(w.Clusters, &routev3.WeightedCluster_ClusterWeight{Name: c.Name, Weight: wrapperspb.UInt32(c.Weight)})
		}
		a.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: w}
	}
	v.Timeout = 15 * time.Second // RouteAction.timeout: "If not specified, the default is 15s."
	switch g.IntN(4) {
	case 0: // 0 is none
		a.Timeout, v.Timeout = durationpb.New(0), 0
	case 1:
		v.Timeout = g.span()
		a.Timeout = durationpb.New(v.Timeout)
	case 2: // gRFC A31: the bound of a gRPC call
		v.Timeout = g.span()
		a.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{MaxStreamDuration: durationpb.New(v.Timeout)}
	}
	if g.chance() {
		v.IdleTimeout = g.span()
		a.IdleTimeout = durationpb.New(v.IdleTimeout)
	}
	if g.chance() {
		a.RetryPolicy, v.Retry = g.retry()
	}
	if g.chance() {
		v.Origin = resource.Origin{Object: g.name("object"), Rule: g.name("rule"), Source: "mesh.yaml:3"}
		m.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"inlay.dev": texts(map[string]string{"object": v.Origin.Object, "rule": v.Origin.Rule, "source": v.Origin.Source})}}
	}
	return m, v
}

func (g maker) routes() sample {
	m := &routev3.RouteConfiguration{Name: g.name("routes")}
	v := &resource.RouteConfiguration{Name: m.Name}
	for i := range 1 + g.IntN(2) {
		vh := &routev3.VirtualHost{Name: fmt.Sprint("vh", i), Domains: []string{fmt.Sprint(i, ".example"), g.name("*.d")}}
		vv := resource.VirtualHost{Name: vh.Name, Domains: vh.Domains}
		for range 1 + g.IntN(3) {
			rm, rv := g.route()
			vh.Routes, vv.Routes = append(vh.Routes, rm), append(vv.Routes, rv)
		}
		m.VirtualHosts, v.VirtualHosts = append(m.VirtualHosts, vh), append(v.VirtualHosts, vv)
	}
	return sample{m, v, nil}
}

func (g maker) hcm() (*hcmv3.HttpConnectionManager, *resource.HTTP) {
	m := &hcmv3.HttpConnectionManager{StatPrefix: "s", HttpFilters: []*hcmv3.HttpFilter{{Name: "router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: g.pack(&routerv3.Router{})}}}}
	v := &resource.HTTP{}
	if g.chance() {
		v.RouteName = g.name("routes")
		m.RouteSpecifier = &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: v.RouteName, ConfigSource: g.ads()}}
	} else {
		s := g.routes()
		v.Inline = s.value.(*resource.RouteConfiguration)
		m.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: s.envoy.(*routev3.RouteConfiguration)}
	}
	if g.chance() {
		v.MaxStreamDuration = g.span()
		m.CommonHttpProtocolOptions = &corev3.HttpProtocolOptions{MaxStreamDuration: durationpb.New(v.MaxStreamDuration)}
	}
	return m, v
}

func (g maker) listener() sample {
	m := &listenerv3.Listener{Name: g.name("listener")}
	v := &resource.Listener{Name: m.Name}
	if g.chance() {
		hm, hv := g.hcm()
		m.ApiListener, v.API = &listenerv3.ApiListener{ApiListener: g.pack(hm)}, hv
		return sample{m, v, nil}
	}
	m.Address, _ = g.address()
	for _, transport := range []string{"tls", "raw_buffer"} {
		hm, hv := g.hcm()
		c := resource.Chain{TransportProtocol: transport, HTTP: hv}
		fc := &listenerv3.FilterChain{Name: transport, FilterChainMatch: &listenerv3.FilterChainMatch{TransportProtocol: transport},
			Filters: []*listenerv3.Filter{{Name: "http", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: g.pack(hm)}}}}
		if transport == "tls" {
			c.TLS = &resource.ServerTLS{RequireClientCertificate: g.chance()}
			fc.TransportSocket = &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: g.pack(&tlsv3.DownstreamTlsContext{
				RequireClientCertificate: wrapperspb.Bool(c.TLS.RequireClientCertificate),
				CommonTlsContext: &tlsv3.CommonTlsContext{TlsCertificateProviderInstance: g.provider(), ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{
					ValidationContext: &tlsv3.CertificateValidationContext{CaCertificateProviderInstance: g.provider()}}}})}}
		}
		m.FilterChains, v.Chains = append(m.FilterChains, fc), append(v.Chains, c)
	}
	return sample{m, v, nil}
}

// samples makes one of each type.
func (g maker) samples() map[string]sample {
	return map[string]sample{resource.EndpointsType: g.endpoints(), resource.ClusterType: g.cluster(), resource.RouteType: g.routes(), resource.ListenerType: g.listener()}
}

func (g maker) marshal(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		g.t.Fatal(err)
	}
	return b
}

// TestHonouredFields: random resources of Envoy's own types, each valid by Envoy's own rules, say
// the same in ours.
func TestHonouredFields(t *testing.T) {
	g := maker{seeded(t), t}
	for range 500 {
		for typeURL, s := range g.samples() {
			if err := s.envoy.Validate(); err != nil {
				t.Fatalf("the sample is not valid: %v", err)
			}
			d, err := resource.Decode(typeURL, g.marshal(s.envoy))
			if err != nil {
				t.Fatalf("%v\n%v", err, s.envoy)
			}
			if !reflect.DeepEqual(d.Value, s.value) {
				t.Fatalf("decoded\n%+v\nwant\n%+v\nfrom %v", d.Value, s.value, s.envoy)
			}
			if !reflect.DeepEqual(d.NotHonoured, s.notHonoured) {
				t.Fatalf("not honoured: %q, want %q", d.NotHonoured, s.notHonoured)
			}
		}
	}
}
