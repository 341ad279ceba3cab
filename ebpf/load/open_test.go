package load

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// check dials from inside and wants the right outcomes, counted by the program with this key once each.
func (r *room) check(layout string, key uint32) {
	r.t.Helper()
	before := r.pinnedCounter(layout, key)
	dials, wrong := r.once()
	if wrong != 0 {
		r.t.Errorf("%d of %d dials were judged wrong", wrong, dials)
	}
	if got := r.pinnedCounter(layout, key) - before; got != uint64(dials) {
		r.t.Errorf("program %d counted %d of %d dials", key, got, dials)
	}
}

func TestProgramsOutliveTheAgent(t *testing.T) {
	r := newRoom(t)
	filled := false
	s, err := open(r.cfg, func(m *bpfobj.InlayMaps) error {
		filled = true
		if r.attached(ebpf.AttachCGroupInet4Connect) != 0 {
			t.Error("attached before its maps were filled")
		}
		return m.Endpoints.Put(bpfobj.InlaySvcKey{Port: 7}, uint64(300))
	}, version(16))
	if err != nil {
		t.Fatal(err)
	}
	if !filled {
		t.Error("fill was not called")
	}
	for _, h := range s.Hooks() {
		if !h.On || h.Why != "" {
			t.Errorf("hook %s: on %v, why %q", h.Name, h.On, h.Why)
		}
	}
	r.check("1", 16)
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	r.check("1", 16)

	m, err := openMaps(r.cfg.Pin, "1")
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var id uint64
	if err := m.Endpoints.Lookup(bpfobj.InlaySvcKey{Port: 7}, &id); err != nil || id != 300 {
		t.Errorf("endpoint = %d, %v; want what was filled in", id, err)
	}
	s = r.open(r.cfg, version(17))
	if err := s.Maps().Endpoints.Lookup(bpfobj.InlaySvcKey{Port: 7}, &id); err != nil {
		t.Errorf("a restart lost an entry: %v", err)
	}
	r.check("1", 17)
	if n := r.attached(ebpf.AttachCGroupInet4Connect); n != 1 {
		t.Errorf("%d connect programs attached, want 1", n)
	}
}

func TestOneAgentAtATime(t *testing.T) {
	r := newRoom(t)
	s := r.open(r.cfg, version(16))
	if _, err := open(r.cfg, nil, version(17)); !errors.Is(err, ErrBusy) {
		t.Errorf("second Open: %v, want ErrBusy", err)
	}
	if _, err := Cleanup(r.cfg.Pin); !errors.Is(err, ErrBusy) {
		t.Errorf("Cleanup: %v, want ErrBusy", err)
	}
	r.check("1", 16)
	s.Close()
	r.open(r.cfg, version(17))
	r.check("1", 17)
}

