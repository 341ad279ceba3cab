package controlplane

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

const plainService = `
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: billing}
spec: {ports: [{port: 8080, protocol: TCP}]}
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: billing}
spec: {workloads: {service: billing}, ingress: [{from: [{service: orders}]}]}
---
`

// agent is a node agent's stream: all services, and the policies of one.
func agent(t *testing.T, p *plane, hosted string) *xds {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(p.local()).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	node := &corev3.Node{Id: "node-1", UserAgentName: "inlay-node"}
	for _, req := range []*discoveryv3.DeltaDiscoveryRequest{
		{Node: node, TypeUrl: xdsgen.NodeServiceType, ResourceNamesSubscribe: []string{"*"}},
		{TypeUrl: xdsgen.NodePoliciesType, ResourceNamesSubscribe: []string{hosted}},
	} {
		if err := s.Send(req); err != nil {
			t.Fatal(err)
		}
	}
	return &xds{t, s}
}

// until reads and acknowledges until the services and policies held satisfy a wish.
func (x *xds) until(held map[string]*nodepb.Service, policies map[string]*nodepb.Policies, wish func() bool) {
	x.t.Helper()
	for !wish() {
		resp := x.next()
		for _, r := range resp.GetResources() {
			if resp.GetTypeUrl() == xdsgen.NodePoliciesType {
				p := &nodepb.Policies{}
				if err := r.GetResource().UnmarshalTo(p); err != nil {
					x.t.Fatal(err)
				}
				policies[r.GetName()] = p
				continue
			}
			s := &nodepb.Service{}
			if err := r.GetResource().UnmarshalTo(s); err != nil {
				x.t.Fatal(err)
			}
			held[r.GetName()] = s
		}
		for _, name := range resp.GetRemovedResources() {
			delete(held, name)
			delete(policies, name)
		}
	}
}

// The whole way: a service is declared and one registered, both get addresses, keep them over a
// restart and when they go and come again; the agent has services, workloads and policies.
func TestServicesKeepTheirVirtualAddresses(t *testing.T) {
	p, n := withNode(t)
	n.is("") // the node itself
	p.write("mesh.yaml", plainService+permissive)

	services, policies := map[string]*nodepb.Service{}, map[string]*nodepb.Policies{}
	x := agent(t, p, "default/billing")
	x.until(services, policies, func() bool {
		return services["default/billing"] != nil && services["default/orders"] != nil && len(policies["default/billing"].GetPolicies()) == 1
	})
	billing := services["default/billing"].GetVirtualAddresses()
	if len(billing) != 2 || !netip.MustParsePrefix("198.18.0.0/15").Contains(netip.MustParseAddr(billing[0])) ||
		!netip.MustParsePrefix("fd69:6e6c:6179::/64").Contains(netip.MustParseAddr(billing[1])) {
		t.Fatalf("addresses = %v, want one of each range", billing)
	}
	if got := policies["default/billing"].GetPolicies()[0].GetSource(); got != "mesh.yaml:7" {
		t.Errorf("source of the policy = %q", got)
	}

	// A legacy program, by its node: first a workload, then one that listens.
	in := &registrypb.Instance{
		InstanceId: "w-1", Namespace: "default", Service: "worker", Tls: registrypb.Tls_TLS_NONE, RunId: "run-1",
		Labels: map[string]string{"tier": "back"}, Addresses: []string{"10.0.0.7", "127.0.0.1"},
	}
	stream := enrol(t, p.local(), in)
	x.until(services, policies, func() bool { return services["default/worker"] != nil })
	worker := services["default/worker"]
	if w := worker.GetWorkloads(); len(worker.GetPorts()) != 0 || len(w) != 1 || w[0].GetLabels()["tier"] != "back" || !slices.Equal(w[0].GetAddresses(), []string{"10.0.0.7"}) {
		t.Errorf("worker = %v, want one workload without ports and without its loopback address", worker)
	}
	in.Ports = []*registrypb.Port{{Port: 53, Protocol: registrypb.Protocol_PROTOCOL_UDP, Addresses: []string{"10.0.0.7:53"}}}
	if err := stream.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: in}}); err != nil {
		t.Fatal(err)
	}
	if resp, err := stream.Recv(); err != nil || resp.GetRegistered().GetUnreachable() != "" {
		t.Errorf("registered = %v, %v", resp, err)
	}
	x.until(services, policies, func() bool {
		ports := services["default/worker"].GetPorts()
		return len(ports) == 1 && ports[0].GetUdp() && len(ports[0].GetEndpoints()) == 1 && ports[0].GetEndpoints()[0].GetAddress() == "10.0.0.7:53"
	})

	list, err := p.admin().ListServices(t.Context(), connect.NewRequest(&adminpb.ListServicesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]*adminpb.Service{}
	for _, s := range list.Msg.GetServices() {
		shown[s.GetName()] = s
	}
	if got := shown["billing"]; !slices.Equal(got.GetVirtualAddresses(), billing) || got.GetPorts()[0].GetProtocol() != "TCP" {
		t.Errorf("inlay get services shows %v", got)
	}
	if got := shown["worker"]; got.GetWorkloads() != 1 || got.GetPorts()[0].GetProtocol() != "UDP" || got.GetReady() != 1 {
		t.Errorf("inlay get services shows %v", got)
	}
	clients, err := p.admin().ListClients(t.Context(), connect.NewRequest(&adminpb.ListClientsRequest{}))
	if err != nil || len(clients.Msg.GetClients()) != 1 || clients.Msg.GetClients()[0].GetKind() != "node" {
		t.Errorf("clients = %v, %v", clients, err)
	}

	// It goes, the control plane restarts, another comes first.
	p.write("mesh.yaml", permissive)
	x.until(services, policies, func() bool {
		// Its policies are gone with it; the name is still one that may have some.
		return services["default/billing"] == nil && len(policies["default/billing"].GetPolicies()) == 0
	})
	p.stopOne(p.ControlPlane)
	p.start()
	p.ready()
	p.write("mesh.yaml", strings.ReplaceAll(permissive, "orders", "aaa")+"---\n"+plainService+permissive)
	services, policies = map[string]*nodepb.Service{}, map[string]*nodepb.Policies{}
	agent(t, p, "default/billing").until(services, policies, func() bool {
		return services["default/aaa"] != nil && services["default/billing"] != nil && services["default/worker"] != nil
	})
	if got := services["default/billing"].GetVirtualAddresses(); !slices.Equal(got, billing) {
		t.Errorf("billing is at %v after a restart, was at %v", got, billing)
	}
	if got := services["default/worker"].GetVirtualAddresses(); !slices.Equal(got, worker.GetVirtualAddresses()) {
		t.Errorf("worker is at %v after a restart, was at %v", got, worker.GetVirtualAddresses())
	}
	seen := map[string]string{}
	for name, s := range services {
		for _, a := range s.GetVirtualAddresses() {
			if seen[a] != "" {
				t.Errorf("%s and %s are both at %s", name, seen[a], a)
			}
			seen[a] = name
		}
	}
}

