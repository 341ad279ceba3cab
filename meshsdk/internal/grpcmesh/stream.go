package grpcmesh

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// stream is a stream of the mesh: one grpc.ClientStream after the other behind one that the caller
// holds, until the call is committed to one of them.
//
// Messages that were sent are kept, within the bounds of the engine, and sent again when an attempt
// fails in a way that the route's policy names. The first response header or message, or a buffer
// over its bounds, commits the call: from then on the stream is gRPC's own with a record at its end.
//
// As with gRPC, one goroutine may send while another receives; Header may be called beside both.
type stream struct {
	client   *Client
	cl       *call.Call
	desc     *grpc.StreamDesc
	open     func(context.Context) (grpc.ClientStream, error)
	headers  headers
	unwatch  func() bool
	once     sync.Once
	final    error                 // of the call; set by once
	guard    atomic.Pointer[Guard] // of the attempt
	receives sync.Mutex            // held while cur.RecvMsg runs; taken before mu
	stash    error                 // what the next RecvMsg returns; guarded by receives

	mu        sync.Mutex // guards what follows; held while an attempt is replaced
	cur       grpc.ClientStream
	try       *try
	buffer    []any // messages to send again
	closed    bool  // CloseSend was called
	committed bool
}

// stream is the interceptor of streams.
func (c *Client) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	ch := c.target(cc.Target())
	listener, mesh, err := ch.decide(ctx, c)
	if err != nil {
		return nil, c.undecided(ctx, ch, method, err)
	}
	if !mesh {
		return c.outsideStream(ctx, ch, desc, cc, method, streamer, opts)
	}
	method = canonical(method)
	s := &stream{client: c, desc: desc, headers: headers{ctx: ctx}}
	r := request(method, listener, &s.headers, opts)
	cl, err := c.cfg.Engine.Begin(ctx, listener, &r)
	if err != nil {
		return nil, wrap(err)
	}
	s.cl = cl
	open := false
	defer func() {
		if !open {
			cl.Unwind()
		}
	}()
	var trace traceContext
	trace.take(c, cl)
	opts = append(opts[:len(opts):len(opts)], grpc.OnFinish(s.finished))
	s.open = func(ctx context.Context) (grpc.ClientStream, error) {
		return streamer(trace.into(ctx), desc, cc, method, opts...)
	}
	s.mu.Lock()
	err = s.begin()
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	// A caller may leave a stream by ending its context and nothing else.
	stop := context.AfterFunc(cl, s.abandon)
	s.mu.Lock()
	s.unwatch = stop
	s.mu.Unlock()
	open = true
	return s, nil
}

// begin makes attempts until one has a stream on which what was sent is sent again. It fails with
// the error of the call, which has then ended. s.mu is held.
func (s *stream) begin() error {
	for {
		a, err := s.cl.Next()
		if err != nil {
			return s.finish(exhausted(err), nil)
		}
		g := NewGuard(s.client.cfg.Clock, a)
		s.guard.Store(g)
		g.Idle(s.cl.Idle())
		t := &try{Context: g.Context(), attempt: a}
		cur, err := s.open(t)
		if err == nil {
			s.cur, s.try = cur, t
			s.replay()
			return nil
		}
		t.cut = g.End()
		res := t.result(err, false)
		if !s.cl.Retry(res) {
			return s.finish(res, err)
		}
	}
}

// replay sends the buffer on a new attempt. What fails here shows when something is received.
func (s *stream) replay() {
	for _, m := range s.buffer {
		if s.cur.SendMsg(m) != nil {
			return
		}
	}
	if s.closed {
		_ = s.cur.CloseSend()
	}
}

// current is the attempt of this moment.
func (s *stream) current() (grpc.ClientStream, *try) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur, s.try
}

// commit makes the attempt final and drops the buffer.
func (s *stream) commit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitLocked()
}

func (s *stream) commitLocked() {
	if s.committed {
		return
	}
	s.committed = true
	s.buffer = nil
	s.cl.Unreserve()
	s.try.attempt.Commit()
}

// failed deals with the end of an attempt: another one took its place, or final is the error of
// the call. s.receives is held.
func (s *stream) failed(cur grpc.ClientStream, err error) (again bool, final error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.try
	t.cut = s.guard.Load().End()
	answered := s.committed
	if !answered {
		// The attempt is over, so this does not wait: nil means that no headers came.
		md, _ := cur.Header()
		answered = md != nil
	}
	res := t.result(err, answered)
	if s.committed || !s.cl.Retry(res) {
		return false, s.finish(res, err)
	}
	if err := s.begin(); err != nil {
		return false, err
	}
	return true, nil
}

// finish ends the call, once, and gives its error. It takes no lock of the stream.
func (s *stream) finish(res call.Result, err error) error {
	s.once.Do(func() {
		s.final = finish(s.cl, res, err)
		s.guard.Load().End()
	})
	return s.final
}