func TestFailuresLeaveTheOldProgramsWorking(t *testing.T) {
	bad := errors.New("no state on disk")
	spoil := func(f func(*parts)) parts {
		p := version(17)
		f(&p)
		return p
	}
	for name, tc := range map[string]struct {
		p    parts
		fill func(*bpfobj.InlayMaps) error
		want string
	}{
		"a required program is refused": {spoil(func(p *parts) {
			p.objects["broken"] = object(&ebpf.ProgramSpec{Name: "connect", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, Instructions: broken()})
			p.hooks[4].object = "broken"
		}), nil, "hook connect4"},
		"a required program is missing": {spoil(func(p *parts) { p.hooks[4].program = "nosuch" }), nil, "program nosuch: not in the object"},
		"both variants are refused": {spoil(func(p *parts) {
			p.objects["iter"] = object(&ebpf.ProgramSpec{Name: "iter", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "tcp", Instructions: broken()})
			p.objects["iterold"] = p.objects["iter"]
		}), nil, "hook iter_tcp"},
		"maps cannot be filled": {version(17), func(*bpfobj.InlayMaps) error { return bad }, "no state on disk"},
		// Attached last, after others were replaced: they go back.
		"a program does not fit its hook": {spoil(func(p *parts) {
			p.hooks = append(slices.Clone(p.hooks), hook{Hook: Hook{Name: "zz", Required: true}, object: "judges", program: "connect", attach: ebpf.AttachCGroupInet6Connect})
		}), nil, "hook zz"},
	} {
		for _, layout := range []string{"1", "2"} {
			t.Run(name+", layout "+layout, func(t *testing.T) {
				r := newRoom(t)
				r.open(r.cfg, version(16)).Close()
				before := tree(t, r.cfg.Pin)
				_, err := open(r.with(layout), tc.fill, tc.p)
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("Open = %v, want %q", err, tc.want)
				}
				if after := tree(t, r.cfg.Pin); !slices.Equal(before, after) {
					t.Errorf("pins changed:\n%v\n%v", before, after)
				}
				r.check("1", 16)
				if n := r.attached(ebpf.AttachCGroupSockOps); n != 1 {
					t.Errorf("%d sockops programs attached, want 1", n)
				}
				r.open(r.with(layout), version(18))
				r.check(layout, 18)
			})
		}
	}
	t.Run("on a clean machine", func(t *testing.T) {
		r := newRoom(t)
		if _, err := open(r.cfg, func(*bpfobj.InlayMaps) error { return bad }, version(16)); !errors.Is(err, bad) {
			t.Fatalf("Open = %v", err)
		}
		for _, dir := range []string{r.cfg.Pin, r.cfg.Cgroup} {
			if _, err := os.Stat(dir); !os.IsNotExist(err) {
				t.Errorf("%s was left behind: %v", dir, err)
			}
		}
	})
}

// tree lists all below a directory.
func tree(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		names = append(names, strings.TrimPrefix(path, dir))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestOptionalHooksAreLeftOut(t *testing.T) {
	r := newRoom(t)
	p := version(16)
	p.objects["writers"] = object(
		&ebpf.ProgramSpec{Name: "sockops", Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps, Instructions: returns(1)},
		&ebpf.ProgramSpec{Name: "state", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "inet_sock_set_state", Instructions: broken()},
	)
	p.objects["iter"] = object(&ebpf.ProgramSpec{Name: "iter", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "tcp", Instructions: broken()})
	check := func(hooks []Hook) {
		t.Helper()
		for _, h := range hooks {
			switch h.Name {
			case "set_state":
				if h.On || h.Why == "" || strings.Contains(h.Why, "\n") {
					t.Errorf("set_state: on %v, why %q; want off with one line", h.On, h.Why)
				}
			case "iter_tcp":
				if !h.On || h.Why != "less" {
					t.Errorf("iter_tcp: on %v, why %q; want the lesser one", h.On, h.Why)
				}
			default:
				if !h.On {
					t.Errorf("%s: off: %s", h.Name, h.Why)
				}
			}
		}
	}
	check(probe(p))
	s := r.open(r.cfg, p)
	check(s.Hooks())
	if err := s.Sweep(); err != nil {
		t.Errorf("Sweep by the lesser iterators: %v", err)
	}
	r.check("1", 16)
}

func TestPinnedMapOfAnotherShapeIsNamed(t *testing.T) {
	r := newRoom(t)
	r.open(r.cfg, version(16)).Close()
	path := filepath.Join(r.cfg.Pin, "v1", mapsDir, "endpoints")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(path); err != nil {
		t.Fatal(err)
	}
	_, err = open(r.cfg, nil, version(17))
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "KeySize") {
		t.Errorf("Open = %v, want one that names %s and what differs", err, path)
	}
	if _, err := openMaps(r.cfg.Pin, "1"); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("OpenMaps = %v, want one that names %s", err, path)
	}
	if _, err := openMaps(r.cfg.Pin, "7"); err == nil || !strings.Contains(err.Error(), "layout v1: want v7") {
		t.Errorf("OpenMaps of another layout = %v", err)
	}
	r.check("1", 16)
}

