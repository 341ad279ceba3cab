package meshsdk

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/httpmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// NewServer returns a grpc.Server with ServerOptions and opts, which Shutdown stops gracefully and
// Close at once. Serve it on what Listen returns, or hand it to Run. Interceptors in opts run inside
// those of the Mesh when they are given by grpc.ChainUnaryInterceptor and grpc.ChainStreamInterceptor;
// gRPC runs one given by grpc.UnaryInterceptor or grpc.StreamInterceptor first of all, before identity
// headers are taken off.
func (m *Mesh) NewServer(opts ...grpc.ServerOption) *grpc.Server {
	interceptors, creds := m.serverOptions()
	all := append(interceptors, opts...)
	if creds != nil {
		all = append(all, creds) // last: mesh TLS wins over credentials in opts
	}
	s := grpc.NewServer(all...)
	m.adopt(grpcServer{s})
	return s
}

// ServerOptions make any grpc.Server one of the mesh: its calls are recorded and refused once the
// Mesh has drained, identity headers are taken off, and handlers learn who calls by
// PeerFromContext. Give them last: their credentials then win over other ones. A call that comes
// over a listener other than that of Listen has no identity.
func (m *Mesh) ServerOptions() []grpc.ServerOption {
	interceptors, creds := m.serverOptions()
	if creds == nil {
		return interceptors
	}
	return append(interceptors, creds)
}

func (m *Mesh) serverOptions() ([]grpc.ServerOption, grpc.ServerOption) {
	if m.set.disabled {
		return nil, nil
	}
	m.skins.Or(skinGRPC)
	return grpcmesh.ServerOptions(grpcmesh.ServerConfig{Observer: m.observer, Service: m.serviceName, Gate: m.gate})
}

// Middleware makes h a handler of the mesh: its calls are recorded and refused once the Mesh has
// drained, identity headers are taken off, and h learns who calls by PeerFromContext. A call that
// comes over a listener other than that of Listen has no identity.
func (m *Mesh) Middleware(h http.Handler) http.Handler {
	if m.set.disabled {
		return h
	}
	m.skins.Or(skinHTTP)
	return httpmesh.Middleware(httpmesh.ServerConfig{Observer: m.observer, Service: m.serviceName, Gate: m.gate}, h)
}

// Kinds of server that this process has made; they tell the protocol of a port that nobody named.
const (
	skinGRPC = 1 << iota
	skinHTTP
)

// protocolOf is what Listen registers a port as: gRPC when that is all this process serves, HTTP
// otherwise. Run knows better. Where a MeshService declares the port, that wins.
func protocolOf(skins int32) registrypb.Protocol {
	if skins == skinGRPC {
		return registrypb.Protocol_PROTOCOL_GRPC
	}
	return registrypb.Protocol_PROTOCOL_HTTP
}

// Listen returns the listener of a port of this service. It binds INLAY_LISTEN (WithListen) when
// that is set, else the port on all addresses; ctx bounds the binding alone. A port that is taken
// is an error at once.
//
// Connections are mesh TLS, and plaintext too where the service is permissive; a change of mode
// applies to new connections, and until the mode is known it is strict. Accept returns *tls.Conn
// with the handshake done, which gRPC and net/http both serve (TLS 1.3, h2 and http/1.1), or a
// plaintext connection, whose peer has no identity.
//
// The instance registers with the control plane when the first Accept is called, and leaves when
// the listener is closed or the Mesh is shut down.
func (m *Mesh) Listen(ctx context.Context, port uint16) (net.Listener, error) {
	return m.listen(ctx, port, registrypb.Protocol_PROTOCOL_UNSPECIFIED)
}

func (m *Mesh) listen(ctx context.Context, port uint16, protocol registrypb.Protocol) (net.Listener, error) {
	if port == 0 {
		return nil, errors.New("listen: port 0: want the service's port as the MeshService has it; a free address to bind is INLAY_LISTEN=127.0.0.1:0")
	}
	if m.stage.Load() != stageOpen {
		return nil, errClosed
	}
	at := m.set.options.listen
	if at == "" {
		at = ":" + strconv.Itoa(int(port))
	}
	bind := m.set.listener
	if bind == nil {
		bind = new(net.ListenConfig).Listen
	}
	inner, err := bind(ctx, "tcp", at)
	if err != nil {
		return nil, listenError(port, at, m.set.options.listen != "", err)
	}
	if m.set.disabled {
		return inner, nil
	}
	bound, err := netip.ParseAddrPort(inner.Addr().String())
	if err != nil {
		inner.Close()
		return nil, fmt.Errorf("listen: the listener's address is %q: want ip:port, since callers are given it", inner.Addr())
	}
	in := m.watchInbound(port)
	var l *tcpmesh.Listener
	l = tcpmesh.New(tcpmesh.Config{
		Inner:    inner,
		Identity: m.source,
		Mode:     in.mode,
		Started: func() {
			p := protocol
			if p == registrypb.Protocol_PROTOCOL_UNSPECIFIED {
				p = protocolOf(m.skins.Load())
			}
			m.registrar.add(&binding{port, p, bound})
		},
		Closed: func() {
			m.registrar.remove(port)
			in.cancel()
			m.forget(l)
		},
		Stats: &m.inbound,
		Clock: m.clock,
		Log:   m.log,
	})
	if !m.remember(l, in) {
		l.Close()
		return nil, errClosed
	}
	return l, nil
}

// listenError says what to do about an address that cannot be bound.
func listenError(port uint16, at string, chosen bool, err error) error {
	hint := "choose where to bind with INLAY_LISTEN=127.0.0.1:0 or WithListen"
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && chosen:
		hint = "another program, or another port of this one, has that address: use port 0 in INLAY_LISTEN"
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "another program has it; " + hint
	}
	return fmt.Errorf("listen: port %d at %s: %w: %s", port, at, err, hint)
}

