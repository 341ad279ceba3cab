package compile_test

import (
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/inlay-mesh/inlay/controlplane/compile"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

// FuzzCompile: whatever Parse accepts compiles to faults or to a mesh in which every route leads
// to clusters that exist and every list is in its documented order.
func FuzzCompile(f *testing.F) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, p := range paths {
		ar, err := txtar.ParseFile(p)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range ar.Files {
			if filepath.Ext(file.Name) == ".yaml" {
				f.Add(file.Data)
			}
		}
	}
	instances := registry.Snapshot{Instances: []registry.Instance{
		{ID: "1", Namespace: "default", Service: "web", MeshTLS: true, Ports: []registry.PortBinding{
			{Port: 80, Protocol: "HTTP", Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:80")}}}},
		{ID: "2", Namespace: "default", Service: "registered", Ports: []registry.PortBinding{
			{Port: 90, Protocol: "GRPC", Addresses: []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::1]:90")}}}},
	}}
	f.Fuzz(func(t *testing.T, data []byte) {
		set, findings := config.Parse([]source.File{{Path: "in.yaml", Data: data}})
		mesh, more := compile.Compile(compile.Input{Set: set, Instances: instances, TrustDomain: "inlay.local"})
		if bad := config.HasFaults(findings) || config.HasFaults(more); bad != (mesh == nil) {
			t.Fatalf("faults: %v, mesh is nil: %v", bad, mesh == nil)
		}
		if mesh != nil {
			checkMesh(t, mesh)
		}
	})
}

func checkMesh(t *testing.T, mesh *ir.Mesh) {
	t.Helper()
	for i := range mesh.NetworkPolicies {
		p := &mesh.NetworkPolicies[i]
		if p.Subject.Namespace != p.Namespace || p.Subject.Service == "" && len(p.Subject.Labels) == 0 || len(p.Ingress)+len(p.Egress) == 0 {
			t.Fatalf("policy %s/%s selects nothing, or without effect: %+v", p.Namespace, p.Name, p)
		}
		for _, r := range slices.Concat(p.Ingress, p.Egress) {
			for _, peer := range r.Peers {
				kinds := 0
				for _, is := range []bool{peer.Workloads.Namespace != "", peer.CIDR.IsValid(), peer.Entity != ir.NoEntity} {
					if is {
						kinds++
					}
				}
				if kinds != 1 || peer.CIDR.IsValid() && peer.CIDR != peer.CIDR.Masked() {
					t.Fatalf("policy %s/%s: peer %+v is %d of the three kinds, want 1", p.Namespace, p.Name, peer, kinds)
				}
			}
			for _, pr := range r.Ports {
				if pr.First > pr.Last || (pr.First == 0) != (pr.Last == 0) || pr.Protocol == ir.TransportICMP && pr.First != 0 || pr.Protocol == ir.AnyTransport {
					t.Fatalf("policy %s/%s: ports %+v", p.Namespace, p.Name, pr)
				}
			}
			if r.Errno != 0 && !r.Deny {
				t.Fatalf("policy %s/%s: errno without deny", p.Namespace, p.Name)
			}
		}
	}
	clusters := map[string]bool{}
	for _, s := range mesh.Services {
		for _, p := range s.Ports {
			for _, c := range p.Clusters {
				if clusters[c.Name] {
					t.Fatalf("cluster %q is there twice", c.Name)
				}
				clusters[c.Name] = true
				seen := map[netip.AddrPort]bool{}
				for _, e := range c.Endpoints {
					if e.Weight == 0 || len(e.Addresses) == 0 {
						t.Fatalf("cluster %q: endpoint %+v without weight or address", c.Name, e)
					}
					for _, a := range e.Addresses {
						if seen[a] {
							t.Fatalf("cluster %q: address %s is there twice", c.Name, a)
						}
						seen[a] = true
					}
				}
				if !slices.IsSortedFunc(c.Endpoints, func(a, b ir.Endpoint) int {
					if a.InstanceID != b.InstanceID {
						if a.InstanceID < b.InstanceID {
							return -1
						}
						return 1
					}
					return a.Addresses[0].Compare(b.Addresses[0])
				}) {
					t.Fatalf("cluster %q: endpoints are not sorted", c.Name)
				}
			}
		}
	}
	for _, s := range mesh.Services {
		for _, p := range s.Ports {
			for _, r := range p.Routes {
				for _, b := range r.Backends {
					if !clusters[b.Cluster] {
						t.Fatalf("%s rule %s: cluster %q does not exist", r.Object, r.Rule, b.Cluster)
					}
				}
				if r.Match.PathKind == ir.PathPrefix && (len(r.Match.Path) < 2 || r.Match.Path[len(r.Match.Path)-1] == '/') {
					t.Fatalf("%s rule %s: prefix %q is empty or ends in a slash", r.Object, r.Rule, r.Match.Path)
				}
			}
		}
	}
}

// TestRegistryChangeNeedsNoParsing builds one plan twice.
func TestRegistryChangeNeedsNoParsing(t *testing.T) {
	set, findings := config.Parse([]source.File{{Path: "mesh.yaml", Data: []byte(`
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: web}
spec: {ports: [{port: 80, protocol: HTTP}]}
`)}})
	plan, more := compile.Resolve(set)
	if plan == nil {
		t.Fatalf("no plan: %v %v", findings, more)
	}
	endpoints := func(instances ...registry.Instance) int {
		mesh, _ := plan.Build(registry.Snapshot{Instances: instances}, "inlay.local", "r1")
		return len(mesh.Services[0].Ports[0].Clusters[0].Endpoints)
	}
	in := registry.Instance{ID: "1", Namespace: "default", Service: "web", MeshTLS: true, Ports: []registry.PortBinding{
		{Port: 80, Protocol: "HTTP", Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:80")}}}}
	for i, want := range []int{0, 1, 0} {
		var have []registry.Instance
		if want == 1 {
			have = append(have, in)
		}
		if got := endpoints(have...); got != want {
			t.Errorf("build %d: %d endpoints, want %d", i, got, want)
		}
	}
}
