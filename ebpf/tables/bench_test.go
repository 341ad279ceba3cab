package tables

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// largeTable fills real maps with that many services of two endpoints each.
func largeTable(b *testing.B, services int) (*Table, []*nodepb.Service) {
	b.Helper()
	table, err := New(kernelMaps(b, nil), Config{})
	if err != nil {
		b.Fatal(err)
	}
	all := make([]*nodepb.Service, services)
	for i := range all {
		all[i] = numberedService(i, 2)
		if err := table.SetService(all[i]); err != nil {
			b.Fatal(err)
		}
	}
	commit(b, table)
	return table, all
}

// 100 changes among that many services: one endpoint of each comes or goes.
func BenchmarkReconcile100(b *testing.B) {
	for _, services := range []int{1_000, 10_000, 100_000} {
		b.Run(fmt.Sprint(services, " services"), func(b *testing.B) {
			table, _ := largeTable(b, services)
			writes, round := 0, 0
			for b.Loop() {
				round++
				for i := range 100 {
					if err := table.SetService(numberedService(i*(services/100), 2+round%2)); err != nil {
						b.Fatal(err)
					}
				}
				c := commit(b, table)
				writes += c.Writes + c.Deletes
			}
			b.ReportMetric(float64(writes)/float64(b.N), "writes/op")
		})
	}
}

// The first fill of empty maps, by batches.
func BenchmarkFill(b *testing.B) {
	for _, services := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(services, " services"), func(b *testing.B) {
			for b.Loop() {
				largeTable(b, services)
			}
		})
	}
}

// What a table of that many services keeps on the heap.
func BenchmarkMemory(b *testing.B) {
	for _, services := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(services, " services"), func(b *testing.B) {
			var before, after runtime.MemStats
			for b.Loop() {
				runtime.GC()
				runtime.ReadMemStats(&before)
				table, all := largeTable(b, services)
				clear(all)
				runtime.GC()
				runtime.ReadMemStats(&after)
				runtime.KeepAlive(table)
			}
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
		})
	}
}
