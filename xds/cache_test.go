package xds_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/resource"
)

const (
	td  = "inlay.local"
	own = "spiffe://inlay.local/ns/default/svc/cart"
)

func raw(t testing.TB, version string, v any) xds.RawResource {
	t.Helper()
	typ, b, err := resource.Encode(v)
	if err != nil {
		t.Fatal(err)
	}
	d, err := resource.Decode(typ, b)
	if err != nil {
		t.Fatal(err)
	}
	return xds.RawResource{Type: typ, Name: d.Name, Version: version, Bytes: b}
}

func openCache(t *testing.T, path string) *xds.Cache {
	t.Helper()
	c, err := xds.OpenCache(xds.CacheConfig{Path: path, TrustDomain: td, SPIFFEID: own})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestColdStartFromTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "state", "cart.xds")
		cp := newControlPlane(t)
		cp.start()
		cp.set(cluster("c", 1), cluster("gone", 1))
		cache := openCache(t, path)
		cache.SetNamespaces([]string{"default", "shop"})
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Cache: cache})
		var a recorder
		c.Watch(resource.ClusterType, "c", &a)
		c.Watch(resource.ClusterType, "gone", &recorder{})
		synctest.Wait()
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("written before the debounce: %v", err)
		}
		pass(2 * time.Second)
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("cache file: %v, %v", info, err)
		}
		cp.set(cluster("c", 2))
		synctest.Wait()
		cp.stop()
		stop() // writes what the debounce still held

		// The same workload again, while the control plane is away.
		cache = openCache(t, path)
		if ns := cache.Meta().Namespaces; !reflect.DeepEqual(ns, []string{"default", "shop"}) {
			t.Errorf("namespaces %q", ns)
		}
		c, stop = runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Cache: cache})
		defer stop()
		var b, gone recorder
		c.Watch(resource.ClusterType, "c", &b)
		c.Watch(resource.ClusterType, "gone", &gone)
		pass(time.Minute)
		if r := b.last(t); maxRequests(t, r) != 2 || !r.Cached || r.Version != "v3" || len(b.all()) != 1 {
			t.Errorf("cold start: %+v", b.all())
		}
		if st := c.Status(); st.LoadedFrom != path || st.LoadedWritten.IsZero() || !st.Resources[0].Cached {
			t.Errorf("status %+v", st)
		}
		// Back, with what is at the client and with one resource less.
		cp.remove(name{resource.ClusterType, "gone"})
		before := len(cp.asked())
		cp.start()
		defer cp.stop()
		pass(5 * time.Second)
		if r := deltaRequests(cp)[before]; r.GetInitialResourceVersions()["c"] != "v3" {
			t.Errorf("first request %v: want the cached versions", r)
		}
		if len(b.all()) != 1 {
			t.Errorf("told again of what did not change: %+v", b.all())
		}
		if err := gone.last(t).Err; !errors.Is(err, xds.ErrNotExist) {
			t.Errorf("deleted while away: %v", err)
		}
	})
}

func TestAttachGivesACacheLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "cart.xds")
		if err := xds.WriteSnapshot(path, []xds.RawResource{raw(t, "v1", cluster("c", 3))}, xds.Meta{TrustDomain: td, SPIFFEID: own}); err != nil {
			t.Fatal(err)
		}
		cp := newControlPlane(t) // away
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial})
		defer stop()
		var a recorder
		c.Watch(resource.ClusterType, "c", &a)
		pass(time.Second)
		if len(a.all()) != 0 {
			t.Fatalf("told %+v", a.all())
		}
		c.Attach(openCache(t, path))
		synctest.Wait()
		if r := a.last(t); maxRequests(t, r) != 3 || !r.Cached {
			t.Errorf("after Attach: %+v", r)
		}
	})
}

func TestUnwritableCacheIsOneWarning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		cache, err := xds.OpenCache(xds.CacheConfig{Path: filepath.Join(filepath.Dir(file), "sub", "cart.xds"),
			Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		// The directory turns into one that nobody can write to, root included.
		if err := os.Rename(file, filepath.Join(filepath.Dir(file), "sub")); err != nil {
			t.Fatal(err)
		}
		cp := newControlPlane(t)
		cp.start()
		defer cp.stop()
		c, stop := runUntil(t, xds.Config{Bootstrap: oneServer, Dial: cp.dial, Cache: cache})
		var a recorder
		c.Watch(resource.ClusterType, "c", &a)
		for i := range uint32(3) {
			cp.set(cluster("c", i+1))
			pass(5 * time.Second)
		}
		if maxRequests(t, a.last(t)) != 3 {
			t.Errorf("told %+v", a.all())
		}
		stop()
		if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "cannot be saved") {
			t.Errorf("%d warnings, want 1: %s", n, log.String())
		}
	})
}

