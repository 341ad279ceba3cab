package ebpf

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/export"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// metrics is what the agent needs of the exporter; an *export.Exporter.
type metrics interface {
	// Observe counts a flow. It must not block.
	Observe(*nodepb.Flow)
	// Listen binds the address and returns it; empty when nothing is served.
	Listen() (string, error)
	// Serve serves until ctx is done.
	Serve(ctx context.Context) error
	// Close sends what is due.
	Close(ctx context.Context) error
}

func exporter(ctx context.Context, a *Agent) (metrics, error) {
	return export.New(ctx, export.Config{
		Addr: a.cfg.Metrics, OTLP: a.cfg.OTLP, ServiceAt: namer{a.table}.ServiceAt, State: a.exported, Version: a.cfg.Version, Log: a.log,
	})
}

// exported is the state of the agent as metrics tell it.
func (a *Agent) exported(context.Context) export.State {
	out := export.State{ConfigAge: -1, HeartbeatAge: -1}
	select {
	case <-a.ready:
	default:
		return out // what is read below is not there yet
	}
	out.Made, out.Kept, out.Lost = a.flows.Counts()
	out.Malformed = a.flows.Malformed()
	var err error
	if out.Events, err = a.flows.Counters(); err != nil {
		a.log.Debug("counters", "err", err)
	}
	stats, err := a.set.Stats()
	if err != nil {
		a.log.Debug("program statistics", "err", err)
	}
	for _, s := range stats {
		out.Programs = append(out.Programs, export.Program{Name: s.Name, Runs: s.Runs, Time: s.Time})
	}
	for _, u := range a.table.Usage() {
		out.Maps = append(out.Maps, export.Map{Name: u.Name, Entries: uint64(u.Entries), Capacity: uint64(u.Capacity), Refused: u.Refused})
	}
	out.HeartbeatAge = a.heartbeatAge()
	out.Services = a.table.Services()
	now := a.cfg.Clock.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if age, ok := a.configAge(now); ok {
		out.ConfigAge = age
	}
	out.Breakglass, out.Workloads = a.open, len(a.workloads)
	out.Queries = queries(a.proxy)
	return out
}

// queries are the counts of a DNS proxy by what became of the message; nil when none ever answered.
func queries(s proxy.Status) map[string]uint64 {
	if s.PID == 0 {
		return nil
	}
	return map[string]uint64{
		"answered": s.Answered, "forwarded": s.Forwarded, "refused": s.Refused, "failed": s.Failed,
		"shed": s.Shed, "looped": s.Looped, "malformed": s.Malformed,
	}
}

// configAge is how long ago the control plane last stood by the configuration; ok is false when it
// never did. The lock is held.
func (a *Agent) configAge(now time.Time) (time.Duration, bool) {
	if a.confirmed.IsZero() {
		return 0, false
	}
	return max(0, now.Sub(a.confirmed)), true
}

// heartbeatAge is that of the DNS proxy of the agent's network namespace; negative without one.
func (a *Agent) heartbeatAge() time.Duration {
	maps := a.set.Maps()
	if maps == nil || maps.DnsProxies == nil {
		return -1
	}
	cookie, err := netnsCookie()
	if err != nil {
		return -1
	}
	var p bpfobj.InlayDnsProxy
	if maps.DnsProxies.Lookup(cookie, &p) != nil {
		return -1
	}
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) != nil {
		return -1
	}
	return max(0, time.Duration(now.Nano()-int64(p.Heartbeat)))
}
