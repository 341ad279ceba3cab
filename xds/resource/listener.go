package resource

import (
	"errors"
	"fmt"

	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// Type URLs inside a listener.
const (
	hcmType           = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
	routerType        = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
	downstreamTLSType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
)

func (d *decoder) listener(m *xdspb.Listener) (*Listener, error) {
	d.loose(m, nil)
	l := &Listener{Name: m.GetName()}
	if api := m.GetApiListener(); api != nil {
		at := (*path)(nil).field("api_listener")
		d.loose(api, at)
		at = at.field("api_listener")
		if t := api.GetApiListener().GetTypeUrl(); t != hcmType {
			return nil, fmt.Errorf("%s: type %q: want %s", at, t, hcmType)
		}
		hcm, err := unpack(api.GetApiListener(), &xdspb.HttpConnectionManager{})
		if err != nil {
			return nil, err
		}
		if l.API, err = d.http(hcm, at); err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
		if len(m.GetFilterChains()) > 0 {
			d.ignored((*path)(nil).field("filter_chains"))
		}
		if m.GetDefaultFilterChain() != nil {
			d.ignored((*path)(nil).field("default_filter_chain"))
		}
		return l, nil
	}

	if a := m.GetAddress(); a != nil {
		at := (*path)(nil).field("address")
		if _, err := d.address(a, at); err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
	}
	seen := map[string]int{}
	for i, fc := range m.GetFilterChains() {
		at := (*path)(nil).item("filter_chains", i)
		c, err := d.chain(fc, fc.GetFilterChainMatch(), at)
		if err != nil {
			return nil, fmt.Errorf("filter chain %d: %w", i, err)
		}
		// gRFC A36: "If the most-specific matching logic might not produce a unique result, then the
		// Listener must be NACKed. This case can only occur if there are duplicate matchers."
		if j, dup := seen[c.TransportProtocol]; dup {
			return nil, fmt.Errorf("filter chains %d and %d have the same match (transport_protocol %q): want each once", j, i, c.TransportProtocol)
		}
		seen[c.TransportProtocol] = i
		l.Chains = append(l.Chains, *c)
	}
	if fc := m.GetDefaultFilterChain(); fc != nil {
		at := (*path)(nil).field("default_filter_chain")
		c, err := d.chain(fc, nil, at)
		if err != nil {
			return nil, fmt.Errorf("default filter chain: %w", err)
		}
		// Listener.default_filter_chain: "The filter chain match is ignored in this field."
		if fc.GetFilterChainMatch() != nil {
			d.ignored(at.field("filter_chain_match"))
		}
		l.Default = c
	}
	if len(l.Chains) == 0 && l.Default == nil {
		return nil, errors.New("neither api_listener nor a filter chain is set: want the first for a client, the second for a server")
	}
	return l, nil
}

func (d *decoder) chain(m *xdspb.FilterChain, match *xdspb.FilterChainMatch, at *path) (*Chain, error) {
	d.loose(m, at)
	c := &Chain{}
	if match != nil {
		// An unknown condition would let the chain take connections that it was not written for.
		if err := d.strict(match, at.field("filter_chain_match")); err != nil {
			return nil, err
		}
		switch tp := match.GetTransportProtocol(); tp {
		case "", "tls", "raw_buffer":
			c.TransportProtocol = tp
		default:
			return nil, fmt.Errorf(`transport_protocol %q: want "tls", "raw_buffer" or none`, tp)
		}
	}
	if ts := m.GetTransportSocket(); ts != nil {
		at := at.field("transport_socket")
		switch t := ts.GetTypedConfig().GetTypeUrl(); t {
		case rawBufferType:
			if err := d.rawBuffer(ts, at); err != nil {
				return nil, err
			}
		case downstreamTLSType:
			tls, err := d.serverTLS(ts, at)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", at, err)
			}
			c.TLS = tls
		default:
			return nil, fmt.Errorf("%s: type %q: want %s or %s", at, t, downstreamTLSType, rawBufferType)
		}
	}
	// gRFC A36: the chain "is only valid if filters contains exactly one entry for the"
	// HttpConnectionManager "as the last entry in the list"; this client knows no other filter.
	if n := len(m.GetFilters()); n != 1 {
		return nil, fmt.Errorf("%d network filters: want one HttpConnectionManager", n)
	}
	f := m.GetFilters()[0]
	at = at.item("filters", 0)
	if err := d.strict(f, at); err != nil {
		return nil, err
	}
	at = at.field("typed_config")
	if t := f.GetTypedConfig().GetTypeUrl(); t != hcmType {
		return nil, fmt.Errorf("network filter %q: type %q: want %s", f.GetName(), t, hcmType)
	}
	hcm, err := unpack(f.GetTypedConfig(), &xdspb.HttpConnectionManager{})
	if err != nil {
		return nil, err
	}
	if c.HTTP, err = d.http(hcm, at); err != nil {
		return nil, fmt.Errorf("network filter %q: %w", f.GetName(), err)
	}
	return c, nil
}