// release is finish for those who hold no lock: it also stops watching the context.
func (s *stream) release(res call.Result, err error) error {
	final := s.finish(res, err)
	s.mu.Lock()
	stop := s.unwatch
	s.mu.Unlock()
	if stop != nil {
		stop()
	}
	return final
}

// abandon ends the call of a stream whose context has ended.
func (s *stream) abandon() {
	_ = s.finish(call.Result{Reason: call.ReasonCancelled, GRPCCode: int(codes.Canceled), Err: context.Cause(s.cl)}, nil)
}

// finished hears from gRPC that an attempt is over. Only the end of the channel matters here: its
// caller may never touch the stream again.
func (s *stream) finished(err error) {
	if closing(err) {
		_ = s.finish(call.Result{Reason: call.ReasonCancelled, GRPCCode: int(codes.Canceled), Err: err}, err)
	}
}

// SendMsg keeps m to send it again, while the call may be repeated, and sends it. As gRPC says, m
// must not be changed afterwards. io.EOF means that the stream has ended: RecvMsg says how.
func (s *stream) SendMsg(m any) error {
	s.mu.Lock()
	if !s.committed {
		if p, ok := m.(proto.Message); ok && s.cl.Reserve(proto.Size(p)) {
			s.buffer = append(s.buffer, m)
		} else {
			s.commitLocked()
		}
	}
	cur, t := s.cur, s.try
	s.mu.Unlock()

	err := cur.SendMsg(m)
	s.guard.Load().Move()
	if err == nil {
		return nil
	}
	s.mu.Lock()
	replaced, committed := s.cur != cur, s.committed
	s.mu.Unlock()
	switch {
	case replaced: // and sent there
		return nil
	case !ended(err):
		// gRPC could not encode it, or the call may not send: nothing to repeat.
		t.cut = s.guard.Load().End()
		return s.release(t.result(err, true), err)
	case committed:
		return io.EOF
	}
	if md, _ := cur.Header(); md != nil {
		s.commit()
		return io.EOF
	}
	if !s.receives.TryLock() {
		return nil // whoever receives finds out, and m is kept
	}
	defer s.receives.Unlock()
	if s.probe(cur) {
		return nil
	}
	return io.EOF
}

// probe deals with an attempt that ended without response headers, and reports whether another one
// took its place. Otherwise the next RecvMsg says what became of the call. s.receives is held.
func (s *stream) probe(cur grpc.ClientStream) bool {
	if now, _ := s.current(); now != cur {
		return true
	}
	if s.stash != nil {
		return false
	}
	err := cur.RecvMsg(new(emptypb.Empty)) // without headers there is no message to lose
	if err == nil || ended(err) {
		s.stash = io.EOF
		return false
	}
	again, final := s.failed(cur, err)
	if !again {
		s.stash = final
	}
	return again
}

// RecvMsg receives a message, from the attempt that gives one.
func (s *stream) RecvMsg(m any) error {
	s.receives.Lock()
	defer s.receives.Unlock()
	for {
		cur, _ := s.current()
		if ended(s.stash) {
			_ = s.release(call.Result{Reason: call.ReasonOK}, nil)
			return io.EOF
		}
		if s.stash != nil {
			return s.stash
		}
		err := cur.RecvMsg(m)
		switch {
		case err == nil:
			s.commit()
			s.guard.Load().Move()
			if !s.desc.ServerStreams {
				return s.release(call.Result{Reason: call.ReasonOK}, nil)
			}
			return nil
		case ended(err):
			_ = s.release(call.Result{Reason: call.ReasonOK}, nil)
			return io.EOF
		}
		again, final := s.failed(cur, err)
		if !again {
			s.stash = final
			_ = s.release(call.Result{}, nil)
			return final
		}
	}
}

// Header waits for the response headers. Without any it gives nil, and RecvMsg the status.
func (s *stream) Header() (metadata.MD, error) {
	for {
		cur, _ := s.current()
		md, err := cur.Header()
		if md != nil || err != nil {
			s.commit()
			return md, err
		}
		s.receives.Lock()
		again := s.probe(cur)
		s.receives.Unlock()
		if !again {
			return nil, nil
		}
	}
}

// Trailer is that of the last attempt.
func (s *stream) Trailer() metadata.MD {
	cur, _ := s.current()
	return cur.Trailer()
}

// CloseSend ends sending, in later attempts too.
func (s *stream) CloseSend() error {
	s.mu.Lock()
	s.closed = true
	cur := s.cur
	s.mu.Unlock()
	return cur.CloseSend()
}

// Context of the attempt; as with gRPC, asking for it ends retries.
func (s *stream) Context() context.Context {
	s.commit()
	cur, _ := s.current()
	return cur.Context()
}

// closing reports whether err is the end of the channel.
func closing(err error) bool {
	return errors.Is(err, grpc.ErrClientConnClosing) //nolint:staticcheck // the one way to tell it from that of the call
}

// ended reports whether err is the end of a stream: gRPC says io.EOF itself, and what wraps it is a
// failure.
func ended(err error) bool { return err == io.EOF } //nolint:errorlint // see above
