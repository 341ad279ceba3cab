package meshsdk

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/report"
	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

const (
	// cacheFile holds the last known good, in the state directory of the service.
	cacheFile = "xds.cache"
	// userAgent is what node.user_agent_name says.
	userAgent = "inlay-go"
	// featureSDK tells the control plane that this client enforces what the SDK does.
	featureSDK = "inlay.sdk"
	// plaintextWait is how long the start waits for an SVID where the control plane asks for none.
	plaintextWait = 2 * time.Second
	// streamPoll is how often the start looks whether the connected control plane has taken the
	// stream.
	streamPoll = 10 * time.Millisecond
)

// start runs the Mesh until end.
func (m *Mesh) start(ctx context.Context) {
	if c, ok := m.source.(*identity.Client); ok && m.set.identity == nil {
		m.wg.Go(func() {
			// An error is in Current as well, which is where everybody looks.
			if err := c.Run(ctx); err != nil {
				m.log.ErrorContext(ctx, "no identity will come", "err", err)
			}
		})
	}
	m.stopNames = m.clock.AfterFunc(namesWait, m.names.settle)
	m.wg.Go(func() {
		if err := m.run(ctx); err != nil && ctx.Err() == nil {
			m.fail(err)
			m.names.settle() // nothing will be announced
		}
	})
}

// end stops what start started and waits for it.
func (m *Mesh) end() {
	if m.engine != nil {
		m.engine.Close()
	}
	m.http.close()
	if m.plain != nil {
		m.plain.CloseIdleConnections()
	}
	if m.stopNames != nil {
		m.stopNames()
		m.names.settle() // whoever waits finds everything closed
	}
	m.cancel()
	m.wg.Wait()
}

// fail notes that there will be no configuration, and why.
func (m *Mesh) fail(err error) {
	m.mu.Lock()
	m.failure = err
	m.mu.Unlock()
	m.settleSelf(nil)
	m.log.Error("mesh does not work", "err", err)
}

// settleSelf makes it known who this process is; nil when that failed. Once.
func (m *Mesh) settleSelf(who *self) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if who != nil {
		m.who = *who
		if who.service != "" {
			name := who.name()
			m.whoName.Store(&name)
		}
		m.names.setOwn(who.namespace)
	}
	select {
	case <-m.known:
	default:
		close(m.known)
	}
}

// run finds out who this process is, follows its configuration, and keeps it registered and
// reported until ctx is done.
func (m *Mesh) run(ctx context.Context) error {
	svid, err := m.firstSVID(ctx)
	if err != nil {
		return err
	}
	who, err := m.set.selfOf(svid)
	if err != nil && (m.snapshot == nil || svid != nil) {
		return err
	}
	if m.snapshot != nil && svid == nil {
		who = m.selfOfSnapshot(who)
	}
	if err := m.checkSnapshot(who); err != nil {
		return err
	}
	m.settleSelf(&who)

	client, err := m.client(ctx, who)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.xds = client
	m.mu.Unlock()
	m.config.begin(graph.New(client), who)
	m.wg.Go(func() {
		if err := client.Run(ctx); err != nil {
			m.log.ErrorContext(ctx, "configuration is not followed", "err", err)
		}
	})
	if svid == nil && m.expectsIdentity() {
		m.wg.Go(func() { m.lateSVID(ctx, client) })
	}
	if m.snapshot != nil {
		m.setLoaded()
		return nil
	}
	m.wg.Go(func() { m.registrar.run(ctx) })
	m.reporting.Store(true)
	m.wg.Go(func() { m.reporter.Run(ctx) })
	m.awaitStream(ctx, client)
	return nil
}

// awaitStream notes when the control plane is there for the first time: a connection alone is not
// enough, since it may refuse who we are.
func (m *Mesh) awaitStream(ctx context.Context, client *xds.Client) {
	for {
		if _, err := m.control.ready(ctx); err != nil {
			return
		}
		if client.Status().Connected {
			m.setLoaded()
			return
		}
		// The client tells nobody of its stream; between connection and stream lies a moment.
		passed := make(chan struct{})
		stop := m.clock.AfterFunc(streamPoll, func() { close(passed) })
		select {
		case <-passed:
		case <-ctx.Done():
			stop()
			return
		}
	}
}

