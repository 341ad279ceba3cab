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

// FromProto is the reverse of ToProto; nil gives nil. It takes whatever the wire holds: an absent
// or invalid time is the zero time.
func FromProto(m *reportpb.Decision) *call.Decision {
	if m == nil {
		return nil
	}
	d := &call.Decision{
		Service:        m.GetService(),
		Revision:       m.GetRevision(),
		Cluster:        m.GetCluster(),
		Limits:         m.GetLimits(),
		Reason:         call.Reason(m.GetReason()),
		Detail:         m.GetDetail(),
		RequestTimeout: m.GetRequestTimeout().AsDuration(),
		PerTryTimeout:  m.GetPerTryTimeout().AsDuration(),
		MaxRetries:     m.GetMaxRetries(),
	}
	if r := m.GetRoute(); r != nil {
		c := choiceOf(r)
		d.Route = &c
	}
	for _, s := range m.GetSkipped() {
		d.Skipped = append(d.Skipped, call.SkippedRoute{Route: choiceOf(s.GetRoute()), Why: s.GetWhy()})
	}
	for _, c := range m.GetCandidates() {
		d.Candidates = append(d.Candidates, call.ClusterShare{Cluster: c.GetCluster(), Weight: c.GetWeight(), Invalid: c.GetInvalid()})
	}
	for _, e := range m.GetEndpoints() {
		d.Endpoints = append(d.Endpoints, call.EndpointView{
			Address: e.GetAddress(), InstanceID: e.GetInstanceId(), Labels: maps.Clone(e.GetLabels()), Locality: e.GetLocality(),
			Priority: e.GetPriority(), Excluded: e.GetExcluded(), TLS: e.GetTls(),
		})
	}
	for _, a := range m.GetAttempts() {
		v := call.AttemptView{Endpoint: a.GetEndpoint(), Took: a.GetTook().AsDuration(), Outcome: a.GetOutcome(), Peer: a.GetPeer()}
		if a.GetStart().CheckValid() == nil {
			v.Start = a.GetStart().AsTime()
		}
		d.Attempts = append(d.Attempts, v)
	}
	return d
}

func choiceOf(r *reportpb.RouteChoice) call.RouteChoice {
	return call.RouteChoice{Object: r.GetObject(), Rule: r.GetRule(), Source: r.GetSource()}
}
