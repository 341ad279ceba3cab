package xdsgen_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// mesh has n services s0.. in namespace "default" with as many endpoints each.
func mesh(n, endpoints int) *ir.Mesh {
	m := &ir.Mesh{Revision: "r1", TrustDomain: "inlay.local"}
	for i := range n {
		name := fmt.Sprintf("s%d", i)
		cluster := name + ".default:80"
		c := ir.Cluster{
			Name: cluster, Namespace: "default", Service: name, Port: 80, Protocol: ir.GRPC, MTLS: ir.MTLS(i % 2),
			SPIFFEID: "spiffe://inlay.local/ns/default/svc/" + name,
		}
		for e := range endpoints {
			c.Endpoints = append(c.Endpoints, ir.Endpoint{
				InstanceID: fmt.Sprintf("%s-%d", name, e), Weight: 1, MeshTLS: true,
				Addresses: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i), byte(e >> 8), byte(e)}), 80)},
				Labels:    map[string]string{"version": "v1"},
			})
		}
		m.Services = append(m.Services, ir.Service{Namespace: "default", Name: name, MTLS: ir.MTLS(i % 2), Ports: []ir.Port{{
			Number: 80, Protocol: ir.GRPC, Clusters: []ir.Cluster{c},
			Routes: []ir.Route{{Object: "MeshService/default/" + name, Rule: "0", Backends: []ir.Backend{{Cluster: cluster, Weight: 1}}}},
		}}})
	}
	return m
}

func sameSet(t *testing.T, got, want *xdsgen.Set) {
	t.Helper()
	for typeURL, byName := range want.Resources {
		if g, w := slices.Sorted(maps.Keys(got.Resources[typeURL])), slices.Sorted(maps.Keys(byName)); !slices.Equal(g, w) {
			t.Errorf("%s: names %v, want %v", typeURL, g, w)
			continue
		}
		for name, w := range byName {
			g := got.Resources[typeURL][name]
			if g.Version != w.Version || !proto.Equal(g.Any, w.Any) || !slices.Equal(g.Instances, w.Instances) {
				t.Errorf("%s %q: version %s, want %s", typeURL, name, g.Version, w.Version)
			}
		}
	}
	if !maps.Equal(got.Withheld, want.Withheld) {
		t.Errorf("withheld %v, want %v", got.Withheld, want.Withheld)
	}
}

// What is taken from an earlier result must be what would have been made anew.
func TestReuseGivesWhatAFreshStartGives(t *testing.T) {
	change := map[string]struct {
		edit    func(*ir.Mesh)
		encoded int
	}{
		"nothing": {func(*ir.Mesh) {}, 0},
		// Endpoints are shared by the kinds: one resource.
		"an endpoint drains":    {func(m *ir.Mesh) { m.Services[1].Ports[0].Clusters[0].Endpoints[0].Health = ir.Draining }, 1},
		"a label changes":       {func(m *ir.Mesh) { m.Services[1].Ports[0].Clusters[0].Endpoints[0].Labels = nil }, 1},
		"a policy changes":      {func(m *ir.Mesh) { m.Services[1].Ports[0].Clusters[0].Policy.MaxRequests = 7 }, 2},
		"a route changes":       {func(m *ir.Mesh) { m.Services[1].Ports[0].Routes[0].Timeout = 1 }, 2},
		"a service goes":        {func(m *ir.Mesh) { m.Services = m.Services[:3] }, 0},
		"the revision changes":  {func(m *ir.Mesh) { m.Revision = "r2" }, 0},
		"a route into the dark": {func(m *ir.Mesh) { m.Services[1].Ports[0].Routes[0].Backends[0].Cluster = "x.default:1" }, 5},
		// Cluster and inbound listener of the SDK.
		"a service becomes strict": {func(m *ir.Mesh) {
			m.Services[1].MTLS, m.Services[1].Ports[0].Clusters[0].MTLS = ir.Strict, ir.Strict
		}, 2},
		// The same two, and four listeners, routes and the cluster of the gRPC view.
		"a service becomes permissive": {func(m *ir.Mesh) {
			m.Services[2].MTLS, m.Services[2].Ports[0].Clusters[0].MTLS = ir.Permissive, ir.Permissive
		}, 8},
	}
	for name, tc := range change {
		t.Run(name, func(t *testing.T) {
			before, err := xdsgen.New(mesh(4, 3), nil)
			if err != nil {
				t.Fatal(err)
			}
			m := mesh(4, 3)
			tc.edit(m)
			got, err := xdsgen.New(m, before)
			if err != nil {
				t.Fatal(err)
			}
			fresh, _ := xdsgen.New(m, nil)
			for _, k := range xdsgen.Kinds() {
				for _, v := range []xdsgen.View{{Kind: k, Namespace: "default", Service: "s1"}, {Kind: k, Namespace: "default", Service: "s2"}} {
					sameSet(t, got.Set(v), fresh.Set(v))
				}
			}
			if got.Encoded() != tc.encoded {
				t.Errorf("encoded %d resources, want %d; changed %v", got.Encoded(), tc.encoded, got.Changed(before))
			}
			// And what changed is what differs between two fresh starts.
			first, _ := xdsgen.New(mesh(4, 3), nil)
			if a, b := len(got.Changed(before)), len(fresh.Changed(first)); a != b {
				t.Errorf("%d keys changed, want %d", a, b)
			}
		})
	}
}

