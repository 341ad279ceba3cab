package export

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

type resourceMetrics = metricdata.ResourceMetrics

// counts are the instruments of flows.
type counts struct {
	serviceAt                                         func(netip.AddrPort, uint8) (string, uint16, bool)
	max                                               int
	connections, io, retransmits, resets, denied, cut metric.Int64Counter
	rtt                                               metric.Float64Histogram

	mu     sync.RWMutex
	series map[seriesKey]*series
	beyond map[seriesKey]*series // other to other
}

// seriesKey is what flows are counted by. Services bound it.
type seriesKey struct {
	source, destination, verdict, direction, transport string
	port                                               uint16
}

// series are the attributes of a key, made once: what a flow costs is a look-up.
type series struct {
	all, sent, received metric.MeasurementOption
	attributes          []attribute.KeyValue
}

func newSeries(k seriesKey) *series {
	kv := []attribute.KeyValue{
		keySource.String(k.source), keyDestination.String(k.destination), keyPort.Int(int(k.port)),
		keyVerdict.String(k.verdict), keyDirection.String(k.direction), keyTransport.String(k.transport),
	}
	with := func(more ...attribute.KeyValue) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(append(kv[:len(kv):len(kv)], more...)...))
	}
	return &series{
		all: with(), sent: with(keyIODirection.String("transmit")), received: with(keyIODirection.String("receive")),
		attributes: kv,
	}
}

func newCounts(m metric.Meter, cfg Config) (*counts, error) {
	c := &counts{serviceAt: cfg.ServiceAt, max: cfg.MaxSeries, series: map[seriesKey]*series{}, beyond: map[seriesKey]*series{}}
	if c.serviceAt == nil {
		c.serviceAt = func(netip.AddrPort, uint8) (string, uint16, bool) { return "", 0, false }
	}
	var faults []error
	counter := func(name, unit, text string) metric.Int64Counter {
		i, err := m.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(text))
		faults = append(faults, err)
		return i
	}
	c.connections = counter(nameConnections, "{connection}", "Connections and datagram exchanges that ended, and those that were refused.")
	c.io = counter(nameIO, "By", "Payload that the workload of this node sent and received.")
	c.retransmits = counter(nameRetransmits, "{segment}", "TCP segments that the workload of this node sent again.")
	c.resets = counter(nameResets, "{connection}", "Connections that ended by a reset.")
	c.denied = counter(nameDenied, "{connection}", "What policy refused, or would have refused if it were enforced (verdict audited), by reason.")
	c.cut = counter(nameOverflow, "{flow}", "Flows counted as from other to other, beyond the bound on series.")
	var err error
	c.rtt, err = m.Float64Histogram(nameRTT, metric.WithUnit("s"), metric.WithExplicitBucketBoundaries(rttBounds...),
		metric.WithDescription("Smoothed round trip times of TCP, one of each connection at its end and at each sample."))
	faults = append(faults, err)
	_, err = m.Int64ObservableGauge(nameSeries, metric.WithUnit("{series}"), metric.WithDescription("Sets of source, destination, port, verdict, direction and transport in use."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			c.mu.RLock()
			defer c.mu.RUnlock()
			o.Observe(int64(len(c.series)))
			return nil
		}))
	faults = append(faults, err)
	if cfg.State != nil {
		faults = append(faults, observeState(m, cfg.State))
	}
	return c, errors.Join(faults...)
}

// Observe counts one flow. Its counts are taken as they are, so that of a connection with samples
// each flow must carry what came since the one before (flow.Config.Sink does).
func (x *Exporter) Observe(f *nodepb.Flow) { x.counts.observe(f) }

func (c *counts) observe(f *nodepb.Flow) {
	ctx := context.Background() // instruments read spans from it; there is none
	s := c.find(ctx, seriesKey{
		source: f.GetFrom().GetName(), destination: f.GetTo().GetName(), port: c.port(f),
		verdict: f.GetVerdict(), direction: f.GetDirection(), transport: f.GetProtocol(),
	})
	switch f.GetKind() {
	case "denied":
		c.connections.Add(ctx, 1, s.all)
		c.refuse(ctx, s, f)
		return
	case "audit": // the connection itself goes on, and is counted at its end
		c.refuse(ctx, s, f)
		return
	case "close":
		c.connections.Add(ctx, 1, s.all)
	}
	if n := f.GetBytesSent(); n > 0 {
		c.io.Add(ctx, int64(n), s.sent)
	}
	if n := f.GetBytesReceived(); n > 0 {
		c.io.Add(ctx, int64(n), s.received)
	}
	if n := f.GetRetransmits(); n > 0 {
		c.retransmits.Add(ctx, int64(n), s.all)
	}
	if f.GetReset_() {
		c.resets.Add(ctx, 1, s.all)
	}
	if d := f.GetRtt(); d != nil {
		c.rtt.Record(ctx, d.AsDuration().Seconds(), s.all)
	}
}

func (c *counts) refuse(ctx context.Context, s *series, f *nodepb.Flow) {
	c.denied.Add(ctx, 1, metric.WithAttributes(append(s.attributes[:len(s.attributes):len(s.attributes)], keyReason.String(f.GetReason()))...))
}

