package resource

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/xds/meshpb/extpb"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// Encode is the way back from Decode: value is a *Listener, *RouteConfiguration, *Cluster or
// *Endpoints, and Decode of the bytes gives an equal value. The bytes are deterministic. It is for
// tests that build resources and for tools; a control plane writes the real messages.
//
// An invalid route keeps its reason in its metadata, under "inlay.dev", key "invalid".
func Encode(value any) (typeURL string, b []byte, err error) {
	var m proto.Message
	switch v := value.(type) {
	case *Listener:
		typeURL = ListenerType
		m, err = encodeListener(v)
	case *RouteConfiguration:
		typeURL, m = RouteType, encodeRoutes(v)
	case *Cluster:
		typeURL = ClusterType
		m, err = encodeCluster(v)
	case *Endpoints:
		typeURL, m = EndpointsType, encodeEndpoints(v)
	default:
		return "", nil, fmt.Errorf("cannot encode a %T: want *Listener, *RouteConfiguration, *Cluster or *Endpoints", value)
	}
	if err != nil {
		return "", nil, err
	}
	b, err = proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return typeURL, b, err
}

var ads = &xdspb.ConfigSource{ConfigSourceSpecifier: &xdspb.ConfigSource_Ads{Ads: &xdspb.AggregatedConfigSource{}}}

func pack(typeURL string, m proto.Message) (*anypb.Any, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return &anypb.Any{TypeUrl: typeURL, Value: b}, err
}

func encodeListener(l *Listener) (*xdspb.Listener, error) {
	m := &xdspb.Listener{Name: l.Name}
	if l.API != nil {
		a, err := encodeHTTP(l.API)
		m.ApiListener = &xdspb.ApiListener{ApiListener: a}
		return m, err
	}
	for i := range l.Chains {
		c, err := encodeChain(&l.Chains[i])
		if err != nil {
			return nil, err
		}
		m.FilterChains = append(m.FilterChains, c)
	}
	if l.Default != nil {
		c, err := encodeChain(l.Default)
		if err != nil {
			return nil, err
		}
		m.DefaultFilterChain = c
	}
	return m, nil
}

func encodeHTTP(h *HTTP) (*anypb.Any, error) {
	router, err := pack(routerType, &xdspb.Router{})
	if err != nil {
		return nil, err
	}
	m := &xdspb.HttpConnectionManager{HttpFilters: []*xdspb.HttpFilter{{
		Name: "router", ConfigType: &xdspb.HttpFilter_TypedConfig{TypedConfig: router},
	}}}
	if h.MaxStreamDuration > 0 {
		m.CommonHttpProtocolOptions = &xdspb.HttpProtocolOptions{MaxStreamDuration: durationpb.New(h.MaxStreamDuration)}
	}
	if h.Inline != nil {
		m.RouteSpecifier = &xdspb.HttpConnectionManager_RouteConfig{RouteConfig: encodeRoutes(h.Inline)}
	} else {
		m.RouteSpecifier = &xdspb.HttpConnectionManager_Rds{Rds: &xdspb.Rds{ConfigSource: ads, RouteConfigName: h.RouteName}}
	}
	return pack(hcmType, m)
}

func encodeChain(c *Chain) (*xdspb.FilterChain, error) {
	m := &xdspb.FilterChain{}
	if c.TransportProtocol != "" {
		m.FilterChainMatch = &xdspb.FilterChainMatch{TransportProtocol: c.TransportProtocol}
	}
	if c.TLS != nil {
		packed, err := pack(downstreamTLSType, &xdspb.DownstreamTlsContext{
			RequireClientCertificate: wrapperspb.Bool(c.TLS.RequireClientCertificate),
			CommonTlsContext: &xdspb.CommonTlsContext{
				TlsCertificateProviderInstance: &xdspb.CertificateProviderPluginInstance{InstanceName: "default"},
				ValidationContextType: &xdspb.CommonTlsContext_ValidationContext{ValidationContext: &xdspb.CertificateValidationContext{
					CaCertificateProviderInstance: &xdspb.CertificateProviderPluginInstance{InstanceName: "default"},
				}},
			},
		})
		if err != nil {
			return nil, err
		}
		m.TransportSocket = transportSocket("tls", packed)
	}
	if c.HTTP == nil {
		return nil, fmt.Errorf("chain %q: HTTP is nil", c.TransportProtocol)
	}
	hcm, err := encodeHTTP(c.HTTP)
	if err != nil {
		return nil, err
	}
	m.Filters = []*xdspb.Filter{{Name: "http", ConfigType: &xdspb.Filter_TypedConfig{TypedConfig: hcm}}}
	return m, nil
}

