package ads_test

import (
	"fmt"
	"testing"

	"github.com/inlay-mesh/inlay/xds/ads"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// BenchmarkOneChangeAmong: a change of one resource below a wildcard of n.
func BenchmarkOneChangeAmong(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m := ads.NewMachine()
			m.Step(ads.SubscribeAll{Type: resource.ClusterType})
			m.Step(ads.Connected{})
			m.Step(ads.Flush{})
			r := ads.Response{Type: resource.ClusterType, Nonce: "1"}
			for i := range n {
				r.Resources = append(r.Resources, ads.Received{Name: fmt.Sprint("default/service-", i), Version: "1"})
			}
			m.Step(r)
			m.Step(ads.Response{Type: resource.ClusterType, Nonce: "2", Removed: []string{"~synced"}})
			one := ads.Response{Type: resource.ClusterType, Nonce: "3", Resources: r.Resources[:1]}
			b.ReportAllocs()
			for b.Loop() {
				if len(m.Step(one)) != 2 {
					b.Fatal("want the news and an ACK")
				}
			}
		})
	}
}

// A request must stay below what servers admit, however much is held.
func TestClaimsOfManyAreBounded(t *testing.T) {
	m := ads.NewMachine()
	held := map[string]string{}
	for i := range 200_000 {
		held[fmt.Sprintf("default/a-service-with-a-name-%d", i)] = "0123456789abcdef"
	}
	m.Step(ads.SubscribeAll{Type: resource.ClusterType, Held: held})
	m.Step(ads.Connected{})
	size := 0
	for _, a := range m.Step(ads.Flush{}) {
		for n, v := range a.(ads.Send).InitialVersions {
			size += len(n) + len(v) + 6
		}
	}
	if size == 0 || size > 3<<20 {
		t.Errorf("initial versions of %d bytes, want some and at most 3 MiB", size)
	}
	// What was not claimed and is not sent is gone; what was claimed holds.
	m.Step(ads.Response{Type: resource.ClusterType, Nonce: "1"})
	gone := 0
	for _, a := range m.Step(ads.Response{Type: resource.ClusterType, Nonce: "2", Removed: []string{"~synced"}}) {
		if d, ok := a.(ads.Deliver); ok && d.NotExist {
			gone++
		}
	}
	if gone == 0 || gone == len(held) {
		t.Errorf("%d of %d gone, want those that were not claimed", gone, len(held))
	}
}