// inbound is the mode of one port, kept current.
type inbound struct {
	m      *Mesh
	port   uint16
	cancel func()

	mu    sync.Mutex
	value tcpmesh.Mode
	err   error
}

func (in *inbound) mode() tcpmesh.Mode {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.value
}

func (in *inbound) state() (tcpmesh.Mode, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.value, in.err
}

// watchInbound follows the listener resource of a port of this service.
func (m *Mesh) watchInbound(port uint16) *inbound {
	in := &inbound{m: m, port: port, err: errNoConfig}
	in.cancel = m.config.watch(func(w self) string {
		return resource.InboundListener(w.namespace, w.service, port)
	}, func(cfg *graphConfig) {
		mode, err := tcpmesh.ModeOf(cfg)
		in.mu.Lock()
		changed := in.value != mode
		in.value, in.err = mode, err
		in.mu.Unlock()
		if changed {
			m.log.Info("inbound mode changed", "port", port, "mode", mode.String())
		}
	})
	return in
}

// reachable is the address that callers are given for a bound one: itself, or where it stands for
// all addresses one that others reach.
func (m *Mesh) reachable(bound netip.AddrPort) netip.AddrPort {
	ip := bound.Addr().Unmap()
	if !ip.IsUnspecified() {
		return netip.AddrPortFrom(ip.WithZone(""), bound.Port())
	}
	if ip, ok := m.control.localAddr(); ok {
		return netip.AddrPortFrom(ip, bound.Port()) // the way to the control plane leads to the mesh
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		m.log.Warn("own addresses are unknown, registering loopback", "err", err)
	}
	return netip.AddrPortFrom(chooseAddr(addrs), bound.Port())
}

// chooseAddr takes the first address that other machines may reach, IPv4 before IPv6; loopback
// when there is none.
func chooseAddr(addrs []net.Addr) netip.Addr {
	var v6 netip.Addr
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, ok := netip.AddrFromSlice(n.IP)
		if ip = ip.Unmap(); !ok || !ip.IsGlobalUnicast() {
			continue
		}
		if ip.Is4() {
			return ip
		}
		if !v6.IsValid() {
			v6 = ip
		}
	}
	if v6.IsValid() {
		return v6
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// Server is one port and what answers on it: GRPC or HTTP.
type Server interface {
	start(m *Mesh) (protocol, stoppable)
}

// protocol and what serves it.
type protocol struct {
	port  uint16
	wire  registrypb.Protocol
	serve func(net.Listener) error
}

// GRPC serves s on a port of the service. s is best made by NewServer; one made elsewhere with
// ServerOptions is one of the mesh too.
func GRPC(port uint16, s *grpc.Server) Server { return grpcPort{port, s} }

type grpcPort struct {
	port uint16
	s    *grpc.Server
}

func (g grpcPort) start(*Mesh) (protocol, stoppable) {
	return protocol{g.port, registrypb.Protocol_PROTOCOL_GRPC, g.s.Serve}, grpcServer{g.s}
}

// HTTP serves h, with Middleware around it, on a port of the service: HTTP/1.1 and HTTP/2, over
// mesh TLS and, where the service is permissive, in plaintext. For an own http.Server use Listen
// and Middleware.
func HTTP(port uint16, h http.Handler) Server { return httpPort{port, h} }

type httpPort struct {
	port uint16
	h    http.Handler
}

func (h httpPort) start(m *Mesh) (protocol, stoppable) {
	s := &http.Server{Handler: m.Middleware(h.h), ReadHeaderTimeout: readHeaderTimeout, IdleTimeout: idleTimeout, Protocols: new(http.Protocols)}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetHTTP2(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	return protocol{h.port, registrypb.Protocol_PROTOCOL_HTTP, s.Serve}, httpServer{s}
}

// Run serves until ctx ends, the process gets SIGTERM or an interrupt, or a server fails; then it
// shuts the Mesh down as Shutdown does, within 30 s, and closes it. A second signal ends the
// process as usual. It returns nil when ctx or a signal ended it and everything drained.
func (m *Mesh) Run(ctx context.Context, servers ...Server) error {
	if len(servers) == 0 {
		return errors.New("run: no server: want at least one of GRPC(port, s) and HTTP(port, h)")
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, os.Interrupt)
	defer stop()
	type part struct {
		protocol
		lis net.Listener
	}
	parts := make([]part, 0, len(servers))
	for _, s := range servers {
		p, st := s.start(m)
		lis, err := m.listen(ctx, p.port, p.wire)
		if err != nil {
			for _, p := range parts {
				p.lis.Close()
			}
			return err
		}
		m.adopt(st)
		parts = append(parts, part{p, lis})
	}
	failed := make(chan error, len(parts))
	var wg sync.WaitGroup
	for _, p := range parts {
		wg.Go(func() {
			err := p.serve(p.lis)
			if m.stage.Load() == stageOpen {
				failed <- fmt.Errorf("run: server of port %d: %w", p.port, orEnded(err))
			}
		})
	}
	var cause error
	select {
	case <-ctx.Done():
	case <-m.ended: // somebody called Shutdown or Close
	case cause = <-failed:
	}
	stop()
	bound, cancel := withTimeout(context.WithoutCancel(ctx), m.clock, runDrainTimeout)
	defer cancel()
	err := m.Shutdown(bound)
	wg.Wait()
	if cause != nil {
		return cause
	}
	return err
}

func orEnded(err error) error {
	if err == nil {
		return errors.New("it stopped by itself")
	}
	return err
}
