package load

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// The table of hooks and the compiled programs speak of the same things.
func TestTableIsThatOfTheObjects(t *testing.T) {
	used := make(map[string]bool)
	known := map[string]bool{"managed_level": true, "dns_stale": true, "own_netns": true, "sample_after": true}
	shared, err := mapSpecs(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range hooks {
		for _, stem := range []string{h.object, h.fallback} {
			if stem == "" {
				continue
			}
			used[stem] = true
			spec, err := objects[stem]()
			if err != nil {
				t.Fatal(err)
			}
			p := spec.Programs[h.program]
			if p == nil {
				t.Errorf("hook %s: object %s holds no %s but %v", h.Name, stem, h.program, slices.Sorted(maps.Keys(spec.Programs)))
				continue
			}
			if h.place == atCgroup && p.AttachType != h.attach {
				t.Errorf("hook %s: %s is for %v, the table says %v", h.Name, h.program, p.AttachType, h.attach)
			}
			for name := range spec.Variables {
				if !known[name] {
					t.Errorf("object %s: variable %s is set by nobody", stem, name)
				}
			}
			for name := range spec.Maps {
				// A writable section would be one for each program, since each is loaded by itself.
				if shared[name] == nil && !strings.HasPrefix(name, ".rodata") {
					t.Errorf("object %s: map %s is not in maps.h", stem, name)
				}
			}
			for name := range spec.Programs {
				if !slices.ContainsFunc(hooks, func(h hook) bool {
					return h.program == name && (h.object == stem || h.fallback == stem)
				}) {
					t.Errorf("object %s: program %s has no hook", stem, name)
				}
			}
		}
	}
	for stem := range objects {
		if !used[stem] {
			t.Errorf("object %s: no hook uses it", stem)
		}
	}
}

// This kernel takes every program there is; each one that it refused would be told by name.
func TestProbeOfTheRealPrograms(t *testing.T) {
	needKernel(t)
	for _, h := range Probe() {
		t.Logf("%-20s on %-5v required %-5v %s %s", h.Name, h.On, h.Required, h.Gives, h.Why)
		if h.Required && !h.On {
			t.Errorf("hook %s: %s", h.Name, h.Why)
		}
	}
}

func TestLesserIteratorsLoad(t *testing.T) {
	needKernel(t)
	var lesser []hook
	for _, h := range hooks {
		if h.fallback != "" {
			h.object, h.fallback = h.fallback, ""
			lesser = append(lesser, h)
		}
	}
	if len(lesser) != 2 {
		t.Fatalf("%d hooks with a lesser variant, want 2", len(lesser))
	}
	for _, h := range probe(parts{hooks: lesser, objects: objects}) {
		if !h.On {
			t.Errorf("hook %s in its lesser variant: %s", h.Name, h.Why)
		}
	}
}

// The real programs, under a prober: attached, restarted, moved to another layout, policies on all along.
func TestRealProgramsAreReplacedWithoutAGap(t *testing.T) {
	r := newRoom(t)
	const identity = 4711
	deny := func(m *bpfobj.InlayMaps) error {
		return errors.Join(
			m.Subjects.Put(uint64(identity), bpfobj.InlaySubject{Gen: 1}),
			m.Policies.Put(bpfobj.InlayPolKey{Subject: identity, Gen: 1, Dir: uint8(bpfobj.InlayDirDIR_EGRESS), Proto: 17, Kind: uint8(bpfobj.InlayPeerKindPEER_ANY)}, uint32(1)),
			m.PortSets.Put(uint32(1), bpfobj.InlayPortSet{N: 1, Segs: [64]bpfobj.InlaySeg{{Lo: deniedPort, Hi: deniedPort, Action: uint8(bpfobj.InlayVerdictVERDICT_DENY), Audit: uint8(bpfobj.InlayVerdictVERDICT_DENY), Rule: 1}}}),
		)
	}
	leaf := r.leaf("leaf")
	id, err := CgroupID(leaf.cfg.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	fill := func(m *bpfobj.InlayMaps) error {
		return errors.Join(deny(m), m.Workloads.Put(id, bpfobj.InlayWorkload{Identity: identity}))
	}
	start := func(layout string) *Set {
		t.Helper()
		began := time.Now()
		s, err := Open(r.with(layout), fill)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		t.Logf("layout %s opened in %v", layout, time.Since(began))
		return s
	}
	s := start("1")
	p := leaf.prober()
	for _, layout := range []string{"1", "1", "2", "2", "1"} {
		if err := s.Sweep(); err != nil {
			t.Error(err)
		}
		s.Close()
		s = start(layout)
		for _, h := range s.Hooks() {
			if !h.On {
				t.Errorf("hook %s: %s", h.Name, h.Why)
			}
		}
	}
	dials, wrong := p.stop()
	t.Logf("%d dials", dials)
	if wrong != 0 {
		t.Errorf("%d of %d dials were judged wrong", wrong, dials)
	}
	if n := r.attached(ebpf.AttachCGroupInet4Connect); n != 1 {
		t.Errorf("%d connect programs attached, want 1", n)
	}
}

// Two workloads talk over TCP while the programs are replaced and change their layout: who may goes on to,
// who may not never gets through, and a connection that was there before lives, also through rounds
// of the iterators.
func TestConnectionsOutliveReplacements(t *testing.T) {
	r := newRoom(t)
	const server, friend, stranger = 6000, 5000, 7000
	leaves := map[uint64]*room{server: r.leaf("server"), friend: r.leaf("friend"), stranger: r.leaf("stranger")}
	fill := func(m *bpfobj.InlayMaps) error {
		faults := []error{
			m.Subjects.Put(uint64(server), bpfobj.InlaySubject{Gen: 1, Flags: uint32(bpfobj.InlaySubjectFlagSUBJECT_DENY_INGRESS | bpfobj.InlaySubjectFlagSUBJECT_AUDIT_DENY_INGRESS)}),
			m.Policies.Put(bpfobj.InlayPolKey{Subject: server, Peer: friend, Gen: 1, Dir: uint8(bpfobj.InlayDirDIR_INGRESS), Proto: 6, Kind: uint8(bpfobj.InlayPeerKindPEER_IDENTITY)}, uint32(1)),
			m.PortSets.Put(uint32(1), bpfobj.InlayPortSet{N: 1, Segs: [64]bpfobj.InlaySeg{{Lo: 0, Hi: 65535, Action: uint8(bpfobj.InlayVerdictVERDICT_ALLOW), Audit: uint8(bpfobj.InlayVerdictVERDICT_ALLOW), Rule: 1}}}),
		}
		for identity, leaf := range leaves {
			id, err := CgroupID(leaf.cfg.Cgroup)
			faults = append(faults, err, m.Workloads.Put(id, bpfobj.InlayWorkload{Identity: identity}))
		}
		return errors.Join(faults...)
	}
	start := func(layout string) *Set {
		t.Helper()
		s, err := Open(r.with(layout), fill)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	s := start("1")
	srv := leaves[server].inside("server", syscall.SysProcAttr{})
	at := "INLAY_LOAD_ARGS=" + srv.line()
	may := leaves[friend].inside("caller", syscall.SysProcAttr{}, at)
	mayNot := leaves[stranger].inside("stranger", syscall.SysProcAttr{}, at)
	may.line()
	mayNot.line()
	for _, layout := range []string{"1", "2", "2", "1", "2", "1"} {
		s.Close()
		s = start(layout)
		if err := s.Sweep(); err != nil {
			t.Error(err)
		}
		may.wait(50)
		mayNot.wait(3)
	}
	calls, failed := may.stop()
	tries, through := mayNot.stop()
	t.Logf("%d calls; %d tries of a stranger", calls, tries)
	if failed != 0 {
		t.Errorf("%d of %d allowed calls failed", failed, calls)
	}
	if through != 0 {
		t.Errorf("%d of %d denied connections got through", through, tries)
	}
}
