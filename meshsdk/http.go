package meshsdk

import (
	"context"
	"net"
	"net/http"
	"sync"

	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
	"github.com/inlay-mesh/inlay/meshsdk/internal/httpmesh"
)

// newHTTPClients makes the net/http side; nothing is open yet.
func newHTTPClients(m *Mesh, dial func(ctx context.Context, network, addr string) (net.Conn, error), external grpcmesh.ExternalPolicy) *httpClients {
	return &httpClients{config: httpmesh.Config{
		Engine:   m.engine,
		Identity: m.source,
		Dial:     dial,
		InMesh:   m.names.listener,
		External: external,
		Inject:   m.observer.Inject,
		Log:      m.log,
		Clock:    m.set.clock,
	}}
}

// httpClients are the transports that were given out.
type httpClients struct {
	config httpmesh.Config

	mu     sync.Mutex
	all    []*httpmesh.Transport
	one    *httpmesh.Transport // of HTTPClient
	closed bool
}

func (h *httpClients) transport(base *http.Transport) *httpmesh.Transport {
	cfg := h.config
	cfg.Base = base
	t := httpmesh.New(cfg)
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.all = append(h.all, t)
	}
	return t
}

func (h *httpClients) shared() *httpmesh.Transport {
	h.mu.Lock()
	one := h.one
	h.mu.Unlock()
	if one != nil {
		return one
	}
	t := h.transport(nil)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.one == nil {
		h.one = t
	}
	return h.one
}

func (h *httpClients) close() {
	if h == nil {
		return
	}
	h.mu.Lock()
	all := h.all
	h.all, h.closed = nil, true
	h.mu.Unlock()
	for _, t := range all {
		t.Close()
	}
}
