package xdsgen

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// outboundListener is the listener of a name that calls are made to; its routes are in the route
// configuration of that name.
func outboundListener(name, routes string) (*listenerv3.Listener, error) {
	router, err := routerFilter()
	if err != nil {
		return nil, err
	}
	hcm, err := pack(&hcmv3.HttpConnectionManager{
		StatPrefix: "outbound",
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			ConfigSource:    ads(),
			RouteConfigName: routes,
		}},
		HttpFilters: []*hcmv3.HttpFilter{router},
	})
	if err != nil {
		return nil, err
	}
	return &listenerv3.Listener{Name: name, ApiListener: &listenerv3.ApiListener{ApiListener: hcm}}, nil
}

// inboundListener is the listener of an SDK's server. A strict service takes TLS only; a
// permissive one takes plaintext beside it.
func inboundListener(name string, port uint16, mode ir.MTLS) (*listenerv3.Listener, error) {
	tls, err := inboundChain("mesh-tls", true)
	if err != nil {
		return nil, err
	}
	chains := []*listenerv3.FilterChain{tls}
	if mode == ir.Permissive {
		plain, err := inboundChain("plaintext", false)
		if err != nil {
			return nil, err
		}
		tls.FilterChainMatch = &listenerv3.FilterChainMatch{TransportProtocol: "tls"}
		plain.FilterChainMatch = &listenerv3.FilterChainMatch{TransportProtocol: "raw_buffer"}
		chains = append(chains, plain)
	}
	return &listenerv3.Listener{Name: name, Address: socketAddress("0.0.0.0", port), FilterChains: chains}, nil
}

// serverListener is the listener of a gRPC server of a permissive service: plaintext, since a
// stock server has no identity of the mesh to show.
func serverListener(name string) (*listenerv3.Listener, error) {
	host, port, err := serverAddress(name)
	if err != nil {
		return nil, err
	}
	chain, err := inboundChain("plaintext", false)
	if err != nil {
		return nil, err
	}
	// gRFC A36: "the xDS client ... must validate that the address of the Listener matches the
	// listening address", hence the very host and port that the server asked with.
	return &listenerv3.Listener{
		Name: name, Address: socketAddress(host, port), FilterChains: []*listenerv3.FilterChain{chain},
	}, nil
}

func inboundChain(name string, withTLS bool) (*listenerv3.FilterChain, error) {
	router, err := routerFilter()
	if err != nil {
		return nil, err
	}
	hcm, err := pack(&hcmv3.HttpConnectionManager{
		StatPrefix: "inbound",
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			Name: "inbound",
			VirtualHosts: []*routev3.VirtualHost{{
				Name: "inbound", Domains: []string{"*"},
				Routes: []*routev3.Route{{
					Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
					// gRFC A36: on a server "non_forwarding_action is expected for all Routes".
					Action: &routev3.Route_NonForwardingAction{NonForwardingAction: &routev3.NonForwardingAction{}},
				}},
			}},
		}},
		HttpFilters: []*hcmv3.HttpFilter{router},
	})
	if err != nil {
		return nil, err
	}
	chain := &listenerv3.FilterChain{Name: name, Filters: []*listenerv3.Filter{{
		Name:       "envoy.filters.network.http_connection_manager",
		ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: hcm},
	}}}
	if !withTLS {
		return chain, nil
	}
	ctx, err := pack(&tlsv3.DownstreamTlsContext{
		CommonTlsContext: &tlsv3.CommonTlsContext{
			AlpnProtocols:                  []string{"h2", "http/1.1"},
			TlsCertificateProviderInstance: certificates(),
			ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{
				ValidationContext: &tlsv3.CertificateValidationContext{CaCertificateProviderInstance: certificates()},
			},
		},
		RequireClientCertificate: wrapperspb.Bool(true),
	})
	if err != nil {
		return nil, err
	}
	chain.TransportSocket = tlsSocket(ctx)
	return chain, nil
}

// routerFilter is the only HTTP filter. gRFC A39: "Validation will fail if a terminal filter is
// not the last filter in the chain or if a non-terminal filter is the last filter in the chain."
func routerFilter() (*hcmv3.HttpFilter, error) {
	router, err := pack(&routerv3.Router{})
	if err != nil {
		return nil, err
	}
	return &hcmv3.HttpFilter{
		Name:       "envoy.filters.http.router",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: router},
	}, nil
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

func socketAddress(host string, port uint16) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       host,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}
