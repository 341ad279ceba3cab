// Command xdstrim writes the trimmed copy of the xDS messages that the SDK links: the messages
// and fields named in the table below, with the numbers and types of the real descriptors, under
// the package inlay.xds.v3. What is left out stays in the unknown fields of a decoded message,
// which is how a client learns what it does not honour (ARCHITECTURE, decision 4).
//
// Run it through `make generate`; it prints one .proto file.
package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// message says which fields of one real message are kept, and under which name it is written.
type message struct {
	real   protoreflect.FullName
	name   string // as written; nested real messages become top-level ones
	fields string // blank-separated
}

var kept = []message{
	{"envoy.service.discovery.v3.DiscoveryRequest", "DiscoveryRequest", "version_info node resource_names type_url response_nonce error_detail"},
	{"envoy.service.discovery.v3.DiscoveryResponse", "DiscoveryResponse", "version_info resources type_url nonce"},
	{"envoy.service.discovery.v3.DeltaDiscoveryRequest", "DeltaDiscoveryRequest", "node type_url resource_names_subscribe resource_names_unsubscribe initial_resource_versions response_nonce error_detail"},
	{"envoy.service.discovery.v3.DeltaDiscoveryResponse", "DeltaDiscoveryResponse", "system_version_info resources type_url removed_resources nonce"},
	{"envoy.service.discovery.v3.Resource", "Resource", "name version resource"},

	{"envoy.config.core.v3.Node", "Node", "id cluster metadata locality user_agent_name user_agent_version client_features"},
	{"envoy.config.core.v3.Locality", "Locality", "region zone sub_zone"},
	{"envoy.config.core.v3.Metadata", "Metadata", "filter_metadata typed_filter_metadata"},
	{"envoy.config.core.v3.Address", "Address", "socket_address"},
	{"envoy.config.core.v3.SocketAddress", "SocketAddress", "protocol address port_value"},
	{"envoy.config.core.v3.ConfigSource", "ConfigSource", "ads self resource_api_version"},
	{"envoy.config.core.v3.AggregatedConfigSource", "AggregatedConfigSource", ""},
	{"envoy.config.core.v3.SelfConfigSource", "SelfConfigSource", ""},
	{"envoy.config.core.v3.TransportSocket", "TransportSocket", "name typed_config"},
	{"envoy.config.core.v3.HttpProtocolOptions", "HttpProtocolOptions", "idle_timeout max_stream_duration"},
	{"envoy.config.core.v3.Http1ProtocolOptions", "Http1ProtocolOptions", ""},
	{"envoy.config.core.v3.Http2ProtocolOptions", "Http2ProtocolOptions", ""},

	{"envoy.config.listener.v3.Listener", "Listener", "name address filter_chains default_filter_chain api_listener"},
	{"envoy.config.listener.v3.ApiListener", "ApiListener", "api_listener"},
	{"envoy.config.listener.v3.FilterChain", "FilterChain", "name filter_chain_match filters transport_socket"},
	{"envoy.config.listener.v3.FilterChainMatch", "FilterChainMatch", "transport_protocol"},
	{"envoy.config.listener.v3.Filter", "Filter", "name typed_config"},

	{"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", "HttpConnectionManager", "stat_prefix rds route_config http_filters common_http_protocol_options"},
	{"envoy.extensions.filters.network.http_connection_manager.v3.Rds", "Rds", "config_source route_config_name"},
	{"envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter", "HttpFilter", "name typed_config is_optional"},
	{"envoy.extensions.filters.http.router.v3.Router", "Router", ""},

	{"envoy.config.route.v3.RouteConfiguration", "RouteConfiguration", "name virtual_hosts"},
	{"envoy.config.route.v3.VirtualHost", "VirtualHost", "name domains routes"},
	{"envoy.config.route.v3.Route", "Route", "name match route non_forwarding_action metadata"},
	{"envoy.config.route.v3.RouteMatch", "RouteMatch", "prefix path safe_regex path_separated_prefix headers"},
	{"envoy.config.route.v3.HeaderMatcher", "HeaderMatcher", "name string_match"},
	{"envoy.type.matcher.v3.RegexMatcher", "RegexMatcher", "regex"},
	{"envoy.type.matcher.v3.StringMatcher", "StringMatcher", "exact"},
	{"envoy.config.route.v3.NonForwardingAction", "NonForwardingAction", ""},
	{"envoy.config.route.v3.RouteAction", "RouteAction", "cluster weighted_clusters timeout idle_timeout retry_policy max_stream_duration"},
	{"envoy.config.route.v3.RouteAction.MaxStreamDuration", "MaxStreamDuration", "max_stream_duration grpc_timeout_header_max"},
	{"envoy.config.route.v3.WeightedCluster", "WeightedCluster", "clusters"},
	{"envoy.config.route.v3.WeightedCluster.ClusterWeight", "ClusterWeight", "name weight"},
	{"envoy.config.route.v3.RetryPolicy", "RetryPolicy", "retry_on num_retries per_try_timeout retriable_status_codes retry_back_off"},
	{"envoy.config.route.v3.RetryPolicy.RetryBackOff", "RetryBackOff", "base_interval max_interval"},

	{"envoy.config.cluster.v3.Cluster", "Cluster", "name type eds_cluster_config connect_timeout lb_policy circuit_breakers typed_extension_protocol_options transport_socket transport_socket_matches metadata"},
	{"envoy.config.cluster.v3.Cluster.EdsClusterConfig", "EdsClusterConfig", "eds_config service_name"},
	{"envoy.config.cluster.v3.Cluster.TransportSocketMatch", "TransportSocketMatch", "name match transport_socket"},
	{"envoy.config.cluster.v3.CircuitBreakers", "CircuitBreakers", "thresholds"},
	{"envoy.config.cluster.v3.CircuitBreakers.Thresholds", "Thresholds", "priority max_requests retry_budget"},
	{"envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget", "RetryBudget", "budget_percent min_retry_concurrency"},
	{"envoy.type.v3.Percent", "Percent", "value"},
	{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "UpstreamHttpProtocolOptions", "common_http_protocol_options explicit_http_config"},
	{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig", "ExplicitHttpConfig", "http_protocol_options http2_protocol_options"},

	{"envoy.config.endpoint.v3.ClusterLoadAssignment", "ClusterLoadAssignment", "cluster_name endpoints"},
	{"envoy.config.endpoint.v3.LocalityLbEndpoints", "LocalityLbEndpoints", "locality lb_endpoints load_balancing_weight priority"},
	{"envoy.config.endpoint.v3.LbEndpoint", "LbEndpoint", "endpoint health_status metadata load_balancing_weight"},
	{"envoy.config.endpoint.v3.Endpoint", "Endpoint", "address hostname additional_addresses"},
	{"envoy.config.endpoint.v3.Endpoint.AdditionalAddress", "AdditionalAddress", "address"},

	{"envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "UpstreamTlsContext", "common_tls_context"},
	{"envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", "DownstreamTlsContext", "common_tls_context require_client_certificate"},
	{"envoy.extensions.transport_sockets.tls.v3.CommonTlsContext", "CommonTlsContext", "alpn_protocols tls_certificate_provider_instance validation_context"},
	{"envoy.extensions.transport_sockets.tls.v3.CertificateProviderPluginInstance", "CertificateProviderPluginInstance", "instance_name certificate_name"},
	{"envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext", "CertificateValidationContext", "ca_certificate_provider_instance match_subject_alt_names"},
}

// enums maps the real enums that kept fields use to the name they are written under.
var enums = map[protoreflect.FullName]string{
	"envoy.config.core.v3.ApiVersion":               "ApiVersion",
	"envoy.config.core.v3.HealthStatus":             "HealthStatus",
	"envoy.config.core.v3.RoutingPriority":          "RoutingPriority",
	"envoy.config.core.v3.SocketAddress.Protocol":   "SocketProtocol",
	"envoy.config.cluster.v3.Cluster.DiscoveryType": "DiscoveryType",
	"envoy.config.cluster.v3.Cluster.LbPolicy":      "LbPolicy",
}

const header = `// Code generated by tools/xdstrim. DO NOT EDIT.
//
// The xDS messages that this client reads, with the field numbers of the real ones.
syntax = "proto3";

package inlay.xds.v3;

import "google/protobuf/any.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/struct.proto";
import "google/protobuf/wrappers.proto";
import "google/rpc/status.proto";

option go_package = "github.com/inlay-mesh/inlay/xds/xdspb";
`

func main() {
	if err := write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "xdstrim:", err)
		os.Exit(1)
	}
}