func (d *decoder) http(m *xdspb.HttpConnectionManager, at *path) (*HTTP, error) {
	// gRFC A41: "xff_num_trusted_hops must be unset or zero and [...]
	// original_ip_detection_extensions must be empty. If either field has an incorrect value, the
	// Listener must be NACKed."
	const xffNumTrustedHops, originalIPDetection = 19, 46
	for _, num := range unknown(m.ProtoReflect()) {
		if num == xffNumTrustedHops || num == originalIPDetection {
			return nil, fmt.Errorf("field #%d (where the caller's address is read from): want it unset", num)
		}
	}
	d.loose(m, at)
	h := &HTTP{}
	if o := m.GetCommonHttpProtocolOptions(); o != nil {
		at := at.field("common_http_protocol_options")
		d.loose(o, at)
		var err error
		if h.MaxStreamDuration, err = duration("max_stream_duration", o.GetMaxStreamDuration()); err != nil {
			return nil, err
		}
		if o.GetIdleTimeout() != nil {
			d.ignored(at.field("idle_timeout"))
		}
	}
	switch rs := m.GetRouteSpecifier().(type) {
	case *xdspb.HttpConnectionManager_Rds:
		at := at.field("rds")
		d.loose(rs.Rds, at)
		if err := d.adsSource(rs.Rds.GetConfigSource(), at.field("config_source")); err != nil {
			return nil, err
		}
		if h.RouteName = rs.Rds.GetRouteConfigName(); h.RouteName == "" {
			return nil, errors.New("rds: route_config_name is empty: want the name of a route configuration")
		}
	case *xdspb.HttpConnectionManager_RouteConfig:
		rc, err := d.routeConfiguration(rs.RouteConfig, at.field("route_config"))
		if err != nil {
			return nil, fmt.Errorf("route_config: %w", err)
		}
		h.Inline = rc
	default:
		return nil, errors.New("neither rds nor route_config is set: want one of them")
	}
	return h, d.httpFilters(m.GetHttpFilters(), at)
}

// httpFilters checks the chain of filters. This client knows the router only.
func (d *decoder) httpFilters(filters []*xdspb.HttpFilter, at *path) error {
	// gRFC A39: "There must be at least one filter in the list, or the Listener resource will be
	// NACKed."
	if len(filters) == 0 {
		return errors.New("http_filters is empty: want the router as the last filter")
	}
	seen := map[string]bool{}
	last := false // whether the filter before was the router
	for i, f := range filters {
		at := at.item("http_filters", i)
		// gRFC A39: "Every filter in the list must have a unique instance name."
		if f.GetName() == "" || seen[f.GetName()] {
			return fmt.Errorf("http filter %d: name %q: want one that no other filter of the list has", i, f.GetName())
		}
		seen[f.GetName()] = true
		// gRFC A39: "validation will fail if a terminal filter is not the last filter in the chain or
		// if a non-terminal filter is the last filter in the chain".
		if last {
			return fmt.Errorf("http filter %q stands after the router: want the router last", f.GetName())
		}
		if f.GetTypedConfig().GetTypeUrl() != routerType {
			// gRFC A39: "Any unknown config type will cause the Listener resource to be NACKed, unless
			// the is_optional field is true, in which case the individual filter will be ignored."
			if !f.GetIsOptional() {
				return fmt.Errorf("http filter %q: type %q is not supported: want the router, or is_optional",
					f.GetName(), f.GetTypedConfig().GetTypeUrl())
			}
			d.ignored(at)
			continue
		}
		if err := d.strict(f, at); err != nil {
			return err
		}
		router, err := unpack(f.GetTypedConfig(), &xdspb.Router{})
		if err != nil {
			return err
		}
		if err := d.strict(router, at.field("typed_config")); err != nil {
			return fmt.Errorf("http filter %q: %w", f.GetName(), err)
		}
		last = true
	}
	if !last {
		return fmt.Errorf("http filter %q is the last: want the router there", filters[len(filters)-1].GetName())
	}
	return nil
}

func (d *decoder) serverTLS(ts *xdspb.TransportSocket, at *path) (*ServerTLS, error) {
	if err := d.strict(ts, at); err != nil {
		return nil, err
	}
	m, err := unpack(ts.GetTypedConfig(), &xdspb.DownstreamTlsContext{})
	if err != nil {
		return nil, err
	}
	if err := d.strict(m, at.field("typed_config")); err != nil {
		return nil, err
	}
	c := m.GetCommonTlsContext()
	// gRFC A29, of tls_certificate_provider_instance on a server: "If this field is not present
	// [...] gRPC will NACK the LDS update." The server of this SDK shows its SVID whatever the name.
	if c.GetTlsCertificateProviderInstance() == nil {
		return nil, errors.New("tls_certificate_provider_instance is not set: a server needs a certificate")
	}
	t := &ServerTLS{RequireClientCertificate: m.GetRequireClientCertificate().GetValue()}
	// gRFC A29: "if require_client_certificate is true, and if no CertificateValidationContext is
	// provided, gRPC will NACK the LDS resource", and so without a CA in it.
	if t.RequireClientCertificate && c.GetValidationContext().GetCaCertificateProviderInstance() == nil {
		return nil, errors.New("require_client_certificate without validation_context.ca_certificate_provider_instance: nothing would check the certificate")
	}
	// gRFC A29: "On the server side an implementation may support this field and its semantics, or
	// NACK the update"; who may call is for RBAC to say.
	if len(c.GetValidationContext().GetMatchSubjectAltNames()) > 0 {
		return nil, errors.New("match_subject_alt_names in a server's context: want none")
	}
	return t, nil
}
