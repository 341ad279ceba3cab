package flow

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// exchange is a datagram exchange as udp_flows holds it.
type exchange struct {
	key  bpfobj.InlayUdpKey
	flow bpfobj.InlayUdpFlow
}

// told is what was already said of an exchange that goes on.
type told struct{ first, tx, rx uint64 }

// What a sweep does with an exchange.
type action int

const (
	leave  action = iota // nothing to tell yet
	sample               // it lasts: tell what was said since the sample before
	finish               // it ended or idles: tell it whole and remove it
)

// judge decides about an exchange at now; before is what was told of it.
func judge(f bpfobj.InlayUdpFlow, before told, now uint64, idle, every time.Duration) action {
	since := func(t uint64) time.Duration {
		if t > now {
			return 0 // spoken in while the sweep ran
		}
		return time.Duration(now - t)
	}
	switch {
	case f.Flags&uint8(bpfobj.InlayFlowFlagFLOW_ENDED) != 0, since(spoken(f)) >= idle:
		return finish
	case f.Verdict == verdictDeny:
		return leave // each refusal had its record
	case since(f.First) >= every && (f.TxBytes != before.tx || f.RxBytes != before.rx):
		return sample
	}
	return leave
}

// spoken is when the exchange was last heard of. The connect() of a datagram socket makes one in
// which nobody has spoken yet.
func spoken(f bpfobj.InlayUdpFlow) uint64 { return max(f.First, f.Last) }

// worthTelling is false of exchanges whose refusals each had a record, and of those in which nobody
// ever spoke: resolvers connect() datagram sockets only to see which source address they would get
// (RFC 6724, section 2).
func worthTelling(f bpfobj.InlayUdpFlow) bool {
	return f.Verdict != verdictDeny && f.TxPackets+f.RxPackets > 0
}

// sweeper holds what one run knows of the exchanges that it left in the map.
type sweeper struct {
	log  *Log
	told map[bpfobj.InlayUdpKey]told
}

// sweepUDP sweeps every SweepEvery until ctx is done. What lies in the map at the start was told
// by the agent before, up to now: only what is said from here on is given to the sink.
func (l *Log) sweepUDP(ctx context.Context) {
	s := sweeper{log: l, told: map[bpfobj.InlayUdpKey]told{}}
	err := each(l.cfg.Maps.UdpFlows, func(x exchange) {
		s.told[x.key] = told{x.flow.First, x.flow.TxBytes, x.flow.RxBytes}
	})
	if err != nil {
		l.cfg.Log.Warn("datagram exchanges not swept", "err", err)
	}
	tick := make(chan struct{}, 1)
	for {
		stop := l.cfg.Clock.AfterFunc(l.cfg.SweepEvery, func() { tick <- struct{}{} })
		select {
		case <-ctx.Done():
			stop()
			return
		case <-tick:
		}
		if err := s.sweep(); err != nil {
			l.cfg.Log.Warn("datagram exchanges not swept", "err", err)
		}
	}
}

// sweep looks at every exchange once.
func (s *sweeper) sweep() error {
	cfg := &s.log.cfg
	now := cfg.Monotonic()
	next := make(map[bpfobj.InlayUdpKey]told, len(s.told))
	var faults []error
	err := each(cfg.Maps.UdpFlows, func(x exchange) {
		before, ok := s.told[x.key]
		if !ok || before.first != x.flow.First {
			before = told{first: x.flow.First} // another exchange under the same key
		}
		switch judge(x.flow, before, now, cfg.UDPIdle, cfg.SweepEvery) {
		case leave:
			next[x.key] = before
		case sample:
			s.tell(x, before, kindSample)
			next[x.key] = told{x.flow.First, x.flow.TxBytes, x.flow.RxBytes}
		case finish:
			last, taken, err := take(cfg.Maps.UdpFlows, x)
			switch {
			case err != nil:
				faults = append(faults, err)
				next[x.key] = before
			case !taken:
				next[x.key] = before // somebody spoke again
			case worthTelling(last.flow):
				s.tell(last, before, kindClose)
			}
		}
	})
	if err != nil { // what it did not come to was told as before
		for key, before := range s.told {
			if _, ok := next[key]; !ok {
				next[key] = before
			}
		}
	}
	s.told = next
	return errors.Join(append(faults, err)...)
}

// tell makes a flow of x. Counts of an exchange never fall while its first datagram is the same.
func (s *sweeper) tell(x exchange, before told, kind uint8) {
	f := x.flow
	e := bpfobj.InlayEvent{
		Time: spoken(f), Start: f.First, Cgroup: f.Cgroup, Identity: f.Identity, Peer: f.Peer,
		Cookie: x.key.Cookie, TxBytes: f.TxBytes, RxBytes: f.RxBytes,
		Remote: x.key.Addr, RemotePort: x.key.Port, LocalPort: f.LocalPort,
		Rule: f.Rule, Kind: kind, Dir: f.Dir, Proto: f.Proto, Verdict: f.Verdict, Flags: f.Flags,
	}
	if e.Proto == 0 {
		e.Proto = protoUDP
	}
	var asked bpfobj.InlayReverse
	if err := s.log.cfg.Maps.UdpReverse.Lookup(x.key, &asked); err == nil {
		e.Vip, e.VipPort = asked.Addr, asked.Port
	}
	since := e
	since.TxBytes -= min(before.tx, since.TxBytes)
	since.RxBytes -= min(before.rx, since.RxBytes)
	s.log.keep(e, since)
}

// each calls f for every exchange, in batches of whole buckets: f may remove the one that it is
// given, and a batch goes on where the last one ended.
func each(m *ebpf.Map, f func(exchange)) error {
	const size = 1024 // more than a bucket holds
	var (
		cursor ebpf.MapBatchCursor
		keys   = make([]bpfobj.InlayUdpKey, size)
		flows  = make([]bpfobj.InlayUdpFlow, size)
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, flows, nil)
		for i := range n {
			f(exchange{keys[i], flows[i]})
		}
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return nil
		case err != nil:
			return fmt.Errorf("map udp_flows: %w", err)
		}
	}
}

// take removes x from the map unless it changed, and returns it as it was at its removal.
func take(m *ebpf.Map, x exchange) (exchange, bool, error) {
	var now bpfobj.InlayUdpFlow
	switch err := m.Lookup(x.key, &now); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return x, true, nil // evicted for want of room since we read it: what we read is its end
	case err != nil:
		return x, false, fmt.Errorf("map udp_flows: %w", err)
	case now.Last != x.flow.Last || now.First != x.flow.First:
		return x, false, nil
	}
	// A datagram between the look and the removal is in what the removal returns.
	switch err := m.LookupAndDelete(x.key, &now); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
	case err != nil:
		return x, false, fmt.Errorf("map udp_flows: %w", err)
	default:
		x.flow = now
	}
	return x, true, nil
}