// A used-up range is a warning, not a fault; another one is a restart away.
func TestAUsedUpRangeIsWarnedOf(t *testing.T) {
	p := launch(t, func(c *Config) { c.VirtualIPv4 = netip.MustParsePrefix("10.200.0.0/30") }) // 10.200.0.1 and .2
	p.ready()
	var text []string
	for _, name := range []string{"orders", "a", "b", "c"} {
		text = append(text, strings.ReplaceAll(permissive, "orders", name))
	}
	p.write("mesh.yaml", strings.Join(text, "---\n"))
	rev := p.until("a warning", func(r *adminpb.Revision) bool {
		return slices.ContainsFunc(r.GetWarnings(), func(f *adminpb.Finding) bool { return f.GetCode() == "INL2014" })
	})
	i := slices.IndexFunc(rev.GetWarnings(), func(f *adminpb.Finding) bool { return f.GetCode() == "INL2014" })
	if got := rev.GetWarnings()[i].GetMessage(); !strings.Contains(got, "2 services have no virtual address, since all of 10.200.0.0/30 and fd69:6e6c:6179::/64 are taken: c.default, orders.default") {
		t.Errorf("warning = %q", got)
	}
	list, err := p.admin().ListServices(t.Context(), connect.NewRequest(&adminpb.ListServicesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list.Msg.GetServices() {
		if want := s.GetName() == "a" || s.GetName() == "b"; (len(s.GetVirtualAddresses()) == 2) != want {
			t.Errorf("%s is at %v", s.GetName(), s.GetVirtualAddresses())
		}
	}
}

func TestARangeThatCannotBeIsRefused(t *testing.T) {
	_, err := New(Config{VirtualIPv4: netip.MustParsePrefix("10.0.0.1/8"), VirtualIPv6: netip.MustParsePrefix("10.0.0.0/8")})
	if err == nil || !strings.Contains(err.Error(), "--virtual-ipv4 10.0.0.1/8: bits are set behind the first 8: want 10.0.0.0/8") ||
		!strings.Contains(err.Error(), "--virtual-ipv6 10.0.0.0/8: want a range of IPv6") {
		t.Errorf("New = %v, want both faults", err)
	}
}
