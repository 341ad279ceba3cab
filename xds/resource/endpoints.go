package resource

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// Keys of an endpoint's metadata.
const (
	labelsKey         = "envoy.lb"
	transportMatchKey = "envoy.transport_socket_match"
)

func (d *decoder) endpoints(m *xdspb.ClusterLoadAssignment) (*Endpoints, error) {
	d.loose(m, nil)
	e := &Endpoints{Cluster: m.GetClusterName()}
	type place struct {
		region, zone, subZone string
		priority              uint32
	}
	seen := map[place]bool{}
	weights := map[uint32]uint64{} // by priority
	addresses := map[netip.AddrPort]bool{}
	for i, l := range m.GetEndpoints() {
		at := (*path)(nil).item("endpoints", i)
		// gRFC A27: "If the load_balancing_weight field is unset, the endpoints entry is skipped".
		// Nothing in it is used, so nothing in it is checked.
		if l.GetLoadBalancingWeight().GetValue() == 0 {
			continue
		}
		d.loose(l, at)
		loc, err := d.locality(l, at)
		if err != nil {
			return nil, fmt.Errorf("locality %d: %w", i, err)
		}
		for _, ep := range loc.Endpoints {
			for _, a := range ep.Addresses {
				// gRFC A27: "The endpoint address must be unique within the cluster (across all
				// priorities and localities); if an address is duplicated, the resource will be
				// considered invalid."
				if addresses[a] {
					return nil, fmt.Errorf("address %s stands twice: want each once in a cluster", a)
				}
				addresses[a] = true
			}
		}
		p := place{loc.Region, loc.Zone, loc.SubZone, loc.Priority}
		// gRFC A27: "The locality field must be unique within a given priority."
		if seen[p] {
			return nil, fmt.Errorf("locality %d: region %q, zone %q, sub-zone %q stands twice at priority %d: want once", i, p.region, p.zone, p.subZone, p.priority)
		}
		seen[p] = true
		// gRFC A27: "If the sum of the locality weights within a priority exceeds the max value of a
		// uint32, the resource will be considered invalid."
		if weights[p.priority] += uint64(loc.Weight); weights[p.priority] > math.MaxUint32 {
			return nil, fmt.Errorf("localities of priority %d: total weight %d: want at most %d", p.priority, weights[p.priority], uint32(math.MaxUint32))
		}
		e.Localities = append(e.Localities, *loc)
	}
	// gRFC A27: "The priority list must not have any gaps in it"; checked over what is used.
	for p := range uint32(len(weights)) {
		if _, ok := weights[p]; !ok {
			return nil, fmt.Errorf("no locality of priority %d, but of later ones: want priorities from 0 without gaps", p)
		}
	}
	return e, nil
}

func (d *decoder) locality(m *xdspb.LocalityLbEndpoints, at *path) (*Locality, error) {
	l := &Locality{
		Region: m.GetLocality().GetRegion(), Zone: m.GetLocality().GetZone(), SubZone: m.GetLocality().GetSubZone(),
		Weight: m.GetLoadBalancingWeight().GetValue(), Priority: m.GetPriority(),
	}
	if m.GetLocality() != nil {
		d.loose(m.GetLocality(), at.field("locality"))
	}
	var total uint64
	for i, lb := range m.GetLbEndpoints() {
		ep, err := d.endpoint(lb, at.item("lb_endpoints", i))
		if err != nil {
			return nil, fmt.Errorf("endpoint %d: %w", i, err)
		}
		// LbEndpoint.load_balancing_weight: "The sum of the weights of all endpoints in the
		// endpoint's locality must not exceed uint32_t maximal value (4294967295)."
		if total += uint64(ep.Weight); total > math.MaxUint32 {
			return nil, fmt.Errorf("total weight of the endpoints is over %d", uint32(math.MaxUint32))
		}
		l.Endpoints = append(l.Endpoints, *ep)
	}
	return l, nil
}

