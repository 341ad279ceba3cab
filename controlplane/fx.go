package controlplane

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"go.uber.org/fx"
	"go.uber.org/fx/fxevent"

	"github.com/inlay-mesh/inlay/controlplane/admin"
	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
	"github.com/inlay-mesh/inlay/controlplane/serve"
)

// stopTimeout bounds the end of a control plane.
const stopTimeout = 5 * time.Second

// Module provides a *ControlPlane made of cfg, which runs from the application's start to its
// stop. Its parts are provided to the module alone. A part that ends by itself shuts the
// application down with exit code 1.
func Module(cfg Config) fx.Option {
	return fx.Module("controlplane",
		fx.Provide(fx.Private,
			func() (Config, error) { return cfg.withDefaults() },
			newDisk, newAuthority, newServe, newBuilds, newRegistry, newAddresses, newReports, newPipeline, newServers,
		),
		fx.Provide(newControlPlane),
		fx.Invoke(hooks),
	)
}

func newAuthority(cfg Config, d *disk) (*ca.CA, error) {
	a, err := ca.New(ca.Config{
		Dir: d.caDir, TrustDomain: cfg.TrustDomain, Store: d.certs(), SVIDTTL: cfg.SVIDTTL, NodeUIDs: cfg.NodeUIDs,
		Clock: cfg.Clock, Log: cfg.Log,
	})
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return a, nil
}

func newServe(cfg Config) *serve.Server {
	return serve.New(serve.Config{Log: cfg.Log, Clock: cfg.Clock, Dev: cfg.Plaintext != "", TrustDomain: cfg.TrustDomain, NodeUIDs: cfg.NodeUIDs})
}

func newRegistry(cfg Config, d *disk, srv *serve.Server, b builds) (*registry.Registry, error) {
	r, err := registry.New(registry.Config{
		Store: d.leases(), TrustDomain: cfg.TrustDomain, LeaseTTL: cfg.LeaseTTL, NodeUIDs: cfg.NodeUIDs,
		WaitDrained: func(ctx context.Context, id string) bool { return b.settle(ctx) && srv.WaitDrained(ctx, id) },
		MTLSMode:    mtlsMode(srv), Plain: plainPort(srv), Clock: cfg.Clock, Log: cfg.Log,
	})
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return r, nil
}

func newAddresses(cfg Config, d *disk) (*vip.Allocator, error) {
	a, err := vip.New(vip.Config{IPv4: cfg.VirtualIPv4, IPv6: cfg.VirtualIPv6, Store: d.virtual(), Log: cfg.Log})
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return a, nil
}

func newReports(cfg Config) *admin.Reports {
	return admin.NewReports(admin.ReportsConfig{TrustDomain: cfg.TrustDomain, Clock: cfg.Clock, Log: cfg.Log})
}

func newServers(cfg Config, d *disk, a *ca.CA, reg *registry.Registry, srv *serve.Server, reports *admin.Reports, p *pipeline) (*servers, error) {
	s := &servers{
		cfg: cfg, ca: a, registry: reg, serve: srv, reports: reports, pipeline: p, log: cfg.Log,
		failed: make(chan struct{}),
	}
	v := &view{cfg: cfg, started: cfg.Clock.Now(), pipeline: p, registry: reg, serve: srv, ca: a, disk: d, addresses: s.addresses}
	ac := admin.Config{State: v, Reports: reports, Clock: cfg.Clock, Log: cfg.Log}
	if cfg.EncodeSnapshot != nil {
		ac.Encode = v.snapshot
	}
	var err error
	if s.admin, err = admin.New(ac); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return s, nil
}

func newControlPlane(cfg Config, d *disk, a *ca.CA, reg *registry.Registry, srv *serve.Server, reports *admin.Reports, p *pipeline, s *servers) *ControlPlane {
	return &ControlPlane{cfg: cfg, disk: d, ca: a, registry: reg, serve: srv, reports: reports, pipeline: p, servers: s}
}

// hooks are the stages of a life, started in this order and stopped in the reverse.
func hooks(lc fx.Lifecycle, shutdown fx.Shutdowner, cp *ControlPlane) {
	s := cp.servers
	lc.Append(fx.Hook{OnStop: func(context.Context) error { return cp.disk.Close() }})
	lc.Append(fx.Hook{OnStart: s.bind, OnStop: s.unbind})
	lc.Append(fx.Hook{OnStart: s.run, OnStop: s.stopRunning})
	lc.Append(fx.Hook{OnStart: s.serveAll, OnStop: s.stopServing})
	if cp.cfg.RunDir != "" {
		lc.Append(fx.Hook{OnStart: cp.announce, OnStop: func(context.Context) error { removeStateFile(cp.cfg.RunDir); return nil }})
	}
	stopped, watched := make(chan struct{}), make(chan struct{})
	lc.Append(fx.Hook{
		OnStart: func(context.Context) error {
			go func() {
				defer close(watched)
				select {
				case <-s.failed:
					_ = shutdown.Shutdown(fx.ExitCode(1)) // fails only when it is under way already
				case <-stopped:
				}
			}()
			return nil
		},
		OnStop: func(context.Context) error { close(stopped); <-watched; return nil },
	})
}

func (cp *ControlPlane) announce(context.Context) error {
	return writeStateFile(cp.cfg.RunDir, StateFile{
		PID: os.Getpid(), Started: cp.cfg.Clock.Now(), Version: cp.cfg.Version, Addresses: cp.Addresses(),
		TrustDomain: cp.cfg.TrustDomain, ConfigDir: cp.cfg.ConfigDir, DataDir: cp.cfg.DataDir,
	})
}

// Run runs a control plane until ctx is done, then stops it. The error says why it could not
// start, or which part ended by itself.
func Run(ctx context.Context, cfg Config) error {
	cp, err := New(cfg)
	if err != nil {
		return err
	}
	if err := cp.Start(ctx); err != nil {
		return err
	}
	cp.cfg.Log.InfoContext(ctx, "control plane started", "pid", os.Getpid(), "addresses", cp.Addresses(), "trust_domain", cp.cfg.TrustDomain)
	select {
	case <-ctx.Done():
	case <-cp.Failed():
	}
	return errors.Join(cp.Err(), cp.Stop(ctx))
}

// quiet has fx log at Debug only: the caller reports what New, Start and Stop return.
func quiet(log *slog.Logger) fx.Option {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return fx.WithLogger(func() fxevent.Logger {
		l := &fxevent.SlogLogger{Logger: log}
		l.UseLogLevel(slog.LevelDebug)
		l.UseErrorLevel(slog.LevelDebug)
		return l
	})
}