// firstSVID waits for the SVID; nil where none is expected, or where configuration comes without
// one.
func (m *Mesh) firstSVID(ctx context.Context) (*identity.SVID, error) {
	if svid, err := m.source.Current(); err == nil {
		return svid, nil
	}
	if !m.expectsIdentity() || m.snapshot != nil {
		return nil, nil
	}
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	if m.set.service != "" && m.set.boot.Servers[0].Creds.Type == bootstrap.CredsInsecure {
		defer m.clock.AfterFunc(plaintextWait, cancel)()
	}
	svid, err := m.source.Wait(wait)
	if err == nil {
		return svid, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	_, err = m.source.Current() // why, without how the wait ended
	m.log.WarnContext(ctx, "no identity yet: configuration is asked for without one, connections that need mesh TLS fail until it comes", "err", err)
	return nil, nil
}

// lateSVID takes in an SVID that came after configuration was asked for: it must be that of the
// service we said we are, and it opens the cache.
func (m *Mesh) lateSVID(ctx context.Context, client *xds.Client) {
	svid, err := m.source.Wait(ctx)
	if err != nil {
		return
	}
	who, err := m.set.selfOf(svid)
	if err == nil {
		err = m.checkSnapshot(who)
	}
	if err != nil {
		m.fail(err)
		return
	}
	m.settleSelf(&who)
	if m.snapshot == nil {
		client.Attach(m.openCache(who))
	}
}

// selfOfSnapshot is who a snapshot is for, where nothing else says it.
func (m *Mesh) selfOfSnapshot(who self) self {
	id, err := spiffeIDOf(m.snapshot.Meta.SPIFFEID)
	if err != nil || who.service != "" {
		return who
	}
	if namespace, service, ok := identity.ParseServiceID(id); ok {
		return self{namespace: namespace, service: service}
	}
	return who
}

// client makes the client of the control plane, or of the snapshot.
func (m *Mesh) client(ctx context.Context, who self) (*xds.Client, error) {
	boot := *m.set.boot
	boot.Node = m.node(who)
	cfg := xds.Config{
		Bootstrap:        &boot,
		UserAgent:        userAgent,
		UserAgentVersion: sdkVersion(),
		ClientFeatures:   []string{featureSDK},
		Snapshot:         m.snapshot,
		Log:              m.log,
		Clock:            m.clock,
	}
	if m.snapshot == nil {
		cfg.Dial = m.control.dial
		// Without an identity now and with one to come, the cache is opened when it has come.
		if who.spiffeID != "" || !m.expectsIdentity() {
			cfg.Cache = m.openCache(who)
		}
	}
	return xds.New(cfg)
}

// openCache opens the last known good of this identity. One that is refused costs a warning: the
// start goes on cold, and the file stays as it is.
func (m *Mesh) openCache(who self) *xds.Cache {
	dir := m.set.stateDirOf(who.namespace, who.service)
	if dir == "" {
		return nil
	}
	cache, err := xds.OpenCache(xds.CacheConfig{
		Path:        filepath.Join(dir, cacheFile),
		TrustDomain: who.trustDomain,
		SPIFFEID:    who.spiffeID,
		Log:         m.log,
	})
	if err != nil {
		m.log.Warn("stored configuration is not used: without a control plane this process has none", "err", err)
		m.mu.Lock()
		m.cacheErr = err
		m.mu.Unlock()
		return nil
	}
	m.mu.Lock()
	m.cache = cache
	m.mu.Unlock()
	if meta := cache.Meta(); !meta.Written.IsZero() {
		m.names.announce(meta.Namespaces)
		m.setLoaded()
	}
	return cache
}

// setLoaded notes that configuration came.
func (m *Mesh) setLoaded() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.loaded {
		m.loaded = true
		close(m.loadedCh)
	}
}

// node is what the control plane is told of this process. What the bootstrap says itself stays; the
// SVID wins where it says something else about who we are.
func (m *Mesh) node(who self) bootstrap.Node {
	n := m.set.boot.Node
	if n.ID == "" {
		n.ID = "sdk~" + who.name() + "~" + m.instanceID
	}
	md := map[string]any{}
	maps.Copy(md, n.Metadata)
	md[bootstrap.MetadataNamespace] = who.namespace
	md[bootstrap.MetadataService] = who.service
	if labels := m.set.labels; len(labels) > 0 {
		all := make(map[string]any, len(labels))
		for k, v := range labels {
			all[k] = v
		}
		md[bootstrap.MetadataLabels] = all
		if v := labels["version"]; v != "" {
			md[bootstrap.MetadataVersion] = v
		}
	}
	n.Metadata = md
	return n
}

// instance is this process as the registry knows it, but for its ports.
func (m *Mesh) instance(ctx context.Context) (*registrypb.Instance, error) {
	who, err := m.self(ctx)
	if err != nil {
		return nil, err
	}
	l := m.set.boot.Node.Locality
	return &registrypb.Instance{
		InstanceId: m.instanceID,
		Namespace:  who.namespace,
		Service:    who.service,
		Version:    m.set.labels["version"],
		Labels:     m.set.labels,
		Locality:   &registrypb.Locality{Region: l.Region, Zone: l.Zone, SubZone: l.SubZone},
		Tls:        registrypb.Tls_TLS_MESH,
		SdkVersion: sdkVersion(),
		RunId:      m.set.env.RunID,
	}, nil
}

