package ebpf

import (
	"context"
	"path/filepath"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

// proxyEvery is the time between two looks at the DNS proxy. Its own heartbeat tells the programs
// within a second that it is dead; this starts another.
const proxyEvery = time.Second

// ensure has a DNS proxy run that serves these maps.
func (a *Agent) ensure(ctx context.Context, maps *bpfobj.InlayMaps) error {
	id, err := proxy.MapID(maps)
	if err != nil {
		return err
	}
	_, err = proxy.Ensure(ctx, proxy.EnsureConfig{
		Command: a.cfg.ProxyCommand, Socket: filepath.Join(a.cfg.RunDir, ProxySocket),
		Version: a.cfg.Version, Suffix: a.cfg.Suffix, MapID: id, LogFile: a.cfg.ProxyLog, Log: a.log,
		Told: func(s proxy.Status) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.proxy = s
		},
	})
	return err
}

// proxyLoop keeps a DNS proxy running. It stays when the agent ends.
func (a *Agent) proxyLoop(ctx context.Context) error {
	a.every(ctx, proxyEvery, func() {
		err := a.ensure(ctx, a.set.Maps())
		if ctx.Err() != nil {
			return
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		a.proxyUp = err == nil
		a.once(ctx, "dns proxy", err, "no DNS proxy: managed workloads ask their own resolvers")
	})
	return nil
}

// handover brings the DNS proxy to the maps of another layout. Without it names are not worse off
// than with a dead proxy, so a failure does not undo the upgrade.
func (a *Agent) handover(ctx context.Context) func(*bpfobj.InlayMaps) error {
	if len(a.cfg.ProxyCommand) == 0 {
		return nil
	}
	return func(maps *bpfobj.InlayMaps) error {
		if err := a.ensure(ctx, maps); err != nil {
			a.log.WarnContext(ctx, "DNS proxy is not on the new maps yet", "err", err)
		}
		return nil
	}
}
