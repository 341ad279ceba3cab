package admin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// ReportsConfig is what NewReports needs.
type ReportsConfig struct {
	// TrustDomain that reporters must belong to. Empty accepts any that the listener verified.
	TrustDomain string
	// MaxClients bounds the streams. Zero means 20 000.
	MaxClients int
	// MaxSeries bounds the counters of one calling service. Zero means 4096.
	MaxSeries int
	// ExplainWait bounds how long a client may take to answer. Zero means 5 s.
	ExplainWait time.Duration
	Clock       Clock        // nil means the real one
	Log         *slog.Logger // nil discards
}

// Reports is the server of inlay.report.v1.Report. It is safe for concurrent use.
type Reports struct {
	cfg      ReportsConfig
	counters table

	mu         sync.Mutex
	clients    map[*client]struct{}
	seq        uint64 // of the newest client, and of explain queries
	namespaces []string
	announced  chan struct{} // closed when namespaces change
	stopped    bool
	done       chan struct{}
}

// client is one stream after its hello.
type client struct {
	seq     uint64
	who     who
	id      string // SPIFFE ID
	hello   *reportpb.Hello
	queries chan *reportpb.ExplainQuery
	gone    chan struct{} // closed with the stream

	mu      sync.Mutex
	fields  []string // not honoured, sorted
	waiting map[uint64]chan *reportpb.Explanation
}

// maxFields bounds how many fields not honoured are kept of a client.
const maxFields = 200

// NewReports returns a server without clients.
func NewReports(cfg ReportsConfig) *Reports {
	cfg.MaxClients = cmp.Or(cfg.MaxClients, 20_000)
	cfg.MaxSeries = cmp.Or(cfg.MaxSeries, 4096)
	cfg.ExplainWait = cmp.Or(cfg.ExplainWait, 5*time.Second)
	if cfg.Clock == nil {
		cfg.Clock = systemClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Reports{
		cfg:       cfg,
		counters:  table{maxServices: cfg.MaxClients, maxSeries: cfg.MaxSeries, services: make(map[who]*serviceSums)},
		clients:   make(map[*client]struct{}),
		announced: make(chan struct{}),
		done:      make(chan struct{}),
	}
}

// Register serves inlay.report.v1.Report on s. It belongs on listeners that say who calls: the
// unix socket and mTLS.
func (r *Reports) Register(s grpc.ServiceRegistrar) {
	reportpb.RegisterReportServer(s, &reportServer{reports: r})
}

// Announce tells every client, now and when it connects, which namespaces hold services. The same
// set again sends nothing.
func (r *Reports) Announce(namespaces []string) {
	namespaces = slices.Compact(slices.Sorted(slices.Values(namespaces)))
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.namespaces != nil && slices.Equal(r.namespaces, namespaces) {
		return
	}
	if namespaces == nil {
		namespaces = []string{}
	}
	r.namespaces = namespaces
	close(r.announced)
	r.announced = make(chan struct{})
}

// Counters returns the sums of all reports since the start.
func (r *Reports) Counters() []*adminpb.ServiceCounters { return r.counters.list() }

// Stop ends every stream with Unavailable, and those that come later. It may be called twice.
func (r *Reports) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stopped {
		r.stopped = true
		close(r.done)
	}
}

