package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/admin"
	"github.com/inlay-mesh/inlay/controlplane/compile"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

// minGap is the least time between two builds that the registry caused. The first of a burst is
// built at once, the rest together.
const minGap = 10 * time.Millisecond

// builds holds a token while a mesh is made and published. Who has changed the registry and then
// settles knows that no mesh of before the change is still to come.
type builds chan struct{}

func newBuilds() builds { return make(builds, 1) }

func (b builds) begin() { b <- struct{}{} }

func (b builds) end() { <-b }

// settle waits for the build that is under way, if any; false when ctx ended first.
func (b builds) settle(ctx context.Context) bool {
	select {
	case b <- struct{}{}:
		<-b
		return true
	case <-ctx.Done():
		return false
	}
}

// pipeline turns revisions and instances into what is served. One goroutine (run) decides; state
// is read by anybody.
type pipeline struct {
	cfg      Config
	dir      *source.Dir // nil: Apply only
	disk     *disk
	registry *registry.Registry
	virtual  *vip.Allocator
	serve    *serve.Server
	reports  *admin.Reports
	builds   builds
	log      *slog.Logger

	revisions chan source.Revision // from the directory; unbuffered
	applies   chan applyRequest
	trouble   chan struct{} // capacity 1: the directory cannot be read
	ready     chan struct{}

	// Of the goroutine of run alone.
	plan       *compile.Plan
	revision   string          // of the plan
	registered <-chan struct{} // closed when the instances changed after the last build
	built      time.Duration   // how long the last build took

	mu      sync.Mutex
	state   state
	changed chan struct{}
}

// state is what the pipeline says of itself: a value, replaced whole.
type state struct {
	// revision is the running one; its ID is empty before the first.
	revision string
	time     time.Time
	objects  int
	// warnings of the running revision by itself, and of what it made with the instances.
	warnings, built []config.Finding
	// faults of newer files that were refused.
	faults []config.Finding
	// source says why the directory cannot be read, publish what could not be served.
	source, publish error
	namespaces      []string
}

type applyRequest struct {
	revision source.Revision
	done     chan<- applyResult
}

type applyResult struct {
	applied Applied
	err     error
}

func newPipeline(cfg Config, d *disk, reg *registry.Registry, virtual *vip.Allocator, srv *serve.Server, reports *admin.Reports, b builds) (*pipeline, error) {
	p := &pipeline{
		cfg: cfg, disk: d, registry: reg, virtual: virtual, serve: srv, reports: reports, builds: b, log: cfg.Log,
		revisions: make(chan source.Revision),
		applies:   make(chan applyRequest),
		trouble:   make(chan struct{}, 1),
		ready:     make(chan struct{}),
		changed:   make(chan struct{}),
	}
	d.tell(func() { p.set(func(*state) {}) })
	if cfg.ConfigDir != "" {
		dir, err := source.NewDir(cfg.ConfigDir, source.Options{Problem: p.problem, Clock: cfg.Clock, Log: cfg.Log})
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		p.dir = dir
	}
	return p, nil
}

// run is the whole pipeline, until ctx is done.
func (p *pipeline) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // runs first
	var dirEnded chan error
	if p.dir != nil {
		dirEnded = make(chan error, 1)
		wg.Go(func() {
			dirEnded <- p.dir.Run(ctx, func(rev source.Revision) {
				select {
				case p.revisions <- rev:
				case <-ctx.Done():
				}
			})
		})
	} else {
		p.accept(source.NewRevision(nil), false, nil)
	}
	wg.Go(func() { p.followServer(ctx) })

	var gap chan struct{} // not nil while a build that the registry asked for has to wait
	for {
		registered := p.registered
		if gap != nil {
			registered = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-dirEnded:
			if ctx.Err() == nil {
				return fmt.Errorf("watching of the configuration directory ended: %w", err)
			}
			return nil
		case rev := <-p.revisions:
			if faults := p.accept(rev, true, nil); faults != nil {
				p.refuse(faults)
			}
		case <-p.trouble:
			if p.plan == nil {
				p.restore(p.now().faults)
			}
		case req := <-p.applies:
			if faults := p.accept(req.revision, true, nil); faults != nil {
				p.set(func(s *state) { s.faults = faults })
				req.done <- applyResult{err: &RefusedError{Faults: faults}}
				continue
			}
			s := p.now()
			req.done <- applyResult{applied: Applied{Revision: s.revision, Warnings: slices.Concat(s.warnings, s.built)}}
		case <-registered:
			p.build(func(*state) {})
			done := make(chan struct{})
			gap = done
			// A mesh that takes long to build leaves most of the time to serving it.
			p.cfg.Clock.AfterFunc(max(minGap, 2*p.built), func() { close(done) })
		case <-gap:
			gap = nil
		}
	}
}

