package grpcmesh

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
)

// seen is a ServerObserver that keeps the last call.
type seen struct {
	begun, ended int
	last         call.Result
	traceparent  string
}

func (s *seen) BeginServer(ctx context.Context, _ *call.ServerCall, from call.Carrier) context.Context {
	s.begun++
	s.traceparent = from.Get("traceparent")
	return ctx
}

func (s *seen) EndServer(_ context.Context, _ *call.ServerCall, r call.Result) {
	s.ended++
	s.last = r
}

func incomingContext(t testing.TB) context.Context {
	return metadata.NewIncomingContext(t.Context(), metadata.Pairs(":authority", "orders", "content-type", "application/grpc",
		"user-agent", "grpc-go", "traceparent", "00-1", "x-own", "1", "grpc-accept-encoding", "gzip"))
}

func TestServerResults(t *testing.T) {
	cancelled, cancel := context.WithCancel(incomingContext(t))
	for name, tc := range map[string]struct {
		ctx     context.Context
		handler func() error
		want    call.Reason
		code    codes.Code
	}{
		"ok":                    {incomingContext(t), func() error { return nil }, call.ReasonOK, codes.OK},
		"a status":              {incomingContext(t), func() error { return status.Error(codes.NotFound, "x") }, call.ReasonUpstreamStatus, codes.NotFound},
		"an error of no status": {incomingContext(t), func() error { return context.DeadlineExceeded }, call.ReasonUpstreamStatus, codes.DeadlineExceeded},
		"the caller gave up":    {cancelled, func() error { cancel(); return context.Canceled }, call.ReasonCancelled, codes.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			o := new(seen)
			gate := tcpmesh.NewGate()
			s := &server{ServerConfig{Observer: o, Service: func() string { return "orders.default" }, Gate: gate}}
			_, err := s.unary(tc.ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/a.B/C"}, func(context.Context, any) (any, error) { return nil, tc.handler() })
			if o.last.Reason != tc.want || o.last.GRPCCode != int(tc.code) || o.begun != 1 || o.ended != 1 || gate.InFlight() != 0 {
				t.Errorf("%v: %+v", err, o)
			}
			if o.traceparent != "00-1" {
				t.Errorf("traceparent %q", o.traceparent)
			}
		})
	}
}

func TestServerPanicIsRecorded(t *testing.T) {
	o := new(seen)
	gate := tcpmesh.NewGate()
	s := &server{ServerConfig{Observer: o, Service: func() string { return "" }, Gate: gate}}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		s.unary(incomingContext(t), nil, &grpc.UnaryServerInfo{}, func(context.Context, any) (any, error) { panic("x") })
	}()
	if o.ended != 1 || o.last.GRPCCode != int(codes.Internal) || gate.InFlight() != 0 {
		t.Errorf("%+v, %d in flight", o.last, gate.InFlight())
	}
}

func TestServerRefusesOnceDrained(t *testing.T) {
	o := new(seen)
	gate := tcpmesh.NewGate()
	gate.Close()
	s := &server{ServerConfig{Observer: o, Service: func() string { return "" }, Gate: gate}}
	_, err := s.unary(incomingContext(t), nil, &grpc.UnaryServerInfo{}, func(context.Context, any) (any, error) {
		t.Error("the handler ran")
		return nil, nil
	})
	if status.Code(err) != codes.Unavailable || o.last.Reason != call.ReasonDraining {
		t.Errorf("%v %+v", err, o.last)
	}
}

func BenchmarkServerInterceptor(b *testing.B) {
	s := &server{ServerConfig{Observer: new(seen), Service: func() string { return "orders.default" }, Gate: tcpmesh.NewGate()}}
	ctx := incomingContext(b)
	info := &grpc.UnaryServerInfo{FullMethod: "/a.B/C"}
	handler := func(context.Context, any) (any, error) { return nil, nil }
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.unary(ctx, nil, info, handler); err != nil {
			b.Fatal(err)
		}
	}
}
