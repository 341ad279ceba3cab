package xds_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

var oneServer = &bootstrap.Bootstrap{
	Servers: []bootstrap.Server{{URI: "cp-1", Creds: bootstrap.Creds{Type: bootstrap.CredsInsecure}}},
	Node:    bootstrap.Node{ID: "n-1", Metadata: map[string]any{"INLAY_SERVICE": "cart"}},
}

func cluster(name string, max uint32) *resource.Cluster {
	return &resource.Cluster{Name: name, EndpointsName: name, ConnectTimeout: time.Second, MaxRequests: max}
}

// runUntil starts a client; stop ends it and waits.
func runUntil(t *testing.T, cfg xds.Config) (c *xds.Client, stop func()) {
	t.Helper()
	c, err := xds.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stopped := false
	return c, func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

// pass lets d pass on the bubble's clock and everybody settle.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func maxRequests(t *testing.T, r xds.Resource) uint32 {
	t.Helper()
	if r.Err != nil {
		t.Fatalf("error %v, want a cluster", r.Err)
	}
	return r.Decoded.Value.(*resource.Cluster).MaxRequests
}

func deltaRequests(c *controlPlane) []*xdspb.DeltaDiscoveryRequest {
	var out []*xdspb.DeltaDiscoveryRequest
	for _, m := range c.asked() {
		if r, ok := m.(*xdspb.DeltaDiscoveryRequest); ok {
			out = append(out, r)
		}
	}
	return out
}

func TestWatchSharesASubscriptionAndDropsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.start()
		defer cp.stop()
		cp.set(cluster("c", 1))
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, UserAgent: "inlay", UserAgentVersion: "1.2", ClientFeatures: []string{"f"}})
		defer stop()
		var a, b recorder
		cancelA := c.Watch(resource.ClusterType, "c", &a)
		synctest.Wait()
		cancelB := c.Watch(resource.ClusterType, "c", &b)
		synctest.Wait()
		if maxRequests(t, a.last(t)) != 1 || maxRequests(t, b.last(t)) != 1 {
			t.Error("a watcher has another value than the server")
		}
		cp.set(cluster("c", 2))
		synctest.Wait()
		if maxRequests(t, a.last(t)) != 2 || len(a.all()) != 2 || a.last(t).Version != "v2" {
			t.Errorf("after the update: %+v", a.all())
		}
		cancelA()
		cancelA()
		cp.set(cluster("c", 3))
		synctest.Wait()
		if len(a.all()) != 2 || maxRequests(t, b.last(t)) != 3 {
			t.Errorf("after the cancel of one watch: %d calls to it, other %+v", len(a.all()), b.last(t))
		}
		cancelB()
		pass(14 * time.Second)
		cancelB = c.Watch(resource.ClusterType, "c", &b)
		pass(14 * time.Second)
		subscribe, unsubscribe := 0, 0
		count := func() {
			subscribe, unsubscribe = 0, 0
			for _, r := range deltaRequests(cp) {
				subscribe += len(r.GetResourceNamesSubscribe())
				unsubscribe += len(r.GetResourceNamesUnsubscribe())
			}
		}
		if count(); subscribe != 1 || unsubscribe != 0 {
			t.Errorf("%d subscriptions, %d ended; want 1, 0", subscribe, unsubscribe)
		}
		cancelB()
		pass(16 * time.Second)
		if count(); subscribe != 1 || unsubscribe != 1 {
			t.Errorf("%d subscriptions, %d ended after 16 s unwatched; want 1, 1", subscribe, unsubscribe)
		}
		first := deltaRequests(cp)[0].GetNode()
		if first.GetId() != "n-1" || first.GetUserAgentName() != "inlay" || first.GetUserAgentVersion() != "1.2" ||
			first.GetMetadata().GetFields()["INLAY_SERVICE"].GetStringValue() != "cart" || !slices.Equal(first.GetClientFeatures(), []string{"f"}) {
			t.Errorf("node %v", first)
		}
		if deltaRequests(cp)[1].GetNode() != nil {
			t.Error("the second message of the stream carries the node too")
		}
	})
}

