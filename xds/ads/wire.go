package ads

import (
	"context"
	"errors"
	"fmt"
	"sync"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// The methods of the aggregated discovery service; literal, since the messages are trimmed copies
// in a package of our own.
const (
	deltaMethod = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
	sotwMethod  = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
)

// maxMessage bounds a response, in bytes; grpc-go's own bound of 4 MiB is too little for the
// endpoints of a large service.
const maxMessage = 64 << 20

// wrapperType is a resource with name and version around it, which SotW servers may use.
const wrapperType = "type.googleapis.com/envoy.service.discovery.v3.Resource"

var errConnect = errors.New("no connection within the time for it")

// nextMode decides on the variant of the next stream and reports whether it may start at once. The
// variant is remembered for each server.
func (l *link) nextMode(heard bool, err error) bool {
	if heard || status.Code(err) != codes.Unimplemented {
		return false
	}
	if l.next == Delta {
		l.next = SotW
		return true
	}
	l.next = Delta // neither is there now; another version of the server may bring both
	return false
}

// session runs one stream to its end. heard says that at least one response came.
func (s *Stream) session(ctx context.Context, l *link) (heard bool, err error) {
	server := s.cfg.Servers[l.index]
	defer func() {
		if err != nil {
			err = serverError(server, err)
		}
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil) // runs first

	cc, err := s.cfg.Dial(ctx, l.index)
	if err != nil {
		return false, err
	}
	defer cc.Close()
	stop := s.cfg.Clock.AfterFunc(s.cfg.ConnectTimeout, func() { cancel(errConnect) })
	method, mode := deltaMethod, l.next
	if mode == SotW {
		method = sotwMethod
	}
	stream, err := cc.NewStream(ctx, &grpc.StreamDesc{StreamName: "ADS", ClientStreams: true, ServerStreams: true}, method, grpc.MaxCallRecvMsgSize(maxMessage))
	if !stop() && errors.Is(context.Cause(ctx), errConnect) {
		return false, errConnect
	}
	if err != nil {
		return false, err
	}

	out := newOutbox()
	wg.Go(func() { s.sendLoop(ctx, stream, out) })
	responses, broken := make(chan Response), make(chan error, 1)
	wg.Go(func() { broken <- s.receiveLoop(ctx, stream, mode, responses) })

	s.mu.Lock()
	l.mode, l.since, l.lastErr = mode, s.cfg.Clock.Now(), nil
	l.send = out.put
	s.do(l, l.machine.Step(Connected{mode}))
	s.do(l, l.machine.Step(Flush{}))
	s.mu.Unlock()
	s.cfg.Log.DebugContext(ctx, "control plane stream up", "server", server, "mode", mode.String())

	for {
		select {
		case <-l.wake:
			s.mu.Lock()
			s.do(l, l.machine.Step(Flush{}))
			s.mu.Unlock()
		case r := <-responses:
			s.mu.Lock()
			if s.heard(l) {
				s.do(l, l.machine.Step(r))
			}
			s.mu.Unlock()
			if !heard {
				heard = true
				s.cfg.Log.InfoContext(ctx, "control plane answers", "server", server, "mode", mode.String())
			}
		case err := <-broken:
			return heard, err
		}
	}
}

// outbox hands requests from the decisions to the sender, so that a server which does not read
// never holds up the reading of its responses.
type outbox struct {
	mu    sync.Mutex
	queue []Request
	more  chan struct{}
}

func newOutbox() *outbox { return &outbox{more: make(chan struct{}, 1)} }

func (o *outbox) put(r Request) {
	o.mu.Lock()
	o.queue = append(o.queue, r)
	o.mu.Unlock()
	signal(o.more)
}

func (o *outbox) take() []Request {
	o.mu.Lock()
	defer o.mu.Unlock()
	q := o.queue
	o.queue = nil
	return q
}

func (s *Stream) sendLoop(ctx context.Context, stream grpc.ClientStream, out *outbox) {
	for {
		select {
		case <-out.more:
		case <-ctx.Done():
			return
		}
		for _, r := range out.take() {
			s.cfg.Log.DebugContext(ctx, "discovery request", "type", r.Type, "subscribe", r.Subscribe, "unsubscribe", r.Unsubscribe,
				"names", r.Names, "nonce", r.Nonce, "fault", r.Error)
			if stream.SendMsg(s.message(r)) != nil {
				return // the reason comes from RecvMsg
			}
		}
	}
}

// message writes a request in the words of its variant.
func (s *Stream) message(r Request) proto.Message {
	var node *xdspb.Node
	if r.First {
		node = s.cfg.Node
	}
	var fault *spb.Status
	if r.Error != "" {
		// error_detail: "This is populated when the previous DiscoveryResponse failed to update
		// configuration."
		fault = &spb.Status{Code: int32(codes.InvalidArgument), Message: r.Error}
	}
	if r.Mode == SotW {
		return &xdspb.DiscoveryRequest{Node: node, TypeUrl: r.Type, ResourceNames: r.Names, VersionInfo: r.Version, ResponseNonce: r.Nonce, ErrorDetail: fault}
	}
	return &xdspb.DeltaDiscoveryRequest{Node: node, TypeUrl: r.Type, ResourceNamesSubscribe: r.Subscribe, ResourceNamesUnsubscribe: r.Unsubscribe,
		InitialResourceVersions: r.InitialVersions, ResponseNonce: r.Nonce, ErrorDetail: fault}
}

// receiveLoop reads and judges responses until the stream breaks. The next one is read only when
// the one before has been taken: flow control reaches the server.
func (s *Stream) receiveLoop(ctx context.Context, stream grpc.ClientStream, mode Mode, to chan<- Response) error {
	for {
		var r Response
		if mode == SotW {
			m := &xdspb.DiscoveryResponse{}
			if err := stream.RecvMsg(m); err != nil {
				return err
			}
			r = s.judge(m)
		} else {
			m := &xdspb.DeltaDiscoveryResponse{}
			if err := stream.RecvMsg(m); err != nil {
				return err
			}
			r = s.judgeDelta(m)
		}
		s.cfg.Log.DebugContext(ctx, "discovery response", "type", r.Type, "nonce", r.Nonce, "version", r.Version,
			"resources", len(r.Resources), "removed", r.Removed)
		select {
		case to <- r:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *Stream) judge(m *xdspb.DiscoveryResponse) Response {
	r := Response{Type: m.GetTypeUrl(), Nonce: m.GetNonce(), Version: m.GetVersionInfo()}
	for _, a := range m.GetResources() {
		if a.GetTypeUrl() != wrapperType || r.Type == wrapperType {
			r.Resources = append(r.Resources, s.one(r.Type, "", m.GetVersionInfo(), a))
			continue
		}
		w := &xdspb.Resource{}
		if err := proto.Unmarshal(a.GetValue(), w); err != nil {
			r.Resources = append(r.Resources, Received{Err: fmt.Errorf("%s: %w", wrapperType, err)})
		} else if w.GetResource() != nil {
			r.Resources = append(r.Resources, s.one(r.Type, w.GetName(), m.GetVersionInfo(), w.GetResource()))
		}
	}
	return r
}

func (s *Stream) judgeDelta(m *xdspb.DeltaDiscoveryResponse) Response {
	r := Response{Type: m.GetTypeUrl(), Nonce: m.GetNonce(), Version: m.GetSystemVersionInfo(), Removed: m.GetRemovedResources()}
	for _, w := range m.GetResources() {
		// xDS protocol: a Resource with "the resource unset" is for updates of its TTL only.
		if w.GetResource() != nil {
			r.Resources = append(r.Resources, s.one(r.Type, w.GetName(), w.GetVersion(), w.GetResource()))
		}
	}
	return r
}

// one judges a resource; name is that of the wrapper, empty when there is none.
func (s *Stream) one(typeURL, name, version string, a *anypb.Any) Received {
	res := Received{Name: name, Version: version, Bytes: a.GetValue()}
	if a.GetTypeUrl() != typeURL {
		res.Err = fmt.Errorf("resource %q: type %q in a response for %s", name, a.GetTypeUrl(), typeURL)
		return res
	}
	inner, value, err := s.cfg.Check(typeURL, a.GetValue())
	if name == "" {
		res.Name = inner
	}
	switch {
	case err != nil:
		res.Err = err
	case inner != res.Name:
		res.Err = fmt.Errorf("resource %q holds one that is named %q: want the same name", res.Name, inner)
	default:
		res.Value = value
	}
	return res
}
