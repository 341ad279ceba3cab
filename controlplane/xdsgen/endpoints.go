package xdsgen

import (
	"cmp"
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// place is where a group of endpoints stands in an assignment.
type place struct {
	priority uint32 // as in ir, not yet dense
	locality ir.Locality
}

func comparePlaces(a, b place) int {
	return cmp.Or(
		cmp.Compare(a.priority, b.priority),
		cmp.Compare(a.locality.Region, b.locality.Region),
		cmp.Compare(a.locality.Zone, b.locality.Zone),
		cmp.Compare(a.locality.SubZone, b.locality.SubZone),
	)
}

// assignment makes the endpoints resource of a cluster and the ids of its healthy instances.
// Endpoints that nobody may call are left out, and of two at one address the better one stays.
func assignment(name string, endpoints []ir.Endpoint) (*endpointv3.ClusterLoadAssignment, []string) {
	groups := map[place][]ir.Endpoint{}
	var healthy []string
	for _, e := range callable(endpoints) {
		p := place{e.Priority, e.Locality}
		groups[p] = append(groups[p], e)
		if e.Health == ir.Healthy && e.InstanceID != "" {
			healthy = append(healthy, e.InstanceID)
		}
	}
	places := make([]place, 0, len(groups))
	for p := range groups {
		places = append(places, p)
	}
	slices.SortFunc(places, comparePlaces)

	out := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	var dense uint32
	for i, p := range places {
		// gRFC A27: priorities must be dense, without a gap from 0.
		if i > 0 && p.priority != places[i-1].priority {
			dense++
		}
		out.Endpoints = append(out.Endpoints, locality(p.locality, dense, groups[p]))
	}
	slices.Sort(healthy)
	return out, slices.Compact(healthy)
}

// locality groups the endpoints of one locality. gRFC A27: "If not specified or zero, the locality
// is ignored", so that every locality carries a weight: the one it was given, else 1 for each
// endpoint that takes calls, by which each of them takes the same share.
func locality(l ir.Locality, priority uint32, endpoints []ir.Endpoint) *endpointv3.LocalityLbEndpoints {
	out := &endpointv3.LocalityLbEndpoints{
		Locality: &corev3.Locality{Region: l.Region, Zone: l.Zone, SubZone: l.SubZone},
		Priority: priority,
	}
	var given, taking uint32
	for i := range endpoints {
		given = max(given, endpoints[i].LocalityWeight)
		if endpoints[i].Health == ir.Healthy {
			taking++
		}
		out.LbEndpoints = append(out.LbEndpoints, endpoint(&endpoints[i]))
	}
	if given == 0 {
		given = max(taking, 1)
	}
	out.LoadBalancingWeight = wrapperspb.UInt32(given)
	return out
}

func endpoint(e *ir.Endpoint) *endpointv3.LbEndpoint {
	ep := &endpointv3.Endpoint{Address: socketAddress(e.Addresses[0].Addr().String(), e.Addresses[0].Port())}
	for _, a := range e.Addresses[1:] {
		ep.AdditionalAddresses = append(ep.AdditionalAddresses, &endpointv3.Endpoint_AdditionalAddress{
			Address: socketAddress(a.Addr().String(), a.Port()),
		})
	}
	tls := "none"
	if e.MeshTLS {
		tls = "mesh"
	}
	metadata := map[string]*structpb.Struct{
		"envoy.transport_socket_match": stringStruct(map[string]string{tlsLabel: tls}),
	}
	if len(e.Labels) > 0 {
		metadata["envoy.lb"] = stringStruct(e.Labels)
	}
	if e.InstanceID != "" {
		metadata[extensionKey] = stringStruct(map[string]string{"instance": e.InstanceID})
	}
	return &endpointv3.LbEndpoint{
		HostIdentifier:      &endpointv3.LbEndpoint_Endpoint{Endpoint: ep},
		HealthStatus:        health(e.Health),
		LoadBalancingWeight: wrapperspb.UInt32(max(e.Weight, 1)),
		Metadata:            &corev3.Metadata{FilterMetadata: metadata},
	}
}

func health(h ir.Health) corev3.HealthStatus {
	switch h {
	case ir.Draining:
		return corev3.HealthStatus_DRAINING
	case ir.Unhealthy:
		return corev3.HealthStatus_UNHEALTHY
	}
	return corev3.HealthStatus_HEALTHY
}

// callable returns the endpoints that may be called, in their order. gRPC rejects the whole
// resource for one address that stands in it twice (a restarted program on its old port, say, or
// a static endpoint that registers too), so that each address stays with the endpoint that is
// healthier, then speaks mesh TLS, then registered itself, then comes first.
func callable(endpoints []ir.Endpoint) []ir.Endpoint {
	order := make([]int, 0, len(endpoints))
	for i := range endpoints {
		if endpoints[i].Unreachable == "" && len(endpoints[i].Addresses) > 0 {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(i, j int) int {
		a, b := &endpoints[i], &endpoints[j]
		return cmp.Or(cmp.Compare(a.Health, b.Health), falseLast(a.MeshTLS, b.MeshTLS), falseLast(!a.Static, !b.Static))
	})
	taken := make(map[netip.AddrPort]bool, len(order))
	keep := make(map[int][]netip.AddrPort, len(order))
	for _, i := range order {
		var free []netip.AddrPort
		for _, a := range endpoints[i].Addresses {
			if !taken[a] {
				taken[a] = true
				free = append(free, a)
			}
		}
		if len(free) > 0 {
			keep[i] = free
		}
	}
	out := make([]ir.Endpoint, 0, len(keep))
	for i := range endpoints {
		if free, ok := keep[i]; ok {
			e := endpoints[i]
			e.Addresses = free
			out = append(out, e)
		}
	}
	return out
}

func falseLast(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}