func TestRejectedUpdateChangesNothingAndDoesNotLoop(t *testing.T) {
	for mode, sotw := range map[string]bool{"delta": false, "sotw": true} {
		t.Run(mode, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cp := newControlPlane(t)
				cp.noDelta = sotw
				cp.start()
				defer cp.stop()
				cp.set(cluster("c", 1))
				c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
				defer stop()
				var a recorder
				c.Watch(resource.ClusterType, "c", &a)
				synctest.Wait()
				before := len(cp.asked())

				bad, err := proto.Marshal(&xdspb.Cluster{Name: "c"}) // not of type EDS
				if err != nil {
					t.Fatal(err)
				}
				cp.setRaw(name{resource.ClusterType, "c"}, bad)
				pass(time.Hour)
				if n := len(cp.asked()) - before; n != 1 {
					t.Errorf("%d requests after the bad update, want the one NACK", n)
				}
				var text string
				switch r := cp.asked()[before].(type) {
				case *xdspb.DeltaDiscoveryRequest:
					text = r.GetErrorDetail().GetMessage()
				case *xdspb.DiscoveryRequest:
					text = r.GetErrorDetail().GetMessage()
				}
				if !strings.Contains(text, `cluster "c"`) || !strings.Contains(text, "want EDS") {
					t.Errorf("NACK %q: want where and what", text)
				}
				if len(a.all()) != 1 || maxRequests(t, a.last(t)) != 1 {
					t.Errorf("the watcher was told %+v, want the first value only", a.all())
				}
				st := c.Status()
				if r := st.Resources[0]; r.Version == "" || r.Err != nil || r.Rejected != text || st.Mode != mode {
					t.Errorf("status %+v of %+v", r, st)
				}
				cp.set(cluster("c", 5))
				synctest.Wait()
				if maxRequests(t, a.last(t)) != 5 || c.Status().Resources[0].Rejected != "" {
					t.Errorf("after the good update: %+v", c.Status())
				}
			})
		})
	}
}

func TestRejectedWithoutAnEarlierValueIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.start()
		defer cp.stop()
		cp.setRaw(name{resource.ClusterType, "c"}, []byte{0xff})
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var a recorder
		c.Watch(resource.ClusterType, "c", &a)
		synctest.Wait()
		if err := a.last(t).Err; err == nil || errors.Is(err, xds.ErrNotExist) || !strings.Contains(err.Error(), "rejected") {
			t.Errorf("error %v", err)
		}
	})
}

func TestReconnectWithVersionsWithinFiveSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.start()
		defer cp.stop()
		cp.set(cluster("c", 1), cluster("d", 1))
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var a, d recorder
		c.Watch(resource.ClusterType, "c", &a)
		c.Watch(resource.ClusterType, "d", &d)
		synctest.Wait()
		cp.stop()
		pass(10 * time.Minute)
		if st := c.Status(); st.Connected || st.Err == nil || st.Server != "cp-1" {
			t.Errorf("status while away: %+v", st)
		}
		if len(a.all()) != 1 || a.last(t).Err != nil {
			t.Errorf("told while the server was away: %+v", a.all())
		}
		before := len(cp.asked())
		cp.set(cluster("c", 2))
		cp.start()
		pass(5 * time.Second)
		if !c.Status().Connected || maxRequests(t, a.last(t)) != 2 {
			t.Fatalf("5 s after the server is back: %+v, %+v", c.Status(), a.last(t))
		}
		if len(d.all()) != 1 {
			t.Errorf("what did not change was told again: %+v", d.all())
		}
		r := cp.asked()[before].(*xdspb.DeltaDiscoveryRequest)
		if r.GetNode() == nil || r.GetInitialResourceVersions()["c"] != "v1" || !slices.Equal(r.GetResourceNamesSubscribe(), []string{"c", "d"}) {
			t.Errorf("first request after the reconnect: %v", r)
		}
	})
}

func TestSotWFallback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.noDelta = true
		cp.start()
		defer cp.stop()
		cp.set(cluster("c", 1))
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var a recorder
		c.Watch(resource.ClusterType, "c", &a)
		synctest.Wait() // no time passes: the other variant is tried at once
		if maxRequests(t, a.last(t)) != 1 || c.Status().Mode != "sotw" {
			t.Errorf("status %+v", c.Status())
		}
		cp.remove(name{resource.ClusterType, "c"})
		synctest.Wait()
		if !errors.Is(a.last(t).Err, xds.ErrNotExist) {
			t.Errorf("after the removal: %+v", a.last(t))
		}
	})
}

func TestResourceTimerRunsOnlyWhileConnected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var a recorder
		c.Watch(resource.ListenerType, "nobody", &a)
		pass(time.Minute)
		if len(a.all()) != 0 {
			t.Fatalf("told without a server: %+v", a.all())
		}
		cp.start()
		defer cp.stop()
		pass(14 * time.Second)
		if len(a.all()) != 0 {
			t.Fatalf("told before 15 s of a connection: %+v", a.all())
		}
		pass(6 * time.Second)
		if err := a.last(t).Err; !errors.Is(err, xds.ErrNotExist) || !strings.Contains(err.Error(), `listener "nobody"`) {
			t.Errorf("after the timer: %v", err)
		}
		cp.set(&resource.Listener{Name: "nobody", API: &resource.HTTP{RouteName: "r"}})
		synctest.Wait()
		if a.last(t).Err != nil {
			t.Errorf("once it exists: %+v", a.last(t))
		}
	})
}

