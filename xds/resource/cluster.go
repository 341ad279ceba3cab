package resource

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/inlay-mesh/inlay/xds/meshpb/extpb"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// Type URLs and keys inside a cluster.
const (
	upstreamTLSType   = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
	rawBufferType     = "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
	httpOptionsKey    = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	httpOptionsType   = "type.googleapis.com/" + httpOptionsKey
	clusterPolicyType = "type.googleapis.com/inlay.ext.v1.ClusterPolicy"
)

// Defaults of the cluster's fields, by Envoy's documentation of them.
const (
	defaultConnectTimeout = 5 * time.Second // Cluster.connect_timeout
	defaultMaxRequests    = 1024            // Thresholds.max_requests
	defaultBudgetPercent  = 20              // RetryBudget.budget_percent
	defaultRetryMin       = 3               // as RetryBudget.min_retry_concurrency, but for each second
)

func (d *decoder) cluster(m *xdspb.Cluster) (*Cluster, error) {
	d.loose(m, nil)
	var root *path
	c := &Cluster{Name: m.GetName(), EndpointsName: m.GetName(), ConnectTimeout: defaultConnectTimeout, MaxRequests: defaultMaxRequests, RetryMinPerSecond: defaultRetryMin}

	t, ok := m.GetClusterDiscoveryType().(*xdspb.Cluster_Type)
	if !ok || t.Type != xdspb.DiscoveryType_DISCOVERY_TYPE_EDS {
		return nil, fmt.Errorf("discovery type %v: want EDS", m.GetClusterDiscoveryType())
	}
	eds := m.GetEdsClusterConfig()
	if eds == nil {
		return nil, errors.New("eds_cluster_config is not set: want one with eds_config")
	}
	d.loose(eds, root.field("eds_cluster_config"))
	if err := d.adsSource(eds.GetEdsConfig(), root.field("eds_cluster_config").field("eds_config")); err != nil {
		return nil, err
	}
	if n := eds.GetServiceName(); n != "" {
		c.EndpointsName = n
	}

	switch p := m.GetLbPolicy(); p {
	case xdspb.LbPolicy_LB_POLICY_ROUND_ROBIN:
		c.LB = RoundRobin
	case xdspb.LbPolicy_LB_POLICY_LEAST_REQUEST:
		c.LB = LeastRequest
	default:
		return nil, fmt.Errorf("lb_policy %v: want ROUND_ROBIN or LEAST_REQUEST", p)
	}
	var err error
	if m.GetConnectTimeout() != nil {
		if c.ConnectTimeout, err = duration("connect_timeout", m.GetConnectTimeout()); err != nil {
			return nil, err
		}
		if c.ConnectTimeout == 0 {
			return nil, errors.New("connect_timeout 0s: want more")
		}
	}
	policy, err := d.clusterPolicy(m, c)
	if err != nil {
		return nil, err
	}
	if err := d.thresholds(m.GetCircuitBreakers(), policy, c); err != nil {
		return nil, err
	}
	if err := d.protocol(m, c); err != nil {
		return nil, err
	}

	seen := map[string]bool{}
	for i, tm := range m.GetTransportSocketMatches() {
		at := root.item("transport_socket_matches", i)
		match, err := d.transportMatch(tm, at)
		if err != nil {
			return nil, fmt.Errorf("transport socket match %q: %w", tm.GetName(), err)
		}
		if tm.GetName() == "" || seen[tm.GetName()] {
			return nil, fmt.Errorf("transport socket match %d: name %q: want one that no other match of the cluster has", i, tm.GetName())
		}
		seen[tm.GetName()] = true
		c.Transports = append(c.Transports, *match)
	}
	if ts := m.GetTransportSocket(); ts != nil {
		if c.TLS, err = d.clientTransport(ts, root.field("transport_socket")); err != nil {
			return nil, fmt.Errorf("transport_socket: %w", err)
		}
	}
	return c, nil
}