// hello is this process as the report knows it.
func (m *Mesh) hello(ctx context.Context) (*reportpb.Hello, error) {
	who, err := m.self(ctx)
	if err != nil {
		return nil, err
	}
	return &reportpb.Hello{
		NodeId:     m.node(who).ID,
		Namespace:  who.namespace,
		Service:    who.service,
		Version:    m.set.labels["version"],
		InstanceId: m.instanceID,
		SdkVersion: sdkVersion(),
		Pid:        uint32(os.Getpid()),
	}, nil
}

// announced takes the namespaces of the mesh and keeps them for the next cold start.
func (m *Mesh) announced(namespaces []string) {
	m.names.announce(namespaces)
	m.names.settle()
	m.mu.Lock()
	cache := m.cache
	m.mu.Unlock()
	if cache != nil {
		cache.SetNamespaces(namespaces)
	}
}

// reportStatus is the state of the configuration, for the control plane.
func (m *Mesh) reportStatus() *reportpb.Status {
	m.mu.Lock()
	client := m.xds
	m.mu.Unlock()
	if client == nil {
		return nil
	}
	st := client.Status()
	out := &reportpb.Status{LoadedFrom: loadedFrom(st, m.snapshot != nil)}
	var updated time.Time
	for _, r := range st.Resources {
		text := r.Rejected
		if text == "" && r.Err != nil && !errors.Is(r.Err, xds.ErrNotExist) {
			text = r.Err.Error()
		}
		out.Resources = append(out.Resources, &reportpb.ResourceStatus{
			TypeUrl: r.Type, Name: r.Name, Version: r.Version, Error: text, NotHonoured: r.NotHonoured,
		})
		if r.Updated.After(updated) {
			updated = r.Updated
		}
	}
	if !updated.IsZero() {
		out.Updated = timestamppb.New(updated)
	}
	if svid, err := m.source.Current(); err == nil {
		out.Identity = svid.ID.String()
		out.IdentityExpires = timestamppb.New(svid.NotAfter())
	}
	return out
}

// loadedFrom says where what is in use comes from.
func loadedFrom(st xds.Status, snapshot bool) string {
	if snapshot {
		return "file"
	}
	for _, r := range st.Resources {
		if r.Version != "" && !r.Cached {
			return "control-plane"
		}
	}
	if st.Connected || st.LoadedFrom == "" {
		return "control-plane"
	}
	return "cache"
}

// reportCounters takes what was counted since the last report; nil for nothing.
func (m *Mesh) reportCounters() *reportpb.Counters {
	counts := m.counters.Take(m.clock.Now())
	if len(counts.Calls) == 0 && counts.Dropped == 0 {
		return nil
	}
	out := &reportpb.Counters{Dropped: counts.Dropped, Window: durationpb.New(counts.Window)}
	for _, c := range counts.Calls {
		out.Calls = append(out.Calls, &reportpb.CallCounter{
			Direction: c.Direction, Service: c.Service, Route: c.Route, Peer: c.Peer, Version: c.Version, Reason: c.Reason,
			Calls: c.Calls, Failed: c.Failed, Mtls: c.MTLS, Total: durationpb.New(c.Total), Buckets: c.Buckets[:],
		})
	}
	return out
}

// answer explains a call to the control plane.
func (m *Mesh) answer(ctx context.Context, q *reportpb.ExplainQuery) (*reportpb.Decision, error) {
	header := make(map[string][]string, len(q.GetHeaders()))
	for _, h := range q.GetHeaders() {
		header[h.GetName()] = append(header[h.GetName()], h.GetValue())
	}
	d, err := m.Explain(ctx, q.GetMethod(), q.GetUrl(), header)
	if err != nil {
		return nil, err
	}
	return report.ToProto(d), nil
}

// flush sends what is left to report, for as long as ctx and a second allow.
func (m *Mesh) flush(ctx context.Context) {
	if !m.reporting.Load() {
		return
	}
	ctx, cancel := withTimeout(ctx, m.clock, time.Second)
	defer cancel()
	m.reporter.Finish(ctx)
}

// sdkVersion is the version of this module in the running program.
func sdkVersion() string {
	const module = "github.com/inlay-mesh/inlay"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	if info.Main.Path == module {
		return orDevel(info.Main.Version)
	}
	for _, d := range info.Deps {
		if d.Path == module {
			return orDevel(d.Version)
		}
	}
	return "devel"
}

func orDevel(v string) string {
	if v == "" || v == "(devel)" {
		return "devel"
	}
	return v
}
