// Package telemetry is what the mesh tells of calls: spans, metrics, access records and the counts
// for the report to the control plane. Every name of a metric, span and attribute lives here.
//
// It implements call.Observer (client) and call.ServerObserver; the skins of the client use Inject.
// It uses the OpenTelemetry API only and exports nothing itself. It never sees payloads and records
// no header value. It starts no goroutine and takes no lock on the way of a call.
package telemetry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"reflect"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// scope names the instrumentation to OpenTelemetry.
const scope = "github.com/inlay-mesh/inlay/meshsdk"

// Config of a Telemetry. The zero value uses the global providers of OpenTelemetry, read in New.
type Config struct {
	TracerProvider trace.TracerProvider          // nil: otel.GetTracerProvider()
	MeterProvider  metric.MeterProvider          // nil: otel.GetMeterProvider()
	Propagator     propagation.TextMapPropagator // nil: otel.GetTextMapPropagator(); W3C when that propagates nothing
	// AccessLog is called once a call, in its goroutine, on both sides; nil means none. It must not
	// block. Record.Decision may be called in it and later.
	AccessLog func(call.Record)
	// Logger gets an access record for each call at Debug; nil discards.
	Logger *slog.Logger
	// Counters sum the calls for the report; nil means none.
	Counters *Counters
	// Now is the time of spans' and calls' beginnings at a server; nil means time.Now.
	Now func() time.Time
}

// Telemetry observes calls. It is safe for concurrent use; nothing of it needs closing.
type Telemetry struct {
	cfg         Config
	tracer      trace.Tracer
	propagator  propagation.TextMapPropagator
	unset       trace.TracerProvider // the global provider while the program has set none; nil when it had
	series      seriesCache
	instruments [4]metric.Float64Histogram // by instrument()
}

// Compile-time proof of the contracts.
var (
	_ call.Observer       = (*Telemetry)(nil)
	_ call.ServerObserver = (*Telemetry)(nil)
)

// New makes the instruments. An error is that of the meter provider.
func New(cfg Config) (*Telemetry, error) {
	var unset trace.TracerProvider
	if cfg.TracerProvider == nil {
		cfg.TracerProvider = otel.GetTracerProvider()
		if placeholder(cfg.TracerProvider) {
			unset = cfg.TracerProvider
		}
	}
	if cfg.MeterProvider == nil {
		cfg.MeterProvider = otel.GetMeterProvider()
	}
	if cfg.Propagator == nil {
		cfg.Propagator = otel.GetTextMapPropagator()
	}
	if len(cfg.Propagator.Fields()) == 0 {
		// The global default propagates nothing, which would break every trace at its first hop.
		cfg.Propagator = propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 100}))
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	t := &Telemetry{cfg: cfg, propagator: cfg.Propagator, unset: unset}
	t.tracer = cfg.TracerProvider.Tracer(scope)
	meter := cfg.MeterProvider.Meter(scope)
	var faults []error
	for i, in := range instruments {
		h, err := meter.Float64Histogram(in.name, metric.WithUnit("s"), metric.WithDescription(in.text),
			metric.WithExplicitBucketBoundaries(secondsBounds...))
		t.instruments[i] = h
		faults = append(faults, err)
	}
	return t, errors.Join(faults...)
}

var (
	clientSpan = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindClient)}
	serverSpan = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindServer)}
)

// BeginClient starts the span of a client's call.
func (t *Telemetry) BeginClient(ctx context.Context, c *call.Call) context.Context {
	req := c.Request()
	ctx, span := t.start(ctx, req.GRPC, req.Method, req.Path, clientSpan)
	if span != nil {
		c.Observed = span
	}
	return ctx
}

// start starts a span. nil means that the program does no tracing: what ctx has of a trace then
// passes on as it is, which is all that a span of the API alone would do. OpenTelemetry, "Behavior of
// the API in the absence of an installed SDK": "The API MUST return a non-recording Span with the
// SpanContext in the parent Context".
func (t *Telemetry) start(ctx context.Context, grpc bool, method, path string, kind []trace.SpanStartOption) (context.Context, trace.Span) {
	if t.unset != nil && otel.GetTracerProvider() == t.unset {
		return ctx, nil
	}
	return t.tracer.Start(ctx, spanName(grpc, method, path), kind...)
}

// placeholder reports whether p stands for the provider that the program has not set globally. It
// is a pointer: once the program sets one, the global provider is another.
func placeholder(p trace.TracerProvider) bool {
	t := reflect.TypeOf(p)
	return t.Kind() == reflect.Pointer && t.Elem().PkgPath() == "go.opentelemetry.io/otel/internal/global"
}

// Inject writes the trace context of ctx into to, over what is there.
func (t *Telemetry) Inject(ctx context.Context, to call.Carrier) { t.propagator.Inject(ctx, to) }

// EndClient ends the span and records the call.
func (t *Telemetry) EndClient(c *call.Call, rec *call.Record) {
	if span, ok := c.Observed.(trace.Span); ok {
		if span.IsRecording() {
			describe(span, rec)
			if d := rec.Summary(); d != nil {
				decide(span, d)
			}
		}
		span.End()
	}
	t.record(c, rec)
}

// BeginServer continues the trace in from and starts the span of a call that a server answers.
func (t *Telemetry) BeginServer(ctx context.Context, s *call.ServerCall, from call.Carrier) context.Context {
	if s.Start.IsZero() {
		s.Start = t.cfg.Now()
	}
	if from != nil {
		ctx = t.propagator.Extract(ctx, from)
	}
	ctx, span := t.start(ctx, s.GRPC, s.Method, s.Path, serverSpan)
	if span != nil {
		s.Observed = span
	}
	return ctx
}

