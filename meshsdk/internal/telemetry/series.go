package telemetry

import (
	"strings"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// maxSeries bounds the cache of attribute sets. It is the default cardinality limit of the
// OpenTelemetry SDKs, beyond which they keep no series apart either.
const maxSeries = 2000

// seriesKey is all that the attributes of a metric depend on.
type seriesKey struct {
	direction, service, route, peer, version, method string
	reason                                           call.Reason
	code                                             int32
	grpc, mtls                                       bool
}

// series is what recording a call needs, made once.
type series struct {
	options []metric.RecordOption
	shared  bool                 // by all that have no room: such a series has no cell of its own
	cell    atomic.Pointer[cell] // of the counters; nil when not looked up or no room
}

// counter is the cell of the series, looked up again when the counters dropped it meanwhile.
func (s *series) counter(c *Counters, rec *call.Record) *cell {
	if cl := s.cell.Load(); cl != nil && !cl.gone.Load() {
		return cl
	}
	cl := c.cell(rec)
	if !s.shared {
		s.cell.Store(cl)
	}
	return cl
}

// seriesCache finds the series of a call without building it. Reading takes no lock.
type seriesCache struct {
	made     atomic.Pointer[map[seriesKey]*series] // replaced, never changed
	overflow [4]atomic.Pointer[series]
	mu       sync.Mutex // guards the replacement
}

func (sc *seriesCache) get(rec *call.Record) *series {
	k := seriesKey{
		direction: rec.Direction, service: rec.Service, route: rec.Route, peer: rec.Peer,
		version: rec.Version, reason: rec.Reason, grpc: rec.GRPC, mtls: rec.MTLS,
	}
	if rec.GRPC {
		k.method, k.code = rec.Path, int32(rec.GRPCCode)
	} else {
		k.method, k.code = knownMethod(rec.Method), int32(rec.HTTPStatus)
	}
	if m := sc.made.Load(); m != nil {
		if s := (*m)[k]; s != nil {
			return s
		}
		if len(*m) >= maxSeries {
			return sc.over(rec)
		}
	}
	return sc.make(k, rec)
}

func (sc *seriesCache) make(k seriesKey, rec *call.Record) *series {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	next := make(map[seriesKey]*series)
	if m := sc.made.Load(); m != nil {
		if s := (*m)[k]; s != nil {
			return s
		}
		for k, s := range *m {
			next[k] = s
		}
	}
	// A path or peer may be part of a larger buffer that the caller does not want kept.
	k.method, k.peer = strings.Clone(k.method), strings.Clone(k.peer)
	s := &series{options: option(attributes(rec))}
	next[k] = s
	sc.made.Store(&next)
	return s
}

// over is the one series of an instrument for all that have no room, as the OpenTelemetry
// specification names it: otel.metric.overflow = true.
func (sc *seriesCache) over(rec *call.Record) *series {
	p := &sc.overflow[instrument(rec)]
	if s := p.Load(); s != nil {
		return s
	}
	p.CompareAndSwap(nil, &series{shared: true, options: option([]attribute.KeyValue{keyOverflow.Bool(true)})})
	return p.Load()
}

func option(kv []attribute.KeyValue) []metric.RecordOption {
	return []metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(kv...))}
}
