package resource_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/xds/meshpb/extpb"
	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

const (
	prefix        = "type.googleapis.com/"
	hcmType       = prefix + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
	routerType    = prefix + "envoy.extensions.filters.http.router.v3.Router"
	downTLSType   = prefix + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
	upTLSType     = prefix + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
	rawType       = prefix + "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
	httpOptsKey   = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	policyType    = prefix + "inlay.ext.v1.ClusterPolicy"
	unknownNumber = 900
)

// insideAny makes the message of an Any of these tests.
var insideAny = map[string]func() proto.Message{
	hcmType:              func() proto.Message { return &xdspb.HttpConnectionManager{} },
	routerType:           func() proto.Message { return &xdspb.Router{} },
	downTLSType:          func() proto.Message { return &xdspb.DownstreamTlsContext{} },
	upTLSType:            func() proto.Message { return &xdspb.UpstreamTlsContext{} },
	prefix + httpOptsKey: func() proto.Message { return &xdspb.UpstreamHttpProtocolOptions{} },
	policyType:           func() proto.Message { return &extpb.ClusterPolicy{} },
}

func pack(typeURL string, m proto.Message) *anypb.Any {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return &anypb.Any{TypeUrl: typeURL, Value: b}
}

func exact(s string) *xdspb.StringMatcher {
	return &xdspb.StringMatcher{MatchPattern: &xdspb.StringMatcher_Exact{Exact: s}}
}

func adsSource() *xdspb.ConfigSource {
	return &xdspb.ConfigSource{ConfigSourceSpecifier: &xdspb.ConfigSource_Ads{Ads: &xdspb.AggregatedConfigSource{}}}
}

func hcm(m *xdspb.HttpConnectionManager) *anypb.Any {
	m.HttpFilters = []*xdspb.HttpFilter{{Name: "router", ConfigType: &xdspb.HttpFilter_TypedConfig{TypedConfig: pack(routerType, &xdspb.Router{})}}}
	return pack(hcmType, m)
}

func socket(a *anypb.Any) *xdspb.TransportSocket {
	return &xdspb.TransportSocket{Name: "s", ConfigType: &xdspb.TransportSocket_TypedConfig{TypedConfig: a}}
}

func commonTLS(sans ...string) *xdspb.CommonTlsContext {
	v := &xdspb.CertificateValidationContext{CaCertificateProviderInstance: &xdspb.CertificateProviderPluginInstance{InstanceName: "ca"}}
	for _, s := range sans {
		v.MatchSubjectAltNames = append(v.MatchSubjectAltNames, exact(s))
	}
	return &xdspb.CommonTlsContext{
		TlsCertificateProviderInstance: &xdspb.CertificateProviderPluginInstance{InstanceName: "own"},
		ValidationContextType:          &xdspb.CommonTlsContext_ValidationContext{ValidationContext: v},
	}
}

func address(ip string, port uint32) *xdspb.Address {
	return &xdspb.Address{Address: &xdspb.Address_SocketAddress{SocketAddress: &xdspb.SocketAddress{
		Address: ip, PortSpecifier: &xdspb.SocketAddress_PortValue{PortValue: port}}}}
}

func texts(kv ...string) *structpb.Struct {
	s := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for i := 0; i < len(kv); i += 2 {
		s.Fields[kv[i]] = structpb.NewStringValue(kv[i+1])
	}
	return s
}

func seconds(n int64) *durationpb.Duration { return &durationpb.Duration{Seconds: n} }