// EndServer ends the span and records the call.
func (t *Telemetry) EndServer(ctx context.Context, s *call.ServerCall, r call.Result) {
	if r.Reason == "" {
		r.Reason = call.ReasonOK
	}
	rec := call.Record{
		Direction: "server", Service: s.Service, Peer: s.Peer, Reason: r.Reason, GRPC: s.GRPC,
		GRPCCode: r.GRPCCode, HTTPStatus: r.HTTPStatus, Start: s.Start, Duration: t.cfg.Now().Sub(s.Start),
		MTLS: s.MTLS, Method: s.Method, Path: s.Path, Err: r.Err,
	}
	if !s.GRPC {
		rec.GRPCCode = -1
	}
	if span, ok := s.Observed.(trace.Span); ok {
		if span.IsRecording() {
			describe(span, &rec)
		}
		span.End()
	}
	t.record(ctx, &rec)
}

// record is the one place where a call becomes numbers and lines.
func (t *Telemetry) record(ctx context.Context, rec *call.Record) {
	s := t.series.get(rec)
	t.instruments[instrument(rec)].Record(ctx, rec.Duration.Seconds(), s.options...)
	if c := t.cfg.Counters; c != nil {
		c.add(s.counter(c, rec), rec.Duration)
	}
	if t.cfg.AccessLog != nil {
		t.cfg.AccessLog(*rec)
	}
	if t.cfg.Logger.Enabled(ctx, slog.LevelDebug) {
		t.log(ctx, rec)
	}
}

func (t *Telemetry) log(ctx context.Context, rec *call.Record) {
	attrs := []slog.Attr{
		slog.String("direction", rec.Direction), slog.String("service", rec.Service),
		slog.String("method", rec.Method), slog.String("path", rec.Path),
		slog.String("reason", string(rec.Reason)), slog.Duration("took", rec.Duration),
		slog.String("peer", rec.Peer), slog.Bool("mtls", rec.MTLS),
	}
	if rec.Direction == "client" {
		attrs = append(attrs, slog.String("route", rec.Route), slog.String("version", rec.Version), slog.Int("attempts", rec.Attempts))
	}
	if rec.GRPC {
		attrs = append(attrs, slog.String("code", codeName(rec.GRPCCode)))
	} else if rec.HTTPStatus != 0 {
		attrs = append(attrs, slog.Int("status", rec.HTTPStatus))
	}
	if rec.Err != nil {
		attrs = append(attrs, slog.String("err", rec.Err.Error()))
	}
	t.cfg.Logger.LogAttrs(ctx, slog.LevelDebug, "call", attrs...)
}

// describe puts the record on a recording span.
func describe(span trace.Span, rec *call.Record) {
	span.SetAttributes(attributes(rec)...)
	if !rec.GRPC {
		span.SetAttributes(keyURLPath.String(rec.Path))
	}
	if rec.Attempts > 1 {
		span.SetAttributes(keyAttempts.Int(rec.Attempts))
		if !rec.GRPC {
			// HTTP conventions: "The ordinal number of request resending attempt".
			span.SetAttributes(keyResend.Int(rec.Attempts - 1))
		}
	}
	if spanFailed(rec) {
		// The text of a mesh error names no address; a handler's error is its own and stays out.
		var own *call.Error
		text := string(rec.Reason)
		if errors.As(rec.Err, &own) {
			text = own.Error()
		}
		span.SetStatus(codes.Error, text)
	}
}

// spanFailed follows the conventions: a client's span is an error when the call failed. A server's
// is one for 5xx, and for the codes of gRPC that are the server's fault: UNKNOWN,
// DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE and DATA_LOSS.
func spanFailed(rec *call.Record) bool {
	if rec.Reason == call.ReasonOK {
		return false
	}
	if rec.Direction == "client" {
		return true
	}
	if rec.GRPC {
		switch rec.GRPCCode {
		case 2, 4, 12, 13, 14, 15:
			return true
		}
		return rec.GRPCCode < 0
	}
	return rec.HTTPStatus >= 500 || rec.HTTPStatus == 0
}

// decide puts the summary of a decision on a recording span.
func decide(span trace.Span, d *call.Decision) {
	attrs := []attribute.KeyValue{
		keyCluster.String(d.Cluster), keyRevision.String(d.Revision),
	}
	if d.Route != nil && d.Route.Source != "" {
		attrs = append(attrs, keyRouteSource.String(d.Route.Source))
	}
	if len(d.Limits) > 0 {
		attrs = append(attrs, keyLimits.StringSlice(d.Limits))
	}
	span.SetAttributes(attrs...)
	if len(d.Attempts) < 2 {
		return
	}
	for i, a := range d.Attempts {
		span.AddEvent("attempt", trace.WithTimestamp(a.Start), trace.WithAttributes(
			keyAttempt.Int(i), keyOutcome.String(a.Outcome), keyTook.Int64(a.Took.Microseconds())))
	}
}

// spanName: RPC conventions, "{rpc.method}"; HTTP conventions, "{method}" when no template of the
// target is known, "HTTP" for a method that is not one of the known ones.
func spanName(grpc bool, method, path string) string {
	if grpc {
		if len(path) > 1 && path[0] == '/' {
			return path[1:]
		}
		return path
	}
	if m := knownMethod(method); m != otherMethod {
		return m
	}
	return "HTTP"
}
