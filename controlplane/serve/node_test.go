package serve_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

const (
	services = xdsgen.NodeServiceType
	policies = xdsgen.NodePoliciesType
)

// root is a process of root outside every registration, as the node agent is.
var root = attest.Caller{Local: true, Process: attest.Process{PID: 7}}

func agentNode() *corev3.Node { return &corev3.Node{Id: "node-1", UserAgentName: "inlay-node"} }

// denying is shop with a policy for one service, or for all of the namespace.
func denying(revision, service string, names ...string) *ir.Mesh {
	m := shop(revision, names...)
	m.NetworkPolicies = []ir.NetworkPolicy{{
		Namespace: "default", Name: "deny", Subject: ir.Selector{Namespace: "default", Service: service},
		Ingress: []ir.NetworkRule{{Name: "0", Deny: true}},
	}}
	return m
}

func TestANodeAgentFollowsEveryServiceAndThePoliciesOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart", "orders"))
		d := openDelta(t, dial(t, s, root), agentNode())
		d.subscribe(services, "*")
		d.ack("Service +default/cart +default/orders")
		d.subscribe(policies, "default/cart")
		d.ack("Policies +default/cart")
		// Of its first workload, which is not registered yet.
		d.subscribe(policies, "default/new")
		d.ack("Policies +default/new")

		m := shop("r2", "cart", "orders", "pay")
		m.Services[0].VirtualAddresses = []netip.Addr{netip.MustParseAddr("198.18.0.1")}
		publish(t, s, m)
		for _, r := range d.want("Service +default/cart +default/pay") {
			var got nodepb.Service
			if err := r.Resources[0].Resource.UnmarshalTo(&got); err != nil || len(got.GetVirtualAddresses()) != 1 || len(got.GetPorts()) != 1 {
				t.Errorf("service = %v, %v", &got, err)
			}
		}
		publish(t, s, shop("r3", "cart", "orders"))
		d.ack("Service +default/cart -default/pay")
		publish(t, s, denying("r4", "cart", "cart", "orders"))
		d.ack("Policies +default/cart")
		publish(t, s, denying("r5", "orders", "cart", "orders"))
		d.ack("Policies +default/cart") // it lost it; that of orders is nobody's here
		publish(t, s, denying("r6", "", "cart", "orders"))
		d.ack("Policies +default/cart +default/new")
		publish(t, s, denying("r7", "", "cart", "orders", "new"))
		d.ack("Service +default/new") // its policies were there already
		publish(t, s, denying("r8", "", "cart", "orders", "new"))
		d.ack()

		c := s.Clients(true)
		if len(c) != 1 || c[0].Kind != xdsgen.Node || c[0].Kind.String() != "node" || c[0].State != "acked" || c[0].Identity != "" || c[0].Subscribed != 5 {
			t.Errorf("clients = %+v", c)
		}
	})
}

func TestANodeAgentComesBackWithWhatItHas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{MaxNames: 1}) // a node may follow 32 times as many
		var names []string
		for i := range 30 {
			names = append(names, fmt.Sprintf("s%02d", i))
		}
		publish(t, s, shop("r1", names...))
		versions := map[string]string{"default/gone": "1"}
		for _, r := range s.SnapshotFor("", "", xdsgen.Node) {
			if r.Type == services && r.Name != "default/s07" {
				versions[r.Name] = r.Version
			}
		}
		d := openDelta(t, dial(t, s, root), agentNode())
		d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: services, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: versions})
		d.ack("Service +default/s07 -default/gone")
	})
}

func TestWhoIsANodeAgent(t *testing.T) {
	user := uint32(os.Geteuid())
	for name, tc := range map[string]struct {
		caller attest.Caller
		cfg    serve.Config
		agent  string
		kind   xdsgen.Kind
		code   codes.Code
		text   string
	}{
		"root on the unix socket":              {caller: root, agent: "inlay-node", kind: xdsgen.Node},
		"the control plane's own user":         {caller: attest.Caller{Local: true, UID: user}, agent: "inlay-node", kind: xdsgen.Node},
		"another user":                         {caller: attest.Caller{Local: true, UID: 4711}, agent: "inlay-node", code: codes.PermissionDenied, text: "want one of the users"},
		"a user that was named":                {caller: attest.Caller{Local: true, UID: 4711}, cfg: serve.Config{NodeUIDs: []uint32{4711}}, agent: "inlay-node", kind: xdsgen.Node},
		"root where another was named":         {caller: root, cfg: serve.Config{NodeUIDs: []uint32{4711}}, agent: "inlay-node", code: codes.PermissionDenied, text: "want one of the users [4711]"},
		"one of whom nobody knows whose it is": {caller: attest.Caller{Local: true, Err: errors.New("the node is away")}, agent: "inlay-node", code: codes.PermissionDenied, text: "the node is away"},
		"a workload that says so":              {caller: svid("/ns/default/svc/cart"), agent: "inlay-node", kind: xdsgen.GRPC},
		"somebody over plaintext":              {cfg: serve.Config{Dev: true}, agent: "inlay-node", kind: xdsgen.GRPC},
		"root that does not say so":            {caller: root, agent: "gRPC Go", code: codes.PermissionDenied, text: "has no identity"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := serve.New(tc.cfg)
				publish(t, s, denying("r1", "cart", "cart"))
				d := openDelta(t, dial(t, s, tc.caller), &corev3.Node{Id: "n", UserAgentName: tc.agent})
				d.subscribe(services, "*", "default/cart")
				if tc.code != codes.OK {
					if err := d.failed(); status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.text) {
						t.Errorf("error %v, want %s with %q", err, tc.code, tc.text)
					}
					return
				}
				if tc.kind == xdsgen.Node {
					d.ack("Service +default/cart")
					return
				}
				d.ack("Service -default/cart")
				d.subscribe(policies, "default/cart")
				d.ack("Policies -default/cart")
				c := s.Clients(true)[0]
				if c.Kind != tc.kind || len(c.Resources) != 3 {
					t.Fatalf("client = %+v, want kind %v with two names and the wildcard", c, tc.kind)
				}
				for _, r := range c.Resources {
					if !strings.Contains(r.Withheld, "only the node agent is served this type") {
						t.Errorf("%s %q: withheld %q", r.TypeURL, r.Name, r.Withheld)
					}
				}
			})
		})
	}
}

func TestANodeAgentIsServedNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart"))
		d := openDelta(t, dial(t, s, root), agentNode())
		d.subscribe(eds, "cart.default:80")
		d.ack("EDS -cart.default:80")
		d.subscribe(lds, "cart")
		d.ack("LDS -cart")
	})
}

// Connections of programs without the SDK go where the agent last heard of: a drain waits for it.
func TestADrainWaitsForNodeAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart", "orders"))
		d := openDelta(t, dial(t, s, root), agentNode())
		d.subscribe(services, "*")
		d.ack("Service +default/cart +default/orders")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		drained := wait(ctx, t, s, "cart-0")
		publish(t, s, draining("r2", "cart", "orders"))
		if got := answered(drained); got != "waiting" {
			t.Fatalf("%s before the agent acknowledged", got)
		}
		d.ack("Service +default/cart")
		if got := answered(drained); got != "true" {
			t.Errorf("%s after it did, want true", got)
		}
	})
}

// The endpoints of a plain port are in no view of calls, and still a drain waits until they are out
// of the mesh.
func TestADrainOfAPlainPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		plain := func(m *ir.Mesh) *ir.Mesh {
			m.Services[0].Ports[0].Protocol, m.Services[0].Ports[0].Clusters[0].Protocol, m.Services[0].Ports[0].Routes = ir.TCP, ir.TCP, nil
			return m
		}
		publish(t, s, plain(shop("r1", "cart")))
		drained := wait(t.Context(), t, s, "cart-0")
		if got := answered(drained); got != "waiting" {
			t.Fatalf("%s while the mesh holds it", got)
		}
		publish(t, s, plain(draining("r2", "cart")))
		if got := answered(drained); got != "true" {
			t.Errorf("%s, want true: nobody follows", got)
		}
	})
}

// BenchmarkNodePush measures a change of one endpoint among 100,000 services from Publish until
// the agent of a node has it. What is sent is one resource of them, whatever their number.
func BenchmarkNodePush(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			meshes := [2]*ir.Mesh{bigShop(n, 1), bigShop(n, 2)}
			s := serve.New(serve.Config{})
			publish(b, s, meshes[0])
			rpc, err := dial(b, s, root).DeltaAggregatedResources(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			if err := rpc.Send(&discoveryv3.DeltaDiscoveryRequest{Node: agentNode(), TypeUrl: services, ResourceNamesSubscribe: []string{"*"}}); err != nil {
				b.Fatal(err)
			}
			read := func(want int) (resources int) {
				for resources < want {
					r, err := rpc.Recv()
					if err != nil {
						b.Fatal(err)
					}
					resources += len(r.Resources)
					if err := rpc.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: services, ResponseNonce: r.Nonce}); err != nil {
						b.Fatal(err)
					}
				}
				return resources
			}
			read(n)
			sent, i := 0, 0
			b.ReportAllocs()
			for b.Loop() {
				i++
				publish(b, s, meshes[i%2])
				sent += read(1)
			}
			b.ReportMetric(float64(sent)/float64(b.N), "resources/op")
		})
	}
}

// bigShop has n services of one endpoint each; that of the first has a weight.
func bigShop(n int, weight uint32) *ir.Mesh {
	m := &ir.Mesh{Revision: "r", TrustDomain: "inlay.local"}
	for i := range n {
		name := fmt.Sprintf("s%06d", i)
		c := ir.Cluster{Name: name + ".default:80", Namespace: "default", Service: name, Port: 80, Protocol: ir.TCP}
		c.Endpoints = []ir.Endpoint{{
			InstanceID: name, Weight: 1, Addresses: []netip.AddrPort{addrPort([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
		}}
		if i == 0 {
			c.Endpoints[0].Weight = weight
		}
		m.Services = append(m.Services, ir.Service{
			Namespace: "default", Name: name, Workloads: []ir.Workload{{Addresses: []netip.Addr{c.Endpoints[0].Addresses[0].Addr()}}},
			VirtualAddresses: []netip.Addr{netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)})},
			Ports:            []ir.Port{{Number: 80, Protocol: ir.TCP, Clusters: []ir.Cluster{c}}},
		})
	}
	return m
}
