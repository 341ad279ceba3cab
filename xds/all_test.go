package xds_test

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// everything is a watcher of a type that keeps what it is told as words, in order, and what holds.
type everything struct {
	mu    sync.Mutex
	words []string
	has   map[string]xds.Resource
}

func (e *everything) Changed(n string, r xds.Resource) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.has == nil {
		e.has = map[string]xds.Resource{}
	}
	switch {
	case errors.Is(r.Err, xds.ErrNotExist):
		delete(e.has, n)
		e.words = append(e.words, "-"+n)
	case r.Err != nil:
		e.words = append(e.words, "!"+n)
	default:
		e.has[n] = r
		e.words = append(e.words, n+"@"+r.Version)
	}
}

func (e *everything) Synced(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		e.words = append(e.words, "failed: "+err.Error())
		return
	}
	e.words = append(e.words, "synced")
}

// told returns the words since the last call, news of one moment sorted.
func (e *everything) told() string {
	synctest.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	out := e.words
	e.words = nil
	if n := len(out); n > 0 && out[n-1] == "synced" {
		slices.Sort(out[:n-1])
	} else {
		slices.Sort(out)
	}
	return strings.Join(out, " ")
}

func (e *everything) names() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(maps.Keys(e.has))
}

func expect(t *testing.T, e *everything, what, want string) {
	t.Helper()
	if got := e.told(); got != want {
		t.Errorf("%s: told %q, want %q", what, got, want)
	}
}

func TestWatchAllTellsOfEachResourceAndOfTheWholeAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.most = 2 // the answer takes several responses
		cp.set(cluster("a", 1), cluster("b", 1), cluster("c", 1), cluster("d", 1), cluster("e", 1))
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var all, late everything
		cancel := c.WatchAll(resource.ClusterType, &all)
		expect(t, &all, "start", "a@v1 b@v2 c@v3 d@v4 e@v5 synced")
		cp.set(cluster("b", 2), cluster("f", 1))
		cp.remove(name{resource.ClusterType, "a"})
		expect(t, &all, "changes", "-a b@v6 f@v7")
		if max := all.has["b"].Decoded.Value.(*resource.Cluster).MaxRequests; max != 2 {
			t.Errorf("value of b: %d, want 2", max)
		}
		before := len(cp.asked())
		cancelLate := c.WatchAll(resource.ClusterType, &late)
		expect(t, &late, "a second watch", "b@v6 c@v3 d@v4 e@v5 f@v7 synced")
		if n := len(cp.asked()) - before; n != 0 {
			t.Errorf("%d requests for a second watch, want 0", n)
		}
		// One resource by its name beside it: one more subscription, and it stays when that ends.
		var one recorder
		cancelOne := c.Watch(resource.ClusterType, "b", &one)
		synctest.Wait()
		if maxRequests(t, one.last(t)) != 2 {
			t.Errorf("by name: %+v", one.last(t))
		}
		cancelOne()
		pass(20 * time.Second)
		all.told()
		late.told()
		cp.set(cluster("b", 3))
		expect(t, &all, "after the watch by name ended", "b@v8")
		if len(one.all()) != 1 {
			t.Errorf("the cancelled watch was told %d times, want 1", len(one.all()))
		}
		cancel()
		cancel()
		cancelLate()
		synctest.Wait()
		last := deltaRequests(cp)[len(deltaRequests(cp))-1]
		if !slices.Equal(last.GetResourceNamesUnsubscribe(), []string{"*"}) {
			t.Errorf("last request %v, want the end of the wildcard", last)
		}
		late.told()
		cp.set(cluster("b", 4))
		expect(t, &all, "after cancel", "")
		if n := len(c.Status().Resources); n != 0 {
			t.Errorf("%d resources held after the last watch, want 0", n)
		}
	})
}

func TestWatchAllOfNothingIsSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var all everything
		c.WatchAll(resource.ClusterType, &all)
		expect(t, &all, "start", "synced")
		cp.set(cluster("a", 1))
		expect(t, &all, "later", "a@v1")
	})
}

func TestWatchAllOfAMuteServerIsNeverSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.mute = true
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var all everything
		c.WatchAll(resource.ClusterType, &all)
		pass(time.Hour)
		expect(t, &all, "an hour of silence", "")
	})
}

func TestWatchAllOverAReconnectAndAColdStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "node.xds")
		cp := newControlPlane(t)
		cp.set(cluster("a", 1), cluster("b", 1), cluster("c", 1))
		cp.start()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Cache: openCache(t, path)})
		var all everything
		c.WatchAll(resource.ClusterType, &all)
		pass(20 * time.Second)
		expect(t, &all, "start", "a@v1 b@v2 c@v3 synced")

		cp.stop()
		pass(time.Minute)
		expect(t, &all, "while away", "")
		cp.remove(name{resource.ClusterType, "a"})
		cp.set(cluster("b", 2))
		before := len(cp.asked())
		cp.start()
		pass(20 * time.Second)
		if v := deltaRequests(cp)[before].GetInitialResourceVersions(); !maps.Equal(v, map[string]string{"a": "v1", "b": "v2", "c": "v3"}) {
			t.Errorf("initial versions %v, want what is held", v)
		}
		expect(t, &all, "back", "-a b@v4 synced")
		cp.stop()
		stop()

		// The same watcher's program again, while the control plane is away.
		c, stop = runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Cache: openCache(t, path)})
		defer stop()
		all = everything{}
		c.WatchAll(resource.ClusterType, &all)
		pass(time.Hour)
		expect(t, &all, "cold start", "b@v4 c@v3")
		if !all.has["c"].Cached {
			t.Error("a value from disk is not marked as cached")
		}
		cp.remove(name{resource.ClusterType, "c"})
		cp.start()
		defer cp.stop()
		pass(20 * time.Second)
		expect(t, &all, "back again", "-c synced")
		if got := all.names(); !slices.Equal(got, []string{"b"}) {
			t.Errorf("holds %v, want b", got)
		}
	})
}

func TestWatchAllKeepsTheGoodValueOfARejectedOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.set(cluster("a", 1), cluster("b", 1))
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var all everything
		c.WatchAll(resource.ClusterType, &all)
		pass(20 * time.Second)
		all.told()
		for _, n := range []string{"a", "new"} {
			bad, err := proto.Marshal(&xdspb.Cluster{Name: n}) // not of type EDS
			if err != nil {
				t.Fatal(err)
			}
			cp.setRaw(name{resource.ClusterType, n}, bad)
		}
		expect(t, &all, "bad ones", "!new")
		if got := all.names(); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("holds %v", got)
		}
		cp.set(cluster("a", 3), cluster("new", 1))
		expect(t, &all, "good ones", "a@v5 new@v6")
	})
}

func TestWatchAllSaysThatStateOfTheWorldCannot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := newControlPlane(t)
		cp.noDelta = true
		cp.set(cluster("a", 1))
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var all everything
		c.WatchAll(resource.ClusterType, &all)
		if got := all.told(); !strings.HasPrefix(got, "failed: ") || !strings.Contains(got, "DeltaAggregatedResources") {
			t.Errorf("told %q, want what is missing", got)
		}
	})
}

func TestWatchAllOfASnapshotAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &xds.Snapshot{Resources: []xds.RawResource{raw(t, "1", cluster("a", 1)), raw(t, "1", cluster("b", 1))}}
		c, stop := runUntil(t, xds.Config{Bootstrap: &bootstrap.Bootstrap{}, Snapshot: s})
		defer stop()
		var all, unknown everything
		c.WatchAll(resource.ClusterType, &all)
		expect(t, &all, "snapshot", "a@1 b@1 synced")
		c.WatchAll("type.googleapis.com/nobody.knows", &unknown)
		if got := unknown.told(); !strings.Contains(got, "no decoder") {
			t.Errorf("unknown type: told %q", got)
		}
	})
}

// BenchmarkCacheSave is what one write of the cache costs; it happens once in Debounce at most.
func BenchmarkCacheSave(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var list []xds.RawResource
			for i := range n {
				list = append(list, xds.RawResource{Type: "type.googleapis.com/inlay.node.v1.Service", Name: fmt.Sprintf("default/service-%d", i), Version: "0123456789abcdef", Bytes: make([]byte, 250)})
			}
			path := filepath.Join(b.TempDir(), "c")
			for b.Loop() {
				if err := xds.WriteSnapshot(path, list, xds.Meta{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