// full returns resources that together hold every message this client reads.
func full() map[string]proto.Message {
	routes := func(name string) *xdspb.RouteConfiguration {
		return &xdspb.RouteConfiguration{Name: name, VirtualHosts: []*xdspb.VirtualHost{{
			Name: "v", Domains: []string{"*"},
			Routes: []*xdspb.Route{{
				Name:  "split",
				Match: &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Prefix{Prefix: "/a"}, Headers: []*xdspb.HeaderMatcher{{Name: "X-Env", HeaderMatchSpecifier: &xdspb.HeaderMatcher_StringMatch{StringMatch: exact("dev")}}}},
				Metadata: &xdspb.Metadata{FilterMetadata: map[string]*structpb.Struct{
					"inlay.dev": texts("object", "HTTPRoute/default/r", "rule", "0.0", "source", "mesh.yaml:3")}},
				Action: &xdspb.Route_Route{Route: &xdspb.RouteAction{
					Timeout: seconds(3), IdleTimeout: seconds(300),
					MaxStreamDuration: &xdspb.MaxStreamDuration{MaxStreamDuration: seconds(2)},
					RetryPolicy: &xdspb.RetryPolicy{RetryOn: "unavailable,connect-failure,retriable-status-codes", NumRetries: wrapperspb.UInt32(2),
						PerTryTimeout: seconds(1), RetriableStatusCodes: []uint32{503},
						RetryBackOff: &xdspb.RetryBackOff{BaseInterval: seconds(1), MaxInterval: seconds(2)}},
					ClusterSpecifier: &xdspb.RouteAction_WeightedClusters{WeightedClusters: &xdspb.WeightedCluster{Clusters: []*xdspb.ClusterWeight{
						{Name: "c|v1", Weight: wrapperspb.UInt32(90)}, {Name: "c|v2", Weight: wrapperspb.UInt32(10)}, {Name: "c|v3", Weight: wrapperspb.UInt32(0)}}}},
				}},
			}, {
				Match:  &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_Path{Path: "/b"}},
				Action: &xdspb.Route_NonForwardingAction{NonForwardingAction: &xdspb.NonForwardingAction{}},
			}},
		}}}
	}
	return map[string]proto.Message{
		"regex": &xdspb.RouteConfiguration{Name: "regex", VirtualHosts: []*xdspb.VirtualHost{{Name: "v", Domains: []string{"*"}, Routes: []*xdspb.Route{{
			Match:  &xdspb.RouteMatch{PathSpecifier: &xdspb.RouteMatch_SafeRegex{SafeRegex: &xdspb.RegexMatcher{Regex: "/[^/]+/Charge"}}},
			Action: &xdspb.Route_NonForwardingAction{NonForwardingAction: &xdspb.NonForwardingAction{}},
		}}}}},
		"api listener": &xdspb.Listener{Name: "orders", ApiListener: &xdspb.ApiListener{ApiListener: hcm(&xdspb.HttpConnectionManager{
			StatPrefix: "x", CommonHttpProtocolOptions: &xdspb.HttpProtocolOptions{MaxStreamDuration: seconds(9)},
			RouteSpecifier: &xdspb.HttpConnectionManager_Rds{Rds: &xdspb.Rds{RouteConfigName: "orders", ConfigSource: adsSource()}}})}},
		"server listener": &xdspb.Listener{Name: "inlay/inbound/default/orders/8080", Address: address("0.0.0.0", 8080),
			FilterChains: []*xdspb.FilterChain{{
				FilterChainMatch: &xdspb.FilterChainMatch{TransportProtocol: "tls"},
				TransportSocket:  socket(pack(downTLSType, &xdspb.DownstreamTlsContext{CommonTlsContext: commonTLS(), RequireClientCertificate: wrapperspb.Bool(true)})),
				Filters: []*xdspb.Filter{{Name: "http", ConfigType: &xdspb.Filter_TypedConfig{TypedConfig: hcm(&xdspb.HttpConnectionManager{
					RouteSpecifier: &xdspb.HttpConnectionManager_RouteConfig{RouteConfig: routes("")}})}}},
			}}},
		"routes": routes("orders"),
		"cluster": &xdspb.Cluster{Name: "c", ClusterDiscoveryType: &xdspb.Cluster_Type{Type: xdspb.DiscoveryType_DISCOVERY_TYPE_EDS},
			EdsClusterConfig: &xdspb.EdsClusterConfig{ServiceName: "c-eds", EdsConfig: &xdspb.ConfigSource{
				ConfigSourceSpecifier: &xdspb.ConfigSource_Self{Self: &xdspb.SelfConfigSource{}}}},
			LbPolicy: xdspb.LbPolicy_LB_POLICY_LEAST_REQUEST,
			CircuitBreakers: &xdspb.CircuitBreakers{Thresholds: []*xdspb.Thresholds{{MaxRequests: wrapperspb.UInt32(7),
				RetryBudget: &xdspb.RetryBudget{BudgetPercent: &xdspb.Percent{Value: 25}, MinRetryConcurrency: wrapperspb.UInt32(3)}}}},
			TypedExtensionProtocolOptions: map[string]*anypb.Any{httpOptsKey: pack(prefix+httpOptsKey, &xdspb.UpstreamHttpProtocolOptions{
				CommonHttpProtocolOptions: &xdspb.HttpProtocolOptions{},
				UpstreamProtocolOptions: &xdspb.UpstreamHttpProtocolOptions_ExplicitHttpConfig{ExplicitHttpConfig: &xdspb.ExplicitHttpConfig{
					ProtocolConfig: &xdspb.ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &xdspb.Http2ProtocolOptions{}}}}})},
			TransportSocket: socket(pack(upTLSType, &xdspb.UpstreamTlsContext{CommonTlsContext: commonTLS("spiffe://t/ns/default/svc/orders")})),
			TransportSocketMatches: []*xdspb.TransportSocketMatch{{Name: "plain", Match: texts("tls", "none"),
				TransportSocket: socket(&anypb.Any{TypeUrl: rawType})}},
			Metadata: &xdspb.Metadata{TypedFilterMetadata: map[string]*anypb.Any{"inlay.dev": pack(policyType, &extpb.ClusterPolicy{
				RetryMinPerSecond: proto.Uint32(3), SpiffeId: "spiffe://t/ns/default/svc/orders"})}},
		},
		"http1 cluster": &xdspb.Cluster{Name: "h1", ClusterDiscoveryType: &xdspb.Cluster_Type{Type: xdspb.DiscoveryType_DISCOVERY_TYPE_EDS},
			EdsClusterConfig: &xdspb.EdsClusterConfig{EdsConfig: adsSource()},
			TypedExtensionProtocolOptions: map[string]*anypb.Any{httpOptsKey: pack(prefix+httpOptsKey, &xdspb.UpstreamHttpProtocolOptions{
				UpstreamProtocolOptions: &xdspb.UpstreamHttpProtocolOptions_ExplicitHttpConfig{ExplicitHttpConfig: &xdspb.ExplicitHttpConfig{
					ProtocolConfig: &xdspb.ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &xdspb.Http1ProtocolOptions{}}}}})}},
		"endpoints": &xdspb.ClusterLoadAssignment{ClusterName: "c", Endpoints: []*xdspb.LocalityLbEndpoints{{
			Locality: &xdspb.Locality{Region: "r", Zone: "a"}, LoadBalancingWeight: wrapperspb.UInt32(2),
			LbEndpoints: []*xdspb.LbEndpoint{{HealthStatus: xdspb.HealthStatus_HEALTH_STATUS_HEALTHY, LoadBalancingWeight: wrapperspb.UInt32(4),
				Metadata: &xdspb.Metadata{FilterMetadata: map[string]*structpb.Struct{
					"envoy.lb": texts("version", "v1"), "envoy.transport_socket_match": texts("tls", "mesh"), "inlay.dev": texts("instance", "i-1"), "other": texts("a", "b")}},
				HostIdentifier: &xdspb.LbEndpoint_Endpoint{Endpoint: &xdspb.Endpoint{Address: address("10.0.0.1", 80), Hostname: "h",
					AdditionalAddresses: []*xdspb.AdditionalAddress{{Address: address("::1", 80)}}}}}},
		}}},
	}
}

