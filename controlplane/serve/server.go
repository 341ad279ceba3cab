// Package serve is the ADS server: it hands the views that xdsgen makes to xDS clients, delta and
// state-of-the-world, and knows what each of them has accepted. The control plane publishes each
// compiled mesh to it; the registry waits on it for a drain; admin reads its clients.
//
// Resources are encoded once, by xdsgen; a push touches the streams that subscribed to what
// changed and no other. It never decides what a client may see (the view does) and never serves a
// view that is not the caller's.
package serve

import (
	"cmp"
	"errors"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// Clock tells the time of a client's status.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// Config of a Server.
type Config struct {
	// Log gets Info for a client that comes or goes, Warn for a rejected resource. nil discards.
	Log *slog.Logger
	// Clock is the source of times in statuses; nil is the real one.
	Clock Clock
	// Dev admits callers that show no identity over a connection that asks for none (the plaintext
	// port). They are given the outbound names of the namespace in their node metadata, and no
	// inbound listener.
	Dev bool
	// TrustDomain refuses identities of any other; empty accepts what the transport verified.
	TrustDomain string
	// NodeUIDs are the users as which node agents run: such a process, outside every registration
	// and on the unix socket, is given the view of a node. Nil means this process's own user and root.
	NodeUIDs []uint32
	// MaxNames bounds the subscriptions of one stream, all types together. Zero means 65536. A node
	// agent, which follows every service, has 32 times as many.
	MaxNames int
	// MaxResponse is the size in bytes beyond which a response is split in two, where the protocol
	// allows it; a single resource is never split. Zero means 1 MiB (gRPC clients refuse messages
	// above 4 MiB unless told otherwise).
	MaxResponse int
}

// Bounds of what one stream may ask for.
const (
	defaultMaxNames    = 1 << 16
	defaultMaxResponse = 1 << 20
	maxNameLength      = 2048
	maxTypes           = 32
	nodeNames          = 32 // times MaxNames
)

// Server serves ADS. It is safe for concurrent use.
type Server struct {
	cfg Config
	log *slog.Logger

	publishing sync.Mutex // one Publish at a time
	views      atomic.Pointer[xdsgen.Views]

	stop    chan struct{}
	running sync.WaitGroup // the goroutines of all streams

	mu       sync.Mutex
	stopped  bool
	lastID   uint64
	streams  map[*stream]struct{}
	index    map[xdsgen.Key]map[*stream]struct{} // who asked for what; name "*" is a wildcard
	onDemand map[xdsgen.Key]struct{}             // keys of index that xdsgen makes only when asked
	changed  chan struct{}
}

// New returns a server with nothing published: clients may connect and wait for the first Publish.
func New(cfg Config) *Server {
	cfg.MaxNames = cmp.Or(cfg.MaxNames, defaultMaxNames)
	cfg.MaxResponse = cmp.Or(cfg.MaxResponse, defaultMaxResponse)
	if cfg.NodeUIDs == nil {
		cfg.NodeUIDs = []uint32{0, uint32(os.Geteuid())}
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{
		cfg: cfg, log: log,
		stop:     make(chan struct{}),
		streams:  map[*stream]struct{}{},
		index:    map[xdsgen.Key]map[*stream]struct{}{},
		onDemand: map[xdsgen.Key]struct{}{},
		changed:  make(chan struct{}),
	}
}

// Register adds the service to a gRPC server. One Server may be registered on several: what a
// caller is given depends on who it is, not on where it came in.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, ads{server: s})
}

// Publish makes m what clients are served, and returns when every interested stream knows that it
// has something to send. Resources that cannot be made are joined in the error, and clients keep
// the last good one of that name; everything else of m is served all the same.
func (s *Server) Publish(m *ir.Mesh) error {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	prev := s.views.Load()
	views, err := xdsgen.New(m, prev)
	keys := views.Changed(prev)
	s.views.Store(views)

	s.mu.Lock()
	defer s.mu.Unlock()
	if prev == nil {
		// Whatever was asked before the first mesh waits for it, names that do not exist too.
		for st := range s.streams {
			st.touchAll()
		}
	}
	// Each stream is told of all its changes at once: told one by one, it could send a route before
	// the cluster that the route names.
	told := map[*stream][]xdsgen.Key{}
	tell := func(indexed, k xdsgen.Key) {
		for st := range s.index[indexed] {
			told[st] = append(told[st], k)
		}
	}
	for _, k := range keys {
		every := k
		every.Name = wildcard
		tell(k, k)
		tell(every, k)
	}
	for k := range s.onDemand {
		if views.MayDiffer(prev, k) {
			tell(k, k)
		}
	}
	for st, keys := range told {
		st.touch(keys)
	}
	s.broadcastLocked()
	s.log.Debug("mesh published", "revision", m.Revision, "changed", len(keys), "encoded", views.Encoded())
	return err
}

// Views is what was published last; nil before the first.
func (s *Server) Views() *xdsgen.Views { return s.views.Load() }

// SnapshotFor returns everything that a client of this class may ask for, by type and name; none
// before the first Publish.
func (s *Server) SnapshotFor(namespace, service string, kind xdsgen.Kind) []*xdsgen.Resource {
	views := s.views.Load()
	if views == nil {
		return nil
	}
	var out []*xdsgen.Resource
	for _, byName := range views.Set(xdsgen.View{Kind: kind, Namespace: namespace, Service: service}).Resources {
		for _, r := range byName {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *xdsgen.Resource) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// Stop ends every stream with Unavailable and waits until all goroutines have ended. Later calls
// and later streams end at once.
func (s *Server) Stop() {
	s.mu.Lock()
	if !s.stopped {
		s.stopped = true
		close(s.stop)
	}
	s.mu.Unlock()
	s.running.Wait()
}

// Changed returns a channel that is closed when, after this call, something is published,
// acknowledged or rejected, or a client comes or goes.
func (s *Server) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *Server) broadcast() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broadcastLocked()
}

func (s *Server) broadcastLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Server) now() time.Time {
	if s.cfg.Clock != nil {
		return s.cfg.Clock.Now()
	}
	return time.Now()
}

