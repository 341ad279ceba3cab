package grpcmesh

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

// try is one attempt on its way through gRPC: the interceptor puts it into the context, the picker
// finds it there and notes what becomes of it. It is the context of the attempt.
type try struct {
	context.Context // of the attempt, or of its guard
	attempt         *call.Attempt
	bounded         bool // the deadline is that of the attempt: nothing will commit it

	// What follows is written by the picker and by gRPC's end of the attempt, and read by the
	// interceptor after that end.
	picked   bool
	waiting  bool        // the last pick had to wait for a connection
	received bool        // headers came from the server
	answered bool        // they were those of a response, or trailers after such
	sent     bool        // a stream was opened
	trailer  bool        // the status came from the server
	reason   call.Reason // why no endpoint could be picked; empty when one was
	detail   string
	cause    error
	cut      *call.Reason // why the interceptor itself ended it; nil when it did not
}

type tryKey struct{}

// Deadline is what gRPC tells the server.
func (t *try) Deadline() (time.Time, bool) {
	if t.bounded {
		if end, ok := t.attempt.Until(); ok {
			return end, true
		}
	}
	return t.Context.Deadline()
}

func (t *try) Value(key any) any {
	if _, ok := key.(tryKey); ok {
		return t
	}
	return t.Context.Value(key)
}

// done is PickResult.Done.
func (t *try) done(info balancer.DoneInfo) {
	t.attempt.Release()
	t.sent = info.BytesSent
	t.received = info.BytesReceived
	// A status of gRPC's own making has no trailer; one that the server sent alone has at least its
	// content-type in it.
	t.trailer = len(info.Trailer) > 0
	// gRPC over HTTP2: "Trailers-Only → HTTP-Status Content-Type Trailers"; the Trailers after
	// Response-Headers have no content-type.
	t.answered = info.BytesReceived && len(info.Trailer["content-type"]) == 0
}

// picker picks for the calls of one channel, from one configuration and one state of its
// connections. It is immutable.
type picker struct {
	client    *Client
	service   *call.Service
	views     map[string]*view
	ready     map[string]*sub // every connection that is up, also of clusters that have gone
	authority func(*call.Cluster) metadata.MD
}

// errWaiting is PickResult's way of saying: when a connection is made, ask again.
var errWaiting = balancer.ErrNoSubConnAvailable

// Pick chooses the endpoint by the policy of the cluster that the call drew, among those that are
// connected. It waits while the first connections are made, and fails when all have failed.
func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	t, _ := info.Ctx.Value(tryKey{}).(*try)
	if t == nil {
		return balancer.PickResult{}, status.Error(codes.Internal, "mesh: a call went past the interceptor of the mesh: an interceptor given after Mesh.DialOptions dropped its context")
	}
	cl := t.attempt.Call().Cluster()
	v := p.views[cl.Name]
	if v == nil {
		if v = p.former(t, cl); v == nil {
			t.waiting = true
			return balancer.PickResult{}, errWaiting
		}
	}
	ep := v.ready.Pick(t.attempt.Tried())
	if ep == nil {
		return balancer.PickResult{}, v.fail(t)
	}
	sb := v.subs[ep]
	t.picked, t.waiting, t.reason, t.detail, t.cause = true, false, "", "", nil
	t.attempt.Picked(ep)
	if who := sb.link.peer.Load(); who != nil {
		t.attempt.Connected(*who, sb.link.tls != nil)
	}
	return balancer.PickResult{SubConn: sb.conn, Done: t.done, Metadata: v.authority}, nil
}

// former is the view of a cluster that this picker does not have: the call began before the
// cluster went, or the picker has not heard of it yet. nil says the latter: another picker comes.
func (p *picker) former(t *try, cl *call.Cluster) *view {
	v := &view{cluster: cl, chosen: cl.Set, authority: p.authority(cl), subs: make(map[*endpoint.Endpoint]*sub)}
	v.ready = cl.Set.Filter(func(ep *endpoint.Endpoint) bool {
		sb := p.ready[ep.Key]
		if sb != nil {
			v.subs[ep] = sb
		}
		return sb != nil
	})
	if v.ready.Len() == 0 {
		if now := p.client.cfg.Engine.Snapshot().Services[p.service.Name]; now != nil && now.Clusters[cl.Name] != nil {
			return nil
		}
		v.err = errGone
	}
	return v
}

// errGone is why a call that began with an older configuration finds no connection.
var errGone = errors.New("its cluster has left the configuration and its endpoints are not connected")

// fail notes in t why v has no endpoint to give.
func (v *view) fail(t *try) error {
	switch {
	case v.connecting:
		t.waiting = true
		if v.err != nil {
			t.detail, t.cause = Describe(v.err), v.err
		}
		return errWaiting
	case v.chosen.Len() == 0:
		t.reason, t.detail = call.ReasonNoEndpoint, v.cluster.EmptyReason
		if t.detail == "" {
			t.detail = "the cluster has none"
		}
	default:
		t.reason, t.detail, t.cause = call.ReasonConnectFailed, Describe(v.err), v.err
	}
	// Not a status: a call that waits for ready then goes on waiting.
	return errors.New(t.detail)
}
