package grpcmesh_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/xds/resource"
)

var again = &resource.Retry{On: []string{"unavailable"}, Attempts: 2, Base: time.Millisecond}

// pair is a mesh with one server under "orders".
func pair(t testing.TB, s *server, change func(*resource.Route)) *mesh {
	ca, n := newAuthority(t), newNetwork()
	s.start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	r := resource.Route{Name: "all", Clusters: []resource.WeightedCluster{{Name: "orders.default:8080", Weight: 1}}}
	if change != nil {
		change(&r)
	}
	m.publish(serviceOf("orders", []resource.Route{r}, clusterOf("orders.default:8080", s.endpoint())))
	return m
}

func withRetry(r *resource.Route) { r.Retry = again }

// bodies receives everything and gives the bodies, and the error that ended the stream.
func bodies(st testpb.TestService_FullDuplexCallServer) (all []string, err error) {
	for {
		m, err := st.Recv()
		if err != nil {
			return all, err
		}
		all = append(all, string(m.GetPayload().GetBody()))
	}
}

func TestStreamIsReplayed(t *testing.T) {
	s := &server{}
	var mu sync.Mutex
	var seen [][]string
	s.duplex = func(st testpb.TestService_FullDuplexCallServer) error {
		all, err := bodies(st) // until the half-close
		mu.Lock()
		seen = append(seen, all)
		attempt := len(seen)
		mu.Unlock()
		if !errors.Is(err, io.EOF) {
			return err
		}
		if attempt < 3 {
			return status.Error(codes.Unavailable, "not yet")
		}
		st.SetTrailer(metadata.Pairs("attempt", fmt.Sprint(attempt)))
		for _, b := range all {
			if err := st.Send(&testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: []byte(b)}}); err != nil {
				return err
			}
		}
		return nil
	}
	m := pair(t, s, withRetry)
	st, err := m.test("orders").FullDuplexCall(ctxFor(t))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if err := st.Send(payload(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		r, err := st.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if got := string(r.GetPayload().GetBody()); got != fmt.Sprint(i) {
			t.Fatalf("message %d is %q", i, got)
		}
	}
	if _, err := st.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("end %v, want io.EOF", err)
	}
	if got := header(st.Trailer(), "attempt"); got != "3" {
		t.Errorf("trailer of attempt %q, want 3", got)
	}
	if len(seen) != 3 || fmt.Sprint(seen[0]) != fmt.Sprint(seen[2]) || len(seen[2]) != 10 {
		t.Errorf("server saw %v", seen)
	}
	if rec := m.rec.last(t); rec.Attempts != 3 || rec.Reason != call.ReasonOK || m.rec.count() != 1 {
		t.Errorf("record %+v, %d records", rec, m.rec.count())
	}
}

