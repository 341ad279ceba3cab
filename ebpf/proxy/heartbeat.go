package proxy

import (
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
)

// heartbeat keeps the entry in dns_proxies young.
type heartbeat struct {
	tables Tables
	netns  uint64
	v4, v6 netip.AddrPort
	clock  Clock
	log    *slog.Logger
	failed *atomic.Uint64

	mu      sync.Mutex
	quit    chan struct{} // nil at rest
	running sync.WaitGroup
}

// start writes the first beat and keeps on until stop. When the first cannot be written it
// returns why, and nothing runs. It does nothing when it runs already.
func (h *heartbeat) start() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.quit != nil {
		return nil
	}
	if err := h.tables.Beat(h.netns, h.v4, h.v6); err != nil {
		return err
	}
	quit := make(chan struct{})
	h.quit = quit
	h.running.Go(func() { h.run(quit) })
	return nil
}

// stop returns when no beat will be written any more. The entry stays.
func (h *heartbeat) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.quit == nil {
		return
	}
	close(h.quit)
	h.quit = nil
	h.running.Wait()
}

func (h *heartbeat) run(quit <-chan struct{}) {
	ill := false
	for {
		wake := make(chan struct{})
		stop := h.clock.AfterFunc(HeartbeatEvery, func() { close(wake) })
		select {
		case <-quit:
			stop()
			return
		case <-wake:
		}
		err := h.tables.Beat(h.netns, h.v4, h.v6)
		if err != nil {
			h.failed.Add(1)
		}
		if (err != nil) != ill { // once a change, not four times a second
			ill = err != nil
			if ill {
				h.log.Error("heartbeat not written: after two seconds programs ask their own resolvers", "err", err)
			} else {
				h.log.Info("heartbeat written again")
			}
		}
	}
}
