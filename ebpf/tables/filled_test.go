package tables

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Maps that programs fill are counted, and warned of at nine tenths, once until they are less full.
func TestCountWarnsOfMapsThatProgramsFill(t *testing.T) {
	maps := kernelMaps(t, map[string]uint32{bpfobj.InlayMapPeers: 10, bpfobj.InlayMapListeners: 100})
	var log bytes.Buffer
	table, err := New(maps, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	put := func(from, to int) {
		t.Helper()
		for i := from; i < to; i++ {
			if err := maps.Peers.Put(&bpfobj.InlayTuple{Sport: uint16(i)}, &bpfobj.InlayPeer{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	count := func(want int) (warnings int) {
		t.Helper()
		log.Reset()
		if err := table.Count(); err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(table.Usage(), MapUsage{Name: bpfobj.InlayMapPeers, Entries: want, Capacity: 10}) {
			t.Errorf("usage %+v: want %d of 10 in peers", table.Usage(), want)
		}
		return strings.Count(log.String(), `level=WARN msg="map is nearly full" map=peers`)
	}
	put(0, 8)
	if n := count(8); n != 0 {
		t.Errorf("%d warnings at 8 of 10", n)
	}
	put(8, 9)
	if n := count(9); n != 1 {
		t.Errorf("%d warnings at 9 of 10, want one", n)
	}
	if n := count(9); n != 0 {
		t.Errorf("%d warnings when it was told already", n)
	}
	for i := range 5 {
		if err := maps.Peers.Delete(&bpfobj.InlayTuple{Sport: uint16(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if n := count(4); n != 0 {
		t.Errorf("%d warnings at 4 of 10", n)
	}
	put(20, 25)
	if n := count(9); n != 1 {
		t.Errorf("%d warnings when it is nearly full again, want one", n)
	}
	for _, name := range []string{bpfobj.InlayMapUdpPeers, bpfobj.InlayMapListeners, bpfobj.InlayMapDnsClients} {
		if !slices.ContainsFunc(table.Usage(), func(u MapUsage) bool { return u.Name == name && u.Capacity > 0 }) {
			t.Errorf("usage %+v: want %s too", table.Usage(), name)
		}
	}
}

// What it costs to count a full map of peers.
func BenchmarkCountFullPeers(b *testing.B) {
	maps := kernelMaps(b, nil)
	table, err := New(maps, Config{})
	if err != nil {
		b.Fatal(err)
	}
	n := int(maps.Peers.MaxEntries())
	keys, values := make([]bpfobj.InlayTuple, n), make([]bpfobj.InlayPeer, n)
	for i := range keys {
		keys[i] = bpfobj.InlayTuple{Sport: uint16(i), Netns: uint64(i >> 16)}
	}
	if _, err := maps.Peers.BatchUpdate(keys, values, nil); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := table.Count(); err != nil {
			b.Fatal(err)
		}
	}
}
