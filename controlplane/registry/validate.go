package registry

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// Bounds of what one instance may say of itself.
const (
	maxID        = 128
	maxLabels    = 64
	maxLabelKey  = 128
	maxText      = 256 // label values, localities, versions of the SDK
	maxPorts     = 64
	maxAddresses = 16
	maxSources   = 64
	maxWeight    = 10_000
)

// decode checks every field of an instance and makes the value; all faults come together. Identity
// and Expires are the caller's to set.
func decode(m *registrypb.Instance) (Instance, error) {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }

	if m.GetInstanceId() == "" || len(m.GetInstanceId()) > maxID || !printable(m.GetInstanceId()) {
		fault("instance_id %.140q: want 1 to %d visible ASCII characters", m.GetInstanceId(), maxID)
	}
	if err := identity.CheckService(m.GetNamespace(), m.GetService()); err != nil {
		faults = append(faults, err)
	}
	for _, f := range []struct {
		field, value string
		max          int
	}{
		{"run_id", m.GetRunId(), maxID},
		{"version", m.GetVersion(), 63},
		{"sdk_version", m.GetSdkVersion(), maxText},
		{"locality.region", m.GetLocality().GetRegion(), maxText},
		{"locality.zone", m.GetLocality().GetZone(), maxText},
		{"locality.sub_zone", m.GetLocality().GetSubZone(), maxText},
	} {
		if len(f.value) > f.max || !printable(f.value) {
			fault("%s %.80q: want at most %d visible ASCII characters", f.field, f.value, f.max)
		}
	}

	labels := maps.Clone(m.GetLabels())
	if len(labels) > maxLabels {
		fault("labels: %d of them: want at most %d", len(labels), maxLabels)
	} else {
		for k, v := range labels {
			if k == "" || len(k) > maxLabelKey || !printable(k) {
				fault("label %.140q: want a key of 1 to %d visible ASCII characters", k, maxLabelKey)
			}
			if len(v) > maxText || !printable(v) {
				fault("label %.140q: value %.80q: want at most %d visible ASCII characters", k, v, maxText)
			}
		}
	}
	version := m.GetVersion()
	if v, ok := labels["version"]; ok {
		if version != "" && v != version {
			fault("version %.80q and label version %.80q: want one of them, or the same", version, v)
		}
		version = v
	} else if version != "" {
		if labels == nil {
			labels = make(map[string]string, 1)
		}
		labels["version"] = version
	}

	weight := m.GetWeight()
	if weight == 0 {
		weight = 1
	}
	if weight > maxWeight {
		fault("weight %d: want 1 to %d", weight, maxWeight)
	}

	switch m.GetTls() {
	case registrypb.Tls_TLS_NONE, registrypb.Tls_TLS_MESH:
	default:
		fault("tls %v: want TLS_MESH (the program itself speaks mesh TLS) or TLS_NONE", m.GetTls())
	}

	ports, err := decodePorts(m.GetPorts())
	if err != nil {
		faults = append(faults, err)
	}
	addresses, err := decodeAddresses(m.GetAddresses())
	if err != nil {
		faults = append(faults, err)
	}
	if len(faults) > 0 {
		return Instance{}, errors.Join(faults...)
	}
	return Instance{
		ID: m.GetInstanceId(), Namespace: m.GetNamespace(), Service: m.GetService(),
		Version: version, Labels: labels,
		Locality: Locality{Region: m.GetLocality().GetRegion(), Zone: m.GetLocality().GetZone(), SubZone: m.GetLocality().GetSubZone()},
		Weight:   weight, Ports: ports, Addresses: addresses,
		MeshTLS:    m.GetTls() == registrypb.Tls_TLS_MESH,
		SDKVersion: m.GetSdkVersion(), RunID: m.GetRunId(),
	}, nil
}

