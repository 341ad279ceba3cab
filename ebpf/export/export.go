// Package export turns flows and the state of the node agent into metrics: for Prometheus, on
// loopback, and for an OpenTelemetry collector where one is named. The agent makes one Exporter,
// gives it every flow, and runs it.
//
// Series are bounded by the services of the mesh and never by addresses: a peer is a service, host,
// world or unknown; a port is one of a known service or 0. Beyond Config.MaxSeries of them flows are
// counted as from `other` to `other`, and that they were is counted too.
//
// The package reads no maps and decides nothing about connections; what it tells of programs and
// maps, the agent hands it at each collection (Config.State).
package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/otlptranslator"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/exemplar"
	"go.opentelemetry.io/otel/sdk/resource"
)

// DefaultAddr is where metrics are served when Config names no address.
const DefaultAddr = "127.0.0.1:15090"

// Config says what is exported and where to.
type Config struct {
	// Addr is the loopback HOST:PORT that Prometheus asks; metrics have no access control, so any
	// other is refused. Empty means DefaultAddr; "off" serves none.
	Addr string
	// OTLP is the URL of an OpenTelemetry collector, http:// or https://, for OTLP over gRPC. Empty
	// means OTEL_EXPORTER_OTLP_METRICS_ENDPOINT, then OTEL_EXPORTER_OTLP_ENDPOINT, and without them
	// none. All other OTEL_EXPORTER_OTLP_* variables hold as the SDK reads them.
	OTLP string
	// ServiceAt returns the service and its port at a service address or that of an endpoint; proto
	// is IPPROTO_TCP or IPPROTO_UDP. It must not block. Nil: no port is known.
	ServiceAt func(at netip.AddrPort, proto uint8) (name string, port uint16, ok bool)
	// State tells of the agent at each collection, by up to two goroutines at a time. Nil: only
	// flows are exported.
	State func(context.Context) State
	// MaxSeries bounds the sets of (source, destination, port, verdict, direction, transport); each
	// is at most 22 lines of the page, and one more for each reason of a refusal. Zero means 10,000.
	MaxSeries int
	Version   string       // of the agent, a resource attribute
	Log       *slog.Logger // nil discards
}

// Exporter counts flows. It is safe for concurrent use. Close it when nothing more is observed.
type Exporter struct {
	cfg      Config
	provider *metric.MeterProvider
	registry *prometheus.Registry
	counts   *counts

	mu       sync.Mutex
	listener net.Listener
}

// New checks cfg and returns an exporter that counts; nothing is served until Listen and Serve.
// With a collector it starts to send, and Close ends that.
func New(ctx context.Context, cfg Config) (*Exporter, error) {
	if cfg.Addr == "" {
		cfg.Addr = DefaultAddr
	}
	if cfg.MaxSeries <= 0 {
		cfg.MaxSeries = 10000
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Addr != "off" {
		if err := checkAddr(cfg.Addr); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	res, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithHost(), resource.WithFromEnv(),
		resource.WithAttributes(keyService.String("inlay-node"), keyVersion.String(cfg.Version)))
	if err != nil {
		return nil, fmt.Errorf("metrics: resource attributes: %w", err)
	}
	x := &Exporter{cfg: cfg, registry: prometheus.NewRegistry()}
	page, err := otelprom.New(otelprom.WithRegisterer(x.registry), otelprom.WithoutScopeInfo(),
		otelprom.WithTranslationStrategy(otlptranslator.UnderscoreEscapingWithSuffixes))
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	options := []metric.Option{
		metric.WithResource(res), metric.WithReader(page),
		metric.WithCardinalityLimit(0), // ours holds, and says what it cut
		metric.WithExemplarFilter(exemplar.AlwaysOffFilter),
	}
	if push, err := collector(ctx, cfg); err != nil {
		return nil, fmt.Errorf("metrics: collector: %w", err)
	} else if push != nil {
		options = append(options, metric.WithReader(metric.NewPeriodicReader(&told{Exporter: push, log: cfg.Log})))
	}
	x.provider = metric.NewMeterProvider(options...)
	if x.counts, err = newCounts(x.provider.Meter("github.com/inlay-mesh/inlay/ebpf"), cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("metrics: %w", err), x.provider.Shutdown(ctx))
	}
	return x, nil
}

