package meshsdk

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
)

const (
	// runDrainTimeout bounds the shutdown of Run.
	runDrainTimeout = 30 * time.Second
	// readHeaderTimeout and idleTimeout are those of the http.Server of HTTP. Zero would mean none.
	readHeaderTimeout, idleTimeout = 30 * time.Second, 2 * time.Minute
)

// The life of a Mesh; it only ever goes forward.
const (
	stageOpen int32 = iota
	stageDraining
	stageClosed
)

var (
	errClosed = errors.New("mesh: it is shut down: open another one")
	errCut    = errors.New("mesh: it was closed before it had drained")
)

// stoppable is a server that the Mesh ends. Both methods return when it is done; graceful may be
// cut short by now from another goroutine.
type stoppable interface {
	graceful(ctx context.Context)
	now()
}

type grpcServer struct{ s *grpc.Server }

// graceful sends GOAWAY, waits for the calls in flight and closes the listener.
func (g grpcServer) graceful(context.Context) { g.s.GracefulStop() }
func (g grpcServer) now()                     { g.s.Stop() }

type httpServer struct{ s *http.Server }

// graceful closes the listener and what is idle, sends GOAWAY to HTTP/2 clients, and waits for the
// requests in flight.
func (h httpServer) graceful(ctx context.Context) { _ = h.s.Shutdown(ctx) }
func (h httpServer) now()                         { _ = h.s.Close() }

// adopt makes the Mesh end a server; one that is adopted after the end is ended at once.
func (m *Mesh) adopt(s stoppable) {
	m.mu.Lock()
	late := m.stage.Load() == stageClosed
	if !late {
		for _, have := range m.servers {
			if have == s { // the same *grpc.Server by NewServer and GRPC
				m.mu.Unlock()
				return
			}
		}
		m.servers = append(m.servers, s)
	}
	m.mu.Unlock()
	if late {
		s.now()
	}
}

// remember keeps a listener to close; false means that the Mesh has ended meanwhile.
func (m *Mesh) remember(l *tcpmesh.Listener, in *inbound) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stage.Load() != stageOpen {
		return false
	}
	m.listeners[l] = in
	return true
}

func (m *Mesh) forget(l *tcpmesh.Listener) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.listeners, l)
}

// Shutdown ends the Mesh without losing a call, in this order: readiness goes off; the registry is
// told to drain; it answers when every client has let go of this instance, or 5 s pass; servers of
// NewServer and Run send GOAWAY and end keep-alive; their calls in flight end; servers that the
// Mesh does not know refuse new calls, and those in flight end; what is left to report is sent;
// everything is closed.
//
// When ctx ends first, the rest is closed at once and ctx's error returned; so it is when Close is
// called meanwhile. It may be called twice: both return when the Mesh is closed.
func (m *Mesh) Shutdown(ctx context.Context) error {
	if !m.stage.CompareAndSwap(stageOpen, stageDraining) {
		select {
		case <-m.closed:
			return nil
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), m.Close())
		}
	}
	close(m.ended) // readiness is off
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(m.cut, func() { stop(errCut) })()
	m.log.Info("draining")
	drained := true
	if m.registrar != nil {
		drained = m.registrar.drain(ctx)
	}
	if !drained && ctx.Err() == nil {
		m.log.Warn("clients may still call this instance: the registry did not answer in time", "waited", drainTimeout)
	}
	err := m.stopServers(ctx)
	m.gate.Close()
	m.closeListeners()
	if err == nil {
		err = m.gate.Wait(ctx)
	}
	if err == nil {
		m.flush(ctx)
	}
	return errors.Join(err, m.Close())
}

// stopServers ends the servers that the Mesh knows, gracefully until ctx is done, then at once.
func (m *Mesh) stopServers(ctx context.Context) error {
	m.mu.Lock()
	servers := m.servers
	m.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range servers {
		wg.Go(func() { s.graceful(ctx) })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		// Their connections are cut. GracefulStop of gRPC still waits for the handlers, and one that
		// does not look at its context may take as long as it likes: we do not wait for it.
		for _, s := range servers {
			s.now()
		}
		return context.Cause(ctx)
	}
}

func (m *Mesh) closeListeners() {
	m.mu.Lock()
	all := make([]*tcpmesh.Listener, 0, len(m.listeners))
	for l := range m.listeners {
		all = append(all, l)
	}
	m.mu.Unlock()
	for _, l := range all {
		l.Close() // forgets itself
	}
}

// Close ends the Mesh at once: servers are stopped, calls in flight are cut off, and the instance
// stays registered until its lease ends, since nobody waits for a drain. It returns when every
// goroutine of the Mesh has ended; handlers of the servers see their context end and are not waited
// for. It may be called twice, also after Shutdown.
func (m *Mesh) Close() error {
	if before := m.stage.Swap(stageClosed); before == stageOpen {
		close(m.ended)
	} else if before == stageClosed {
		<-m.closed
		return nil
	}
	m.cutNow()
	m.mu.Lock()
	servers := m.servers
	m.mu.Unlock()
	m.gate.Close()
	for _, s := range servers {
		s.now()
	}
	m.closeListeners()
	m.end()
	close(m.closed)
	m.log.Debug("mesh closed")
	return nil
}

// withTimeout is context.WithTimeout by another clock.
func withTimeout(ctx context.Context, clock Clock, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := clock.AfterFunc(d, func() { cancel(context.DeadlineExceeded) })
	return ctx, func() { stop(); cancel(context.Canceled) }
}
