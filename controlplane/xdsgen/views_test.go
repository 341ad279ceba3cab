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

// policies is one of a service of namespace "default", or of all of them.
func policies(service string) []ir.NetworkPolicy {
	return []ir.NetworkPolicy{{
		Namespace: "default", Name: "p", Subject: ir.Selector{Namespace: "default", Service: service, Labels: map[string]string{"a": "b"}},
		Ingress: []ir.NetworkRule{{Name: "0"}},
	}}
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
		// Endpoints are shared by the kinds that make calls: one resource, and the nodes' service.
		"an endpoint drains":    {func(m *ir.Mesh) { m.Services[1].Ports[0].Clusters[0].Endpoints[0].Health = ir.Draining }, 2},
		"a label changes":       {func(m *ir.Mesh) { m.Services[1].Ports[0].Clusters[0].Endpoints[0].Labels = nil }, 2},
		"a workload comes":      {func(m *ir.Mesh) { m.Services[1].Workloads = []ir.Workload{{}} }, 1},
		"an address comes":      {func(m *ir.Mesh) { m.Services[1].VirtualAddresses = []netip.Addr{netip.MustParseAddr("198.18.0.1")} }, 1},
		"a policy of one":       {func(m *ir.Mesh) { m.NetworkPolicies = policies("s1") }, 1},
		"a policy of all":       {func(m *ir.Mesh) { m.NetworkPolicies = policies("") }, 4},
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

// The first workload of a service asks for its policies before the service is known; those that
// select by labels hold for it already.
func TestPoliciesOfAServiceThatNobodyKnowsYet(t *testing.T) {
	node := xdsgen.View{Kind: xdsgen.Node}
	key := xdsgen.KeyOf(node, xdsgen.NodePoliciesType, "default/new")
	build := func(prev *xdsgen.Views, policies []ir.NetworkPolicy, also ...string) *xdsgen.Views {
		m := mesh(1, 1)
		m.NetworkPolicies = policies
		for _, name := range also {
			m.Services = append(m.Services, ir.Service{Namespace: "default", Name: name})
		}
		v, err := xdsgen.New(m, prev)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	none := build(nil, nil)
	empty, why := none.Lookup(node, xdsgen.NodePoliciesType, "default/new")
	if empty == nil || why != "" {
		t.Fatalf("Lookup = %v, %q; want an empty resource", empty, why)
	}
	if !xdsgen.OnDemand(key.Type, key.Name) || !none.MayDiffer(nil, key) {
		t.Error("the name is not said to be one that is made on demand")
	}
	same := build(none, nil)
	if same.MayDiffer(none, key) {
		t.Error("nothing changed, and it may differ")
	}
	one := policies("")
	some := build(same, one)
	if !some.MayDiffer(same, key) {
		t.Error("a policy came, and nothing differs")
	}
	if build(some, policies("")).MayDiffer(some, key) {
		t.Error("the same policy, parsed again, differs")
	}
	full, _ := some.Lookup(node, xdsgen.NodePoliciesType, "default/new")
	if full == nil || full.Version == empty.Version {
		t.Errorf("with a policy by labels: %v", full)
	}
	// Once it is known it has the same resource, so that nothing is sent.
	known := build(some, one, "new")
	if r, _ := known.Lookup(node, xdsgen.NodePoliciesType, "default/new"); r == nil || r.Version != full.Version {
		t.Errorf("known: %v, want version %s", r, full.Version)
	}
	if again := build(known, nil); !again.MayDiffer(known, key) {
		t.Error("the service and its policy went, and nothing differs")
	}
	for _, name := range []string{"new", "default/a.b", "inlay/x", "/", "", "default/"} {
		if r, why := none.Lookup(node, xdsgen.NodePoliciesType, name); r != nil || why == "" {
			t.Errorf("Lookup(%q) = %v, %q; want a reason", name, r, why)
		}
	}
}

func TestEachViewHasItsOwnTypes(t *testing.T) {
	views, err := xdsgen.New(mesh(2, 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range xdsgen.Kinds() {
		v := xdsgen.View{Kind: k, Namespace: "default", Service: "s1"}
		set := views.Set(v)
		for _, typeURL := range []string{
			xdsgen.ListenerType, xdsgen.RouteType, xdsgen.ClusterType, xdsgen.EndpointsType, xdsgen.NodeServiceType, xdsgen.NodePoliciesType,
		} {
			mine := strings.Contains(typeURL, "inlay.node") == (k == xdsgen.Node)
			if got := len(set.Resources[typeURL]) > 0; got != mine {
				t.Errorf("%s view: has %s: %v, want %v", k, typeURL, got, mine)
			}
			for _, name := range []string{"default/s1", "s1.default:80", "s1"} {
				r, why := views.Lookup(v, typeURL, name)
				if !mine && (r != nil || why == "" || why != xdsgen.WithheldType(v, typeURL)) {
					t.Errorf("%s view: %s %q = %v, %q; want none and a reason", k, typeURL, name, r, why)
				}
			}
		}
	}
}

// A name that means a plain port has no listener, and the status of who asks says why.
func TestNamesOfPlainPorts(t *testing.T) {
	m := mesh(2, 1)
	m.Services[0].Ports = append(m.Services[0].Ports,
		ir.Port{Number: 80, Protocol: ir.UDP, Clusters: []ir.Cluster{{Name: "s0.default:80/udp"}}},
		ir.Port{Number: 53, Protocol: ir.UDP, Clusters: []ir.Cluster{{Name: "s0.default:53/udp"}}})
	m.Services[1].Ports[0].Protocol, m.Services[1].Ports[0].Routes = ir.TCP, nil
	views, err := xdsgen.New(m, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, plain := range map[string]bool{
		"s0": false, "s0:80": false, "s0.default:80": false, "s0:53": true, "s0.default:53": true,
		"s1": true, "s1.default": true, "s1:80": true, "s1.default:80": true,
		"s1:81": false, "s1.shop": false, "s2": false, "s2:53": false, "": false, ":": false, ".": false,
	} {
		r, why := views.Lookup(xdsgen.View{Kind: xdsgen.SDK, Namespace: "default"}, xdsgen.ListenerType, name)
		if strings.Contains(why, "is plain TCP or UDP") != plain || plain && r != nil {
			t.Errorf("Lookup(%q) = %v, %q; plain port: %v", name, r, why, plain)
		}
	}
	sdk := xdsgen.View{Kind: xdsgen.SDK, Namespace: "default", Service: "s1"}
	for typeURL, byName := range views.Set(sdk).Resources {
		for name := range byName {
			if strings.Contains(name, "s1") || strings.Contains(name, "udp") || strings.Contains(name, "53") {
				t.Errorf("%s %q is made of a plain port", typeURL, name)
			}
		}
	}
}