func write(w io.Writer) error {
	names := map[protoreflect.FullName]string{}
	for _, m := range kept {
		names[m.real] = m.name
	}
	fmt.Fprint(w, header)
	used := map[protoreflect.FullName]bool{}
	for _, m := range kept {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(m.real)
		if err != nil {
			return fmt.Errorf("message %s: %w", m.real, err)
		}
		if err := writeMessage(w, m, d.(protoreflect.MessageDescriptor), names, used); err != nil {
			return fmt.Errorf("message %s: %w", m.real, err)
		}
	}
	var es []protoreflect.FullName
	for e := range used {
		es = append(es, e)
	}
	slices.Sort(es)
	for _, e := range es {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(e)
		if err != nil {
			return fmt.Errorf("enum %s: %w", e, err)
		}
		writeEnum(w, enums[e], d.(protoreflect.EnumDescriptor))
	}
	return nil
}

func writeMessage(w io.Writer, m message, d protoreflect.MessageDescriptor, names map[protoreflect.FullName]string, used map[protoreflect.FullName]bool) error {
	fmt.Fprintf(w, "\n// %s is %s.\nmessage %s {\n", m.name, m.real, m.name)
	oneofs := map[protoreflect.Name][]string{}
	var order []protoreflect.Name
	for _, name := range strings.Fields(m.fields) {
		f := d.Fields().ByName(protoreflect.Name(name))
		if f == nil {
			return fmt.Errorf("no field %q", name)
		}
		typ, err := typeOf(f, names, used)
		if err != nil {
			return fmt.Errorf("field %s: %w", name, err)
		}
		line := fmt.Sprintf("%s %s = %d;", typ, f.Name(), f.Number())
		if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
			if oneofs[o.Name()] == nil {
				order = append(order, o.Name())
			}
			oneofs[o.Name()] = append(oneofs[o.Name()], line)
			continue
		}
		if f.IsList() {
			line = "repeated " + line
		} else if f.HasOptionalKeyword() {
			line = "optional " + line
		}
		fmt.Fprintf(w, "  %s\n", line)
	}
	for _, o := range order {
		fmt.Fprintf(w, "  oneof %s {\n", o)
		for _, line := range oneofs[o] {
			fmt.Fprintf(w, "    %s\n", line)
		}
		fmt.Fprint(w, "  }\n")
	}
	fmt.Fprint(w, "}\n")
	return nil
}