// find returns the series of k, or that of the rest when there are too many.
func (c *counts) find(ctx context.Context, k seriesKey) *series {
	c.mu.RLock()
	s := c.series[k]
	c.mu.RUnlock()
	if s != nil {
		return s
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.series[k]; s != nil {
		return s
	}
	if len(c.series) < c.max {
		s = newSeries(k)
		c.series[k] = s
		return s
	}
	c.cut.Add(ctx, 1)
	k.source, k.destination, k.port = other, other, 0
	if s = c.beyond[k]; s == nil {
		s = newSeries(k)
		c.beyond[k] = s
	}
	return s
}

// port is the port of the service that was called; 0 when no service is known to have it, so that
// what programs dial by chance makes no series.
func (c *counts) port(f *nodepb.Flow) uint16 {
	proto, ok := map[string]uint8{"tcp": 6, "udp": 17}[f.GetProtocol()]
	if !ok {
		return 0
	}
	for _, text := range [...]string{f.GetServiceAddress(), f.GetTo().GetAddress()} {
		at, err := netip.ParseAddrPort(text)
		if err != nil {
			continue
		}
		if _, port, ok := c.serviceAt(at, proto); ok {
			return port
		}
	}
	return 0
}

// State is what the agent tells of itself.
type State struct {
	// Made, Kept and Lost are records of the programs: made = kept + lost when none waits. Malformed
	// are among the kept.
	Made, Kept, Lost, Malformed uint64
	Events                      map[string]uint64 // counters of the programs by name
	Queries                     map[string]uint64 // messages to the DNS proxy since it started, by what became of them
	Programs                    []Program
	Maps                        []Map
	ConfigAge                   time.Duration // since the control plane confirmed the state; negative: it never did
	HeartbeatAge                time.Duration // of the DNS proxy; negative: there is none
	Breakglass                  bool          // policies are not asked
	Workloads, Services         int
}

// Program is how often and how long a program ran; both 0 where the kernel does not count.
type Program struct {
	Name string
	Runs uint64
	Time time.Duration
}

// Map is how full a map is.
type Map struct {
	Name              string
	Entries, Capacity uint64
	Refused           uint64 // writes that found no room
}

// observeState registers the instruments that a collection fills from state.
func observeState(m metric.Meter, state func(context.Context) State) error {
	var faults []error
	var all []metric.Observable
	counter := func(name, unit, text string) metric.Int64ObservableCounter {
		i, err := m.Int64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(text))
		faults, all = append(faults, err), append(all, i)
		return i
	}
	gauge := func(name, unit, text string) metric.Int64ObservableGauge {
		i, err := m.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(text))
		faults, all = append(faults, err), append(all, i)
		return i
	}
	seconds := func(name, text string) metric.Float64ObservableGauge {
		i, err := m.Float64ObservableGauge(name, metric.WithUnit("s"), metric.WithDescription(text))
		faults, all = append(faults, err), append(all, i)
		return i
	}
	records := counter(nameRecords, "{record}", "Records of the programs: made = kept + lost when none waits; malformed are among the kept.")
	events := counter(nameEvents, "{event}", "What the programs counted beside records.")
	runs := counter(nameRuns, "{run}", "How often a program ran.")
	runTime, err := m.Float64ObservableCounter(nameRunTime, metric.WithUnit("s"), metric.WithDescription("How long a program ran."))
	faults, all = append(faults, err), append(all, runTime)
	entries := gauge(nameMapEntries, "{entry}", "Entries of a map.")
	capacity := gauge(nameMapCapacity, "{entry}", "Entries that a map has room for.")
	refused := counter(nameMapRefused, "{entry}", "Entries that a map had no room for.")
	queries := counter(nameQueries, "{query}", "Messages to the DNS proxy, by what became of them; from 0 again when another process takes over.")
	age := seconds(nameConfigAge, "Time since the control plane last confirmed the state; absent until it did.")
	heartbeat := seconds(nameHeartbeat, "Age of the DNS proxy's heartbeat; absent without a proxy.")
	breakglass := gauge(nameBreakglass, "", "1 while policies are not asked.")
	workloads := gauge(nameWorkloads, "{workload}", "Workloads that run under the managed cgroup.")
	services := gauge(nameServices, "{service}", "Services that the node knows.")
	if err := errors.Join(faults...); err != nil {
		return err
	}
	_, err = m.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		s := state(ctx)
		for _, r := range [...]struct {
			state string
			n     uint64
		}{{"made", s.Made}, {"kept", s.Kept}, {"lost", s.Lost}, {"malformed", s.Malformed}} {
			o.ObserveInt64(records, int64(r.n), metric.WithAttributes(keyState.String(r.state)))
		}
		for name, n := range s.Events {
			o.ObserveInt64(events, int64(n), metric.WithAttributes(keyEvent.String(name)))
		}
		for _, p := range s.Programs {
			with := metric.WithAttributes(keyProgram.String(p.Name))
			o.ObserveInt64(runs, int64(p.Runs), with)
			o.ObserveFloat64(runTime, p.Time.Seconds(), with)
		}
		for _, m := range s.Maps {
			with := metric.WithAttributes(keyMap.String(m.Name))
			o.ObserveInt64(entries, int64(m.Entries), with)
			o.ObserveInt64(capacity, int64(m.Capacity), with)
			o.ObserveInt64(refused, int64(m.Refused), with)
		}
		for outcome, n := range s.Queries {
			o.ObserveInt64(queries, int64(n), metric.WithAttributes(keyOutcome.String(outcome)))
		}
		if s.ConfigAge >= 0 {
			o.ObserveFloat64(age, s.ConfigAge.Seconds())
		}
		if s.HeartbeatAge >= 0 {
			o.ObserveFloat64(heartbeat, s.HeartbeatAge.Seconds())
		}
		open := int64(0)
		if s.Breakglass {
			open = 1
		}
		o.ObserveInt64(breakglass, open)
		o.ObserveInt64(workloads, int64(s.Workloads))
		o.ObserveInt64(services, int64(s.Services))
		return nil
	}, all...)
	return err
}
