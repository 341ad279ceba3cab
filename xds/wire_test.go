package xds_test

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// The whole way: server, stream, decode, graph.
func TestGraphOverTheWire(t *testing.T) {
	for mode, sotw := range map[string]bool{"delta": false, "sotw": true} {
		t.Run(mode, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cp := newControlPlane(t)
				cp.noDelta = sotw
				cp.start()
				defer cp.stop()
				rc := func(clusters ...string) *resource.RouteConfiguration {
					out := &resource.RouteConfiguration{Name: "orders.default:8080", VirtualHosts: []resource.VirtualHost{{Name: "v", Domains: []string{"*"}}}}
					for _, c := range clusters {
						out.VirtualHosts[0].Routes = append(out.VirtualHosts[0].Routes, resource.Route{Clusters: []resource.WeightedCluster{{Name: c, Weight: 1}}})
					}
					return out
				}
				eds := func(name string, port uint16) *resource.Endpoints {
					return &resource.Endpoints{Cluster: name, Localities: []resource.Locality{{Weight: 1, Endpoints: []resource.Endpoint{
						{Addresses: []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)}, Weight: 1}}}}}
				}
				cp.set(&resource.Listener{Name: "orders", API: &resource.HTTP{RouteName: "orders.default:8080"}}, rc("a"), cluster("a", 1), eds("a", 1))
				c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
				defer stop()
				var mu sync.Mutex
				var told []*graph.Config
				defer graph.New(c).Watch("orders", func(cfg *graph.Config) {
					mu.Lock()
					defer mu.Unlock()
					told = append(told, cfg)
				})()
				shown := func() []*graph.Config {
					synctest.Wait()
					mu.Lock()
					defer mu.Unlock()
					return slices.Clone(told)
				}
				got := shown()
				if len(got) != 1 || got[0].Err != nil || got[0].Clusters["a"].Endpoints.Localities[0].Endpoints[0].Addresses[0].Port() != 1 {
					t.Fatalf("first: %+v", got)
				}
				// A route to a cluster that comes a second later is shown with it, not before.
				cp.set(rc("a", "b"))
				pass(time.Second)
				cp.set(cluster("b", 1), eds("b", 2))
				got = shown()
				if n := len(got); n != 2 || got[1].Clusters["b"].Err != nil || len(got[1].Clusters["b"].Endpoints.Localities) != 1 {
					t.Fatalf("after the second cluster: %d configurations, last %+v", n, got[n-1])
				}
				if got[1].Clusters["a"] != got[0].Clusters["a"] {
					t.Error("the cluster that did not change is another value")
				}
				// One that never comes is decided by the resource timer, and only then shown.
				cp.set(rc("a", "never"))
				pass(14 * time.Second)
				if got = shown(); len(got) != 2 {
					t.Fatalf("shown too early: %+v", got[2])
				}
				pass(2 * time.Second)
				if got = shown(); len(got) != 3 || got[2].Clusters["never"].Err == nil || got[2].Clusters["a"].Err != nil {
					t.Fatalf("after the timer: %+v", got)
				}
			})
		})
	}
}

func TestServerThatNeverAnswersTheDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dials := 0
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: func(context.Context, bootstrap.Server) (*grpc.ClientConn, error) {
			dials++
			return grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
					<-ctx.Done()
					return nil, ctx.Err()
				}))
		}})
		defer stop()
		pass(30 * time.Second)
		if dials < 2 {
			t.Errorf("%d attempts in 30 s", dials)
		}
		if err := c.Status().Err; err == nil || !strings.Contains(err.Error(), "cp-1") {
			t.Errorf("status error %v: want the server's name", err)
		}
	})
}

func TestServerThatReadsAndSaysNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.mute = true
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, ResourceTimeout: 3 * time.Second})
		defer stop()
		var a recorder
		c.Watch(resource.ClusterType, "c", &a)
		pass(4 * time.Second)
		if len(a.all()) != 1 || a.last(t).Err == nil {
			t.Errorf("told %+v, want that it does not exist", a.all())
		}
	})
}

func TestNamespacesAloneAreSaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "cart.xds")
		cache := openCache(t, path)
		cp := newControlPlane(t)
		_, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Cache: cache})
		defer stop()
		pass(time.Second)
		cache.SetNamespaces([]string{"shop"})
		pass(2 * time.Second)
		if ns := openCache(t, path).Meta().Namespaces; !reflect.DeepEqual(ns, []string{"shop"}) {
			t.Errorf("namespaces on disk %q", ns)
		}
	})
}
