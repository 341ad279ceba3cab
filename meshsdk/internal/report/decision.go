package report

import (
	"maps"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// ToProto is d as the wire carries it; nil gives nil. A route's name and conditions have no field
// there and stay behind.
func ToProto(d *call.Decision) *reportpb.Decision {
	if d == nil {
		return nil
	}
	out := &reportpb.Decision{
		Service:        d.Service,
		Revision:       d.Revision,
		Cluster:        d.Cluster,
		Limits:         d.Limits,
		Reason:         string(d.Reason),
		Detail:         d.Detail,
		RequestTimeout: duration(d.RequestTimeout),
		PerTryTimeout:  duration(d.PerTryTimeout),
		MaxRetries:     d.MaxRetries,
	}
	if d.Route != nil {
		out.Route = choice(*d.Route)
	}
	for _, s := range d.Skipped {
		out.Skipped = append(out.Skipped, &reportpb.SkippedRoute{Route: choice(s.Route), Why: s.Why})
	}
	for _, c := range d.Candidates {
		out.Candidates = append(out.Candidates, &reportpb.ClusterShare{Cluster: c.Cluster, Weight: c.Weight, Invalid: c.Invalid})
	}
	for _, e := range d.Endpoints {
		out.Endpoints = append(out.Endpoints, &reportpb.EndpointView{
			Address: e.Address, InstanceId: e.InstanceID, Labels: maps.Clone(e.Labels), Locality: e.Locality,
			Priority: e.Priority, Excluded: e.Excluded, Tls: e.TLS,
		})
	}
	for _, a := range d.Attempts {
		v := &reportpb.AttemptView{Endpoint: a.Endpoint, Took: durationpb.New(a.Took), Outcome: a.Outcome, Peer: a.Peer}
		if !a.Start.IsZero() {
			v.Start = timestamppb.New(a.Start)
		}
		out.Attempts = append(out.Attempts, v)
	}
	return out
}

func choice(r call.RouteChoice) *reportpb.RouteChoice {
	return &reportpb.RouteChoice{Object: r.Object, Rule: r.Rule, Source: r.Source}
}

// duration leaves out what is not set.
func duration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}