func typeOf(m proto.Message) string {
	switch m.(type) {
	case *xdspb.Listener:
		return resource.ListenerType
	case *xdspb.RouteConfiguration:
		return resource.RouteType
	case *xdspb.Cluster:
		return resource.ClusterType
	}
	return resource.EndpointsType
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// each calls f for every message below m, those inside an Any too, and writes back what f changed.
func each(m protoreflect.Message, f func(protoreflect.Message)) {
	f(m)
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if !m.Has(fd) || fd.Message() == nil {
			continue
		}
		one := func(v protoreflect.Message) {
			if a, ok := v.Interface().(*anypb.Any); ok {
				if empty := insideAny[a.GetTypeUrl()]; empty != nil {
					inner := empty()
					if err := proto.Unmarshal(a.GetValue(), inner); err != nil {
						panic(err)
					}
					each(inner.ProtoReflect(), f)
					a.Value, _ = proto.MarshalOptions{Deterministic: true}.Marshal(inner)
				}
				return
			}
			each(v, f)
		}
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				m.Get(fd).Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { one(v.Message()); return true })
			}
		case fd.IsList():
			for j := range m.Get(fd).List().Len() {
				one(m.Get(fd).List().Get(j).Message())
			}
		default:
			one(m.Get(fd).Message())
		}
	}
}

type outcome string

const (
	listed  outcome = "listed in NotHonoured"
	invalid outcome = "route invalid"
	nacked  outcome = "resource rejected"
)

