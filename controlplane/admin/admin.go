// Package admin is how people look into a running control plane: the Connect API of the CLI on a
// loopback address, liveness and readiness, and the stream on which SDKs report status and
// counters and answer what a call would do.
//
// controlplane gives it the state through the interface State. It never changes the mesh, and it
// never shows a key or a payload.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

// Clock tells the time and calls back later.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// State is what the control plane says of itself. Its methods do not block and are safe for
// concurrent use; the values are the caller's to keep.
type State interface {
	// Status is everything in the response but Revision and the counts of services, endpoints
	// and clients, which admin fills in.
	Status() *adminpb.StatusResponse
	// Revision is the running one with its acknowledgements and the faults of newer files.
	Revision() *adminpb.Revision
	// Changed is closed when Revision or its acknowledgements changed after this call.
	Changed() <-chan struct{}
	// Mesh is the running one; nil before the first.
	Mesh() *ir.Mesh
	Instances() registry.Snapshot
	// RouteClients says per kind of client how a route of Mesh is served; see adminpb.Route.clients.
	RouteClients(svc *ir.Service, port *ir.Port, route *ir.Route) map[string]string
	// Clients are the connected xDS clients, with their resources when asked.
	Clients(resources bool) []*adminpb.Client
	Certs() ([]*adminpb.Cert, error)
	// Ready is nil when configuration is served, else the reason why not.
	Ready() error
}

// Config is what New needs.
type Config struct {
	State   State    // required
	Reports *Reports // required
	// Encode makes the snapshot file of one service from what is served now, and says of which
	// revision it is. Nil answers Unimplemented.
	Encode func(namespace, service string) (snapshot []byte, revision string, err error)
	Clock  Clock        // nil means the real one
	Log    *slog.Logger // nil discards
}

// Server answers the API. It is safe for concurrent use.
type Server struct {
	cfg     Config
	handler http.Handler
}

var _ adminconnect.AdminHandler = (*Server)(nil)

// New checks cfg; nothing runs until Serve.
func New(cfg Config) (*Server, error) {
	if cfg.State == nil || cfg.Reports == nil {
		return nil, errors.New("admin: State and Reports are required")
	}
	if cfg.Clock == nil {
		cfg.Clock = systemClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg}
	mux := http.NewServeMux()
	path, api := adminconnect.NewAdminHandler(s, connect.WithReadMaxBytes(1<<20))
	mux.Handle(path, api)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := cfg.State.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	s.handler = guard(mux)
	return s, nil
}

// Handler is the whole HTTP surface, guarded against other origins: for tests, and for whoever
// serves it on a listener of its own.
func (s *Server) Handler() http.Handler { return s.handler }

// Serve answers on lis until ctx is done, and returns when every request has ended; streams end
// with ctx. A TCP listener must be on a loopback address: whoever reaches this API sees the mesh.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	if a, ok := lis.Addr().(*net.TCPAddr); ok && !a.IP.IsLoopback() {
		_ = lis.Close()
		return fmt.Errorf("admin address %v: want a loopback address, as 127.0.0.1:15080: the API asks nobody for an identity", a)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true) // gRPC clients, on loopback
	srv := &http.Server{
		Handler:           s.handler,
		Protocols:         protocols,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ended := make(chan struct{})
	defer close(ended) // runs before Wait
	wg.Go(func() {
		select {
		case <-ctx.Done():
		case <-ended:
			return
		}
		bound, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		defer s.cfg.Clock.AfterFunc(time.Second, cancel)()
		if srv.Shutdown(bound) != nil {
			_ = srv.Close()
		}
	})
	err := srv.Serve(lis)
	if errors.Is(err, http.ErrServerClosed) {
		<-ctx.Done()
		return nil
	}
	return err
}
