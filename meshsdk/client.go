package meshsdk

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
)

// CallTrace hooks the Decision of the calls whose context carries it, by WithCallTrace.
type CallTrace = call.Trace

// WithCallTrace returns a context whose calls tell t of their Decision when they have ended:
//
//	ctx = meshsdk.WithCallTrace(ctx, &meshsdk.CallTrace{Done: func(d *meshsdk.Decision) { ... }})
//
// Done is called once a call, in the goroutine that ends it.
func WithCallTrace(ctx context.Context, t *CallTrace) context.Context { return call.WithTrace(ctx, t) }

// PeerFromContext returns the SPIFFE ID that the caller proved, in a handler of gRPC or net/http
// that serves a listener of Listen. ok is false for a plaintext caller, and on every other
// listener: no header can set it.
func PeerFromContext(ctx context.Context) (id spiffeid.ID, ok bool) {
	if p, ok := peer.FromContext(ctx); ok && p.LocalAddr != nil {
		if c, ok := tcpmesh.FromAddr(p.LocalAddr); ok {
			return c.Peer()
		}
	}
	if a, ok := ctx.Value(http.LocalAddrContextKey).(net.Addr); ok {
		if c, ok := tcpmesh.FromAddr(a); ok {
			return c.Peer()
		}
	}
	return spiffeid.ID{}, false
}

// prepareClients makes what sends calls.
func (m *Mesh) prepareClients(dial func(ctx context.Context, network, addr string) (net.Conn, error)) {
	external := grpcmesh.Allow
	if m.set.fallback == Deny {
		external = grpcmesh.Deny
	}
	m.clients = grpcmesh.New(grpcmesh.Config{
		Engine:   m.engine,
		Identity: m.source,
		Dial:     dial,
		InMesh:   m.names.listener,
		External: external,
		Inject:   m.observer.Inject,
		Log:      m.log,
		Clock:    m.set.clock,
	})
	m.http = newHTTPClients(m, dial, external)
}

// NewClient returns a gRPC channel to a service: "orders", "orders.shop", "orders:8080" or
// "xds:///orders". It is a grpc.ClientConn like any other and belongs to the caller; it never
// blocks, the first call waits for configuration. Transport credentials in opts are for targets
// outside the mesh; insecure ones do not weaken a call inside.
func (m *Mesh) NewClient(service string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	if m.set.disabled {
		return m.plainClient(service, opts...)
	}
	return m.clients.NewClient(service, opts...)
}

// DialOptions make any channel of grpc.NewClient one of the mesh. Give them before other options.
func (m *Mesh) DialOptions() []grpc.DialOption {
	if m.set.disabled {
		return m.plainDialOptions()
	}
	return m.clients.DialOptions()
}

// Transport is a RoundTripper for an own http.Client. Hosts of the mesh, by http or https alike, go
// to the service of that name over mesh TLS; all others go over base, which is not changed. A nil
// base is a clone of http.DefaultTransport. It is closed with the Mesh.
func (m *Mesh) Transport(base *http.Transport) http.RoundTripper {
	if m.set.disabled {
		return m.plainTransport(base)
	}
	return m.http.transport(base)
}

// HTTPClient returns a client over Transport(nil). All calls of HTTPClient share one pool of
// connections; the client itself is the caller's to change.
func (m *Mesh) HTTPClient() *http.Client {
	if m.set.disabled {
		return &http.Client{Transport: m.plain}
	}
	return &http.Client{Transport: m.http.shared()}
}