// collector returns the exporter to a collector, nil when none is named.
func collector(ctx context.Context, cfg Config) (metric.Exporter, error) {
	var options []otlpmetricgrpc.Option
	switch {
	case cfg.OTLP != "":
		options = append(options, otlpmetricgrpc.WithEndpointURL(cfg.OTLP))
	case os.Getenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT") == "" && os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") == "":
		return nil, nil
	}
	return otlpmetricgrpc.New(ctx, options...)
}

// told says once in the log when the collector cannot be reached, and once when it can again; the
// SDK's own way is the process-wide error handler.
type told struct {
	metric.Exporter
	log *slog.Logger

	mu     sync.Mutex
	failed bool
}

func (t *told) Export(ctx context.Context, m *resourceMetrics) error {
	err := t.Exporter.Export(ctx, m)
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err != nil && !t.failed:
		t.log.WarnContext(ctx, "metrics not taken by the collector", "err", err)
	case err == nil && t.failed:
		t.log.InfoContext(ctx, "metrics taken by the collector again")
	}
	t.failed = err != nil
	return nil
}

// Listen binds the address of the configuration and returns what was bound; empty when it is off.
// A second call returns the same.
func (x *Exporter) Listen() (string, error) {
	if x.cfg.Addr == "off" {
		return "", nil
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.listener == nil {
		l, err := net.Listen("tcp", x.cfg.Addr)
		if err != nil {
			return "", fmt.Errorf("metrics: %w; choose another address, or off", err)
		}
		x.listener = l
	}
	return x.listener.Addr().String(), nil
}

// Addr is what Listen bound; empty before, and when metrics are served nowhere.
func (x *Exporter) Addr() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.listener == nil {
		return ""
	}
	return x.listener.Addr().String()
}

// Serve answers at the address of the configuration until ctx is done, then returns nil when every
// answer is given, or 2 s later. It binds the address unless Listen did.
func (x *Exporter) Serve(ctx context.Context) error {
	addr, err := x.Listen()
	if err != nil {
		return err
	}
	if addr == "" {
		<-ctx.Done()
		return nil
	}
	srv := &http.Server{
		Handler: x.Handler(), ReadHeaderTimeout: 5 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(x.cfg.Log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(x.listener) }()
	select {
	case err := <-done:
		return fmt.Errorf("metrics: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		srv.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}

// Close sends what was counted to the collector, if there is one, until ctx is done, and releases
// the address. It may be called twice.
func (x *Exporter) Close(ctx context.Context) error {
	x.mu.Lock()
	if x.listener != nil {
		x.listener.Close()
	}
	x.mu.Unlock()
	if err := x.provider.Shutdown(ctx); err != nil && !errors.Is(err, metric.ErrReaderShutdown) {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}

// Handler serves GET /metrics to callers that name this machine as loopback; others, such as a page
// in a browser whose name was made to point here, are refused.
func (x *Exporter) Handler() http.Handler {
	page := promhttp.HandlerFor(x.registry, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(x.cfg.Log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError,
	})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", page)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		if !loopback(host) {
			http.Error(w, fmt.Sprintf("host %q: want localhost or an address of loopback", r.Host), http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func checkAddr(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("address %q: %w: want HOST:PORT on loopback, as %s, or off", addr, err, DefaultAddr)
	}
	if !loopback(host) {
		return fmt.Errorf("address %q: %q is not loopback, and metrics have no access control: want HOST:PORT on loopback, as %s, or off", addr, host, DefaultAddr)
	}
	return nil
}

func loopback(host string) bool {
	if n := len(host); n > 2 && host[0] == '[' && host[n-1] == ']' {
		host = host[1 : n-1]
	}
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.Unmap().IsLoopback()
}