func TestServerListFallback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newControlPlane(t), newControlPlane(t)
		first.set(cluster("c", 1))
		second.set(cluster("c", 2), cluster("d", 2))
		second.start()
		first.start()
		defer second.stop()
		defer first.stop()
		b := &bootstrap.Bootstrap{Servers: []bootstrap.Server{{URI: "first"}, {URI: "second"}}}
		c, stop := runUntil(t, xds.Config{Bootstrap: b, Dial: func(ctx context.Context, s bootstrap.Server) (cc *grpc.ClientConn, err error) {
			if s.URI == "first" {
				return first.dial(ctx, s)
			}
			return second.dial(ctx, s)
		}})
		defer stop()
		var a, d recorder
		c.Watch(resource.ClusterType, "c", &a)
		synctest.Wait()
		first.stop()
		pass(time.Minute)
		// gRFC A71: fall back only when a resource is wanted that is not cached.
		if n := len(second.asked()); n != 0 {
			t.Errorf("the second server was asked %d times while all was cached", n)
		}
		c.Watch(resource.ClusterType, "d", &d)
		pass(5 * time.Second)
		if maxRequests(t, d.last(t)) != 2 || maxRequests(t, a.last(t)) != 2 || c.Status().Server != "second" {
			t.Errorf("on the second server: c %+v, d %+v, %+v", a.last(t), d.last(t), c.Status())
		}
		for _, r := range deltaRequests(second) {
			if len(r.GetInitialResourceVersions()) > 0 {
				t.Errorf("the second server was told versions of the first: %v", r)
			}
		}
		first.start()
		pass(5 * time.Second)
		if maxRequests(t, a.last(t)) != 1 || c.Status().Server != "first" {
			t.Errorf("back on the first server: %+v, %+v", a.last(t), c.Status())
		}
		n := len(second.asked())
		second.set(cluster("c", 9))
		pass(time.Minute)
		if maxRequests(t, a.last(t)) != 1 || len(second.asked()) != n {
			t.Errorf("the second server still counts: %+v", a.last(t))
		}
	})
}

func TestOwnTypes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const own = "type.googleapis.com/inlay.node.v1.Thing"
		cp := newControlPlane(t)
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Decoders: map[string]func([]byte) (resource.Decoded, error){
			own: func(b []byte) (resource.Decoded, error) {
				return resource.Decoded{Name: string(b), Value: string(b)}, nil
			}}})
		defer stop()
		var a, other recorder
		c.Watch(own, "x", &a)
		c.Watch("type.googleapis.com/nobody.knows", "x", &other)
		synctest.Wait()
		if err := other.last(t).Err; err == nil || !strings.Contains(err.Error(), "no decoder") {
			t.Errorf("type without decoder: %v", err)
		}
		if len(a.all()) != 0 {
			t.Errorf("told without a server: %+v", a.all())
		}
	})
}

func TestWildcardsAreNotAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		for _, n := range []string{"", "*"} {
			var a recorder
			c.Watch(resource.ListenerType, n, &a)
			synctest.Wait()
			if !errors.Is(a.last(t).Err, xds.ErrNotExist) {
				t.Errorf("name %q: %+v", n, a.last(t))
			}
		}
		if n := len(cp.asked()); n != 0 {
			t.Errorf("%d requests, want none", n)
		}
	})
}

func TestWatchedAgainAfterTheLingerStartsWithTheLastValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.start()
		defer cp.stop()
		cp.set(cluster("c", 1))
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Linger: time.Second, Cache: openCache(t, t.TempDir()+"/c")})
		defer stop()
		cancel := c.Watch(resource.ClusterType, "c", &recorder{})
		pass(time.Second)
		cancel()
		pass(2 * time.Second)
		cp.set(cluster("c", 2))
		var a recorder
		c.Watch(resource.ClusterType, "c", &a)
		pass(time.Second)
		if all := a.all(); maxRequests(t, all[len(all)-1]) != 2 || all[len(all)-1].Cached {
			t.Errorf("told %+v", all)
		}
	})
}

func TestNewRefusesWhatCannotServe(t *testing.T) {
	for name, cfg := range map[string]xds.Config{
		"no bootstrap": {},
		"no dial":      {Bootstrap: oneServer},
		"no source":    {Bootstrap: &bootstrap.Bootstrap{}},
	} {
		if _, err := xds.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