// Explain asks the newest live client of a service, and the next one when that leaves before it
// answers. With none alive, AnsweredBy is empty. The error says that the time was up.
func (r *Reports) Explain(ctx context.Context, namespace, service, method, url string, headers []*reportpb.Header) (*adminpb.ExplainResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer r.cfg.Clock.AfterFunc(r.cfg.ExplainWait, cancel)()
	asked := make(map[*client]bool)
	for {
		c := r.newest(who{namespace, service}, asked)
		if c == nil {
			return &adminpb.ExplainResponse{}, nil
		}
		asked[c] = true
		r.mu.Lock()
		r.seq++
		id := r.seq
		r.mu.Unlock()
		answer := make(chan *reportpb.Explanation, 1)
		c.mu.Lock()
		c.waiting[id] = answer
		c.mu.Unlock()
		got, err := c.ask(ctx, &reportpb.ExplainQuery{Id: id, Method: method, Url: url, Headers: headers}, answer)
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
		if err != nil {
			return nil, fmt.Errorf("client %q of %s.%s did not answer within %v", c.hello.GetNodeId(), service, namespace, r.cfg.ExplainWait)
		}
		if got != nil {
			return &adminpb.ExplainResponse{AnsweredBy: c.hello.GetNodeId(), Decision: got.GetDecision(), Error: got.GetError()}, nil
		}
	}
}

// ask returns nil without error when the client left.
func (c *client) ask(ctx context.Context, q *reportpb.ExplainQuery, answer <-chan *reportpb.Explanation) (*reportpb.Explanation, error) {
	select {
	case c.queries <- q:
	case <-c.gone:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case a := <-answer:
		return a, nil
	case <-c.gone:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (r *Reports) newest(w who, but map[*client]bool) *client {
	r.mu.Lock()
	defer r.mu.Unlock()
	var best *client
	for c := range r.clients {
		if c.who == w && !but[c] && (best == nil || c.seq > best.seq) {
			best = c
		}
	}
	return best
}

// notHonoured returns what the SDK of an xDS client reported of itself: its version and the fields
// it read past.
func (r *Reports) notHonoured(nodeID, identity string) (sdk string, fields []string) {
	r.mu.Lock()
	var best *client
	for c := range r.clients {
		if c.hello.GetNodeId() == nodeID && c.id == identity && (best == nil || c.seq > best.seq) {
			best = c
		}
	}
	r.mu.Unlock()
	if best == nil {
		return "", nil
	}
	best.mu.Lock()
	defer best.mu.Unlock()
	return best.hello.GetSdkVersion(), slices.Clone(best.fields)
}

// fieldsOf takes from a status what is kept of it.
func fieldsOf(st *reportpb.Status) []string {
	var out []string
	for _, res := range st.GetResources() {
		for _, f := range res.GetNotHonoured() {
			if text := res.GetName() + ": " + f; len(text) <= maxName {
				out = append(out, text)
			}
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	return slices.Clone(out[:min(len(out), maxFields)])
}

type reportServer struct {
	reportpb.UnimplementedReportServer
	reports *Reports
}

// Report is one SDK's stream.
func (s *reportServer) Report(stream reportpb.Report_ReportServer) error {
	r := s.reports
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	// As in the registry: Recv ends only with the stream, whose end is this function's return.
	requests := make(chan *reportpb.ReportRequest)
	ended := make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				ended <- ctx.Err() // the loop hears of the end from here alone
				return
			}
		}
	}()

	caller := attest.CallerFrom(ctx)
	w, err := r.identify(caller)
	if err != nil {
		return err
	}
	var me *client
	defer func() { r.leave(me) }()
	var announced <-chan struct{} // nil before the hello
	var queries chan *reportpb.ExplainQuery
	for {
		select {
		case <-r.done:
			return status.Error(codes.Unavailable, "the control plane is stopping: report again")
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-announced:
			if announced, err = r.sendAnnouncement(stream); err != nil {
				return err
			}
		case q := <-queries:
			if err := stream.Send(&reportpb.ReportResponse{Kind: &reportpb.ReportResponse_Explain{Explain: q}}); err != nil {
				return err
			}
		case req := <-requests:
			hello := req.GetHello()
			switch {
			case me == nil && hello == nil:
				return status.Error(codes.FailedPrecondition, "the first message of a report carries hello")
			case me == nil:
				if me, err = r.join(caller, w, hello); err != nil {
					return err
				}
				queries = me.queries
				if announced, err = r.sendAnnouncement(stream); err != nil {
					return err
				}
			case hello != nil:
				return status.Error(codes.FailedPrecondition, "hello came twice: want one stream for each mesh")
			default:
				r.take(me, req)
			}
		}
	}
}

// identify takes namespace and service from the SPIFFE ID: what the hello says of them is not read.
func (r *Reports) identify(caller attest.Caller) (who, error) {
	if caller.ID.IsZero() {
		why := "use the unix socket, or mTLS with an SVID"
		if caller.Err != nil {
			why = caller.Err.Error()
		}
		return who{}, status.Errorf(codes.Unauthenticated, "a report needs an identity: %s", why)
	}
	if td := caller.ID.TrustDomain().Name(); r.cfg.TrustDomain != "" && td != r.cfg.TrustDomain {
		return who{}, status.Errorf(codes.PermissionDenied, "the caller %s is of trust domain %s: want %s", caller.ID, td, r.cfg.TrustDomain)
	}
	namespace, service, ok := identity.ParseServiceID(caller.ID)
	if !ok {
		return who{}, status.Errorf(codes.PermissionDenied, "the caller %s is no service: want a path /ns/NAMESPACE/svc/SERVICE", caller.ID)
	}
	return who{namespace, service}, nil
}

func (r *Reports) join(caller attest.Caller, w who, hello *reportpb.Hello) (*client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.clients) >= r.cfg.MaxClients {
		return nil, status.Errorf(codes.ResourceExhausted, "%d clients report already, the bound", r.cfg.MaxClients)
	}
	for _, text := range []string{hello.GetNodeId(), hello.GetSdkVersion(), hello.GetInstanceId(), hello.GetVersion()} {
		if len(text) > maxName {
			return nil, status.Errorf(codes.InvalidArgument, "hello: a text of %d bytes: want at most %d", len(text), maxName)
		}
	}
	r.seq++
	c := &client{
		seq: r.seq, who: w, id: caller.ID.String(), hello: hello,
		queries: make(chan *reportpb.ExplainQuery),
		gone:    make(chan struct{}),
		waiting: make(map[uint64]chan *reportpb.Explanation),
	}
	r.clients[c] = struct{}{}
	r.cfg.Log.Debug("client reports", "node", hello.GetNodeId(), "identity", c.id)
	return c, nil
}