func transportSocket(name string, config *anypb.Any) *xdspb.TransportSocket {
	return &xdspb.TransportSocket{Name: name, ConfigType: &xdspb.TransportSocket_TypedConfig{TypedConfig: config}}
}

func encodeRoutes(rc *RouteConfiguration) *xdspb.RouteConfiguration {
	m := &xdspb.RouteConfiguration{Name: rc.Name}
	for _, vh := range rc.VirtualHosts {
		v := &xdspb.VirtualHost{Name: vh.Name, Domains: vh.Domains}
		for i := range vh.Routes {
			v.Routes = append(v.Routes, encodeRoute(&vh.Routes[i]))
		}
		m.VirtualHosts = append(m.VirtualHosts, v)
	}
	return m
}

func encodeRoute(r *Route) *xdspb.Route {
	m := &xdspb.Route{Name: r.Name, Match: encodeMatch(r.Match)}
	own := map[string]string{}
	for k, v := range map[string]string{
		"object": r.Origin.Object, "rule": r.Origin.Rule, "source": r.Origin.Source, "invalid": r.Invalid,
	} {
		if v != "" {
			own[k] = v
		}
	}
	if len(own) > 0 {
		m.Metadata = &xdspb.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataKey: textStruct(own)}}
	}
	if r.NonForwarding {
		m.Action = &xdspb.Route_NonForwardingAction{NonForwardingAction: &xdspb.NonForwardingAction{}}
		return m
	}
	a := &xdspb.RouteAction{Timeout: durationpb.New(r.Timeout), RetryPolicy: encodeRetry(r.Retry)}
	if r.IdleTimeout > 0 {
		a.IdleTimeout = durationpb.New(r.IdleTimeout)
	}
	switch {
	case len(r.Clusters) == 1 && r.Clusters[0].Weight == 1:
		a.ClusterSpecifier = &xdspb.RouteAction_Cluster{Cluster: r.Clusters[0].Name}
	case len(r.Clusters) > 0:
		wc := &xdspb.WeightedCluster{}
		for _, c := range r.Clusters {
			wc.Clusters = append(wc.Clusters, &xdspb.ClusterWeight{Name: c.Name, Weight: wrapperspb.UInt32(c.Weight)})
		}
		a.ClusterSpecifier = &xdspb.RouteAction_WeightedClusters{WeightedClusters: wc}
	}
	m.Action = &xdspb.Route_Route{Route: a}
	return m
}

func encodeMatch(match Match) *xdspb.RouteMatch {
	m := &xdspb.RouteMatch{}
	switch match.Kind {
	case Exact:
		m.PathSpecifier = &xdspb.RouteMatch_Path{Path: match.Path}
	case PathSeparatedPrefix:
		m.PathSpecifier = &xdspb.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: match.Path}
	case Regex:
		m.PathSpecifier = &xdspb.RouteMatch_SafeRegex{SafeRegex: &xdspb.RegexMatcher{Regex: match.Path}}
	default:
		m.PathSpecifier = &xdspb.RouteMatch_Prefix{Prefix: match.Path}
	}
	for _, h := range match.Headers {
		m.Headers = append(m.Headers, &xdspb.HeaderMatcher{Name: h.Name,
			HeaderMatchSpecifier: &xdspb.HeaderMatcher_StringMatch{StringMatch: exactly(h.Exact)}})
	}
	return m
}

