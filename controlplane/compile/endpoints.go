package compile

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// notMesh is why a strict service's endpoint gets no call.
const notMesh = "the service is strict and this endpoint does not speak mesh TLS"

// candidate is an endpoint with what decides between two of the same address.
type candidate struct {
	ir.Endpoint
	expires time.Time // zero for static ones
}

// endpoints are the static and registered endpoints of one port, by instance id, then address.
// Each address is there once: EDS with an address twice is rejected by some clients.
func (b *builder) endpoints(n name, p port, declared *object.Service, mtls ir.MTLS) []ir.Endpoint {
	var all []candidate
	for _, in := range b.instances[n] {
		for _, pb := range in.Ports {
			if pb.Port != p.number || pb.UDP() != (p.protocol == ir.UDP) || len(pb.Addresses) == 0 {
				continue
			}
			e := ir.Endpoint{
				InstanceID: in.ID,
				Addresses:  pb.Addresses,
				Locality:   ir.Locality(in.Locality),
				Weight:     max(1, in.Weight),
				Labels:     in.Labels,
				MeshTLS:    in.MeshTLS,
			}
			if in.Draining {
				e.Health = ir.Draining
			}
			all = append(all, candidate{e, in.Expires})
		}
	}
	if declared != nil {
		for i := range declared.Endpoints {
			if e, ok := static(&declared.Endpoints[i], p.number); ok {
				all = append(all, candidate{Endpoint: e})
			}
		}
	}
	// Of two at one address the one that knows best counts: registered before static (it says when
	// it drains), not draining before draining, then the younger lease (a program that came back
	// where its predecessor crashed).
	slices.SortStableFunc(all, func(x, y candidate) int {
		return cmp.Or(compareBool(!x.Static, !y.Static), cmp.Compare(x.Health, y.Health), y.expires.Compare(x.expires), cmp.Compare(x.InstanceID, y.InstanceID))
	})
	taken := map[netip.AddrPort]bool{}
	var out []ir.Endpoint
	for _, c := range all {
		if slices.ContainsFunc(c.Addresses, func(a netip.AddrPort) bool { return taken[a] }) {
			continue
		}
		for _, a := range c.Addresses {
			taken[a] = true
		}
		if mtls == ir.Strict && !c.MeshTLS && !p.protocol.Plain() {
			c.Unreachable = notMesh
		}
		out = append(out, c.Endpoint)
	}
	slices.SortFunc(out, func(x, y ir.Endpoint) int {
		return cmp.Or(cmp.Compare(x.InstanceID, y.InstanceID), x.Addresses[0].Compare(y.Addresses[0]))
	})
	return out
}

// static returns the endpoint as it serves a port of its service, and whether it does.
func static(e *object.Endpoint, port uint16) (ir.Endpoint, bool) {
	out := ir.Endpoint{
		InstanceID: "static/" + e.Address.String(),
		Locality:   ir.Locality{Region: e.Region, Zone: e.Zone, SubZone: e.SubZone},
		Weight:     e.Weight,
		Labels:     e.Labels,
		MeshTLS:    e.MeshTLS,
		Static:     true,
		Source:     ir.Source(e.Pos),
	}
	addr := netip.AddrPortFrom(e.Address, port)
	if e.Port != 0 {
		if e.ServicePort != port {
			return out, false
		}
		addr = netip.AddrPortFrom(e.Address, e.Port)
		out.InstanceID = "static/" + addr.String()
	}
	out.Addresses = []netip.AddrPort{addr}
	return out, true
}