// accept makes rev the running revision, or returns its faults and leaves the running one and the
// state. beside are the faults of newer files, in whose place rev is served. With remember, new
// revisions are kept on disk.
func (p *pipeline) accept(rev source.Revision, remember bool, beside []config.Finding) []config.Finding {
	set, findings := config.Parse(rev.Files)
	plan, more := compile.Resolve(set)
	findings = config.SortFindings(append(findings, more...))
	if plan == nil || config.HasFaults(findings) {
		faults := slices.DeleteFunc(slices.Clone(findings), func(f config.Finding) bool { return f.Severity != config.Fault })
		for i, f := range faults {
			if i == 20 {
				p.log.Warn("and more faults", "count", len(faults)-i)
				break
			}
			p.log.Warn("configuration refused", "fault", f.String())
		}
		if p.plan != nil {
			p.log.Warn("the running revision stays", "refused", rev.ID, "running", p.revision, "faults", len(faults))
		}
		return faults
	}
	at := p.cfg.Clock.Now()
	if remember {
		at = p.disk.timeOf(rev.ID, at) // a restart is no new revision
	}
	p.plan, p.revision = plan, rev.ID
	p.build(func(s *state) {
		s.revision, s.time = rev.ID, at
		s.objects = set.Len()
		s.warnings, s.faults = findings, beside
	})
	p.log.Info("revision is served", "revision", rev.ID, "files", len(rev.Files), "warnings", len(findings))
	if remember {
		if err := p.disk.saveRevision(rev, at); err != nil {
			p.log.Warn("revision is not remembered over a restart", "revision", rev.ID, "err", err)
		}
	}
	return nil
}

// refuse takes the faults of the directory's files into the state. The first files of a start have
// no running revision behind them: a remembered one is served in their place.
func (p *pipeline) refuse(faults []config.Finding) {
	if p.plan == nil {
		p.restore(faults)
	}
	p.set(func(s *state) { s.faults = faults })
}

// restore serves the newest remembered revision that is still good, when the first files of this
// start are not (faults) or cannot be read. Revision and faults come into the state together:
// nobody sees a moment in which nothing is served, or nothing is wrong.
func (p *pipeline) restore(faults []config.Finding) {
	for _, rev := range p.disk.revisions() {
		if p.accept(rev, true, faults) == nil {
			p.log.Warn("the last good revision is served in place of the directory", "revision", rev.ID)
			return
		}
	}
	p.log.Warn("nothing is served until the directory is good: no good revision of before is remembered")
}

// build makes the mesh of the plan and the instances of this moment, and serves it. Then it changes
// the state, by also too, at once: what the state says is served is served.
func (p *pipeline) build(also func(*state)) {
	began := p.cfg.Clock.Now()
	p.builds.begin()
	p.registered = p.registry.Changed() // before the snapshot, so that nothing between is lost
	instances := p.registry.Snapshot()
	instances.Addresses = p.virtual.Assign(p.plan.Names(instances))
	mesh, findings := p.plan.Build(instances, p.cfg.TrustDomain, p.revision)
	err := p.serve.Publish(mesh)
	p.builds.end()
	if err != nil {
		p.log.Error("resources could not be made; clients keep the last good ones", "err", err)
	}
	namespaces := namespacesOf(mesh)
	p.reports.Announce(namespaces)
	p.set(func(s *state) {
		s.built, s.publish, s.namespaces = findings, err, namespaces
		also(s)
	})
	select {
	case <-p.ready:
	default:
		close(p.ready)
	}
	p.built = p.cfg.Clock.Now().Sub(began)
}

// problem is told by the directory why it cannot be read.
func (p *pipeline) problem(err error) {
	p.set(func(s *state) { s.source = err }) // the directory has logged it
	if err != nil {
		select {
		case p.trouble <- struct{}{}:
		default:
		}
	}
}

// followServer makes acknowledgements changes of the pipeline too.
func (p *pipeline) followServer(ctx context.Context) {
	for {
		changed := p.serve.Changed()
		p.set(func(*state) {})
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (p *pipeline) apply(ctx context.Context, rev source.Revision) (Applied, error) {
	done := make(chan applyResult, 1)
	select {
	case p.applies <- applyRequest{rev, done}:
	case <-ctx.Done():
		return Applied{}, fmt.Errorf("apply: the control plane does not run: %w", ctx.Err())
	}
	r := <-done // the loop answers every request that it took
	return r.applied, r.err
}

func (p *pipeline) now() state {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// set changes the state and wakes who waits on changes.
func (p *pipeline) set(f func(*state)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.state)
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *pipeline) changes() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

func namespacesOf(m *ir.Mesh) []string {
	out := []string{}
	for i := range m.Services {
		if m.Services[i].Unknown == "" {
			out = append(out, m.Services[i].Namespace)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
