package serve_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// draining is shop with the first instance of its first service draining.
func draining(revision string, services ...string) *ir.Mesh {
	m := shop(revision, services...)
	m.Services[0].Ports[0].Clusters[0].Endpoints[0].Health = ir.Draining
	return m
}

// wait runs WaitDrained aside and returns where its answer will be.
func wait(ctx context.Context, t *testing.T, s *serve.Server, instance string) <-chan bool {
	out := make(chan bool, 1)
	var wg sync.WaitGroup
	wg.Go(func() { out <- s.WaitDrained(ctx, instance) })
	t.Cleanup(wg.Wait)
	return out
}

func answered(c <-chan bool) string {
	synctest.Wait()
	select {
	case all := <-c:
		return fmt.Sprint(all)
	default:
		return "waiting"
	}
}

func TestWaitDrained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart", "orders"))
		client := dial(t, s, svid("/ns/default/svc/pay"))
		a, b, other := openDelta(t, client, sdkNode()), openDelta(t, client, sdkNode()), openDelta(t, client, sdkNode())
		a.subscribe(eds, "cart.default:80")
		b.subscribe(eds, "cart.default:80")
		other.subscribe(eds, "orders.default:80")
		a.ack("EDS +cart.default:80")
		b.ack("EDS +cart.default:80")
		other.ack("EDS +orders.default:80")

		drained := wait(t.Context(), t, s, "cart-0")
		if got := answered(drained); got != "waiting" {
			t.Fatalf("%s before the mesh is without the instance", got)
		}
		publish(t, s, draining("r2", "cart", "orders"))
		if got := answered(drained); got != "waiting" {
			t.Fatalf("%s before anybody acknowledged", got)
		}
		a.ack("EDS +cart.default:80")
		if got := answered(drained); got != "waiting" {
			t.Fatalf("%s before the second client acknowledged", got)
		}
		b.ack("EDS +cart.default:80")
		if got := answered(drained); got != "true" {
			t.Fatalf("%s after all acknowledged, want true", got)
		}
		other.want()
		if got := answered(wait(t.Context(), t, s, "cart-0")); got != "true" {
			t.Errorf("%s when nobody holds it any more, want true", got)
		}
		if got := answered(wait(t.Context(), t, s, "nobody")); got != "true" {
			t.Errorf("%s for an instance that never was, want true", got)
		}
	})
}

func TestWaitDrainedCountsClientsThatLeaveAndNotThoseThatReject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart"))
		client := dial(t, s, svid("/ns/default/svc/pay"))
		gone, unsubscribed, rejecting := openDelta(t, client, sdkNode()), openDelta(t, client, sdkNode()), openDelta(t, client, sdkNode())
		for _, d := range []*delta{gone, unsubscribed, rejecting} {
			d.subscribe(eds, "cart.default:80")
			d.ack("EDS +cart.default:80")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		drained := wait(ctx, t, s, "cart-0")
		publish(t, s, draining("r2", "cart"))
		gone.cancel()
		unsubscribed.unsubscribe(eds, "cart.default:80")
		rejecting.nack("no", "EDS +cart.default:80")
		if got := answered(drained); got != "waiting" {
			t.Errorf("%s while a client keeps the old endpoints, want waiting", got)
		}
		time.Sleep(5 * time.Second) // fake time
		if got := answered(drained); got != "false" {
			t.Errorf("%s when the wait ended, want false", got)
		}
	})
}

// A client that comes back says which version it has, and we do not know what is in it.
func TestWaitDrainedDistrustsVersionsOfEarlierStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, draining("r2", "cart"))
		d := openDelta(t, dial(t, s, svid("/ns/default/svc/pay")), sdkNode())
		d.request(&discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: eds, ResourceNamesSubscribe: []string{"cart.default:80"},
			InitialResourceVersions: map[string]string{"cart.default:80": "older"},
		})
		synctest.Wait()
		drained := wait(t.Context(), t, s, "cart-0")
		if got := answered(drained); got != "waiting" {
			t.Errorf("%s, want waiting: the client may hold it", got)
		}
		d.ack("EDS +cart.default:80")
		if got := answered(drained); got != "true" {
			t.Errorf("%s, want true", got)
		}
	})
}

func TestStopEndsStreamsAndLaterOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart"))
		client := dial(t, s, svid("/ns/default/svc/cart"))
		d := openDelta(t, client, sdkNode())
		d.subscribe(lds, "cart")
		d.want("LDS +cart")
		s.Stop()
		s.Stop()
		if err := d.failed(); status.Code(err) != codes.Unavailable {
			t.Errorf("error %v, want Unavailable", err)
		}
		if err := openDelta(t, client, sdkNode()).failed(); status.Code(err) != codes.Unavailable {
			t.Errorf("later stream: error %v, want Unavailable", err)
		}
	})
}

