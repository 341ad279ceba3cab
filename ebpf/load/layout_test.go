package load

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// What programs wrote goes on over a change of layout, and what the new ones write is newer.
func TestAnotherLayoutTakesOverWhatProgramsWrote(t *testing.T) {
	r := newRoom(t)
	s := r.open(r.cfg, version(16))
	older, both := bpfobj.InlayTuple{Sport: 1}, bpfobj.InlayTuple{Sport: 2}
	for _, k := range []bpfobj.InlayTuple{older, both} {
		if err := s.Maps().Peers.Put(k, bpfobj.InlayPeer{Identity: 300}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(
		s.Maps().Endpoints.Put(bpfobj.InlaySvcKey{Port: 1}, uint64(1)),
		s.Maps().UdpReverse.Put(bpfobj.InlayUdpKey{Cookie: 5}, bpfobj.InlayReverse{Port: 6}),
	); err != nil {
		t.Fatal(err)
	}
	s.Close()

	s, err := open(r.with("2"), func(m *bpfobj.InlayMaps) error {
		return m.Peers.Put(both, bpfobj.InlayPeer{Identity: 400}) // as a new sockops would
	}, version(17))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for k, want := range map[bpfobj.InlayTuple]uint64{older: 300, both: 400} {
		var p bpfobj.InlayPeer
		if err := s.Maps().Peers.Lookup(k, &p); err != nil || p.Identity != want {
			t.Errorf("peer %d = %d, %v; want %d", k.Sport, p.Identity, err, want)
		}
	}
	var rev bpfobj.InlayReverse
	if err := s.Maps().UdpReverse.Lookup(bpfobj.InlayUdpKey{Cookie: 5}, &rev); err != nil || rev.Port != 6 {
		t.Errorf("reverse = %+v, %v", rev, err)
	}
	// What the agent writes is filled anew: it may have another meaning.
	var id uint64
	if err := s.Maps().Endpoints.Lookup(bpfobj.InlaySvcKey{Port: 1}, &id); err == nil {
		t.Error("a map of the agent was kept")
	}
}

func TestALayoutThatChangesWhatIsKept(t *testing.T) {
	r := newRoom(t)
	r.open(r.cfg, version(16)).Close()
	path := filepath.Join(r.cfg.Pin, "v1", mapsDir, bpfobj.InlayMapPeers)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 40, ValueSize: 8, MaxEntries: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(path); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cfg := r.with("2")
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	cfg.Handover = func(*bpfobj.InlayMaps) error {
		if w, j := r.attached(ebpf.AttachCGroupSockOps), r.attached(ebpf.AttachCGroupInet4Connect); w != 2 || j != 1 {
			t.Errorf("at the handover %d programs write and %d judge, want 2 and 1", w, j)
		}
		return nil
	}
	s := r.open(cfg, version(17))
	if !strings.Contains(log.String(), "map=peers") || s.Maps().Peers.KeySize() == 40 {
		t.Errorf("peers were not begun anew and told of: %s", log.String())
	}
	r.check("2", 17)
	if n := r.attached(ebpf.AttachCGroupSockOps); n != 1 {
		t.Errorf("%d sockops programs attached, want 1", n)
	}
}

func TestHandoverComesBeforeTheOldLayoutGoes(t *testing.T) {
	r := newRoom(t)
	cfg := r.cfg
	calls := 0
	cfg.Handover = func(*bpfobj.InlayMaps) error { calls++; return nil }
	r.open(cfg, version(16)).Close()
	r.open(cfg, version(16)).Close()
	if calls != 0 {
		t.Errorf("called %d times without a change of layout", calls)
	}
	before := tree(t, r.cfg.Pin)
	cfg.Layout = "2"
	cfg.Handover = func(*bpfobj.InlayMaps) error {
		if got := tree(t, r.cfg.Pin); !slices.Contains(got, "/v1/maps/names") || !slices.Contains(got, "/v2/maps/names") {
			t.Errorf("pins at the handover: %v", got)
		}
		return errors.New("the proxy does not answer")
	}
	if _, err := open(cfg, nil, version(17)); err == nil || !strings.Contains(err.Error(), "the proxy does not answer") {
		t.Fatalf("Open = %v", err)
	}
	if after := tree(t, r.cfg.Pin); !slices.Equal(before, after) {
		t.Errorf("pins changed:\n%v\n%v", before, after)
	}
	r.check("1", 16)
}

// What was counted goes on over a change of layout, but for what speaks of the records of the old ring: made =
// kept + lost holds for the new one from its first record.
func TestCountersOfAnotherLayout(t *testing.T) {
	r := newRoom(t)
	s := r.open(r.cfg, version(16))
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint32(bpfobj.InlayCounterCOUNT_RETRANSMITS) + 1 {
		each := make([]uint64, cpus)
		for cpu := range each {
			each[cpu] = uint64(100*i) + uint64(cpu) + 1
		}
		if err := s.Maps().Counters.Put(i, each); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()

	for _, layout := range []string{"2", "1"} {
		s := r.open(r.with(layout), version(17))
		for i := range uint32(bpfobj.InlayCounterCOUNT_RETRANSMITS) + 1 {
			var each []uint64
			if err := s.Maps().Counters.Lookup(i, &each); err != nil {
				t.Fatal(err)
			}
			for cpu, got := range each {
				want := uint64(100*i) + uint64(cpu) + 1
				if i == uint32(bpfobj.InlayCounterCOUNT_MADE) || i == uint32(bpfobj.InlayCounterCOUNT_LOST) {
					want = 0
				}
				if got != want {
					t.Errorf("layout %s: counter %d of CPU %d = %d, want %d", layout, i, cpu, got, want)
				}
			}
		}
		s.Close()
	}
}
