package compile_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/compile"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

// Whoever is declared or registered gets an address, once, and in the same order each time: the
// first build of a fresh control plane decides who has which.
func TestNames(t *testing.T) {
	set, findings := config.Parse([]source.File{{Path: "mesh.yaml", Data: []byte(`
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: web}
spec: {ports: [{port: 80, protocol: HTTP}]}
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: db, namespace: shop}
spec: {ports: [{port: 80, protocol: TCP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web}
spec: {parentRefs: [{group: "", kind: Service, name: web}], rules: [{backendRefs: [{name: nobody}]}]}
`)}})
	plan, _ := compile.Resolve(set)
	if plan == nil {
		t.Fatal(findings)
	}
	got := plan.Names(registry.Snapshot{Instances: []registry.Instance{
		{ID: "1", Namespace: "default", Service: "legacy"}, {ID: "2", Namespace: "default", Service: "legacy"},
		{ID: "3", Namespace: "default", Service: "web"}, {ID: "4", Namespace: "shop", Service: "a"},
	}})
	want := []vip.Service{{Namespace: "default", Name: "web"}, {Namespace: "shop", Name: "db"}, {Namespace: "default", Name: "legacy"}, {Namespace: "shop", Name: "a"}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("Names = %v, want %v", got, want)
	}
}

// BenchmarkBuild is what one change of the registry costs before it is published, with 100,000
// services of one instance each.
func BenchmarkBuild(b *testing.B) {
	var text strings.Builder
	var instances registry.Snapshot
	for i := range 100_000 {
		if i < 1000 { // the rest exists by registration
			fmt.Fprintf(&text, "apiVersion: inlay.dev/v1alpha1\nkind: MeshService\nmetadata: {name: s%06d}\nspec: {ports: [{port: 80, protocol: TCP}]}\n---\n", i)
		}
		addr := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		instances.Instances = append(instances.Instances, registry.Instance{
			ID: fmt.Sprint(i), Namespace: "default", Service: fmt.Sprintf("s%06d", i), Weight: 1, Labels: map[string]string{"version": "v1"},
			Addresses: []netip.Addr{addr}, Ports: []registry.PortBinding{{Port: 80, Protocol: "TCP", Addresses: []netip.AddrPort{netip.AddrPortFrom(addr, 80)}}},
		})
	}
	set, _ := config.Parse([]source.File{{Path: "mesh.yaml", Data: []byte(text.String())}})
	plan, findings := compile.Resolve(set)
	if plan == nil {
		b.Fatal(findings)
	}
	a, err := vip.New(vip.Config{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		instances.Addresses = a.Assign(plan.Names(instances))
		if mesh, _ := plan.Build(instances, "inlay.local", "r1"); len(mesh.Services) != 100_000 {
			b.Fatalf("%d services", len(mesh.Services))
		}
	}
}

func TestWorkloadsAreGroupedByLabels(t *testing.T) {
	var instances registry.Snapshot
	for i, labels := range []map[string]string{{"a": "1"}, nil, {"b": "1"}, {"a": "1"}, {}, {"a": "1", "b": "1"}, {"b": "1"}, {"a": "2"}} {
		instances.Instances = append(instances.Instances, registry.Instance{
			ID: fmt.Sprint(i), Namespace: "default", Service: "s", Labels: labels,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(9 - i)}), netip.AddrFrom4([4]byte{10, 0, 0, 100})},
		})
	}
	mesh, _ := compile.Compile(compile.Input{Instances: instances})
	got := fmt.Sprint(mesh.Services[0].Workloads)
	want := "[{map[] [10.0.0.5 10.0.0.8 10.0.0.100]} {map[a:1] [10.0.0.6 10.0.0.9 10.0.0.100]} {map[a:1 b:1] [10.0.0.4 10.0.0.100]} " +
		"{map[a:2] [10.0.0.2 10.0.0.100]} {map[b:1] [10.0.0.3 10.0.0.7 10.0.0.100]}]"
	if got != want {
		t.Errorf("workloads = %s, want %s", got, want)
	}
}

// The address of a static endpoint at which an instance is registered is the instance's alone.
func TestAStaticEndpointYieldsItsAddressToAnInstance(t *testing.T) {
	set, findings := config.Parse([]source.File{{Path: "mesh.yaml", Data: []byte(`
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: web}
spec: {ports: [{port: 80, protocol: TCP}], endpoints: [{address: 10.0.0.1}, {address: 10.0.0.2}]}
`)}})
	mesh, more := compile.Compile(compile.Input{Set: set, Instances: registry.Snapshot{Instances: []registry.Instance{{
		ID: "1", Namespace: "default", Service: "web", Weight: 1, Labels: map[string]string{"version": "v1"},
		Ports: []registry.PortBinding{{Port: 80, Protocol: "TCP", Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:80")}}},
	}}}})
	if mesh == nil {
		t.Fatal(findings, more)
	}
	if got, want := fmt.Sprint(mesh.Services[0].Workloads), "[{map[] [10.0.0.2]} {map[version:v1] [10.0.0.1]}]"; got != want {
		t.Errorf("workloads = %s, want %s", got, want)
	}
}
