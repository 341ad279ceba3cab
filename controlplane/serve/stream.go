package serve

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

var errStopped = status.Error(codes.Unavailable, "the control plane is stopping; connect again")

// ads is the gRPC service of a Server.
type ads struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	server *Server
}

// stream is one ADS stream.
type stream struct {
	server    *Server
	connected time.Time
	wake      chan struct{} // holds one: there is something to send

	// Guarded by Server.mu.
	id   uint64
	left bool
	keys map[xdsgen.Key]struct{}

	mu      sync.Mutex
	client  client   // set before the stream joins, not written after
	session *session // without types until the first request
	// unindexed is true while a request has changed the session and not yet the index: a look at
	// the mesh in between could miss what is published next.
	unindexed bool

	summed  bool // summary holds
	summary string
}

// DeltaAggregatedResources serves the incremental protocol.
func (a ads) DeltaAggregatedResources(rpc discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return a.server.serve(rpc.Context(), true, protocol{
		receive: func(st *stream) error {
			req, err := rpc.Recv()
			if err != nil {
				return err
			}
			return st.request(rpc.Context(), req.GetNode(), req.GetTypeUrl(), func(s *session, now time.Time) (effect, error) {
				return s.applyDelta(req, now)
			})
		},
		send: func(st *stream) (bool, error) {
			responses := plan(st, (*session).planDelta)
			for _, r := range responses {
				if err := rpc.Send(r); err != nil {
					return false, err
				}
			}
			return len(responses) > 0, nil
		},
	})
}

// StreamAggregatedResources serves the state-of-the-world protocol.
func (a ads) StreamAggregatedResources(rpc discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return a.server.serve(rpc.Context(), false, protocol{
		receive: func(st *stream) error {
			req, err := rpc.Recv()
			if err != nil {
				return err
			}
			return st.request(rpc.Context(), req.GetNode(), req.GetTypeUrl(), func(s *session, now time.Time) (effect, error) {
				return s.applySotW(req, now)
			})
		},
		send: func(st *stream) (bool, error) {
			responses := plan(st, (*session).planSotW)
			for _, r := range responses {
				if err := rpc.Send(r); err != nil {
					return false, err
				}
			}
			return len(responses) > 0, nil
		},
	})
}

// protocol is the part of a stream that differs between delta and state-of-the-world.
type protocol struct {
	receive func(*stream) error         // takes one request
	send    func(*stream) (bool, error) // sends what is due; false when nothing was
}

// serve runs one stream. Two goroutines of the server's receive and send; they end once this
// function has returned, since gRPC then ends the stream that they block on.
func (s *Server) serve(ctx context.Context, delta bool, p protocol) error {
	if err := s.begin(2); err != nil {
		return err
	}
	st := &stream{
		server: s, connected: s.now(), wake: make(chan struct{}, 1),
		keys: map[xdsgen.Key]struct{}{}, session: &session{delta: delta},
	}
	defer s.leave(st)
	done := make(chan error, 2)
	end := make(chan struct{})
	defer close(end)
	go func() {
		defer s.running.Done()
		done <- receive(st, p)
	}()
	go func() {
		defer s.running.Done()
		done <- send(st, p, end)
	}()
	select {
	case err := <-done:
		if errors.Is(err, io.EOF) {
			err = nil // the client is through
		}
		if st.known() {
			s.log.InfoContext(ctx, "xds client gone", "node", st.client.nodeID, "identity", st.client.identity, "err", err)
		}
		return err
	case <-s.stop:
		return errStopped
	}
}

func receive(st *stream, p protocol) error {
	for {
		if err := p.receive(st); err != nil {
			return err
		}
	}
}

// send waits for something to send until end is closed.
func send(st *stream, p protocol, end <-chan struct{}) error {
	for {
		select {
		case <-st.wake:
		case <-end:
			return nil
		}
		for {
			sent, err := p.send(st)
			if err != nil {
				return err
			}
			if !sent {
				break
			}
		}
	}
}

// request takes one request: the first one says who the client is ("Only the first message on a
// stream is guaranteed to carry the node identifier", DiscoveryRequest.node).
func (st *stream) request(ctx context.Context, node *corev3.Node, url string, apply func(*session, time.Time) (effect, error)) error {
	s := st.server
	if !st.known() {
		c, err := identify(node, attest.CallerFrom(ctx), remote(ctx), s.cfg)
		if err != nil {
			s.log.WarnContext(ctx, "xds client refused", "address", remote(ctx), "node", clip(node.GetId()), "err", err)
			return err
		}
		st.mu.Lock()
		st.client = c
		st.session = newSession(c.view, st.session.delta, s.cfg)
		st.mu.Unlock()
		s.join(st)
		s.log.InfoContext(ctx, "xds client connected", "node", clip(c.nodeID), "identity", c.identity,
			"kind", c.view.Kind.String(), "namespace", c.view.Namespace, "delta", st.session.delta, "agent", clip(c.agent), "address", c.address)
	}
	st.mu.Lock()
	e, err := apply(st.session, s.now())
	st.summed, st.unindexed = false, true
	st.mu.Unlock()
	if err != nil {
		s.log.WarnContext(ctx, "xds request refused", "node", clip(st.client.nodeID), "type", clip(url), "err", err)
		return err
	}
	// The index comes before the first look at the mesh: a Publish in between touches the stream.
	s.follow(st, e.added, e.removed)
	st.mu.Lock()
	st.unindexed = false
	st.mu.Unlock()
	st.wakeUp()
	for _, name := range e.rejected {
		s.log.WarnContext(ctx, "resource rejected", "node", clip(st.client.nodeID), "identity", st.client.identity,
			"type", url, "name", name, "err", e.nack)
	}
	if e.settled {
		s.broadcast()
	}
	return nil
}

// known says whether the client has said who it is. Only the receiving goroutine writes it.
func (st *stream) known() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.session.types != nil
}

// plan takes what is due from the session, against the mesh of this moment.
func plan[R any](st *stream, f func(*session, *xdsgen.Views, time.Time) []R) []R {
	out, looked := planLocked(st, f)
	if looked {
		st.server.broadcast() // a client may be up to date without having been sent anything
	}
	return out
}

func planLocked[R any](st *stream, f func(*session, *xdsgen.Views, time.Time) []R) (_ []R, looked bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	views := st.server.views.Load()
	if views == nil || st.session.types == nil || st.unindexed || !st.session.due() {
		return nil, false
	}
	st.summed = false
	return f(st.session, views, st.server.now()), true
}

func (st *stream) touch(keys []xdsgen.Key) {
	st.mu.Lock()
	for _, k := range keys {
		st.session.touch(k.Type, k.Name)
	}
	st.summed = false
	st.mu.Unlock()
	st.wakeUp()
}

func (st *stream) touchAll() {
	st.mu.Lock()
	st.session.touchAll()
	st.summed = false
	st.mu.Unlock()
	st.wakeUp()
}

func (st *stream) wakeUp() {
	select {
	case st.wake <- struct{}{}:
	default: // it is awake already
	}
}

// remote is where a call came from.
func remote(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}
