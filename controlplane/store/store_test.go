package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
)

// The stores that others declare.
var (
	_ ca.Log          = (*Store)(nil)
	_ registry.Leases = (*Store)(nil)
	_ vip.Store       = (*Store)(nil)
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestSurvivesRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by", "open")
	s := open(t, dir)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	rev := Revision{ID: "r1", Time: at, Files: []File{{Path: "a/mesh.yaml", Data: []byte("kind: X\n")}, {Path: "empty.yaml"}}}
	in := registry.Instance{
		ID: "i-1", Namespace: "default", Service: "orders", Version: "v1", Labels: map[string]string{"version": "v1"},
		Locality: registry.Locality{Region: "r", Zone: "z", SubZone: "s"}, Weight: 7, MeshTLS: true, Draining: true,
		Ports:      []registry.PortBinding{{Port: 8080, Protocol: "GRPC", Addresses: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:9"), netip.MustParseAddrPort("[fd00::1]:9")}}},
		Addresses:  []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		SDKVersion: "0.1", RunID: "run", Identity: "spiffe://inlay.local/ns/default/svc/orders",
	}
	if err := s.SaveRevision(rev); err != nil {
		t.Fatal(err)
	}
	workload := registry.Instance{ID: "i-2", Namespace: "default", Service: "billing", Weight: 1}
	if err := s.WriteInstances([]registry.Instance{in, workload, {ID: "gone"}}, nil); err != nil {
		t.Fatal(err)
	}
	given := []vip.Given{{Service: vip.Service{Namespace: "default", Name: "orders"}, Index: 2}, {Service: vip.Service{Namespace: "shop", Name: "orders"}, Index: 1}}
	lost := vip.Service{Namespace: "default", Name: "lost"}
	if err := s.WriteVirtualIndexes(append(given[:2:2], vip.Given{Service: lost, Index: 3}), nil); err != nil {
		t.Fatal(err)
	}
	if err := s.WriteVirtualIndexes(nil, []vip.Service{lost}); err != nil {
		t.Fatal(err)
	}
	if err := s.WriteInstances(nil, []string{"gone"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open(t, dir)
	got, ok, err := s.LastRevision()
	if err != nil || !ok {
		t.Fatalf("LastRevision() = %v, %v", ok, err)
	}
	if got.ID != rev.ID || !got.Time.Equal(at) || len(got.Files) != 2 || !bytes.Equal(got.Files[0].Data, rev.Files[0].Data) || got.Files[1].Path != "empty.yaml" {
		t.Errorf("revision = %+v, want %+v", got, rev)
	}
	ins, err := s.Instances()
	if err != nil {
		t.Fatal(err)
	}
	if len(ins) != 2 || !reflect.DeepEqual(ins[0], in) || !reflect.DeepEqual(ins[1], workload) {
		t.Errorf("instances = %+v, want %+v and %+v", ins, in, workload)
	}
	if got, err := s.VirtualIndexes(); err != nil || !reflect.DeepEqual(got, given) {
		t.Errorf("virtual addresses = %v, %v; want %v", got, err, given)
	}
}

func TestKeepsTheLastRevisions(t *testing.T) {
	s := open(t, t.TempDir())
	for i := range 25 {
		if err := s.SaveRevision(Revision{ID: fmt.Sprint("r", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SaveRevision(Revision{ID: "r24"}); err != nil { // the running one again
		t.Fatal(err)
	}
	all, err := s.Revisions()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 20 || all[0].ID != "r24" || all[19].ID != "r5" {
		t.Errorf("kept %d, %s to %s; want 20, r24 to r5", len(all), all[0].ID, all[len(all)-1].ID)
	}
}

func TestDirectoryInUseNamesTheProcess(t *testing.T) {
	dir := t.TempDir()
	first := open(t, dir)
	_, err := Open(Config{Dir: dir})
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprintf("the data directory %s is in use by pid %d", dir, os.Getpid())) {
		t.Errorf("second Open: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
}

// testdata/version0.db was written in the layout of version 0, which schema.go describes.
func TestMigratesAnOlderVersionForward(t *testing.T) {
	dir := t.TempDir()
	raw, err := os.ReadFile("testdata/version0.db")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, fileName), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	all, err := s.Revisions()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].ID != "aaaa" || all[1].ID != "zzzz" {
		t.Fatalf("revisions = %+v, want aaaa (newer), zzzz", all)
	}
	if f := all[0].Files; len(f) != 2 || f[0].Path != "a.yaml" || string(f[0].Data) != "a: 1\n" || f[1].Path != "b.yaml" {
		t.Errorf("files = %+v", f)
	}
	ins, err := s.Instances()
	if err != nil || len(ins) != 1 || ins[0].ID != "i-1" || ins[0].Service != "orders" {
		t.Errorf("instances = %+v, %v", ins, err)
	}
	if err := s.RecordCert(testCert("01", time.Now().Add(time.Hour))); err != nil {
		t.Errorf("certificates after the migration: %v", err)
	}
	if err := s.WriteVirtualIndexes([]vip.Given{{Service: vip.Service{Namespace: "default", Name: "orders"}, Index: 1}}, nil); err != nil {
		t.Errorf("virtual addresses after the migration: %v", err)
	}
	_ = s.Close()
	if all, err := open(t, dir).Revisions(); err != nil || len(all) != 2 { // the number was written too
		t.Errorf("second start: %v, %v", all, err)
	}
}

// A store of version 1 had no virtual addresses; everything else stays.
func TestMigratesVersion1Forward(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.WriteInstances([]registry.Instance{{ID: "i-1", Namespace: "default", Service: "orders", Weight: 1}}, nil); err != nil {
		t.Fatal(err)
	}
	err := s.db.Update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.DeleteBucket(addressesBucket), putVersion(tx.Bucket(metaBucket), 1))
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	s = open(t, dir)
	if ins, err := s.Instances(); err != nil || len(ins) != 1 {
		t.Errorf("instances = %v, %v", ins, err)
	}
	if given, err := s.VirtualIndexes(); err != nil || len(given) != 0 {
		t.Errorf("virtual addresses = %v, %v", given, err)
	}
	if err := s.WriteVirtualIndexes([]vip.Given{{Service: vip.Service{Namespace: "default", Name: "orders"}, Index: 1}}, nil); err != nil {
		t.Errorf("write: %v", err)
	}
}

// 100,000 services are given addresses, and remembered, in well under a second.
func BenchmarkAssign(b *testing.B) {
	services := make([]vip.Service, 100_000)
	for i := range services {
		services[i] = vip.Service{Namespace: "default", Name: fmt.Sprintf("s%06d", i)}
	}
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			s, err := Open(Config{Dir: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			a, err := vip.New(vip.Config{Store: s})
			if err != nil {
				b.Fatal(err)
			}
			if got := a.Assign(services).Of("default", "s099999"); len(got) != 2 {
				b.Fatalf("s099999 is at %v", got)
			}
			b.StopTimer()
			_ = s.Close()
			b.StartTimer()
		}
	})
	b.Run("restart", func(b *testing.B) {
		s, err := Open(Config{Dir: b.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		first, err := vip.New(vip.Config{Store: s})
		if err != nil {
			b.Fatal(err)
		}
		want := first.Assign(services).Of("default", "s012345")
		for b.Loop() {
			a, err := vip.New(vip.Config{Store: s})
			if err != nil {
				b.Fatal(err)
			}
			if got := a.Assign(services).Of("default", "s012345"); !slices.Equal(got, want) {
				b.Fatalf("s012345 is at %v, was at %v", got, want)
			}
		}
	})
	b.Run("again", func(b *testing.B) { // with nothing new: what each build pays
		a, err := vip.New(vip.Config{})
		if err != nil {
			b.Fatal(err)
		}
		a.Assign(services)
		b.ReportAllocs()
		for b.Loop() {
			a.Assign(services)
		}
	})
}

func TestRefusesANewerVersion(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.db.Update(func(tx *bbolt.Tx) error { return putVersion(tx.Bucket(metaBucket), schemaVersion+1) }); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	before, _ := os.ReadFile(filepath.Join(dir, fileName))
	_, err := Open(Config{Dir: dir})
	if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "this one reads up to 2: start that newer inlay again") {
		t.Errorf("Open: %v", err)
	}
	if after, _ := os.ReadFile(filepath.Join(dir, fileName)); !bytes.Equal(before, after) {
		t.Error("the refused file was changed")
	}
}

func TestRefusesWhatIsNotAStore(t *testing.T) {
	whole := func() []byte {
		dir := t.TempDir()
		s := open(t, dir)
		for i := range 30 {
			if err := s.SaveRevision(Revision{ID: fmt.Sprint(i), Files: []File{{Path: "x", Data: bytes.Repeat([]byte("x"), 3000)}}}); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.Close()
		b, err := os.ReadFile(filepath.Join(dir, fileName))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}()
	page := os.Getpagesize()
	foreign := filepath.Join(t.TempDir(), "foreign.db")
	db, err := bbolt.Open(foreign, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("boxes")); return err }); err != nil {
		t.Fatal(err)
	}
	_ = db.Close()
	other, _ := os.ReadFile(foreign)

	for name, raw := range map[string][]byte{
		"text":                         bytes.Repeat([]byte("hello world\n"), 4000),
		"cut within the first pages":   whole[:5000],
		"cut after the first pages":    whole[:4*page],
		"zeroes behind the meta pages": append(bytes.Clone(whole[:2*page]), make([]byte, len(whole)-2*page)...),
		"another program's database":   other,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, fileName), raw, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Open(Config{Dir: dir})
			if err == nil { // damage that only a read meets
				_, err = s.Revisions()
				_ = s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), "move it away") {
				t.Errorf("err = %v, want the remedy", err)
			}
		})
	}
}

func TestDirectoryThatIsAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, filepath.Join(file, "below")} {
		if _, err := Open(Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "pass one with --data DIR") {
			t.Errorf("Open(%s): %v", dir, err)
		}
	}
}