// Decision 4 of the architecture, message by message: "Inside a matcher, action, RBAC rule, TLS
// context or required filter an unknown field [...] invalidates the element as the gRFC says (else
// NACKs the resource) [...]. Elsewhere it is reported upward, never dropped silently."
var wantUnknown = map[protoreflect.Name][]outcome{
	"Listener": {listed}, "ApiListener": {listed}, "FilterChain": {listed}, "HttpConnectionManager": {listed}, "Rds": {listed},
	"FilterChainMatch": {nacked}, "Filter": {nacked}, "HttpFilter": {nacked}, "Router": {nacked}, "TransportSocket": {nacked},
	"DownstreamTlsContext": {nacked}, "UpstreamTlsContext": {nacked}, "CommonTlsContext": {nacked},
	"CertificateProviderPluginInstance": {nacked}, "CertificateValidationContext": {nacked}, "TransportSocketMatch": {nacked},
	"RouteConfiguration": {listed}, "VirtualHost": {listed}, "Route": {listed}, "MaxStreamDuration": {listed}, "RetryPolicy": {listed}, "RetryBackOff": {listed},
	"RouteMatch": {invalid}, "HeaderMatcher": {invalid}, "NonForwardingAction": {invalid}, "RouteAction": {invalid},
	"WeightedCluster": {invalid}, "ClusterWeight": {invalid},
	"RegexMatcher":  {invalid},
	"StringMatcher": {invalid, nacked}, // of a header, of a peer's name
	"Cluster":       {listed}, "EdsClusterConfig": {listed}, "ConfigSource": {listed}, "AggregatedConfigSource": {listed}, "SelfConfigSource": {listed},
	"CircuitBreakers": {listed}, "Thresholds": {listed}, "RetryBudget": {listed}, "Percent": {listed}, "ClusterPolicy": {listed},
	"UpstreamHttpProtocolOptions": {listed}, "ExplicitHttpConfig": {listed}, "HttpProtocolOptions": {listed}, "Http1ProtocolOptions": {listed}, "Http2ProtocolOptions": {listed},
	"Metadata":              {listed},
	"ClusterLoadAssignment": {listed}, "LocalityLbEndpoints": {listed}, "LbEndpoint": {listed}, "Endpoint": {listed}, "AdditionalAddress": {listed},
	"Address": {listed}, "SocketAddress": {listed}, "Locality": {listed},
}

func TestUnknownFieldOfEachTrimmedMessageIsNoticed(t *testing.T) {
	seen := map[protoreflect.Name]map[outcome]bool{}
	for name, m := range full() {
		total := 0
		each(proto.Clone(m).ProtoReflect(), func(protoreflect.Message) { total++ })
		for target := range total {
			clone, n, hit := proto.Clone(m), 0, protoreflect.Name("")
			each(clone.ProtoReflect(), func(pm protoreflect.Message) {
				if n++; n == target+1 {
					hit = pm.Descriptor().Name()
					pm.SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, unknownNumber, protowire.VarintType), 1))
				}
			})
			if wantUnknown[hit] == nil {
				continue // Duration, Struct and wrappers: nobody adds fields to those
			}
			got := judge(resource.Decode(typeOf(m), marshal(t, clone)))
			ok := false
			for _, w := range wantUnknown[hit] {
				ok = ok || w == got
			}
			if !ok {
				t.Errorf("%s: unknown field in %s: got %q, want %q", name, hit, got, wantUnknown[hit])
			}
			if seen[hit] == nil {
				seen[hit] = map[outcome]bool{}
			}
			seen[hit][got] = true
		}
	}
	for name, want := range wantUnknown {
		for _, w := range want {
			if !seen[name][w] {
				t.Errorf("%s: the test never saw %q", name, w)
			}
		}
	}
	messages := (&xdspb.Cluster{}).ProtoReflect().Descriptor().ParentFile().Messages()
	transport := map[protoreflect.Name]bool{"Resource": true, "Node": true}
	for i := range messages.Len() {
		n := messages.Get(i).Name()
		if wantUnknown[n] == nil && !transport[n] && !strings.Contains(string(n), "Discovery") {
			t.Errorf("trimmed message %s: the table does not say what an unknown field in it means", n)
		}
	}
}

func judge(d resource.Decoded, err error) outcome {
	if err != nil {
		if strings.Contains(err.Error(), "#900") {
			return nacked
		}
		return outcome("rejected for another reason: " + err.Error())
	}
	var routes *resource.RouteConfiguration
	switch v := d.Value.(type) {
	case *resource.RouteConfiguration:
		routes = v
	case *resource.Listener:
		for _, c := range v.Chains {
			routes = c.HTTP.Inline
		}
	}
	if routes != nil {
		for _, r := range routes.VirtualHosts[0].Routes {
			if strings.Contains(r.Invalid, "#900") {
				return invalid
			}
		}
	}
	for _, p := range d.NotHonoured {
		if strings.HasSuffix(p, "#900") {
			return listed
		}
	}
	return "nothing"
}
