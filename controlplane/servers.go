package controlplane

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/inlay-mesh/inlay/controlplane/admin"
	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/identity"
)

// servers owns the listeners and everything that runs. Its stages are the hooks of the fx module,
// in order: bind, run, serve; stopServing, stopRunning, unbind.
type servers struct {
	cfg      Config
	ca       *ca.CA
	registry *registry.Registry
	serve    *serve.Server
	reports  *admin.Reports
	pipeline *pipeline
	admin    *admin.Server
	log      *slog.Logger

	failed chan struct{}

	authority, leases, pipe, http task

	mu        sync.Mutex
	bound     map[string]net.Listener
	addrs     map[string]string
	grpc      []*grpc.Server
	serving   sync.WaitGroup
	failure   error
	stopped   bool
	attesting *reattesting
	gate      *gate
}

// task is a goroutine with an end that can be waited for.
type task struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func (s *servers) start(t *task, name string, run func(context.Context) error) {
	// The context of a start hook ends with the start.
	ctx, cancel := context.WithCancel(context.Background())
	*t = task{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		if err := run(ctx); err != nil && ctx.Err() == nil {
			s.fail(fmt.Errorf("%s: %w", name, err))
		}
	}()
}

// stop may be called twice, and for a task that never started.
func (t *task) stop() {
	if t.cancel != nil {
		t.cancel()
		<-t.done
	}
}

func (s *servers) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure == nil && !s.stopped {
		s.failure = err
		s.log.Error("the control plane cannot go on", "err", err)
		close(s.failed)
	}
}

func (s *servers) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure
}

func (s *servers) addresses() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.addrs)
}

// bind opens every listener before anything runs: a taken port leaves nothing behind.
func (s *servers) bind(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound, s.addrs = make(map[string]net.Listener), make(map[string]string)
	for _, l := range []struct{ name, addr, flag string }{
		{AddressXDS, s.cfg.Plaintext, "--xds-addr"},
		{AddressXDSMTLS, s.cfg.MTLS, "--xds-mtls-addr"},
		{AddressAdmin, s.cfg.Admin, "--admin-addr"},
		{AddressUnix, s.cfg.UnixSocket, "--run-dir"},
	} {
		if l.addr == "" {
			continue
		}
		listen := listenTCP
		if l.name == AddressUnix {
			listen = listenUnix
		}
		lis, err := listen(s.cfg, l.addr, l.flag)
		if err != nil {
			s.unbindLocked()
			return err
		}
		s.bound[l.name] = lis
		s.addrs[l.name] = lis.Addr().String()
	}
	return nil
}

func (s *servers) unbind(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unbindLocked()
	return nil
}

func (s *servers) unbindLocked() {
	for _, lis := range s.bound {
		_ = lis.Close() // most are closed already, by who served them
	}
	s.bound, s.addrs = nil, nil
}

func (s *servers) run(context.Context) error {
	s.start(&s.authority, "certificate authority", s.ca.Run)
	s.start(&s.leases, "registry", s.registry.Run)
	s.start(&s.pipe, "pipeline", s.pipeline.run)
	return nil
}

func (s *servers) stopRunning(context.Context) error {
	s.pipe.stop()
	s.leases.stop()
	s.authority.stop()
	return nil
}

func (s *servers) serveAll(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate = &gate{log: s.log, clock: s.cfg.Clock, conns: make(map[net.Conn]struct{})}
	if lis := s.bound[AddressXDS]; lis != nil {
		// Configuration only: who registers, reports or asks for signatures shows who it is.
		s.serveGRPC(lis, gated{insecure.NewCredentials(), s.gate}, nil, s.serve.Register)
	}
	if lis := s.bound[AddressXDSMTLS]; lis != nil {
		tls := credentials.NewTLS(identity.ServerTLS(s.ca.Source(), identity.ServerOptions{RequireClient: true, ALPN: []string{"h2"}, Now: s.cfg.Clock.Now}))
		s.serveGRPC(lis, gated{tls, s.gate}, nil, s.serve.Register, s.registry.Register, s.reports.Register)
	}
	if lis := s.bound[AddressUnix]; lis != nil {
		var resolve attest.Resolve
		if s.cfg.NodeSocket != "" {
			resolve = workload.NewResolver(s.cfg.NodeSocket)
		}
		s.attesting = newReattesting(attest.NewCredentials(resolve), s.cfg.Clock)
		// A node agent that comes back names every service that it has in one request.
		opts := append(s.attesting.options(), grpc.MaxRecvMsgSize(maxLocalRequest))
		s.serveGRPC(lis, gated{s.attesting, s.gate}, opts, s.serve.Register, s.registry.Register, s.reports.Register, s.ca.Register)
	}
	if lis := s.bound[AddressAdmin]; lis != nil {
		s.start(&s.http, "admin", func(ctx context.Context) error { return s.admin.Serve(ctx, lis) })
	}
	return nil
}

func (s *servers) serveGRPC(lis net.Listener, creds credentials.TransportCredentials, opts []grpc.ServerOption, register ...func(grpc.ServiceRegistrar)) {
	srv := grpc.NewServer(append(opts,
		grpc.Creds(creds),
		// A client whose machine vanished is noticed within a lease or so.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)...)
	for _, f := range register {
		f(srv)
	}
	s.grpc = append(s.grpc, srv)
	s.serving.Go(func() {
		if err := srv.Serve(lis); err != nil {
			s.fail(fmt.Errorf("serve %s: %w", lis.Addr(), err))
		}
	})
}

// maxLocalRequest bounds one message of a local process, in bytes: enough for the names and
// versions of 200,000 services.
const maxLocalRequest = 16 << 20

// drainTime bounds how long calls in flight may take when the control plane stops. The long
// streams are ended before, with a status that has their clients come back.
const drainTime = 300 * time.Millisecond

func (s *servers) stopServing(context.Context) error {
	s.mu.Lock()
	s.stopped = true
	running := s.grpc
	s.mu.Unlock()

	s.http.stop()
	s.serve.Stop()
	s.reports.Stop()
	s.leases.stop() // ends the streams of the registry
	var wg sync.WaitGroup
	for _, srv := range running {
		wg.Go(func() {
			late := s.cfg.Clock.AfterFunc(drainTime, func() {
				s.gate.close() // else Stop waits for connections that never said a word
				srv.Stop()
			})
			srv.GracefulStop()
			late()
		})
	}
	wg.Wait()
	s.serving.Wait()
	if s.attesting != nil {
		s.attesting.close()
	}
	return nil
}