// typeOf writes the type of a field: a scalar, a well-known message, a kept message or enum.
func typeOf(f protoreflect.FieldDescriptor, names map[protoreflect.FullName]string, used map[protoreflect.FullName]bool) (string, error) {
	if f.IsMap() {
		v, err := typeOf(f.MapValue(), names, used)
		return fmt.Sprintf("map<%s, %s>", f.MapKey().Kind(), v), err
	}
	switch f.Kind() {
	case protoreflect.MessageKind:
		full := f.Message().FullName()
		if strings.HasPrefix(string(full), "google.") {
			return string(full), nil
		}
		if n, ok := names[full]; ok {
			return n, nil
		}
		return "", fmt.Errorf("message %s is not in the table", full)
	case protoreflect.EnumKind:
		full := f.Enum().FullName()
		n, ok := enums[full]
		if !ok {
			return "", fmt.Errorf("enum %s is not in the table", full)
		}
		used[full] = true
		return n, nil
	default:
		return f.Kind().String(), nil
	}
}

// writeEnum prefixes each value with the enum's name, as values share their package's scope.
func writeEnum(w io.Writer, name string, d protoreflect.EnumDescriptor) {
	fmt.Fprintf(w, "\n// %s is %s.\nenum %s {\n", name, d.FullName(), name)
	for i := range d.Values().Len() {
		v := d.Values().Get(i)
		fmt.Fprintf(w, "  %s_%s = %d;\n", screaming(name), v.Name(), v.Number())
	}
	fmt.Fprint(w, "}\n")
}

func screaming(name string) string {
	var b strings.Builder
	for i, r := range name {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return strings.ToUpper(b.String())
}
