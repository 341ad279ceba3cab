package admin

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// Whatever an SDK reports, the table stays bounded and no call is both counted and dropped.
func FuzzCounters(f *testing.F) {
	seed, err := proto.Marshal(&reportpb.Counters{Dropped: 1, Calls: []*reportpb.CallCounter{{Direction: "server", Service: "a", Calls: 2, Buckets: []uint64{1, 1}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		var c reportpb.Counters
		if proto.Unmarshal(b, &c) != nil {
			return
		}
		tab := table{maxServices: 1, maxSeries: 3, services: make(map[who]*serviceSums)}
		tab.add(who{"default", "a"}, &c)
		tab.add(who{"default", "b"}, &c)
		got := tab.list()
		if len(got) != 1 || len(got[0].GetCalls()) > 3 {
			t.Fatalf("table = %v", got)
		}
		var want, sum uint64
		want = c.GetDropped()
		for _, call := range c.GetCalls() {
			want = plus(want, call.GetCalls())
		}
		sum = got[0].GetDropped()
		for _, call := range got[0].GetCalls() {
			sum = plus(sum, call.GetCalls())
			if len(call.GetBuckets()) != buckets || call.GetTotal().AsDuration() < 0 {
				t.Errorf("series = %v", call)
			}
		}
		if sum != want {
			t.Errorf("%d calls counted or dropped, want %d", sum, want)
		}
	})
}
