// Package flow turns the records of the node's programs into flows that people read: who called
// whom, over which service address, what was decided by which rule of which file, and how much
// was said. The node agent makes one Log and runs it; `inlay observe` asks it over gRPC (Server);
// the exporter is given every flow (Config.Sink).
//
// Records of TCP, refusals and audits come by the ring buffer; datagram exchanges are swept from
// the map udp_flows when they end or idle. The newest flows are kept in memory, a bounded number
// of them; observers read at their own pace and are told what they missed. Nothing here decides
// about connections, nothing is written to the maps of the programs but the removal of swept
// exchanges, and a reader that is slow or gone never holds up the programs.
//
// # Counting
//
// The programs raise COUNT_MADE for each record that should be in the ring and COUNT_LOST for
// each that found no room. How many were read needs no counter of ours: the ring's own consumer
// position is the number of bytes ever read from it, and every record is as long as every other.
// So kept outlives the agent with the pinned ring, also a SIGKILL between two instructions, and
// made = kept + lost holds exactly whenever the ring is empty.
package flow

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Clock is the time of day and timers. AfterFunc runs f in a goroutine of its own.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// Identity is the workload behind a numeric identity. Labels are shared: nobody writes them.
type Identity struct {
	Namespace, Service string
	Labels             map[string]string
}

// Rule is one rule of one NetworkPolicy.
type Rule struct {
	Policy string // NAMESPACE/NAME
	Name   string
	Source string // file:line
	Audit  bool
}

// Namer knows what the numbers in records stand for. It is asked once for each record, by at most
// two goroutines at a time, and must not block.
type Namer interface {
	// Identity of a workload; never asked about the reserved numbers below 256.
	Identity(n uint64) (Identity, bool)
	// Rule of a number in segments of ports; never asked about 0.
	Rule(n uint32) (Rule, bool)
	// ServiceAt returns the service, as NAME.NAMESPACE or NAMESPACE/NAME, and its port that lies
	// at a service address or at the address of one of its endpoints. proto is IPPROTO_TCP or
	// IPPROTO_UDP.
	ServiceAt(at netip.AddrPort, proto uint8) (name string, port uint16, ok bool)
}

// Config says what a Log reads and how much of it is kept.
type Config struct {
	// Maps of the programs: events, counters, udp_flows and udp_reverse are used. Nil means that
	// there is nothing to read: Run waits for its context, and flows come by Add.
	Maps *bpfobj.InlayMaps
	// Namer resolves numbers; nil means that no workload, rule or service is known.
	Namer Namer
	// Capacity bounds how many flows are kept; they take about 400 bytes each. Zero means 65,536.
	Capacity int
	// Sink is given each flow, with its counts since the sample of the connection before it, so
	// that counts can be summed. It is called by two goroutines and must not block. Nil: none.
	Sink func(*nodepb.Flow)
	// SweepEvery is the time between two sweeps of datagram exchanges, and so between two samples
	// of a lasting one. Zero means 10 s.
	SweepEvery time.Duration
	// UDPIdle ends a datagram exchange that nobody spoke in. Zero means 30 s.
	UDPIdle time.Duration
	Clock   Clock // nil: the real one
	// Monotonic is the time in ns that records carry; nil: CLOCK_MONOTONIC.
	Monotonic func() uint64
	Log       *slog.Logger // nil discards
}

// Log is the flow log of one node. It is safe for concurrent use.
type Log struct {
	cfg       Config
	malformed atomic.Uint64

	addMu  sync.Mutex // guards totals: one record at a time
	totals totals

	mu   sync.Mutex
	ring []*entry      // that of sequence number n lies at n % len
	head uint64        // sequence number of the next
	wake chan struct{} // closed at the next append; nil while nobody waits
}

// New returns a log at rest; nothing is read until Run. Only one log at a time may read a ring
// buffer.
func New(cfg Config) *Log {
	if cfg.Capacity <= 0 {
		cfg.Capacity = 65536
	}
	if cfg.SweepEvery <= 0 {
		cfg.SweepEvery = 10 * time.Second
	}
	if cfg.UDPIdle <= 0 {
		cfg.UDPIdle = 30 * time.Second
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Monotonic == nil {
		cfg.Monotonic = monotonic
	}
	if cfg.Namer == nil {
		cfg.Namer = nobody{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Log{cfg: cfg, ring: make([]*entry, cfg.Capacity)}
}

// Run reads records and sweeps datagram exchanges until ctx is done, and returns when all it
// started has ended: nil then, else what made reading impossible. What is in the ring at the end
// stays there for the next agent.
func (l *Log) Run(ctx context.Context) error {
	if l.cfg.Maps == nil {
		<-ctx.Done()
		return nil
	}
	reader, err := ringbuf.NewReader(l.cfg.Maps.Events)
	if err != nil {
		return fmt.Errorf("flow log: ring buffer events: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		<-ctx.Done()
		reader.Close() // ends the read below
	})
	wg.Go(func() { l.sweepUDP(ctx) })

	var rec ringbuf.Record
	for {
		switch err := reader.ReadInto(&rec); {
		case errors.Is(err, ringbuf.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("flow log: ring buffer events: %w", err)
		}
		if err := l.Add(rec.RawSample); err != nil {
			l.cfg.Log.Debug("record refused", "err", err)
		}
	}
}

// Add keeps one record, as it lies in the ring buffer. One that Decode refuses is counted as
// malformed and changes nothing else. Run calls it; others that have records may too.
func (l *Log) Add(raw []byte) error {
	e, err := Decode(raw)
	if err != nil {
		l.malformed.Add(1)
		return err
	}
	told := e
	if e.Proto == protoTCP && (e.Kind == kindSample || e.Kind == kindClose) {
		l.addMu.Lock()
		e = l.totals.add(e)
		l.addMu.Unlock()
	}
	l.keep(e, told)
	return nil
}

// keep appends a flow with the counts of all, and gives the sink one with those of told.
func (l *Log) keep(all, told bpfobj.InlayEvent) {
	n := l.resolve(all)
	if l.cfg.Sink != nil {
		l.cfg.Sink(n.flow(told))
	}
	l.mu.Lock()
	l.ring[l.head%uint64(len(l.ring))] = n
	l.head++
	wake := l.wake
	l.wake = nil
	l.mu.Unlock()
	if wake != nil {
		close(wake)
	}
}

// Malformed returns how many records were refused: of another length, kind, verdict, direction or
// protocol than the programs of this layout make. They are among the kept of Counts.
func (l *Log) Malformed() uint64 { return l.malformed.Load() }

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }
