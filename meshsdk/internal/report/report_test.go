package report_test

import (
	"context"
	"errors"
	"net"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/report"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

func decision() *call.Decision {
	return &call.Decision{
		Service: "orders", Revision: "3", Cluster: "orders.default:8080",
		Route:      &call.RouteChoice{Object: "HTTPRoute/orders", Rule: "1", Source: "mesh.yaml:4"},
		Skipped:    []call.SkippedRoute{{Route: call.RouteChoice{Object: "HTTPRoute/orders", Rule: "0"}, Why: "path"}},
		Candidates: []call.ClusterShare{{Cluster: "a", Weight: 90}, {Cluster: "b", Weight: 10, Invalid: "nobody knows it"}},
		Endpoints: []call.EndpointView{{Address: "10.0.0.1:1", InstanceID: "i", Labels: map[string]string{"version": "v1"},
			Locality: "r/z", Priority: 1, Excluded: "draining", TLS: "mtls x"}},
		Attempts: []call.AttemptView{{Endpoint: "10.0.0.1:1", Start: time.Unix(7, 9).UTC(), Took: time.Second, Outcome: "ok", Peer: "p"}},
		Limits:   []string{"l"}, Reason: call.ReasonOK, Detail: "d",
		RequestTimeout: time.Second, PerTryTimeout: time.Millisecond, MaxRetries: 2,
	}
}

func TestDecisionSurvivesTheWire(t *testing.T) {
	want := decision()
	b, err := proto.Marshal(report.ToProto(want))
	if err != nil {
		t.Fatal(err)
	}
	m := new(reportpb.Decision)
	if err := proto.Unmarshal(b, m); err != nil {
		t.Fatal(err)
	}
	if got := fromProto(m); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if report.ToProto(nil) != nil || fromProto(nil) != nil {
		t.Error("nil is not nil")
	}
	if got := fromProto(report.ToProto(&call.Decision{})); !reflect.DeepEqual(got, &call.Decision{}) {
		t.Errorf("zero: %+v", got)
	}
}

// FuzzDecision: whatever the wire holds becomes a value, and that survives a round trip.
func FuzzDecision(f *testing.F) {
	b, err := proto.Marshal(report.ToProto(decision()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(reportpb.Decision)
		if proto.Unmarshal(b, m) != nil {
			return
		}
		one := fromProto(m)
		if two := fromProto(report.ToProto(one)); !reflect.DeepEqual(one, two) {
			t.Errorf("%+v\n%+v", one, two)
		}
	})
}

// plane is the other end.
type plane struct {
	reportpb.UnimplementedReportServer
	mu   sync.Mutex
	got  []*reportpb.ReportRequest
	say  chan *reportpb.ReportResponse
	kill chan struct{}
}

func (p *plane) Report(s reportpb.Report_ReportServer) error {
	ended := make(chan error, 1)
	go func() {
		for {
			m, err := s.Recv()
			if err != nil {
				ended <- err
				return
			}
			p.mu.Lock()
			p.got = append(p.got, m)
			p.mu.Unlock()
		}
	}()
	for {
		select {
		case m := <-p.say:
			if err := s.Send(m); err != nil {
				return err
			}
		case <-p.kill:
			return errors.New("killed")
		case <-ended:
			return nil
		}
	}
}

func (p *plane) count(is func(*reportpb.ReportRequest) bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, m := range p.got {
		if is(m) {
			n++
		}
	}
	return n
}

func connect(t *testing.T, register func(*grpc.Server)) *grpc.ClientConn {
	lis := bufconn.Listen(64 << 10)
	srv := grpc.NewServer()
	if register != nil {
		register(srv)
	}
	go srv.Serve(lis)
	t.Cleanup(srv.Stop)
	cc, err := grpc.NewClient("passthrough:///plane", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

func TestReporter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &plane{say: make(chan *reportpb.ReportResponse), kill: make(chan struct{})}
		cc := connect(t, func(s *grpc.Server) { reportpb.RegisterReportServer(s, p) })
		var mu sync.Mutex
		var announced []string
		revision, counted := "1", uint64(0)
		r := report.New(report.Config{
			Conn:  func(context.Context) (grpc.ClientConnInterface, error) { return cc, nil },
			Hello: func(context.Context) (*reportpb.Hello, error) { return &reportpb.Hello{Service: "cart"}, nil },
			Status: func() *reportpb.Status {
				mu.Lock()
				defer mu.Unlock()
				return &reportpb.Status{LoadedFrom: revision}
			},
			Counters: func() *reportpb.Counters {
				mu.Lock()
				defer mu.Unlock()
				if counted == 0 {
					return nil
				}
				c := &reportpb.Counters{Calls: []*reportpb.CallCounter{{Calls: counted}}}
				counted = 0
				return c
			},
			Explain: func(ctx context.Context, q *reportpb.ExplainQuery) (*reportpb.Decision, error) {
				if q.GetUrl() == "slow" {
					<-ctx.Done()
					return nil, context.Cause(ctx)
				}
				return &reportpb.Decision{Service: q.GetUrl()}, nil
			},
			Announce: func(n []string) {
				mu.Lock()
				defer mu.Unlock()
				announced = n
			},
		})
		done := make(chan struct{})
		go func() { r.Run(t.Context()); close(done) }()
		synctest.Wait()
		hellos := func(m *reportpb.ReportRequest) bool { return m.GetHello().GetService() == "cart" }
		statuses := func(m *reportpb.ReportRequest) bool { return m.GetStatus() != nil }
		if p.count(hellos) != 1 || p.count(statuses) != 1 {
			t.Fatalf("hello %d, status %d", p.count(hellos), p.count(statuses))
		}

		// A status that does not change is not told again; counters come each second, when there are any.
		time.Sleep(5 * time.Second)
		if p.count(statuses) != 1 {
			t.Errorf("status told %d times", p.count(statuses))
		}
		mu.Lock()
		revision, counted = "2", 5
		mu.Unlock()
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		fives := func(m *reportpb.ReportRequest) bool {
			return len(m.GetCounters().GetCalls()) == 1 && m.GetCounters().GetCalls()[0].GetCalls() == 5
		}
		if p.count(statuses) != 2 || p.count(fives) != 1 {
			t.Errorf("status %d, counters %d", p.count(statuses), p.count(fives))
		}

		// Announcements are sorted and bounded.
		p.say <- &reportpb.ReportResponse{Kind: &reportpb.ReportResponse_Announcement{Announcement: &reportpb.Announcement{
			Namespaces: []string{"shop", "", "default", "shop", string(make([]byte, 64))}}}}
		synctest.Wait()
		mu.Lock()
		if !slices.Equal(announced, []string{"default", "shop"}) {
			t.Errorf("announced %q", announced)
		}
		mu.Unlock()

		// Questions: an answer, one that takes too long, and too many at once.
		ask := func(id uint64, url string) {
			p.say <- &reportpb.ReportResponse{Kind: &reportpb.ReportResponse_Explain{Explain: &reportpb.ExplainQuery{Id: id, Url: url}}}
		}
		ask(1, "orders")
		for i := range uint64(17) {
			ask(10+i, "slow")
		}
		synctest.Wait()
		answered := func(id uint64) func(*reportpb.ReportRequest) bool {
			return func(m *reportpb.ReportRequest) bool {
				e := m.GetExplanation()
				return e != nil && e.GetId() == id && (e.GetError() != "" || e.GetDecision().GetService() == "orders")
			}
		}
		if p.count(answered(1)) != 1 || p.count(answered(26)) != 1 || p.count(answered(10)) != 0 {
			t.Errorf("answers: %d %d %d", p.count(answered(1)), p.count(answered(26)), p.count(answered(10)))
		}
		time.Sleep(5100 * time.Millisecond)
		synctest.Wait()
		if p.count(answered(10)) != 1 {
			t.Error("a question without an answer in 5 s was not answered with an error")
		}

		// A broken stream is opened again and says hello again.
		p.kill <- struct{}{}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if p.count(hellos) != 2 {
			t.Errorf("hello %d times after a broken stream", p.count(hellos))
		}

		// Finish sends what was counted last.
		mu.Lock()
		counted = 5
		mu.Unlock()
		r.Finish(t.Context())
		<-done
		if p.count(fives) != 2 {
			t.Error("the last counters were lost")
		}
		cc.Close()
	})
}

func TestReporterWithoutAControlPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		r := report.New(report.Config{
			Conn: func(ctx context.Context) (grpc.ClientConnInterface, error) {
				tries++
				<-ctx.Done()
				return nil, ctx.Err()
			},
			Hello: func(context.Context) (*reportpb.Hello, error) { return nil, errors.New("unknown") },
		})
		done := make(chan struct{})
		go func() { r.Run(t.Context()); close(done) }()
		synctest.Wait()
		start := time.Now()
		r.Finish(t.Context()) // nobody to send to
		<-done
		if d := time.Since(start); d != 0 || tries != 1 {
			t.Errorf("Finish took %v, %d tries", d, tries)
		}
	})
}

func TestReporterLeavesAForeignControlPlaneAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := connect(t, nil)
		var tries atomic.Int64
		r := report.New(report.Config{
			Conn:  func(context.Context) (grpc.ClientConnInterface, error) { tries.Add(1); return cc, nil },
			Hello: func(context.Context) (*reportpb.Hello, error) { return &reportpb.Hello{}, nil },
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { r.Run(ctx); close(done) }()
		time.Sleep(4 * time.Minute)
		if tries.Load() > 2 {
			t.Errorf("%d tries in 4 minutes at a server without the service", tries.Load())
		}
		cancel()
		<-done
		cc.Close()
	})
}