// begin counts the goroutines of a stream, unless the server has stopped.
func (s *Server) begin(goroutines int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return errStopped
	}
	s.running.Add(goroutines)
	return nil
}

// join makes a stream known once its client has said who it is.
func (s *Server) join(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.left {
		return
	}
	s.lastID++
	st.id = s.lastID
	s.streams[st] = struct{}{}
	s.broadcastLocked()
}

// leave forgets a stream and all that it asked for.
func (s *Server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.left = true
	if _, ok := s.streams[st]; !ok {
		return
	}
	delete(s.streams, st)
	for k := range st.keys {
		s.dropLocked(st, k)
	}
	s.broadcastLocked()
}

// follow changes what a stream is told of.
func (s *Server) follow(st *stream, added, removed []xdsgen.Key) {
	if len(added) == 0 && len(removed) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.left {
		return
	}
	for _, k := range added {
		if s.index[k] == nil {
			s.index[k] = map[*stream]struct{}{}
		}
		s.index[k][st] = struct{}{}
		st.keys[k] = struct{}{}
		if xdsgen.OnDemand(k.Type, k.Name) {
			s.onDemand[k] = struct{}{}
		}
	}
	// A request takes its subscriptions before its unsubscriptions: a name in both is not wanted, and
	// must not stay here, where no bound counts it.
	for _, k := range removed {
		s.dropLocked(st, k)
		delete(st.keys, k)
	}
}

func (s *Server) dropLocked(st *stream, k xdsgen.Key) {
	delete(s.index[k], st)
	if len(s.index[k]) == 0 {
		delete(s.index, k)
		delete(s.onDemand, k)
	}
}

// all returns the streams, oldest first.
func (s *Server) all() []*stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*stream, 0, len(s.streams))
	for st := range s.streams {
		out = append(out, st)
	}
	slices.SortFunc(out, func(a, b *stream) int { return cmp.Compare(a.id, b.id) })
	return out
}

var errNoNode = errors.New("the first request of the stream has no node")