func (r *Reports) leave(c *client) {
	if c == nil {
		return
	}
	r.mu.Lock()
	delete(r.clients, c)
	r.mu.Unlock()
	close(c.gone)
}

// take handles one message after the hello; an unknown kind is of a newer SDK and is passed over.
func (r *Reports) take(c *client, req *reportpb.ReportRequest) {
	switch kind := req.GetKind().(type) {
	case *reportpb.ReportRequest_Status:
		fields := fieldsOf(kind.Status)
		c.mu.Lock()
		c.fields = fields
		c.mu.Unlock()
	case *reportpb.ReportRequest_Counters:
		r.counters.add(c.who, kind.Counters)
	case *reportpb.ReportRequest_Explanation:
		c.mu.Lock()
		answer := c.waiting[kind.Explanation.GetId()]
		delete(c.waiting, kind.Explanation.GetId())
		c.mu.Unlock()
		if answer != nil { // else nobody waits any more
			answer <- kind.Explanation
		}
	}
}

// sendAnnouncement sends the namespaces, when they are known, and returns what to wait on for the
// next ones.
func (r *Reports) sendAnnouncement(stream reportpb.Report_ReportServer) (<-chan struct{}, error) {
	r.mu.Lock()
	namespaces, next := r.namespaces, r.announced
	r.mu.Unlock()
	if namespaces == nil {
		return next, nil
	}
	return next, stream.Send(&reportpb.ReportResponse{Kind: &reportpb.ReportResponse_Announcement{
		Announcement: &reportpb.Announcement{Namespaces: namespaces}}})
}
