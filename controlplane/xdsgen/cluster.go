package xdsgen

import (
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	leastrequestv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/least_request/v3"
	roundrobinv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/round_robin/v3"
	wrrlocalityv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/wrr_locality/v3"
	rawbufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/xds/meshpb/extpb"
)

const (
	// extensionKey is the key of everything of our own in Envoy's metadata.
	extensionKey = "inlay.dev"
	// tlsLabel of an endpoint says how it is called: "mesh" or "none".
	tlsLabel = "inlay.dev/tls"
	// connectTimeout is Envoy's own default, written out ("If not set, a default value of 5s
	// will be used", Cluster.connect_timeout).
	connectTimeout     = 5 * time.Second
	defaultMaxRequests = 1024
)

// cluster makes the cluster of c for a kind of client.
func cluster(k Kind, c *ir.Cluster) (*clusterv3.Cluster, error) {
	ext, err := packPlain(&extpb.ClusterPolicy{
		RetryMinPerSecond: &c.Policy.RetryMinPerSecond,
		EmptyReason:       c.EmptyReason,
		SpiffeId:          c.SPIFFEID,
	})
	if err != nil {
		return nil, err
	}
	options, err := httpOptions(c.Protocol)
	if err != nil {
		return nil, err
	}
	maxRequests := c.Policy.MaxRequests
	if maxRequests == 0 {
		maxRequests = defaultMaxRequests
	}
	out := &clusterv3.Cluster{
		Name:                 c.Name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
		ConnectTimeout:       durationpb.New(connectTimeout),
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			Priority:    corev3.RoutingPriority_DEFAULT,
			MaxRequests: wrapperspb.UInt32(maxRequests),
			// Always set: without it Envoy limits retries by max_retries instead, not at all by
			// a share of the calls in flight.
			RetryBudget: &clusterv3.CircuitBreakers_Thresholds_RetryBudget{
				BudgetPercent: &typev3.Percent{Value: c.Policy.RetryBudgetPercent},
			},
		}}},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options,
		},
		Metadata: &corev3.Metadata{TypedFilterMetadata: map[string]*anypb.Any{extensionKey: ext}},
	}
	if err := loadBalancing(k, c.Policy.LB, out); err != nil {
		return nil, err
	}
	if k == SDK {
		return out, meshTLS(c, out)
	}
	return out, nil
}

// loadBalancing sets the policy. For stock gRPC clients least request goes into
// load_balancing_policy, whose list says "Envoy will iterate through the list and stop at the
// first policy that is supported": a client without it (gRFC A48 is not in every language) falls
// back to round robin, where lb_policy LEAST_REQUEST would make it reject the whole cluster.
func loadBalancing(k Kind, lb ir.LB, out *clusterv3.Cluster) error {
	out.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
	if lb != ir.LeastRequest {
		return nil
	}
	if k == SDK {
		out.LbPolicy = clusterv3.Cluster_LEAST_REQUEST
		return nil
	}
	least, err := pack(&leastrequestv3.LeastRequest{ChoiceCount: wrapperspb.UInt32(2)})
	if err != nil {
		return err
	}
	round, err := pack(&roundrobinv3.RoundRobin{})
	if err != nil {
		return err
	}
	wrr, err := pack(&wrrlocalityv3.WrrLocality{EndpointPickingPolicy: policies(
		policy("envoy.load_balancing_policies.least_request", least),
		policy("envoy.load_balancing_policies.round_robin", round),
	)})
	if err != nil {
		return err
	}
	out.LoadBalancingPolicy = policies(policy("envoy.load_balancing_policies.wrr_locality", wrr))
	return nil
}

func policies(ps ...*clusterv3.LoadBalancingPolicy_Policy) *clusterv3.LoadBalancingPolicy {
	return &clusterv3.LoadBalancingPolicy{Policies: ps}
}

func policy(name string, config *anypb.Any) *clusterv3.LoadBalancingPolicy_Policy {
	return &clusterv3.LoadBalancingPolicy_Policy{
		TypedExtensionConfig: &corev3.TypedExtensionConfig{Name: name, TypedConfig: config},
	}
}

// meshTLS makes the SDK call each endpoint in its own way. Whatever matches no entry is called
// with TLS: an endpoint without metadata fails closed.
func meshTLS(c *ir.Cluster, out *clusterv3.Cluster) error {
	alpn := "http/1.1"
	if c.Protocol != ir.HTTP {
		alpn = "h2"
	}
	ctx, err := pack(&tlsv3.UpstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
		AlpnProtocols:                  []string{alpn},
		TlsCertificateProviderInstance: certificates(),
		ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{
			ValidationContext: &tlsv3.CertificateValidationContext{
				CaCertificateProviderInstance: certificates(),
				// The field that gRFC A29 has clients read; match_typed_subject_alt_names, which
				// Envoy prefers, is not in it.
				MatchSubjectAltNames: []*matcherv3.StringMatcher{{ //nolint:staticcheck // see above
					MatchPattern: &matcherv3.StringMatcher_Exact{Exact: c.SPIFFEID},
				}},
			},
		},
	}})
	if err != nil {
		return err
	}
	out.TransportSocket = tlsSocket(ctx)
	out.TransportSocketMatches = []*clusterv3.Cluster_TransportSocketMatch{{
		Name: "mesh-tls", Match: stringStruct(map[string]string{tlsLabel: "mesh"}), TransportSocket: tlsSocket(ctx),
	}}
	if c.MTLS != ir.Permissive {
		return nil
	}
	raw, err := pack(&rawbufferv3.RawBuffer{})
	if err != nil {
		return err
	}
	out.TransportSocketMatches = append(out.TransportSocketMatches, &clusterv3.Cluster_TransportSocketMatch{
		Name: "plaintext", Match: stringStruct(map[string]string{tlsLabel: "none"}),
		TransportSocket: &corev3.TransportSocket{
			Name:       "envoy.transport_sockets.raw_buffer",
			ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: raw},
		},
	})
	return nil
}

func httpOptions(p ir.Protocol) (*anypb.Any, error) {
	explicit := &httpv3.HttpProtocolOptions_ExplicitHttpConfig{}
	if p == ir.HTTP {
		explicit.ProtocolConfig = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{
			HttpProtocolOptions: &corev3.Http1ProtocolOptions{},
		}
	} else {
		explicit.ProtocolConfig = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
			Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
		}
	}
	return pack(&httpv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: explicit},
	})
}

// certificates names the certificate provider of the bootstrap that gives SVID and bundle.
func certificates() *tlsv3.CertificateProviderPluginInstance {
	return &tlsv3.CertificateProviderPluginInstance{InstanceName: "default"}
}

func tlsSocket(context *anypb.Any) *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name:       "envoy.transport_sockets.tls", // the name that gRPC requires
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: context},
	}
}