func TestHeaderRepeatsToo(t *testing.T) {
	s := &server{}
	s.duplex = func(st testpb.TestService_FullDuplexCallServer) error {
		if s.calls.Load() == 1 {
			return status.Error(codes.Unavailable, "not yet")
		}
		if err := st.SendHeader(metadata.Pairs("who", "second")); err != nil {
			return err
		}
		return echo(st)
	}
	m := pair(t, s, withRetry)
	st, err := m.test("orders").FullDuplexCall(ctxFor(t))
	if err != nil {
		t.Fatal(err)
	}
	md, err := st.Header()
	if err != nil || header(md, "who") != "second" {
		t.Fatalf("header %v, %v", md, err)
	}
	if err := st.Send(payload(7)); err != nil {
		t.Fatal(err)
	}
	if r, err := st.Recv(); err != nil || string(r.GetPayload().GetBody()) != "7" {
		t.Fatalf("%v, %v", r, err)
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Recv(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

func TestHeaderOfAFailureIsNilAndRecvHasTheStatus(t *testing.T) {
	s := &server{}
	s.duplex = func(testpb.TestService_FullDuplexCallServer) error { return status.Error(codes.NotFound, "no") }
	m := pair(t, s, withRetry)
	st, err := m.test("orders").FullDuplexCall(ctxFor(t))
	if err != nil {
		t.Fatal(err)
	}
	if md, err := st.Header(); md != nil || err != nil {
		t.Errorf("header %v, %v", md, err)
	}
	for range 2 { // and stays
		_, err = st.Recv()
		wantCode(t, err, codes.NotFound, call.ReasonUpstreamStatus)
	}
}

func TestAnswerCommits(t *testing.T) {
	for name, duplex := range map[string]func(testpb.TestService_FullDuplexCallServer) error{
		"by a message": func(st testpb.TestService_FullDuplexCallServer) error {
			return st.Send(&testpb.StreamingOutputCallResponse{})
		},
		"by a header": func(st testpb.TestService_FullDuplexCallServer) error { return st.SendHeader(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{}
			s.duplex = func(st testpb.TestService_FullDuplexCallServer) error {
				if err := duplex(st); err != nil {
					return err
				}
				return status.Error(codes.Unavailable, "after the answer")
			}
			m := pair(t, s, withRetry)
			st, err := m.test("orders").FullDuplexCall(ctxFor(t))
			if err != nil {
				t.Fatal(err)
			}
			for err == nil {
				_, err = st.Recv()
			}
			wantCode(t, err, codes.Unavailable, call.ReasonUpstreamStatus)
			if !strings.Contains(err.Error(), "after the answer") {
				t.Errorf("error %q", err)
			}
			if s.calls.Load() != 1 {
				t.Errorf("%d attempts after the answer began, want 1", s.calls.Load())
			}
		})
	}
}

func TestOverflowOfTheBufferCommits(t *testing.T) {
	s := &server{}
	s.input = func(st testpb.TestService_StreamingInputCallServer) error {
		n := 0
		for n < 300 {
			m, err := st.Recv()
			if err != nil {
				return err
			}
			n += len(m.GetPayload().GetBody()) >> 10
		}
		return status.Error(codes.Unavailable, "enough")
	}
	m := pair(t, s, withRetry)
	st, err := m.test("orders").StreamingInputCall(ctxFor(t))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil { // 256 KiB is the bound of a call
		err = st.Send(&testpb.StreamingInputCallRequest{Payload: &testpb.Payload{Body: make([]byte, 1<<10)}})
	}
	if !errors.Is(err, io.EOF) {
		t.Fatalf("send ended with %v, want io.EOF", err)
	}
	_, err = st.CloseAndRecv()
	wantCode(t, err, codes.Unavailable, call.ReasonUpstreamStatus)
	if s.calls.Load() != 1 {
		t.Errorf("%d attempts, want 1", s.calls.Load())
	}
}

func TestClientStreamThatOnlySendsIsRepeated(t *testing.T) {
	s := &server{}
	s.input = func(st testpb.TestService_StreamingInputCallServer) error {
		if s.calls.Load() == 1 {
			return status.Error(codes.Unavailable, "at once")
		}
		n := int32(0)
		for {
			_, err := st.Recv()
			if errors.Is(err, io.EOF) {
				return st.SendAndClose(&testpb.StreamingInputCallResponse{AggregatedPayloadSize: n})
			}
			if err != nil {
				return err
			}
			n++
		}
	}
	m := pair(t, s, withRetry)
	st, err := m.test("orders").StreamingInputCall(ctxFor(t))
	if err != nil {
		t.Fatal(err)
	}
	for s.calls.Load() < 2 { // until the failure was found by sending
		if err := st.Send(&testpb.StreamingInputCallRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Send(&testpb.StreamingInputCallRequest{}); err != nil {
		t.Fatal(err)
	}
	r, err := st.CloseAndRecv()
	if err != nil {
		t.Fatal(err)
	}
	if r.GetAggregatedPayloadSize() < 2 {
		t.Errorf("the second attempt saw %d messages, want all", r.GetAggregatedPayloadSize())
	}
	if rec := m.rec.last(t); rec.Attempts != 2 || m.rec.count() != 1 {
		t.Errorf("record %+v, %d records", rec, m.rec.count())
	}
}

func TestServerStream(t *testing.T) {
	s := &server{}
	s.output = func(_ *testpb.StreamingOutputCallRequest, st testpb.TestService_StreamingOutputCallServer) error {
		if s.calls.Load() == 1 {
			return status.Error(codes.Unavailable, "not yet")
		}
		for range 3 {
			if err := st.Send(&testpb.StreamingOutputCallResponse{}); err != nil {
				return err
			}
		}
		return nil
	}
	m := pair(t, s, withRetry)
	st, err := m.test("orders").StreamingOutputCall(ctxFor(t), &testpb.StreamingOutputCallRequest{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; err == nil; n++ {
		_, err = st.Recv()
	}
	if !errors.Is(err, io.EOF) || n != 4 || s.calls.Load() != 2 {
		t.Errorf("%d receives, %v, %d calls", n, err, s.calls.Load())
	}
}

func TestStreamThatIsLeftIsRecorded(t *testing.T) {
	s := &server{}
	left := make(chan struct{})
	s.duplex = func(st testpb.TestService_FullDuplexCallServer) error {
		<-st.Context().Done()
		close(left)
		return nil
	}
	ended := make(chan *call.Decision, 1)
	m := pair(t, s, nil)
	ctx, cancel := context.WithCancel(call.WithTrace(ctxFor(t), &call.Trace{Done: func(d *call.Decision) { ended <- d }}))
	if _, err := m.test("orders").FullDuplexCall(ctx); err != nil {
		t.Fatal(err)
	}
	cancel()
	if d := <-ended; d.Reason != call.ReasonCancelled {
		t.Errorf("recorded as %v", d.Reason)
	}
	<-left
	t.Run("by the end of the channel", func(t *testing.T) {
		s.duplex = func(st testpb.TestService_FullDuplexCallServer) error { <-st.Context().Done(); return nil }
		cc := m.conn("orders")
		st, err := testpb.NewTestServiceClient(cc).FullDuplexCall(call.WithTrace(context.Background(), &call.Trace{Done: func(d *call.Decision) { ended <- d }}))
		if err != nil {
			t.Fatal(err)
		}
		_ = cc.Close()
		if d := <-ended; d.Reason != call.ReasonCancelled {
			t.Errorf("recorded as %v", d.Reason)
		}
		_, err = st.Recv()
		wantCode(t, err, codes.Canceled, call.ReasonCancelled)
	})
}

// A panic that somebody above recovers must not cost a place under the limit for good.
func TestACallThatPanicsGivesBackWhatItHolds(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{}).start(t, n, ca.issue("orders"))
	m := newMesh(t, n, ca.issue("cart"))
	cl := clusterOf("orders.default:8080", s.endpoint())
	m.publish(serviceOf("orders", nil, cl))
	conn, err := grpc.NewClient("orders", append(m.client.DialOptions(),
		grpc.WithChainUnaryInterceptor(func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
			panic("unary")
		}),
		grpc.WithChainStreamInterceptor(func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, grpc.Streamer, ...grpc.CallOption) (grpc.ClientStream, error) {
			panic("stream")
		}))...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := testpb.NewTestServiceClient(conn)
	for want, call := range map[string]func(){
		"unary":  func() { _, _ = client.UnaryCall(ctxFor(t), &testpb.SimpleRequest{}) },
		"stream": func() { _, _ = client.FullDuplexCall(ctxFor(t)) },
	} {
		func() {
			defer func() {
				if got := recover(); got != want {
					t.Errorf("recovered %v, want %v", got, want)
				}
			}()
			call()
		}()
		if n := cl.Limiter.InFlight(); n != 0 {
			t.Errorf("%s: %d places are taken", want, n)
		}
	}
	if m.rec.count() != 2 || m.rec.last(t).Reason != call.ReasonCancelled {
		t.Errorf("%d records, the last %+v", m.rec.count(), m.rec.last(t))
	}
}

func TestTimes(t *testing.T) {
	hang := func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
		<-ctx.Done()
		// A status on its way at the very instant of the timer would be a response that has begun
		// (gRFC A6) or not, as it happens.
		time.Sleep(time.Millisecond)
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	for name, tc := range map[string]struct {
		change    func(*resource.Route)
		reason    call.Reason
		took      time.Duration
		attempts  int
		wantCalls int64
	}{
		"request": {func(r *resource.Route) { r.Timeout = 2 * time.Second }, call.ReasonTimeout, 2 * time.Second, 1, 1},
		"per try": {func(r *resource.Route) {
			r.Retry = &resource.Retry{On: []string{"unavailable"}, Attempts: 1, PerTry: time.Second, Base: time.Nanosecond, Max: time.Nanosecond}
		}, call.ReasonRetryExhausted, 2 * time.Second, 2, 2},
		"idle": {func(r *resource.Route) { r.IdleTimeout = 3 * time.Second }, call.ReasonTimeout, 3 * time.Second, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &server{unary: hang}
				m := pair(t, s, tc.change)
				start := time.Now()
				_, err := m.test("orders").UnaryCall(context.Background(), &testpb.SimpleRequest{})
				wantCode(t, err, codes.DeadlineExceeded, tc.reason)
				if took := time.Since(start).Round(10 * time.Millisecond); took != tc.took {
					t.Errorf("took %v, want %v", took, tc.took)
				}
				if rec := m.rec.last(t); rec.Attempts != tc.attempts || s.calls.Load() != tc.wantCalls {
					t.Errorf("%d attempts, %d calls", rec.Attempts, s.calls.Load())
				}
				time.Sleep(time.Millisecond) // the last handler ends
				synctest.Wait()
			})
		})
	}
}

func TestTimesOfAStream(t *testing.T) {
	talk := func(t *testing.T, st testpb.TestService_FullDuplexCallClient, pause time.Duration, n int) error {
		for i := range n {
			if err := st.Send(payload(i)); err != nil {
				break
			}
			if _, err := st.Recv(); err != nil {
				return err
			}
			time.Sleep(pause) // of the bubble
		}
		return nil
	}
	t.Run("messages keep an idle stream alive, silence ends it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m := pair(t, &server{}, func(r *resource.Route) { r.IdleTimeout = 3 * time.Second })
			st, err := m.test("orders").FullDuplexCall(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if err := talk(t, st, 2*time.Second, 5); err != nil {
				t.Fatal(err)
			}
			_, err = st.Recv()
			wantCode(t, err, codes.DeadlineExceeded, call.ReasonTimeout)
		})
	})
	t.Run("the time of an attempt ends with the first answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m := pair(t, &server{}, func(r *resource.Route) {
				r.Retry = &resource.Retry{On: []string{"unavailable"}, Attempts: 1, PerTry: time.Second}
			})
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			st, err := m.test("orders").FullDuplexCall(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := talk(t, st, 2*time.Second, 3); err != nil {
				t.Fatal(err)
			}
			if err := st.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if _, err := st.Recv(); !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		})
	})
	t.Run("an attempt without answer is repeated", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := &server{}
			s.duplex = func(st testpb.TestService_FullDuplexCallServer) error {
				if s.calls.Load() == 1 {
					<-st.Context().Done()
					return nil
				}
				return echo(st)
			}
			m := pair(t, s, func(r *resource.Route) {
				r.Retry = &resource.Retry{On: []string{"unavailable"}, Attempts: 1, PerTry: time.Second}
			})
			st, err := m.test("orders").FullDuplexCall(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if err := talk(t, st, 0, 1); err != nil {
				t.Fatal(err)
			}
			if s.calls.Load() != 2 {
				t.Errorf("%d attempts, want 2", s.calls.Load())
			}
			if err := st.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if _, err := st.Recv(); !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		})
	})
	t.Run("the request timeout bounds it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m := pair(t, &server{}, func(r *resource.Route) { r.Timeout = 3 * time.Second })
			st, err := m.test("orders").FullDuplexCall(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			err = talk(t, st, 2*time.Second, 5)
			if err == nil {
				_, err = st.Recv()
			}
			wantCode(t, err, codes.DeadlineExceeded, call.ReasonTimeout)
		})
	})
}

