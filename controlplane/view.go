package controlplane

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/controlplane/admin"
	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

// view shows the parts of a control plane to package admin.
type view struct {
	cfg      Config
	started  time.Time
	pipeline *pipeline
	registry *registry.Registry
	serve    *serve.Server
	ca       *ca.CA
	disk     *disk
	// addresses are those of servers, which need the admin server first.
	addresses func() map[string]string
}

var _ admin.State = (*view)(nil)

// Status implements admin.State.
func (v *view) Status() *adminpb.StatusResponse {
	return &adminpb.StatusResponse{
		Version: v.cfg.Version, Started: timestamppb.New(v.started), TrustDomain: v.cfg.TrustDomain,
		Addresses: v.addresses(), Pid: uint32(os.Getpid()), ConfigDir: v.cfg.ConfigDir, DataDir: v.cfg.DataDir,
	}
}

// Revision implements admin.State. What keeps the control plane from its work, a full disk say,
// stands among the warnings.
func (v *view) Revision() *adminpb.Revision {
	s := v.pipeline.now()
	acked, subscribed, nacked := v.serve.Acks(s.revision)
	out := &adminpb.Revision{
		Id: s.revision, Acked: uint32(acked), Subscribed: uint32(subscribed), Nacked: uint32(nacked), Objects: uint32(s.objects),
		Faults: findings(s.faults), Warnings: findings(slices.Concat(s.warnings, s.built)),
	}
	if !s.time.IsZero() {
		out.Time = timestamppb.New(s.time)
	}
	if s.source != nil {
		out.Warnings = append(out.Warnings, &adminpb.Finding{Code: "SOURCE", Source: v.cfg.ConfigDir, Message: s.source.Error()})
	}
	if s.publish != nil {
		out.Warnings = append(out.Warnings, &adminpb.Finding{Code: "PUBLISH", Message: s.publish.Error()})
	}
	failing := v.disk.failing()
	for _, what := range slices.Sorted(maps.Keys(failing)) {
		out.Warnings = append(out.Warnings, &adminpb.Finding{Code: "STORE", Source: v.cfg.DataDir,
			Message: what + " are not remembered over a restart: " + failing[what].Error()})
	}
	return out
}

// Changed implements admin.State.
func (v *view) Changed() <-chan struct{} { return v.pipeline.changes() }

// Mesh implements admin.State.
func (v *view) Mesh() *ir.Mesh {
	if views := v.serve.Views(); views != nil {
		return views.Mesh()
	}
	return nil
}

// Instances implements admin.State.
func (v *view) Instances() registry.Snapshot { return v.registry.Snapshot() }

// RouteClients implements admin.State.
func (v *view) RouteClients(svc *ir.Service, port *ir.Port, route *ir.Route) map[string]string {
	views := v.serve.Views()
	if views == nil {
		return nil
	}
	out := make(map[string]string)
	for _, k := range xdsgen.Callers() {
		out[k.String()] = views.RouteStatus(k, svc, port, route)
	}
	return out
}

// Clients implements admin.State.
func (v *view) Clients(resources bool) []*adminpb.Client {
	var out []*adminpb.Client
	for _, c := range v.serve.Clients(resources) {
		row := &adminpb.Client{
			NodeId: c.NodeID, Identity: c.Identity, Kind: c.Kind.String(), Protocol: c.Protocol, SdkVersion: c.SDKVersion,
			Address: c.Address, Connected: timestamppb.New(c.Connected), State: c.State, Subscribed: uint32(c.Subscribed),
		}
		for _, r := range c.Resources {
			res := &adminpb.ResourceState{TypeUrl: r.TypeURL, Name: r.Name, Sent: r.Sent, Acked: r.Acked, Nack: r.Nack, Withheld: r.Withheld}
			if !r.Changed.IsZero() {
				res.Changed = timestamppb.New(r.Changed)
			}
			row.Resources = append(row.Resources, res)
		}
		out = append(out, row)
	}
	return out
}

// Certs implements admin.State.
func (v *view) Certs() ([]*adminpb.Cert, error) {
	var out []*adminpb.Cert
	for _, c := range v.ca.Issued() {
		out = append(out, &adminpb.Cert{SpiffeId: c.SPIFFEID, Serial: c.Serial,
			NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter), Authority: c.Authority})
	}
	return out, nil
}

// Ready implements admin.State.
func (v *view) Ready() error {
	select {
	case <-v.pipeline.ready:
		return nil
	default:
	}
	s := v.pipeline.now()
	switch {
	case len(s.faults) > 0:
		return fmt.Errorf("no configuration is served: %d faults, the first: %s", len(s.faults), s.faults[0])
	case s.source != nil:
		return fmt.Errorf("no configuration is served: %w", s.source)
	}
	return errors.New("no configuration is served yet")
}

// snapshot is Config.Encode of package admin.
func (v *view) snapshot(namespace, service string) ([]byte, string, error) {
	s := v.pipeline.now()
	b, err := v.cfg.EncodeSnapshot(Snapshot{
		TrustDomain: v.cfg.TrustDomain, SPIFFEID: "spiffe://" + v.cfg.TrustDomain + "/ns/" + namespace + "/svc/" + service,
		Revision: s.revision, Namespaces: s.namespaces, Written: v.cfg.Clock.Now(),
		Resources: v.serve.SnapshotFor(namespace, service, xdsgen.SDK),
	})
	return b, s.revision, err
}

// mtlsMode is Config.MTLSMode of package registry.
func mtlsMode(srv *serve.Server) func(namespace, service string) ir.MTLS {
	return func(namespace, service string) ir.MTLS {
		views := srv.Views()
		if views == nil {
			return ir.Strict
		}
		s := serviceOf(views.Mesh(), namespace, service)
		if s == nil {
			return ir.Strict
		}
		return s.MTLS
	}
}

// plainPort is Config.Plain of package registry: the declared protocol counts, else the registered.
func plainPort(srv *serve.Server) func(namespace, service string, p registry.PortBinding) bool {
	return func(namespace, service string, p registry.PortBinding) bool {
		registered := p.Protocol == "TCP" || p.UDP()
		views := srv.Views()
		if views == nil {
			return registered
		}
		s := serviceOf(views.Mesh(), namespace, service)
		if s == nil || !s.Declared {
			return registered
		}
		i := slices.IndexFunc(s.Ports, func(o ir.Port) bool { return o.Number == p.Port && (o.Protocol == ir.UDP) == p.UDP() })
		if i < 0 {
			return registered
		}
		return s.Ports[i].Protocol.Plain()
	}
}

// serviceOf finds a service; nil when the mesh has none of that name.
func serviceOf(m *ir.Mesh, namespace, service string) *ir.Service {
	i, ok := slices.BinarySearchFunc(m.Services, [2]string{namespace, service}, func(s ir.Service, want [2]string) int {
		return cmp.Or(cmp.Compare(s.Namespace, want[0]), cmp.Compare(s.Name, want[1]))
	})
	if !ok {
		return nil
	}
	return &m.Services[i]
}

func findings(in []config.Finding) []*adminpb.Finding {
	var out []*adminpb.Finding
	for _, f := range in {
		row := &adminpb.Finding{Code: f.Code, Message: f.Message}
		if f.File != "" {
			row.Source = f.File + ":" + strconv.Itoa(f.Line) + ":" + strconv.Itoa(f.Col)
		}
		out = append(out, row)
	}
	return out
}