func exactly(s string) *xdspb.StringMatcher {
	return &xdspb.StringMatcher{MatchPattern: &xdspb.StringMatcher_Exact{Exact: s}}
}

func encodeRetry(r *Retry) *xdspb.RetryPolicy {
	if r == nil {
		return nil
	}
	m := &xdspb.RetryPolicy{NumRetries: wrapperspb.UInt32(r.Attempts), RetriableStatusCodes: r.Codes}
	for i, word := range r.On {
		if i > 0 {
			m.RetryOn += ","
		}
		m.RetryOn += word
	}
	if r.PerTry > 0 {
		m.PerTryTimeout = durationpb.New(r.PerTry)
	}
	if r.Base > 0 {
		m.RetryBackOff = &xdspb.RetryBackOff{BaseInterval: durationpb.New(r.Base)}
		if r.Max > 0 {
			m.RetryBackOff.MaxInterval = durationpb.New(r.Max)
		}
	}
	return m
}

func encodeCluster(c *Cluster) (*xdspb.Cluster, error) {
	m := &xdspb.Cluster{
		Name:                 c.Name,
		ClusterDiscoveryType: &xdspb.Cluster_Type{Type: xdspb.DiscoveryType_DISCOVERY_TYPE_EDS},
		EdsClusterConfig:     &xdspb.EdsClusterConfig{EdsConfig: ads},
	}
	if c.EndpointsName != c.Name {
		m.EdsClusterConfig.ServiceName = c.EndpointsName
	}
	if c.LB == LeastRequest {
		m.LbPolicy = xdspb.LbPolicy_LB_POLICY_LEAST_REQUEST
	}
	if c.ConnectTimeout != 0 {
		m.ConnectTimeout = durationpb.New(c.ConnectTimeout)
	}
	th := &xdspb.Thresholds{MaxRequests: wrapperspb.UInt32(c.MaxRequests)}
	if c.RetryBudgetPercent > 0 {
		th.RetryBudget = &xdspb.RetryBudget{BudgetPercent: &xdspb.Percent{Value: c.RetryBudgetPercent}}
	}
	m.CircuitBreakers = &xdspb.CircuitBreakers{Thresholds: []*xdspb.Thresholds{th}}
	if c.HTTP2 {
		packed, err := pack(httpOptionsType, &xdspb.UpstreamHttpProtocolOptions{
			UpstreamProtocolOptions: &xdspb.UpstreamHttpProtocolOptions_ExplicitHttpConfig{ExplicitHttpConfig: &xdspb.ExplicitHttpConfig{
				ProtocolConfig: &xdspb.ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &xdspb.Http2ProtocolOptions{}},
			}},
		})
		if err != nil {
			return nil, err
		}
		m.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: packed}
	}
	for _, t := range c.Transports {
		ts, err := encodeClientTransport(t.TLS)
		if err != nil {
			return nil, err
		}
		tm := &xdspb.TransportSocketMatch{Name: t.Name, TransportSocket: ts}
		if len(t.Labels) > 0 {
			tm.Match = textStruct(t.Labels)
		}
		m.TransportSocketMatches = append(m.TransportSocketMatches, tm)
	}
	if c.TLS != nil {
		ts, err := encodeClientTransport(c.TLS)
		if err != nil {
			return nil, err
		}
		m.TransportSocket = ts
	}
	if c.RetryMinPerSecond != defaultRetryMin || c.EmptyReason != "" || c.SPIFFEID != "" {
		packed, err := pack(clusterPolicyType, &extpb.ClusterPolicy{
			RetryMinPerSecond: &c.RetryMinPerSecond, EmptyReason: c.EmptyReason, SpiffeId: c.SPIFFEID,
		})
		if err != nil {
			return nil, err
		}
		m.Metadata = &xdspb.Metadata{TypedFilterMetadata: map[string]*anypb.Any{metadataKey: packed}}
	}
	return m, nil
}