func TestReplacingLeavesNoGap(t *testing.T) {
	for name, layout := range map[string]func(i int) string{
		"same layout":              func(int) string { return "1" },
		"another layout each time": func(i int) string { return []string{"1", "2"}[i%2] },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoom(t)
			s := r.open(r.with(layout(0)), version(16))
			p := r.prober()
			const replacements = 20
			for i := 1; i <= replacements; i++ {
				s.Close()
				s = r.open(r.with(layout(i)), version(16))
			}
			dials, wrong := p.stop()
			t.Logf("%d dials during %d replacements", dials, replacements)
			if wrong != 0 {
				t.Errorf("%d of %d dials were judged wrong", wrong, dials)
			}
			if layout(1) == "1" {
				if got := counted(t, s.Maps().Counters, 16); got != uint64(dials) {
					t.Errorf("%d of %d dials met a program", got, dials)
				}
			}
		})
	}
}

func TestOthersGoOn(t *testing.T) {
	r := newRoom(t)
	if err := os.Mkdir(r.cfg.Cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	parent := r.cfg.Cgroup
	r.cfg.Cgroup = filepath.Join(parent, "managed")
	t.Cleanup(func() { os.Remove(filepath.Join(parent, "managed")); os.Remove(parent) })
	if err := os.Mkdir(r.cfg.Cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	// Programs of somebody else, in the cgroup above and in the same one, before us.
	var seen []*ebpf.Map
	for _, dir := range []string{parent, r.cfg.Cgroup} {
		spec, err := object(&ebpf.ProgramSpec{Name: "foreign", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, Instructions: cat(count(20), returns(1))})()
		if err != nil {
			t.Fatal(err)
		}
		for name := range spec.Maps {
			if name != "counters" {
				delete(spec.Maps, name)
			}
		}
		coll, err := ebpf.NewCollection(spec)
		if err != nil {
			t.Fatal(err)
		}
		defer coll.Close()
		l, err := link.AttachCgroup(link.CgroupOptions{Path: dir, Attach: ebpf.AttachCGroupInet4Connect, Program: coll.Programs["foreign"]})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		seen = append(seen, coll.Maps["counters"])
	}
	foreign := func(what string) {
		t.Helper()
		before := []uint64{counted(t, seen[0], 20), counted(t, seen[1], 20)}
		dials, _ := r.once()
		for i, m := range seen {
			// The one above runs after ours; ours refuses every second one, which the kernel remembers
			// and goes on (BPF_PROG_RUN_ARRAY_CG runs all).
			if got := counted(t, m, 20) - before[i]; got != uint64(dials) {
				t.Errorf("%s: foreign program %d saw %d of %d dials", what, i, got, dials)
			}
		}
	}
	s := r.open(r.cfg, version(16))
	foreign("attached")
	r.check("1", 16)
	s.Close()
	r.open(r.with("2"), version(17)).Close()
	foreign("replaced")
	r.check("2", 17)
	if _, err := Cleanup(r.cfg.Pin); err != nil {
		t.Fatal(err)
	}
	foreign("cleaned up")
	if n := r.attached(ebpf.AttachCGroupInet4Connect); n != 1 {
		t.Errorf("%d programs attached after cleanup, want the foreign one", n)
	}
}

func TestAProgramThatAllowsNoOtherIsToldOf(t *testing.T) {
	r := newRoom(t)
	if err := os.Mkdir(r.cfg.Cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, Instructions: returns(1)})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	dir, err := os.Open(r.cfg.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInet4Connect}); err != nil {
		t.Fatal(err)
	}
	if _, err := open(r.cfg, nil, version(16)); err == nil || !strings.Contains(err.Error(), "bpftool cgroup tree") {
		t.Errorf("Open = %v, want one that tells how to find the other program", err)
	}
	if n := r.attached(ebpf.AttachCGroupSockOps); n != 0 {
		t.Errorf("%d programs were left attached", n)
	}
}

func TestACgroupThatWasMadeAnewIsAttachedAnew(t *testing.T) {
	r := newRoom(t)
	r.open(r.cfg, version(16)).Close()
	if err := os.Remove(r.cfg.Cgroup); err != nil {
		t.Fatal(err)
	}
	r.open(r.cfg, version(17)).Close()
	r.check("1", 17)
	if err := os.Remove(r.cfg.Cgroup); err != nil {
		t.Fatal(err)
	}
	r.open(r.with("2"), version(18))
	r.check("2", 18)
}