func (d *decoder) endpoint(m *xdspb.LbEndpoint, at *path) (*Endpoint, error) {
	d.loose(m, at)
	ep := &Endpoint{Weight: 1}
	// LbEndpoint.load_balancing_weight: "If unspecified, will be treated as 1."; so is 0, which no
	// sender may send.
	if w := m.GetLoadBalancingWeight().GetValue(); w > 0 {
		ep.Weight = w
	}
	switch h := m.GetHealthStatus(); h {
	case xdspb.HealthStatus_HEALTH_STATUS_UNKNOWN:
		ep.Health = HealthUnknown
	case xdspb.HealthStatus_HEALTH_STATUS_HEALTHY:
		ep.Health = Healthy
	case xdspb.HealthStatus_HEALTH_STATUS_DRAINING:
		ep.Health = Draining
	case xdspb.HealthStatus_HEALTH_STATUS_UNHEALTHY, xdspb.HealthStatus_HEALTH_STATUS_TIMEOUT, xdspb.HealthStatus_HEALTH_STATUS_DEGRADED:
		// gRFC A27: "If the health_status field has any value other than HEALTHY or UNKNOWN, the
		// entry will be ignored."
		ep.Health = Unhealthy
	default:
		d.ignored(at.field("health_status"))
		ep.Health = Unhealthy
	}
	host, ok := m.GetHostIdentifier().(*xdspb.LbEndpoint_Endpoint)
	if !ok {
		return nil, errors.New("the host is not given by endpoint: want endpoint with an address")
	}
	at = at.field("endpoint")
	d.loose(host.Endpoint, at)
	ep.Hostname = host.Endpoint.GetHostname()
	a, err := d.address(host.Endpoint.GetAddress(), at.field("address"))
	if err != nil {
		return nil, err
	}
	ep.Addresses = append(ep.Addresses, a)
	for i, more := range host.Endpoint.GetAdditionalAddresses() {
		at := at.item("additional_addresses", i)
		d.loose(more, at)
		a, err := d.address(more.GetAddress(), at.field("address"))
		if err != nil {
			return nil, fmt.Errorf("additional address %d: %w", i, err)
		}
		ep.Addresses = append(ep.Addresses, a)
	}
	if md := m.GetMetadata(); md != nil {
		d.metadata(md, at.up.field("metadata"), ep)
	}
	return ep, nil
}

func (d *decoder) metadata(m *xdspb.Metadata, at *path, ep *Endpoint) {
	d.loose(m, at)
	fm := m.GetFilterMetadata()
	ep.Labels = d.texts(fm[labelsKey], at.field(labelsKey))
	ep.TransportMatch = d.texts(fm[transportMatchKey], at.field(transportMatchKey))
	own := fm[metadataKey].GetFields()
	for _, k := range sortedKeys(own) {
		v, ok := own[k].GetKind().(*structpb.Value_StringValue)
		if k != "instance" || !ok {
			d.ignored(at.field(metadataKey).field(k))
			continue
		}
		ep.InstanceID = v.StringValue
	}
}

// address reads an IP address and port (gRFC A27: "The address field must be set to an IPv4 or IPv6
// address."); names are for the sender to resolve.
func (d *decoder) address(m *xdspb.Address, at *path) (netip.AddrPort, error) {
	var none netip.AddrPort
	sa := m.GetSocketAddress()
	if sa == nil {
		return none, errors.New("address is not a socket_address: want an IP address and a port")
	}
	d.loose(m, at)
	at = at.field("socket_address")
	d.loose(sa, at)
	if p := sa.GetProtocol(); p != xdspb.SocketProtocol_SOCKET_PROTOCOL_TCP {
		return none, fmt.Errorf("address %q: protocol %v: want TCP", sa.GetAddress(), p)
	}
	ip, err := netip.ParseAddr(sa.GetAddress())
	if err != nil {
		return none, fmt.Errorf("address %q: want an IP address", sa.GetAddress())
	}
	port, ok := sa.GetPortSpecifier().(*xdspb.SocketAddress_PortValue)
	if !ok || port.PortValue > math.MaxUint16 {
		return none, fmt.Errorf("address %q: port %d: want port_value of 0 to 65535", sa.GetAddress(), sa.GetPortValue())
	}
	return netip.AddrPortFrom(ip, uint16(port.PortValue)), nil
}