func encodeClientTransport(t *ClientTLS) (*xdspb.TransportSocket, error) {
	if t == nil {
		return transportSocket("raw_buffer", &anypb.Any{TypeUrl: rawBufferType}), nil
	}
	v := &xdspb.CertificateValidationContext{
		CaCertificateProviderInstance: &xdspb.CertificateProviderPluginInstance{InstanceName: "default"},
	}
	for _, p := range t.Peers {
		v.MatchSubjectAltNames = append(v.MatchSubjectAltNames, exactly(p))
	}
	packed, err := pack(upstreamTLSType, &xdspb.UpstreamTlsContext{CommonTlsContext: &xdspb.CommonTlsContext{
		AlpnProtocols:                  t.ALPN,
		TlsCertificateProviderInstance: &xdspb.CertificateProviderPluginInstance{InstanceName: "default"},
		ValidationContextType:          &xdspb.CommonTlsContext_ValidationContext{ValidationContext: v},
	}})
	return transportSocket("tls", packed), err
}

func encodeEndpoints(e *Endpoints) *xdspb.ClusterLoadAssignment {
	m := &xdspb.ClusterLoadAssignment{ClusterName: e.Cluster}
	for _, l := range e.Localities {
		ll := &xdspb.LocalityLbEndpoints{
			Locality:            &xdspb.Locality{Region: l.Region, Zone: l.Zone, SubZone: l.SubZone},
			LoadBalancingWeight: wrapperspb.UInt32(l.Weight), Priority: l.Priority,
		}
		for _, ep := range l.Endpoints {
			ll.LbEndpoints = append(ll.LbEndpoints, encodeEndpoint(ep))
		}
		m.Endpoints = append(m.Endpoints, ll)
	}
	return m
}

func encodeEndpoint(ep Endpoint) *xdspb.LbEndpoint {
	host := &xdspb.Endpoint{Hostname: ep.Hostname}
	for i, a := range ep.Addresses {
		addr := &xdspb.Address{Address: &xdspb.Address_SocketAddress{SocketAddress: &xdspb.SocketAddress{
			Address: a.Addr().String(), PortSpecifier: &xdspb.SocketAddress_PortValue{PortValue: uint32(a.Port())},
		}}}
		if i == 0 {
			host.Address = addr
		} else {
			host.AdditionalAddresses = append(host.AdditionalAddresses, &xdspb.AdditionalAddress{Address: addr})
		}
	}
	m := &xdspb.LbEndpoint{
		HostIdentifier:      &xdspb.LbEndpoint_Endpoint{Endpoint: host},
		LoadBalancingWeight: wrapperspb.UInt32(ep.Weight),
	}
	switch ep.Health {
	case Healthy:
		m.HealthStatus = xdspb.HealthStatus_HEALTH_STATUS_HEALTHY
	case Unhealthy:
		m.HealthStatus = xdspb.HealthStatus_HEALTH_STATUS_UNHEALTHY
	case Draining:
		m.HealthStatus = xdspb.HealthStatus_HEALTH_STATUS_DRAINING
	}
	md := map[string]*structpb.Struct{}
	if len(ep.Labels) > 0 {
		md[labelsKey] = textStruct(ep.Labels)
	}
	if len(ep.TransportMatch) > 0 {
		md[transportMatchKey] = textStruct(ep.TransportMatch)
	}
	if ep.InstanceID != "" {
		md[metadataKey] = textStruct(map[string]string{"instance": ep.InstanceID})
	}
	if len(md) > 0 {
		m.Metadata = &xdspb.Metadata{FilterMetadata: md}
	}
	return m
}

func textStruct(m map[string]string) *structpb.Struct {
	s := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(m))}
	for k, v := range m {
		s.Fields[k] = structpb.NewStringValue(v)
	}
	return s
}
