package admin

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

// GetStatus is the control plane at a glance.
func (s *Server) GetStatus(context.Context, *connect.Request[adminpb.GetStatusRequest]) (*connect.Response[adminpb.StatusResponse], error) {
	out := s.cfg.State.Status()
	out.Revision = s.cfg.State.Revision()
	if mesh := s.cfg.State.Mesh(); mesh != nil {
		for i := range mesh.Services {
			if mesh.Services[i].Unknown != "" {
				continue
			}
			out.Services++
			all, _ := countEndpoints(&mesh.Services[i])
			out.Endpoints += all
		}
	}
	out.Clients = uint32(len(s.cfg.State.Clients(false)))
	return connect.NewResponse(out), nil
}

// ListServices lists the services that configuration or registry know.
func (s *Server) ListServices(context.Context, *connect.Request[adminpb.ListServicesRequest]) (*connect.Response[adminpb.ListServicesResponse], error) {
	out := &adminpb.ListServicesResponse{}
	mesh := s.cfg.State.Mesh()
	if mesh == nil {
		return connect.NewResponse(out), nil
	}
	for i := range mesh.Services {
		svc := &mesh.Services[i]
		if svc.Unknown != "" {
			continue
		}
		row := &adminpb.Service{Namespace: svc.Namespace, Name: svc.Name, Mtls: mtlsText(svc.MTLS), Source: "registered"}
		if svc.Declared {
			row.Source = sourceText(svc.Source)
		}
		for _, p := range svc.Ports {
			row.Ports = append(row.Ports, &adminpb.ServicePort{Port: uint32(p.Number), Protocol: protocolText(p.Protocol)})
		}
		for _, v := range svc.Versions {
			row.Versions = append(row.Versions, v.Name)
		}
		for _, a := range svc.VirtualAddresses {
			row.VirtualAddresses = append(row.VirtualAddresses, a.String())
		}
		row.Workloads = uint32(len(svc.Workloads))
		row.Endpoints, row.Ready = countEndpoints(svc)
		out.Services = append(out.Services, row)
	}
	return connect.NewResponse(out), nil
}