func TestTextsOfTheFileSystem(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"a full disk":           {&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, "the data directory D is full"},
		"a quota":               {syscall.EDQUOT, "the data directory D is full"},
		"a read-only disk":      {&os.PathError{Op: "open", Path: "x", Err: syscall.EROFS}, "make it writable for this user, or pass another one with --data DIR"},
		"somebody else's":       {&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, "make it writable for this user"},
		"anything else is kept": {syscall.EIO, "cannot write to the data directory D: input/output error"},
	} {
		t.Run(name, func(t *testing.T) {
			got := explain("D", "write to", tc.err)
			if !strings.Contains(got.Error(), tc.want) || !errors.Is(got, tc.err) {
				t.Errorf("explain = %v, want %q", got, tc.want)
			}
		})
	}
}

// A disk that is really full: the size of files of this process is limited around one write.
func TestFullDiskFailsTheWriteAndKeepsTheRest(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.SaveRevision(Revision{ID: "small"}); err != nil {
		t.Fatal(err)
	}
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 256 << 10, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	err := s.SaveRevision(Revision{ID: "big", Files: []File{{Path: "x", Data: make([]byte, 1<<20)}}})
	if e := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, ErrFull) {
		t.Errorf("write beyond the limit: %v, want ErrFull", err)
	}
	if r, ok, err := s.LastRevision(); err != nil || !ok || r.ID != "small" {
		t.Errorf("after the failed write: %v %v %v, want small", r.ID, ok, err)
	}
	if err := s.SaveRevision(Revision{ID: "after"}); err != nil {
		t.Errorf("write after space was made: %v", err)
	}
}