func TestRefusedCaches(t *testing.T) {
	good := xds.EncodeSnapshot([]xds.RawResource{raw(t, "1", cluster("c", 1))}, xds.Meta{TrustDomain: td, SPIFFEID: own})
	version := func(v uint32) []byte {
		b := bytes.Clone(good)
		binary.BigEndian.PutUint32(b[8:], v)
		return b
	}
	flip := bytes.Clone(good)
	flip[len(flip)-1] ^= 1
	for name, tc := range map[string]struct {
		b    []byte
		mode fs.FileMode
		want []string
	}{
		"another identity": {xds.EncodeSnapshot(nil, xds.Meta{TrustDomain: td, SPIFFEID: "spiffe://inlay.local/ns/default/svc/orders"}), 0o600,
			[]string{"svc/orders", "svc/cart", "INLAY_STATE_DIR"}},
		"another trust domain": {xds.EncodeSnapshot(nil, xds.Meta{TrustDomain: "other", SPIFFEID: own}), 0o600, []string{`"other"`, `"inlay.local"`}},
		"a newer format":       {version(2), 0o600, []string{"newer", "this program reads (1; update it)", "remove the file"}},
		"an older format":      {version(0), 0o600, []string{"older", "remove the file"}},
		"damage":               {flip, 0o600, []string{"checksum", "remove the file"}},
		"another file":         {[]byte("hello"), 0o600, []string{"not a configuration snapshot", "remove the file"}},
		"open to others":       {good, 0o644, []string{"mode 0644", "0600"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.xds")
			if err := os.WriteFile(path, tc.b, tc.mode); err != nil {
				t.Fatal(err)
			}
			_, err := xds.OpenCache(xds.CacheConfig{Path: path, TrustDomain: td, SPIFFEID: own})
			for _, want := range append(tc.want, path) {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v: want %q in it", err, want)
				}
			}
			if b, _ := os.ReadFile(path); !bytes.Equal(b, tc.b) {
				t.Error("the file was touched")
			}
		})
	}
	t.Run("a link", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Symlink("/dev/null", filepath.Join(dir, "c.xds")); err != nil {
			t.Fatal(err)
		}
		if _, err := xds.OpenCache(xds.CacheConfig{Path: filepath.Join(dir, "c.xds")}); err == nil {
			t.Error("followed")
		}
	})
}

func TestSnapshotServesWithoutServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "cart.snapshot")
		meta := xds.Meta{TrustDomain: td, Revision: "r7", Namespaces: []string{"default"}, Written: time.Unix(1, 2).UTC()}
		if err := xds.WriteSnapshot(path, []xds.RawResource{raw(t, "1", cluster("c", 4)), {Type: resource.ClusterType, Name: "bad", Bytes: []byte{0xff}}}, meta); err != nil {
			t.Fatal(err)
		}
		snap, err := xds.LoadSnapshot(path, td, own) // no SPIFFE ID in the file: for any identity
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(snap.Meta, meta) {
			t.Errorf("meta %+v, want %+v", snap.Meta, meta)
		}
		c, stop := runUntil(t, xds.Config{Bootstrap: &bootstrap.Bootstrap{}, Snapshot: snap})
		defer stop()
		var a, none, bad recorder
		c.Watch(resource.ClusterType, "c", &a)
		c.Watch(resource.ClusterType, "other", &none)
		c.Watch(resource.ClusterType, "bad", &bad)
		synctest.Wait()
		if maxRequests(t, a.last(t)) != 4 || a.last(t).Cached {
			t.Errorf("told %+v", a.last(t))
		}
		if err := none.last(t).Err; !errors.Is(err, xds.ErrNotExist) {
			t.Errorf("a name that is not there: %v", err)
		}
		if bad.last(t).Err == nil {
			t.Error("bytes that do not decode were served")
		}
		if st := c.Status(); st.LoadedFrom != path || st.Connected {
			t.Errorf("status %+v", st)
		}
	})
}

func TestSnapshotOfAnotherIdentity(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if _, err := xds.LoadSnapshot(path, td, own); err == nil || !strings.Contains(err.Error(), "inlay compile") {
		t.Errorf("missing file: %v", err)
	}
	if err := xds.WriteSnapshot(path, nil, xds.Meta{SPIFFEID: "spiffe://inlay.local/ns/default/svc/orders"}); err != nil {
		t.Fatal(err)
	}
	if _, err := xds.LoadSnapshot(path, td, own); err == nil || !strings.Contains(err.Error(), "svc/orders") || !strings.Contains(err.Error(), "svc/cart") {
		t.Errorf("error %v: want both identities", err)
	}
}

func FuzzDecodeSnapshot(f *testing.F) {
	f.Add(xds.EncodeSnapshot(nil, xds.Meta{}))
	f.Add(xds.EncodeSnapshot([]xds.RawResource{{Type: "t", Name: "n", Version: "v", Bytes: []byte{1}}, {Type: "t", Name: "m"}},
		xds.Meta{TrustDomain: td, SPIFFEID: own, Revision: "r", Namespaces: []string{"a", ""}, Written: time.Unix(5, 6).UTC()}))
	f.Fuzz(func(t *testing.T, payload []byte) {
		// The checksum is set right, or nothing behind it would ever be reached.
		for _, b := range [][]byte{payload, xds.Sealed(payload)} {
			resources, meta, err := xds.DecodeSnapshot(b)
			if err != nil {
				continue
			}
			r2, m2, err := xds.DecodeSnapshot(xds.EncodeSnapshot(resources, meta))
			if err != nil || !reflect.DeepEqual(meta, m2) || !reflect.DeepEqual(resources, r2) {
				t.Fatalf("changed: %v\n%+v\n%+v\n%+v\n%+v", err, meta, m2, resources, r2)
			}
		}
	})
}