// ListRoutes lists the routes of the selected services in the order in which they are tried.
func (s *Server) ListRoutes(_ context.Context, req *connect.Request[adminpb.ListRoutesRequest]) (*connect.Response[adminpb.ListRoutesResponse], error) {
	out := &adminpb.ListRoutesResponse{}
	err := s.each(req.Msg.GetNamespace(), req.Msg.GetService(), func(svc *ir.Service) {
		for i := range svc.Ports {
			p := &svc.Ports[i]
			for j := range p.Routes {
				r := &p.Routes[j]
				row := &adminpb.Route{
					Namespace: svc.Namespace, Service: svc.Name, Port: uint32(p.Number),
					Object: r.Object, Rule: r.Rule, Source: sourceText(r.Source), Match: matchText(r.Match),
					Clients: s.cfg.State.RouteClients(svc, p, r),
				}
				for _, b := range r.Backends {
					row.Backends = append(row.Backends, &adminpb.Backend{Cluster: b.Cluster, Weight: b.Weight, Invalid: b.Invalid})
				}
				if r.Timeout > 0 {
					row.RequestTimeout = durationpb.New(r.Timeout)
				}
				if r.Retry != nil {
					row.Retries = r.Retry.Attempts
				}
				out.Routes = append(out.Routes, row)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// ListEndpoints lists the endpoints of each port of the selected services, those that nobody may
// call with the reason.
func (s *Server) ListEndpoints(_ context.Context, req *connect.Request[adminpb.ListEndpointsRequest]) (*connect.Response[adminpb.ListEndpointsResponse], error) {
	leases := make(map[string]*timestamppb.Timestamp)
	for _, in := range s.cfg.State.Instances().Instances {
		leases[in.ID] = timestamppb.New(in.Expires)
	}
	out := &adminpb.ListEndpointsResponse{}
	err := s.each(req.Msg.GetNamespace(), req.Msg.GetService(), func(svc *ir.Service) {
		for i := range svc.Ports {
			p := &svc.Ports[i]
			if len(p.Clusters) == 0 {
				continue
			}
			for _, e := range p.Clusters[0].Endpoints {
				row := &adminpb.Endpoint{
					Namespace: svc.Namespace, Service: svc.Name, Port: uint32(p.Number),
					InstanceId: e.InstanceID, Labels: e.Labels, Locality: localityText(e.Locality), Weight: e.Weight,
					Health: healthText(e.Health), Tls: "none", Origin: "registered", Unreachable: e.Unreachable,
				}
				for _, a := range e.Addresses {
					row.Addresses = append(row.Addresses, a.String())
				}
				if e.MeshTLS {
					row.Tls = "mesh"
				}
				if e.Static {
					row.Origin = "static"
				} else {
					row.LeaseExpires = leases[e.InstanceID]
				}
				out.Endpoints = append(out.Endpoints, row)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// ListClients lists the connected xDS clients, with what their SDKs reported.
func (s *Server) ListClients(_ context.Context, req *connect.Request[adminpb.ListClientsRequest]) (*connect.Response[adminpb.ListClientsResponse], error) {
	out := &adminpb.ListClientsResponse{Clients: s.cfg.State.Clients(req.Msg.GetResources())}
	for _, c := range out.Clients {
		sdk, fields := s.cfg.Reports.notHonoured(c.GetNodeId(), c.GetIdentity())
		if c.GetSdkVersion() == "" {
			c.SdkVersion = sdk
		}
		c.NotHonoured = append(c.NotHonoured, fields...)
	}
	return connect.NewResponse(out), nil
}

// ListCerts lists the certificates that the CA signed and that have not expired.
func (s *Server) ListCerts(context.Context, *connect.Request[adminpb.ListCertsRequest]) (*connect.Response[adminpb.ListCertsResponse], error) {
	certs, err := s.cfg.State.Certs()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return connect.NewResponse(&adminpb.ListCertsResponse{Certs: certs}), nil
}

// GetCounters returns what the SDKs reported, summed since the control plane started.
func (s *Server) GetCounters(context.Context, *connect.Request[adminpb.GetCountersRequest]) (*connect.Response[adminpb.GetCountersResponse], error) {
	return connect.NewResponse(&adminpb.GetCountersResponse{Services: s.cfg.Reports.Counters()}), nil
}

// Explain asks the newest live client of a service what a call would do. With none alive the
// answer has no answered_by, and the caller compiles that view itself.
func (s *Server) Explain(ctx context.Context, req *connect.Request[adminpb.ExplainRequest]) (*connect.Response[adminpb.ExplainResponse], error) {
	m := req.Msg
	if m.GetService() == "" || m.GetUrl() == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("service %q, url %q: want both: who calls, and what", m.GetService(), m.GetUrl()))
	}
	resp, err := s.cfg.Reports.Explain(ctx, namespaceOr(m.GetNamespace()), m.GetService(), m.GetMethod(), m.GetUrl(), m.GetHeaders())
	if err != nil {
		return nil, connect.NewError(connect.CodeDeadlineExceeded, err)
	}
	return connect.NewResponse(resp), nil
}

// GetSnapshot returns the configuration of one service in the format of the SDK's cache.
func (s *Server) GetSnapshot(_ context.Context, req *connect.Request[adminpb.GetSnapshotRequest]) (*connect.Response[adminpb.GetSnapshotResponse], error) {
	if s.cfg.Encode == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, fmt.Errorf("this control plane was started without an encoder of snapshots"))
	}
	if req.Msg.GetService() == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("service: empty: want the name of a service"))
	}
	if err := s.cfg.State.Ready(); err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	snapshot, revision, err := s.cfg.Encode(namespaceOr(req.Msg.GetNamespace()), req.Msg.GetService())
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return connect.NewResponse(&adminpb.GetSnapshotResponse{Snapshot: snapshot, Revision: revision}), nil
}

// WatchRevisions sends the running revision now and after each change of it or of its
// acknowledgements; what changed while a slow reader was busy comes as one.
func (s *Server) WatchRevisions(ctx context.Context, _ *connect.Request[adminpb.WatchRevisionsRequest], stream *connect.ServerStream[adminpb.Revision]) error {
	var last string
	for {
		changed := s.cfg.State.Changed() // before reading, so that nothing between is lost
		rev := s.cfg.State.Revision()
		if now := rev.String(); now != last {
			if err := stream.Send(rev); err != nil {
				return err
			}
			last = now
			if !s.pause(ctx) {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// pause lets what comes in a burst, one acknowledgement after the other, become one message; false
// when ctx ended first.
func (s *Server) pause(ctx context.Context) bool {
	over := make(chan struct{})
	stop := s.cfg.Clock.AfterFunc(10*time.Millisecond, func() { close(over) })
	select {
	case <-over:
		return true
	case <-ctx.Done():
		stop()
		return false
	}
}

// each calls f for the selected services; a named service that nobody knows is NotFound.
func (s *Server) each(namespace, service string, f func(*ir.Service)) error {
	found := false
	if mesh := s.cfg.State.Mesh(); mesh != nil {
		for i := range mesh.Services {
			svc := &mesh.Services[i]
			if (namespace != "" && svc.Namespace != namespace) || (service != "" && svc.Name != service) || svc.Unknown != "" {
				continue
			}
			found = true
			f(svc)
		}
	}
	if service != "" && !found {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("service %q is unknown: inlay get services lists those that configuration or registry know", service))
	}
	return nil
}

// countEndpoints counts instances, not their ports.
func countEndpoints(svc *ir.Service) (all, ready uint32) {
	up := make(map[string]bool)
	for i := range svc.Ports {
		if len(svc.Ports[i].Clusters) == 0 {
			continue
		}
		for _, e := range svc.Ports[i].Clusters[0].Endpoints {
			key := e.InstanceID
			if key == "" && len(e.Addresses) > 0 {
				key = e.Addresses[0].String()
			}
			up[key] = up[key] || (e.Health == ir.Healthy && e.Unreachable == "")
		}
	}
	for _, ok := range up {
		all++
		if ok {
			ready++
		}
	}
	return all, ready
}

func namespaceOr(ns string) string {
	if ns == "" {
		return "default"
	}
	return ns
}

func sourceText(s ir.Source) string {
	if s.File == "" {
		return ""
	}
	return s.File + ":" + strconv.Itoa(s.Line) + ":" + strconv.Itoa(s.Col)
}

func matchText(m ir.Match) string {
	var parts []string
	switch m.PathKind {
	case ir.PathExact:
		parts = append(parts, "path "+m.Path)
	case ir.PathPrefix:
		parts = append(parts, "prefix "+m.Path)
	case ir.PathSuffix:
		parts = append(parts, "suffix "+m.Path)
	}
	if m.Method != "" {
		parts = append(parts, "method "+m.Method)
	}
	for _, h := range m.Headers {
		parts = append(parts, fmt.Sprintf("header %s=%q", h.Name, h.Value))
	}
	if len(parts) == 0 {
		return "any"
	}
	return strings.Join(parts, ", ")
}

func mtlsText(m ir.MTLS) string {
	if m == ir.Permissive {
		return "permissive"
	}
	return "strict"
}

func protocolText(p ir.Protocol) string {
	switch p {
	case ir.GRPC:
		return "GRPC"
	case ir.HTTP2:
		return "HTTP2"
	case ir.TCP:
		return "TCP"
	case ir.UDP:
		return "UDP"
	}
	return "HTTP"
}

func healthText(h ir.Health) string {
	switch h {
	case ir.Draining:
		return "draining"
	case ir.Unhealthy:
		return "unhealthy"
	}
	return "healthy"
}

func localityText(l ir.Locality) string {
	return strings.TrimRight(l.Region+"/"+l.Zone+"/"+l.SubZone, "/")
}