// The values are ours to decode; the pages around them are the database's.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"namespace":"default","service":"orders","weight":1,"ports":[{"port":8080,"protocol":"GRPC","addresses":["127.0.0.1:9001"]}]}`))
	f.Add([]byte(`{"id":"a","time":"2026-01-01T00:00:00Z","files":[{"path":"a.yaml","data":"YTogMQo="}]}`))
	f.Add([]byte(`{"spiffe_id":"spiffe://a/b","serial":"0a","not_before":"2026-01-01T00:00:00Z","not_after":"2099-01-01T00:00:00Z"}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, v []byte) {
		s, err := Open(Config{Dir: filepath.Join(dir, strconv.Itoa(os.Getpid()))}) // workers share dir
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		err = s.update(func(tx *bbolt.Tx) error {
			return errors.Join(tx.Bucket(revisionsBucket).Put(binary.BigEndian.AppendUint64(nil, 1), v),
				tx.Bucket(instancesBucket).Put([]byte("i"), v), tx.Bucket(certsBucket).Put(make([]byte, 8), v))
		})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.Revisions()
		_, _ = s.Certs()
		if ins, err := s.Instances(); err == nil && len(ins) == 1 { // what is accepted survives unchanged
			if err := s.WriteInstances(ins, nil); err != nil {
				t.Fatal(err)
			}
			again, err := s.Instances()
			if err != nil || fmt.Sprintf("%+v", again) != fmt.Sprintf("%+v", ins) {
				t.Errorf("%+v became %+v, %v", ins, again, err)
			}
		}
	})
}

func testCert(serial string, notAfter time.Time) ca.Cert {
	return ca.Cert{SPIFFEID: "spiffe://inlay.local/ns/default/svc/orders", Serial: serial, NotBefore: notAfter.Add(-time.Hour).UTC(), NotAfter: notAfter.UTC()}
}

func TestForgetsExpiredCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, t.TempDir())
		now := time.Now()
		for i := range 5 {
			if err := s.RecordCert(testCert(fmt.Sprint(i), now.Add(time.Duration(i+1)*time.Minute))); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(150 * time.Second) // the bubble's clock: 0 and 1 have expired
		got, err := s.Certs()
		if err != nil || len(got) != 3 || !reflect.DeepEqual(got[0], testCert("2", now.Add(3*time.Minute))) {
			t.Errorf("Certs() = %+v, %v", got, err)
		}
		if err := s.RecordCert(testCert("9", now.Add(time.Hour))); err != nil {
			t.Fatal(err)
		}
		n := 0
		_ = s.db.View(func(tx *bbolt.Tx) error { n = tx.Bucket(certsBucket).Stats().KeyN; return nil })
		if n != 4 {
			t.Errorf("%d certificates on disk, want 4", n)
		}
	})
}
