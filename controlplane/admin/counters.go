package admin

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

const (
	// buckets of a CallCounter: upper bounds 2^i * 100 µs for i = 0..19, and the open one.
	buckets = 21
	// maxName bounds the texts of a series.
	maxName = 512
)

// who is a calling service.
type who struct{ namespace, service string }

// series is one (direction, service, route, peer, version, reason).
type series struct{ direction, service, route, peer, version, reason string }

type sums struct {
	calls, failed, mtls uint64
	total               time.Duration
	buckets             [buckets]uint64
}

// table sums what SDKs report. It is bounded: beyond the limits calls are counted as dropped.
type table struct {
	maxServices, maxSeries int

	mu       sync.Mutex
	services map[who]*serviceSums
}

type serviceSums struct {
	series  map[series]*sums
	dropped uint64
}

// add takes one report. Numbers that would overflow stay at the largest there is.
func (t *table) add(w who, c *reportpb.Counters) {
	t.mu.Lock()
	defer t.mu.Unlock()
	svc, ok := t.services[w]
	if !ok {
		if len(t.services) >= t.maxServices {
			return
		}
		svc = &serviceSums{series: make(map[series]*sums)}
		t.services[w] = svc
	}
	svc.dropped = plus(svc.dropped, c.GetDropped())
	for _, call := range c.GetCalls() {
		key := series{call.GetDirection(), call.GetService(), call.GetRoute(), call.GetPeer(), call.GetVersion(), call.GetReason()}
		s, ok := svc.series[key]
		if !ok {
			if len(svc.series) >= t.maxSeries || key.long() || (key.direction != "client" && key.direction != "server") {
				svc.dropped = plus(svc.dropped, call.GetCalls())
				continue
			}
			s = &sums{}
			svc.series[key] = s
		}
		s.calls = plus(s.calls, call.GetCalls())
		s.failed = plus(s.failed, call.GetFailed())
		s.mtls = plus(s.mtls, call.GetMtls())
		if d := call.GetTotal(); d.IsValid() && d.AsDuration() > 0 {
			if s.total += d.AsDuration(); s.total < 0 {
				s.total = math.MaxInt64
			}
		}
		for i, n := range call.GetBuckets() {
			s.buckets[min(i, buckets-1)] = plus(s.buckets[min(i, buckets-1)], n)
		}
	}
}

// list returns all sums, sorted.
func (t *table) list() []*adminpb.ServiceCounters {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*adminpb.ServiceCounters
	for w, svc := range t.services {
		row := &adminpb.ServiceCounters{Namespace: w.namespace, Service: w.service, Dropped: svc.dropped}
		for k, s := range svc.series {
			row.Calls = append(row.Calls, &reportpb.CallCounter{
				Direction: k.direction, Service: k.service, Route: k.route, Peer: k.peer, Version: k.version, Reason: k.reason,
				Calls: s.calls, Failed: s.failed, Mtls: s.mtls, Total: durationpb.New(s.total), Buckets: slices.Clone(s.buckets[:]),
			})
		}
		slices.SortFunc(row.Calls, func(a, b *reportpb.CallCounter) int {
			return cmp.Or(cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Service, b.Service), cmp.Compare(a.Route, b.Route),
				cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Version, b.Version), cmp.Compare(a.Reason, b.Reason))
		})
		out = append(out, row)
	}
	slices.SortFunc(out, func(a, b *adminpb.ServiceCounters) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Service, b.Service))
	})
	return out
}

func (k series) long() bool {
	for _, s := range []string{k.service, k.route, k.peer, k.version, k.reason} {
		if len(s) > maxName {
			return true
		}
	}
	return false
}

func plus(a, b uint64) uint64 {
	if b > math.MaxUint64-a {
		return math.MaxUint64
	}
	return a + b
}