func decodePorts(in []*registrypb.Port) ([]PortBinding, error) {
	if len(in) > maxPorts {
		return nil, fmt.Errorf("ports: %d of them: want at most %d", len(in), maxPorts)
	}
	if len(in) == 0 {
		return nil, nil // a workload that serves nobody
	}
	type number struct {
		port uint32
		udp  bool
	}
	var faults []error
	seen := make(map[number]bool, len(in))
	out := make([]PortBinding, 0, len(in))
	for i, p := range in {
		at := fmt.Sprintf("ports[%d]", i)
		n := number{p.GetPort(), p.GetProtocol() == registrypb.Protocol_PROTOCOL_UDP}
		if p.GetPort() < 1 || p.GetPort() > 65535 {
			faults = append(faults, fmt.Errorf("%s: port %d: want the service's port, 1 to 65535", at, p.GetPort()))
		} else if seen[n] {
			faults = append(faults, fmt.Errorf("%s: port %d is there twice: want a number once for UDP and once for what is over TCP", at, p.GetPort()))
		}
		seen[n] = true
		b := PortBinding{Port: uint16(p.GetPort())}
		switch p.GetProtocol() {
		case registrypb.Protocol_PROTOCOL_GRPC:
			b.Protocol = "GRPC"
		case registrypb.Protocol_PROTOCOL_HTTP:
			b.Protocol = "HTTP"
		case registrypb.Protocol_PROTOCOL_HTTP2:
			b.Protocol = "HTTP2"
		case registrypb.Protocol_PROTOCOL_TCP:
			b.Protocol = "TCP"
		case registrypb.Protocol_PROTOCOL_UDP:
			b.Protocol = "UDP"
		default:
			faults = append(faults, fmt.Errorf("%s: protocol %v: want PROTOCOL_GRPC, PROTOCOL_HTTP, PROTOCOL_HTTP2, PROTOCOL_TCP or PROTOCOL_UDP", at, p.GetProtocol()))
		}
		if n := len(p.GetAddresses()); n < 1 || n > maxAddresses {
			faults = append(faults, fmt.Errorf("%s: %d addresses: want 1 to %d", at, n, maxAddresses))
			continue
		}
		for _, s := range p.GetAddresses() {
			a, err := decodeAddress(s)
			if err != nil {
				faults = append(faults, fmt.Errorf("%s: address %.80q: %w", at, s, err))
				continue
			}
			b.Addresses = append(b.Addresses, a)
		}
		out = append(out, b)
	}
	return out, errors.Join(faults...)
}

// decodeAddresses reads the IPs that connections of a workload come from.
func decodeAddresses(in []string) ([]netip.Addr, error) {
	if len(in) > maxSources {
		return nil, fmt.Errorf("addresses: %d of them: want at most %d", len(in), maxSources)
	}
	var faults []error
	var out []netip.Addr
	for i, s := range in {
		a, err := netip.ParseAddr(s)
		a = a.Unmap()
		switch {
		case err != nil:
			faults = append(faults, fmt.Errorf("addresses[%d] %.80q: want an IP address, as 10.0.0.7 or fd00::7", i, s))
		case a.Zone() != "":
			faults = append(faults, fmt.Errorf("addresses[%d] %.80q: a zone means something on one machine only: want an address without it", i, s))
		case a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			faults = append(faults, fmt.Errorf("addresses[%d] %.80q: no connection comes from there: want the address of one machine", i, s))
		default:
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), errors.Join(faults...)
}

func decodeAddress(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}, errors.New("want ip:port, as 10.0.0.7:8080 or [fd00::7]:8080")
	}
	ip := a.Addr().Unmap()
	switch {
	case ip.IsUnspecified():
		return netip.AddrPort{}, errors.New("the unspecified address cannot be called: want one that others reach")
	case ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.AddrPort{}, errors.New("want the address of one machine")
	case ip.Zone() != "":
		return netip.AddrPort{}, errors.New("a zone means something on one machine only: want an address without it")
	case a.Port() == 0:
		return netip.AddrPort{}, errors.New("want a port, 1 to 65535")
	}
	return netip.AddrPortFrom(ip, a.Port()), nil
}

// printable reports whether s holds nothing but visible ASCII and spaces, so that it can stand in
// a log line, a table and a header.
func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
