package report_test

import (
	"maps"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// fromProto is the reverse of report.ToProto; nil gives nil. It takes whatever the wire holds: an absent
// or invalid time is the zero time.
func fromProto(m *reportpb.Decision) *call.Decision {
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