// clusterPolicy reads Inlay's own metadata; nil when there is none.
func (d *decoder) clusterPolicy(m *xdspb.Cluster, c *Cluster) (*extpb.ClusterPolicy, error) {
	if m.GetMetadata() == nil {
		return nil, nil
	}
	at := (*path)(nil).field("metadata")
	d.loose(m.GetMetadata(), at)
	a := m.GetMetadata().GetTypedFilterMetadata()[metadataKey]
	if a == nil {
		return nil, nil
	}
	at = at.field(metadataKey)
	if a.GetTypeUrl() != clusterPolicyType {
		d.ignored(at)
		return nil, nil
	}
	p, err := unpack(a, &extpb.ClusterPolicy{})
	if err != nil {
		return nil, fmt.Errorf("metadata %q: %w", metadataKey, err)
	}
	d.loose(p, at)
	if p.RetryMinPerSecond != nil {
		c.RetryMinPerSecond = p.GetRetryMinPerSecond()
	}
	c.EmptyReason, c.SPIFFEID = p.GetEmptyReason(), p.GetSpiffeId()
	return p, nil
}

// thresholds reads the limits of the default priority; this client sends all calls with it.
func (d *decoder) thresholds(m *xdspb.CircuitBreakers, policy *extpb.ClusterPolicy, c *Cluster) error {
	if m == nil {
		return nil
	}
	root := (*path)(nil).field("circuit_breakers")
	d.loose(m, root)
	found := false
	for i, t := range m.GetThresholds() {
		at := root.item("thresholds", i)
		// gRFC A32: "gRPC will look only at the first entry in the list for priority DEFAULT."
		if t.GetPriority() != xdspb.RoutingPriority_ROUTING_PRIORITY_DEFAULT || found {
			d.ignored(at)
			continue
		}
		found = true
		d.loose(t, at)
		if n := t.GetMaxRequests(); n != nil {
			c.MaxRequests = n.GetValue()
		}
		b := t.GetRetryBudget()
		if b == nil {
			continue
		}
		at = at.field("retry_budget")
		d.loose(b, at)
		c.RetryBudgetPercent = defaultBudgetPercent
		if p := b.GetBudgetPercent(); p != nil {
			d.loose(p, at.field("budget_percent"))
			if v := p.GetValue(); !(v >= 0 && v <= 100) { // so written for NaN
				return fmt.Errorf("retry_budget.budget_percent %v: want 0 to 100", v)
			}
			c.RetryBudgetPercent = p.GetValue() + 0 // -0 becomes 0
		}
		// The floor of our budget counts retries each second; a sender that knows so says it in
		// ClusterPolicy, and the floor by concurrency is then for others.
		if b.GetMinRetryConcurrency() != nil && policy == nil {
			d.ignored(at.field("min_retry_concurrency"))
		}
	}
	return nil
}

func (d *decoder) protocol(m *xdspb.Cluster, c *Cluster) error {
	at := (*path)(nil).field("typed_extension_protocol_options")
	for _, k := range sortedKeys(m.GetTypedExtensionProtocolOptions()) {
		a, at := m.GetTypedExtensionProtocolOptions()[k], at.field(strconv.Quote(k))
		if k != httpOptionsKey || a.GetTypeUrl() != httpOptionsType {
			d.ignored(at)
			continue
		}
		o, err := unpack(a, &xdspb.UpstreamHttpProtocolOptions{})
		if err != nil {
			return err
		}
		d.loose(o, at)
		if common := o.GetCommonHttpProtocolOptions(); common != nil {
			at := at.field("common_http_protocol_options")
			d.loose(common, at)
			if common.GetIdleTimeout() != nil {
				d.ignored(at.field("idle_timeout"))
			}
			if common.GetMaxStreamDuration() != nil {
				d.ignored(at.field("max_stream_duration"))
			}
		}
		explicit := o.GetExplicitHttpConfig()
		if explicit == nil {
			continue // another choice is an unknown field, and listed
		}
		at = at.field("explicit_http_config")
		d.loose(explicit, at)
		switch p := explicit.GetProtocolConfig().(type) {
		case *xdspb.ExplicitHttpConfig_HttpProtocolOptions:
			d.loose(p.HttpProtocolOptions, at.field("http_protocol_options"))
		case *xdspb.ExplicitHttpConfig_Http2ProtocolOptions:
			d.loose(p.Http2ProtocolOptions, at.field("http2_protocol_options"))
			c.HTTP2 = true
		}
	}
	return nil
}