// A client that does not read blocks nobody, costs no queue, and is given the newest state alone
// when it reads on; Stop does not wait for it.
func TestASlowClientMissesWhatWasReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		mesh := func(revision string, weight uint32) *ir.Mesh {
			m := shop(revision, "cart")
			c := &m.Services[0].Ports[0].Clusters[0]
			for i := range 2000 { // beyond every window and buffer on the way
				e := c.Endpoints[0]
				e.InstanceID = fmt.Sprintf("cart-%d", i)
				e.Addresses = nil
				e.Addresses = append(e.Addresses, c.Endpoints[1].Addresses[0])
				e.Weight = weight
				addr := e.Addresses[0].Addr().As4()
				addr[2], addr[3] = byte(i>>8), byte(i)
				e.Addresses[0] = addrPort(addr)
				c.Endpoints = append(c.Endpoints, e)
			}
			return m
		}
		publish(t, s, mesh("r0", 1))
		client := dial(t, s, svid("/ns/default/svc/cart"))
		rpc, err := client.DeltaAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := rpc.Send(&discoveryv3.DeltaDiscoveryRequest{Node: sdkNode(), TypeUrl: eds, ResourceNamesSubscribe: []string{"cart.default:80"}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for i := range 12 {
			publish(t, s, mesh(fmt.Sprintf("r%d", i+1), uint32(i+2)))
			synctest.Wait()
		}
		var versions []string
		for {
			r, err := rpc.Recv()
			if err != nil {
				t.Fatal(err)
			}
			versions = append(versions, r.Resources[0].Version)
			if r.Resources[0].Version == s.Clients(true)[0].Resources[0].Sent {
				synctest.Wait()
				if r.Resources[0].Version == s.Clients(true)[0].Resources[0].Sent {
					break
				}
			}
		}
		want, _ := s.Views().Lookup(xdsgen.View{Kind: xdsgen.SDK, Namespace: "default"}, eds, "cart.default:80")
		if last := versions[len(versions)-1]; last != want.Version || len(versions) > 3 {
			t.Errorf("received %d versions, the last %s; want at most 3, the last %s", len(versions), last, want.Version)
		}
		for i := range 5 {
			publish(t, s, mesh(fmt.Sprintf("s%d", i), uint32(100+i)))
			synctest.Wait()
		}
		s.Stop() // the stream is blocked in a send
	})
}

// What the control plane generates with Envoy's own types, the SDK's trimmed ones must take whole.
func TestTheSDKHonoursEverythingInItsView(t *testing.T) {
	m := shop("r1", "cart", "orders")
	m.Services[0].MTLS, m.Services[0].Ports[0].Clusters[0].MTLS = ir.Strict, ir.Strict
	p := &m.Services[1].Ports[0]
	p.Routes = append([]ir.Route{{
		Object: "HTTPRoute/default/orders", Rule: "0.0", Source: ir.Source{File: "mesh.yaml", Line: 3},
		Match: ir.Match{PathKind: ir.PathPrefix, Path: "/v1", Method: "GET", Headers: []ir.HeaderMatch{{Name: "x", Value: "y"}}},
		Backends: []ir.Backend{
			{Cluster: "orders.default:80", Weight: 90}, {Cluster: "gone.default:80", Weight: 10, Invalid: "nobody knows it"},
		},
		Timeout: time.Second, PerTry: time.Millisecond, Idle: time.Minute,
		Retry: &ir.Retry{Attempts: 2, On: []ir.RetryOn{
			ir.OnConnectFailure, ir.OnRefusedStream, ir.OnReset, ir.OnCancelled, ir.OnDeadlineExceeded, ir.OnInternal,
			ir.OnResourceExhausted, ir.OnUnavailable,
		}, Codes: []uint32{503}, Base: time.Millisecond, Max: time.Second},
	}, {Object: "x", Rule: "1", Match: ir.Match{PathKind: ir.PathExact, Path: "/a.B/C"}}}, p.Routes...)
	p.Clusters[0].Endpoints[0].Locality = ir.Locality{Region: "r", Zone: "z"}
	p.Clusters[0].Endpoints[0].Priority = 3
	p.Clusters[0].Endpoints[1].Labels = map[string]string{"version": "v1"}
	p.Clusters[0].Endpoints[1].MeshTLS = false

	s := serve.New(serve.Config{})
	publish(t, s, m)
	all := s.SnapshotFor("default", "orders", xdsgen.SDK)
	if len(all) < 15 {
		t.Fatalf("%d resources, want all of the view", len(all))
	}
	for _, r := range all {
		d, err := resource.Decode(r.Type, r.Any.Value)
		if err != nil {
			t.Errorf("%s %q: %v", r.Type, r.Name, err)
			continue
		}
		if d.Name != r.Name || len(d.NotHonoured) > 0 {
			t.Errorf("%s %q: decoded as %q, not honoured %v", r.Type, r.Name, d.Name, d.NotHonoured)
		}
		rc, ok := d.Value.(*resource.RouteConfiguration)
		if !ok {
			continue
		}
		for _, v := range rc.VirtualHosts {
			for _, route := range v.Routes {
				if route.Invalid != "" {
					t.Errorf("%q: route %q invalid: %s", r.Name, route.Name, route.Invalid)
				}
			}
		}
	}
}

func TestPublishServesTheRestOfAFaultyMesh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := connected(t, shop("r1", "cart", "orders"))
		d.subscribe(rds, "cart.default:80")
		d.subscribe(cds, "orders.default:80")
		d.take()
		m := shop("r2", "cart", "orders")
		m.Services[0].Ports[0].Routes[0].Match = ir.Match{PathKind: ir.PathPrefix, Path: "/ends/"}
		m.Services[1].Ports[0].Clusters[0].Policy.MaxRequests = 5
		if err := s.Publish(m); err == nil {
			t.Error("no error for a route configuration that Envoy refuses")
		}
		d.ack("CDS +orders.default:80") // and the routes of cart stay as they were
	})
}