func TestTheSameMeshGivesTheSameBytes(t *testing.T) {
	v := xdsgen.View{Kind: xdsgen.SDK, Namespace: "default", Service: "s1"}
	a, err := xdsgen.Generate(mesh(5, 5), v)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		b, _ := xdsgen.Generate(mesh(5, 5), v)
		sameSet(t, b, a)
	}
}

func TestTheLastGoodResourceStaysWhenTheNewOneIsInvalid(t *testing.T) {
	v := xdsgen.View{Kind: xdsgen.SDK, Namespace: "default", Service: "s0"}
	before, _ := xdsgen.New(mesh(2, 1), nil)
	good, _ := before.Lookup(v, xdsgen.RouteType, "s0.default:80")
	m := mesh(2, 1)
	m.Services[0].Ports[0].Routes[0].Match = ir.Match{PathKind: ir.PathPrefix, Path: "/ends/"}
	m.Services[0].Ports[0].Clusters[0].Policy.MaxRequests = 9
	// A second time too: the last good one stays, and the fault is told again.
	for range 2 {
		after, err := xdsgen.New(m, before)
		if err == nil || !strings.Contains(err.Error(), `route configuration "s0.default:80"`) {
			t.Fatalf("error %v, want one that names the route configuration", err)
		}
		if got, _ := after.Lookup(v, xdsgen.RouteType, "s0.default:80"); got != good {
			t.Errorf("routes %v, want the last good ones", got)
		}
		if r, _ := after.Lookup(v, xdsgen.ClusterType, "s0.default:80"); r == nil {
			t.Error("the cluster beside it is gone")
		}
		before = after
	}
	fixed, err := xdsgen.New(mesh(2, 1), before)
	if got, _ := fixed.Lookup(v, xdsgen.RouteType, "s0.default:80"); err != nil || got.Version != good.Version {
		t.Errorf("after the repair: %v, %v", got, err)
	}
}

func TestNobodyIsServedAnothersInboundListener(t *testing.T) {
	views, _ := xdsgen.New(mesh(2, 1), nil)
	name := xdsgen.InboundListener("default", "s0", 80)
	for v, want := range map[xdsgen.View]bool{
		{Kind: xdsgen.SDK, Namespace: "default", Service: "s0"}:  true,
		{Kind: xdsgen.SDK, Namespace: "default", Service: "s1"}:  false,
		{Kind: xdsgen.SDK, Namespace: "default"}:                 false,
		{Kind: xdsgen.SDK, Namespace: "shop", Service: "s0"}:     false,
		{Kind: xdsgen.GRPC, Namespace: "default", Service: "s0"}: false,
	} {
		if r, _ := views.Lookup(v, xdsgen.ListenerType, name); (r != nil) != want {
			t.Errorf("%+v: served %v, want %v", v, r != nil, want)
		}
	}
}

func TestListenerOfAGRPCServer(t *testing.T) {
	views, _ := xdsgen.New(mesh(2, 1), nil) // s0 strict, s1 permissive
	for name, tc := range map[string]struct {
		service, addr, withheld string
	}{
		"permissive":          {"s1", "[::]:50051", ""},
		"strict":              {"s0", "127.0.0.1:80", "mutual TLS only"},
		"no identity":         {"", "127.0.0.1:80", "needs an identity"},
		"unknown service":     {"s9", "127.0.0.1:80", "not in the mesh"},
		"host name":           {"s1", "localhost:80", "want an IP address"},
		"no port":             {"s1", "127.0.0.1", "missing port"},
		"port out of range":   {"s1", "127.0.0.1:65536", "want 1 to 65535"},
		"nothing":             {"s1", "", "missing port"},
		"bytes from anywhere": {"s1", "\xff\x00:1", "want an IP address"},
	} {
		t.Run(name, func(t *testing.T) {
			v := xdsgen.View{Kind: xdsgen.GRPC, Namespace: "default", Service: tc.service}
			r, why := views.Lookup(v, xdsgen.ListenerType, xdsgen.ServerListener(tc.addr))
			if (r != nil) != (tc.withheld == "") || !strings.Contains(why, tc.withheld) {
				t.Errorf("resource %v, withheld %q; want %q", r != nil, why, tc.withheld)
			}
		})
	}
}

func BenchmarkOneEndpointOf100k(b *testing.B) {
	before, _ := xdsgen.New(mesh(200, 500), nil)
	m := mesh(200, 500)
	m.Services[7].Ports[0].Clusters[0].Endpoints[3].Health = ir.Draining
	b.ReportAllocs()
	for b.Loop() {
		if v, err := xdsgen.New(m, before); err != nil || v.Encoded() != 1 {
			b.Fatal(v.Encoded(), err)
		}
	}
}