func (d *decoder) transportMatch(m *xdspb.TransportSocketMatch, at *path) (*TransportMatch, error) {
	// The match and the TLS context inside are both elements where nothing may be overlooked.
	if err := d.strict(m, at); err != nil {
		return nil, err
	}
	out := &TransportMatch{Name: m.GetName()}
	for _, k := range sortedKeys(m.GetMatch().GetFields()) {
		v, ok := m.GetMatch().GetFields()[k].GetKind().(*structpb.Value_StringValue)
		if !ok {
			return nil, fmt.Errorf("match %q: want a string value", k)
		}
		if out.Labels == nil {
			out.Labels = map[string]string{}
		}
		out.Labels[k] = v.StringValue
	}
	if m.GetTransportSocket() == nil {
		return nil, errors.New("transport_socket is not set: want a TLS context or the raw buffer")
	}
	var err error
	out.TLS, err = d.clientTransport(m.GetTransportSocket(), at.field("transport_socket"))
	return out, err
}

// clientTransport reads a client's transport socket; nil is plaintext.
func (d *decoder) clientTransport(m *xdspb.TransportSocket, at *path) (*ClientTLS, error) {
	switch t := m.GetTypedConfig().GetTypeUrl(); t {
	case rawBufferType:
		return nil, d.rawBuffer(m, at)
	case upstreamTLSType:
	default:
		return nil, fmt.Errorf("type %q: want %s or %s", t, upstreamTLSType, rawBufferType)
	}
	if err := d.strict(m, at); err != nil {
		return nil, err
	}
	ctx, err := unpack(m.GetTypedConfig(), &xdspb.UpstreamTlsContext{})
	if err != nil {
		return nil, err
	}
	// gRFC A29 has updates with other fields of the context NACKed "because ignoring these fields
	// compromises security".
	if err := d.strict(ctx, at.field("typed_config")); err != nil {
		return nil, err
	}
	common := ctx.GetCommonTlsContext()
	if common == nil {
		return nil, errors.New("common_tls_context is not set")
	}
	v, ok := common.GetValidationContextType().(*xdspb.CommonTlsContext_ValidationContext)
	if !ok {
		return nil, errors.New("how the peer is verified is not known to this client: want validation_context")
	}
	tls := &ClientTLS{ALPN: nonEmpty(common.GetAlpnProtocols())}
	for i, san := range v.ValidationContext.GetMatchSubjectAltNames() {
		exact, ok := san.GetMatchPattern().(*xdspb.StringMatcher_Exact)
		if !ok || exact.Exact == "" {
			return nil, fmt.Errorf("match_subject_alt_names[%d]: want exact with a SPIFFE ID", i)
		}
		tls.Peers = append(tls.Peers, exact.Exact)
	}
	if len(tls.Peers) == 0 {
		return nil, errors.New("match_subject_alt_names is empty: every certificate of the bundle would be accepted; want the SPIFFE IDs of the peer")
	}
	return tls, nil
}

// rawBuffer checks a plaintext transport socket. RawBuffer is an empty message, so every byte in
// it is a field that is not known.
func (d *decoder) rawBuffer(m *xdspb.TransportSocket, at *path) error {
	if err := d.strict(m, at); err != nil {
		return err
	}
	raw, err := unpack(m.GetTypedConfig(), &xdspb.Router{}) // any message without fields will do
	if err != nil {
		return err
	}
	d.loose(raw, at.field("typed_config"))
	return nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// nonEmpty copies s; nil when it is empty, so that equal values are equal in every way.
func nonEmpty[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return slices.Clone(s)
}
