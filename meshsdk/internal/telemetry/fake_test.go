package telemetry_test

import (
	"context"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// tracers is a tracer provider in memory. The SDK's is not used here: tests of this module must not
// add to what its users require.
type tracers struct {
	tracenoop.TracerProvider
	sampled bool

	mu    sync.Mutex
	ended []*span
	ids   byte
}

func (p *tracers) Tracer(string, ...trace.TracerOption) trace.Tracer { return &tracer{p: p} }

type tracer struct {
	tracenoop.Tracer
	p *tracers
}

func (t *tracer) Start(ctx context.Context, name string, opts ...trace.SpanStartOption) (context.Context, trace.Span) {
	cfg := trace.NewSpanStartConfig(opts...)
	parent := trace.SpanContextFromContext(ctx)
	t.p.mu.Lock()
	t.p.ids++
	id := t.p.ids
	t.p.mu.Unlock()
	next := trace.SpanContextConfig{TraceID: parent.TraceID(), SpanID: trace.SpanID{7: id}}
	if !parent.IsValid() {
		next.TraceID = trace.TraceID{15: id}
	}
	if t.p.sampled {
		next.TraceFlags = trace.FlagsSampled
	}
	s := &span{p: t.p, name: name, kind: cfg.SpanKind(), parent: parent, self: trace.NewSpanContext(next), attrs: map[attribute.Key]attribute.Value{}}
	return trace.ContextWithSpan(ctx, s), s
}

type span struct {
	tracenoop.Span
	p            *tracers
	name         string
	kind         trace.SpanKind
	parent, self trace.SpanContext
	attrs        map[attribute.Key]attribute.Value
	events       []string
	status       codes.Code
	text         string
	ends         int
}

func (s *span) SpanContext() trace.SpanContext { return s.self }
func (s *span) IsRecording() bool              { return s.p.sampled }
func (s *span) SetAttributes(kv ...attribute.KeyValue) {
	for _, a := range kv {
		s.attrs[a.Key] = a.Value
	}
}
func (s *span) attributes() int                              { return len(s.attrs) }
func (s *span) AddEvent(name string, _ ...trace.EventOption) { s.events = append(s.events, name) }
func (s *span) SetStatus(c codes.Code, text string)          { s.status, s.text = c, text }
func (s *span) End(...trace.SpanEndOption) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.ends++; s.ends == 1 {
		s.p.ended = append(s.p.ended, s)
	}
}

// meters is a meter provider in memory.
type meters struct {
	metricnoop.MeterProvider
	mu   sync.Mutex
	made map[string]string // instrument -> unit
	got  []measured
}

type measured struct {
	name  string
	value float64
	attrs attribute.Set
}

func (p *meters) Meter(string, ...metric.MeterOption) metric.Meter { return &meter{p: p} }

type meter struct {
	metricnoop.Meter
	p *meters
}

func (m *meter) Float64Histogram(name string, opts ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	cfg := metric.NewFloat64HistogramConfig(opts...)
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	if m.p.made == nil {
		m.p.made = map[string]string{}
	}
	m.p.made[name] = cfg.Unit()
	return &histogram{p: m.p, name: name}, nil
}

type histogram struct {
	metricnoop.Float64Histogram
	p    *meters
	name string
}

func (h *histogram) Record(_ context.Context, v float64, opts ...metric.RecordOption) {
	set := metric.NewRecordConfig(opts).Attributes()
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	h.p.got = append(h.p.got, measured{h.name, v, set})
}

// sums is a meter provider that does what a cheap real one would: it adds to a number by set.
type sums struct {
	metricnoop.MeterProvider
	mu sync.Mutex
	by map[attribute.Distinct]float64
}

func (p *sums) Meter(string, ...metric.MeterOption) metric.Meter { return &sumMeter{p: p} }

type sumMeter struct {
	metricnoop.Meter
	p *sums
}

func (m *sumMeter) Float64Histogram(string, ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	return &sumHistogram{p: m.p}, nil
}

type sumHistogram struct {
	metricnoop.Float64Histogram
	p *sums
}

func (h *sumHistogram) Record(_ context.Context, v float64, opts ...metric.RecordOption) {
	set := metric.NewRecordConfig(opts).Attributes()
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	h.p.by[set.Equivalent()] += v
}

var epoch = time.Unix(1_700_000_000, 0)

// headers makes gRPC metadata (keys in lower case) a call.Carrier.
type headers map[string][]string

// Get is the first value of key.
func (m headers) Get(key string) string {
	if v := m[strings.ToLower(key)]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// Set replaces the values of key.
func (m headers) Set(key, value string) { m[strings.ToLower(key)] = []string{value} }

// Keys lists the names.
func (m headers) Keys() []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	return keys
}