func TestServerThatDiesIsReset(t *testing.T) {
	s := &server{}
	begun := make(chan struct{})
	s.duplex = func(st testpb.TestService_FullDuplexCallServer) error {
		close(begun)
		<-st.Context().Done()
		return nil
	}
	m := pair(t, s, nil)
	st, err := m.test("orders").FullDuplexCall(ctxFor(t))
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	s.grpc.Stop()
	_, err = st.Recv()
	wantCode(t, err, codes.Unavailable, call.ReasonReset)
}

var _ grpc.ClientStream = testpb.TestService_FullDuplexCallClient(nil)

// A server is told of the time of an attempt only where nothing takes that back: when the answer of
// a stream has begun, it may take the time of the whole call.
func TestDeadlineThatTheServerSees(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen []time.Duration
		look := func(ctx context.Context) {
			end, _ := ctx.Deadline()
			seen = append(seen, time.Until(end).Round(10*time.Millisecond))
		}
		s := &server{}
		s.unary = func(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
			look(ctx)
			return &testpb.SimpleResponse{}, nil
		}
		s.duplex = func(st testpb.TestService_FullDuplexCallServer) error {
			look(st.Context())
			return echo(st)
		}
		m := pair(t, s, func(r *resource.Route) {
			r.Timeout = 10 * time.Second
			r.Retry = &resource.Retry{On: []string{"unavailable"}, Attempts: 1, PerTry: time.Second}
		})
		c := m.test("orders")
		if _, err := c.UnaryCall(context.Background(), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
		st, err := c.FullDuplexCall(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if want := []time.Duration{time.Second, 10 * time.Second}; !slices.Equal(seen, want) {
			t.Errorf("deadlines %v, want %v", seen, want)
		}
	})
}
