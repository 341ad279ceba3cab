package load

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

func allowAll(t *testing.T, m *ebpf.Map) bool {
	t.Helper()
	var s bpfobj.InlaySettings
	if err := m.Lookup(uint32(0), &s); err != nil {
		t.Fatal(err)
	}
	return s.AllowAll != 0
}

func TestBreakglass(t *testing.T) {
	r := newRoom(t)
	if _, err := Breakglass(r.cfg.Pin, true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("with nothing pinned: %v", err)
	}
	s := r.open(r.cfg, version(16))
	if err := s.Maps().SettingsMap.Put(uint32(0), bpfobj.InlaySettings{Pad: 77}); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ on, changed bool }{{true, true}, {true, false}, {false, true}, {false, false}, {true, true}} {
		changed, err := Breakglass(r.cfg.Pin, step.on)
		if err != nil || changed != step.changed || allowAll(t, s.Maps().SettingsMap) != step.on {
			t.Errorf("Breakglass(%v) = %v, %v; want %v", step.on, changed, err, step.changed)
		}
	}
	var set bpfobj.InlaySettings
	if err := s.Maps().SettingsMap.Lookup(uint32(0), &set); err != nil || set.Pad != 77 {
		t.Errorf("settings = %+v, %v: another field was changed", set, err)
	}
	// It holds over a restart and over a change of layout, as the counters do.
	r.once()
	n := counted(t, s.Maps().Counters, 16)
	s.Close()
	for _, layout := range []string{"1", "2"} {
		s = r.open(r.with(layout), version(17))
		if !allowAll(t, s.Maps().SettingsMap) {
			t.Errorf("layout %s: a new agent turned policies on again", layout)
		}
		if got := counted(t, s.Maps().Counters, 16); got != n || n == 0 {
			t.Errorf("layout %s: counter = %d, want %d", layout, got, n)
		}
		s.Close()
	}
	if changed, err := Breakglass(r.cfg.Pin, false); !changed || err != nil {
		t.Errorf("without an agent: %v, %v", changed, err)
	}
}

func TestCleanup(t *testing.T) {
	r := newRoom(t)
	if removed, err := Cleanup(r.cfg.Pin); len(removed) != 0 || err != nil {
		t.Errorf("with nothing pinned: %v, %v", removed, err)
	}
	r.open(r.cfg, version(16)).Close()
	want := tree(t, r.cfg.Pin)
	removed, err := Cleanup(r.cfg.Pin)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range want {
		name := strings.TrimPrefix(path, "/")
		if strings.Count(name, "/") == 2 && !slices.Contains(removed, name) {
			t.Errorf("%s was not named", name)
		}
	}
	for _, name := range []string{"v1/links/connect4", "v1/maps/services"} {
		if !slices.Contains(removed, name) {
			t.Errorf("%s was not removed: %v", name, removed)
		}
	}
	if _, err := os.Stat(r.cfg.Pin); !os.IsNotExist(err) {
		t.Errorf("pin directory: %v, want it gone", err)
	}
	if n := r.attached(ebpf.AttachCGroupInet4Connect); n != 0 {
		t.Errorf("%d programs are still attached", n)
	}
	p := r.prober()
	if dials, wrong := p.stop(); wrong != dials/2 {
		t.Errorf("%d of %d dials judged, want none", wrong, dials)
	}
	if removed, err := Cleanup(r.cfg.Pin); len(removed) != 0 || err != nil {
		t.Errorf("second time: %v, %v", removed, err)
	}
}

func TestCleanupRefusesWhatIsNotItsOwn(t *testing.T) {
	newRoom(t)
	for dir, want := range map[string]string{BPFFS: "is the bpf file system itself", t.TempDir(): "not on a bpf file system"} {
		if removed, err := Cleanup(dir); err == nil || len(removed) != 0 || !strings.Contains(err.Error(), want) {
			t.Errorf("Cleanup(%s) = %v, %v; want %q", dir, removed, err, want)
		}
	}
}

func TestEnsureBPFFS(t *testing.T) {
	needKernel(t)
	if err := errors.Join(EnsureBPFFS(""), EnsureBPFFS(filepath.Join(BPFFS, "not", "there", "yet"))); err != nil {
		t.Error(err)
	}
	if err := EnsureBPFFS(t.TempDir()); err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("a directory elsewhere: %v", err)
	}
}

func TestPinDir(t *testing.T) {
	mnt, err := FindCgroup2()
	if err != nil && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{"": "/sys/fs/bpf/inlay", "inlay": "/sys/fs/bpf/inlay", mnt + "/inlay": "/sys/fs/bpf/inlay", "inlay-demo-7": "/sys/fs/bpf/inlay-inlay-demo-7", mnt + "/a/b": "/sys/fs/bpf/inlay-a_2fb"} {
		if got, err := PinDir(in); got != want || err != nil {
			t.Errorf("PinDir(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestCgroupLevel(t *testing.T) {
	r := newRoom(t)
	chain, err := ancestors()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(self)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok {
			continue
		}
		depth := 0
		if path != "" {
			depth = len(strings.Split(path, "/"))
		}
		mnt, _ := FindCgroup2()
		id, err := CgroupID(filepath.Join(mnt, path))
		if err != nil || len(chain) != depth+1 || chain[depth] != id {
			t.Errorf("ancestors = %v, %v; want %d levels and %d last", chain, err, depth+1, id)
		}
	}
	deep := filepath.Join(r.cfg.Cgroup, "leaf")
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(deep)
	if level, err := cgroupLevel(deep); level != 2 || err != nil {
		t.Errorf("cgroupLevel(%s) = %d, %v; want 2", deep, level, err)
	}
	if _, err := CgroupID(t.TempDir()); err == nil {
		t.Error("a directory that is no cgroup has an id")
	}
}

func TestSweepReachesEveryNetworkNamespace(t *testing.T) {
	r := newRoom(t)
	s := r.open(r.cfg, version(16))
	p := r.inside("listener", syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET})
	if got := p.line(); got != "<nil>" {
		t.Fatal(got)
	}
	for range 2 {
		before := counted(t, s.Maps().Counters, 31)
		if err := s.Sweep(); err != nil {
			t.Fatal(err)
		}
		if got := counted(t, s.Maps().Counters, 31) - before; got != 1 {
			t.Errorf("the listener in another namespace was met %d times, want once", got)
		}
	}
	s.Close()
	if err := s.Sweep(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Sweep after Close = %v", err)
	}
}

func TestStats(t *testing.T) {
	r := newRoom(t)
	r.cfg.Stats = true
	s := r.open(r.cfg, version(16))
	dials, _ := r.once()
	stats, err := s.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for _, st := range stats {
		if st.Name == "connect4" && st.Runs == uint64(dials) && st.Time > 0 {
			return
		}
	}
	t.Errorf("stats = %+v, want connect4 with %d runs", stats, dials)
}