// Ready waits until this process can call: it has its identity, where one is to come, and its
// configuration, and each of services is known and has an endpoint that can be picked. A service
// that does not exist yet is waited for too. The error, when ctx ends first, says what is missing.
// A mistake that waiting does not mend is returned at once.
func (m *Mesh) Ready(ctx context.Context, services ...string) error {
	if m.set.disabled {
		return nil
	}
	select {
	case <-m.known:
	case <-ctx.Done():
		_, err := m.source.Current()
		return fmt.Errorf("mesh: not ready: %w", orCause(err, ctx))
	case <-m.ended:
		return errClosed
	}
	if _, err := m.self(ctx); err != nil {
		return fmt.Errorf("mesh: %w", err)
	}
	if m.expectsIdentity() {
		if _, err := m.source.Wait(ctx); err != nil {
			return fmt.Errorf("mesh: not ready: %w", err)
		}
	}
	select {
	case <-m.loadedCh:
	case <-ctx.Done():
		return fmt.Errorf("mesh: not ready: %w", orCause(m.missing(), ctx))
	case <-m.ended:
		return errClosed
	}
	for _, name := range services {
		if err := m.readyService(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func orCause(err error, ctx context.Context) error {
	if err == nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
}

// readyService waits until a service can be called.
func (m *Mesh) readyService(ctx context.Context, name string) error {
	listener, ok, err := m.names.listener(ctx, name)
	if err != nil {
		return fmt.Errorf("mesh: %q is not ready: the namespaces of the mesh are not known yet: %w", name, err)
	}
	if !ok {
		return fmt.Errorf("mesh: %q is not a name of the mesh: want NAME, NAME.NAMESPACE or NAME:PORT", name)
	}
	var mu sync.Mutex
	why := errors.New("its configuration has not come")
	ready := make(chan struct{})
	isReady := false
	cancel := m.engine.Watch(listener, func(s *call.Service) {
		mu.Lock()
		defer mu.Unlock()
		if why = notReady(s); why == nil && !isReady {
			isReady = true
			close(ready)
		}
	})
	defer cancel()
	select {
	case <-ready:
		return nil
	case <-m.ended:
		return errClosed
	case <-ctx.Done():
		mu.Lock()
		defer mu.Unlock()
		if isReady {
			return nil
		}
		return fmt.Errorf("mesh: %q is not ready: %w (%w)", name, why, context.Cause(ctx))
	}
}

// notReady says why a service cannot be called; nil when it can.
func notReady(s *call.Service) error {
	if s == nil {
		return errors.New("its configuration has not come")
	}
	if s.Err != nil {
		return s.Err
	}
	why := errors.New("no cluster has an endpoint")
	for _, c := range s.Clusters {
		switch {
		case c.Err != nil:
			why = c.Err
		case c.Set.Len() > 0:
			return nil
		case c.EmptyReason != "":
			why = errors.New(c.EmptyReason)
		}
	}
	return why
}

// Explain says what a call of this process would do now, without sending anything: method is that
// of HTTP ("POST" for gRPC), url is http://SERVICE/PATH or SERVICE/PATH; of a split the greater part
// is shown. The error is an *Error when the service has no configuration, and another one when the
// question cannot be read.
func (m *Mesh) Explain(ctx context.Context, method, url string, header http.Header) (*Decision, error) {
	if m.set.disabled {
		return nil, errors.New("mesh: it is disabled (INLAY_DISABLED): calls go as they would without it")
	}
	host, path, err := splitURL(url)
	if err != nil {
		return nil, err
	}
	if method == "" {
		method = http.MethodGet
	}
	listener, ok, err := m.names.listener(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("mesh: the namespaces of the mesh are not known yet: %w", err)
	}
	if !ok {
		d := &Decision{Service: host, Reason: ReasonOK, Detail: "it is not a name of the mesh: the call goes over the base transport"}
		if m.set.fallback == Deny {
			d.Reason, d.Detail = ReasonDenied, "it is not a name of the mesh, and calls to the outside are refused (WithFallback)"
		}
		return d, nil
	}
	return m.engine.Explain(ctx, listener, call.Request{
		Request:   route.Request{Method: strings.ToUpper(method), Path: path, Header: explainHeader(header)},
		Authority: host,
		GRPC:      strings.HasPrefix(header.Get("Content-Type"), "application/grpc"),
	})
}

// splitURL reads SERVICE/PATH with or without scheme.
func splitURL(s string) (host, path string, err error) {
	raw := s
	if rest, ok := strings.CutPrefix(raw, "xds:///"); ok {
		raw = rest
	}
	if !strings.Contains(raw, "://") {
		raw = "http://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		return "", "", fmt.Errorf("mesh: url %q: %w: want http://SERVICE/PATH", s, errors.Unwrap(err))
	}
	if u.Host == "" || u.User != nil {
		return "", "", fmt.Errorf("mesh: url %q: want http://SERVICE/PATH", s)
	}
	return u.Host, u.EscapedPath(), nil
}

// explainHeader is http.Header as routes ask for it.
type explainHeader http.Header

func (h explainHeader) Get(name string) (string, bool) {
	for k, v := range h {
		if strings.EqualFold(k, name) && len(v) > 0 {
			return strings.Join(v, ","), true
		}
	}
	return "", false
}
