package admin

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// as is a listener's credentials that have attested one caller.
type as struct {
	credentials.TransportCredentials
	caller attest.Caller
}

func (a as) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, attest.Info{Caller: a.caller}, nil
}

func (a as) Clone() credentials.TransportCredentials { return a }

var orders = attest.Caller{Local: true, ID: spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/orders")}

// line is a report stream over an in-memory listener.
type line struct {
	t *testing.T
	reportpb.Report_ReportClient
	hang func()
}

type office struct {
	t   *testing.T
	r   *Reports
	end []func()
}

func (o *office) close() {
	for _, f := range slices.Backward(o.end) {
		f()
	}
	synctest.Wait()
}

func (o *office) call(caller attest.Caller) *line {
	o.t.Helper()
	lis := bufconn.Listen(1 << 16)
	srv := grpc.NewServer(grpc.Creds(as{insecure.NewCredentials(), caller}))
	o.r.Register(srv)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(lis) })
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	o.end = append(o.end, func() { cancel(); _ = conn.Close(); srv.Stop(); wg.Wait() })
	s, err := reportpb.NewReportClient(conn).Report(ctx)
	if err != nil {
		o.t.Fatal(err)
	}
	return &line{o.t, s, cancel}
}

func (l *line) say(req *reportpb.ReportRequest) {
	l.t.Helper()
	if err := l.Send(req); err != nil && !errors.Is(err, io.EOF) {
		l.t.Fatal(err)
	}
	synctest.Wait()
}

func hello(node string) *reportpb.ReportRequest {
	return &reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Hello{Hello: &reportpb.Hello{NodeId: node, Namespace: "lies", Service: "lies", SdkVersion: "0.1"}}}
}

func counters(c *reportpb.Counters) *reportpb.ReportRequest {
	return &reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Counters{Counters: c}}
}

func bubble(t *testing.T, cfg ReportsConfig, f func(t *testing.T, o *office)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		o := &office{t: t, r: NewReports(cfg)}
		defer o.close()
		f(t, o)
	})
}

func TestCountersAreSummedUnderTheCallersIdentity(t *testing.T) {
	bubble(t, ReportsConfig{}, func(t *testing.T, o *office) {
		one := &reportpb.CallCounter{Direction: "client", Service: "cart.default", Reason: "ok", Calls: 3, Failed: 1, Mtls: 2, Total: durationpb.New(time.Second), Buckets: []uint64{1, 2}}
		for range 2 {
			l := o.call(orders)
			l.say(hello("n"))
			l.say(counters(&reportpb.Counters{Calls: []*reportpb.CallCounter{one}, Dropped: 5}))
		}
		got := o.r.Counters()
		if len(got) != 1 || got[0].GetNamespace() != "default" || got[0].GetService() != "orders" || got[0].GetDropped() != 10 || len(got[0].GetCalls()) != 1 {
			t.Fatalf("counters = %v", got)
		}
		c := got[0].GetCalls()[0]
		if c.GetCalls() != 6 || c.GetFailed() != 2 || c.GetMtls() != 4 || c.GetTotal().AsDuration() != 2*time.Second || c.GetBuckets()[1] != 4 || len(c.GetBuckets()) != buckets {
			t.Errorf("sum = %v", c)
		}
	})
}

func TestCountersAreBounded(t *testing.T) {
	bubble(t, ReportsConfig{MaxSeries: 2}, func(t *testing.T, o *office) {
		l := o.call(orders)
		l.say(hello("n"))
		var calls []*reportpb.CallCounter
		for _, svc := range []string{"a", "b", "c", strings.Repeat("x", 1000)} {
			calls = append(calls, &reportpb.CallCounter{Direction: "client", Service: svc, Calls: 10, Buckets: make([]uint64, 1000)})
		}
		calls = append(calls, nil, &reportpb.CallCounter{Direction: "sideways", Calls: 1},
			&reportpb.CallCounter{Direction: "client", Service: "a", Calls: math.MaxUint64, Total: &durationpb.Duration{Seconds: math.MaxInt64}})
		l.say(counters(&reportpb.Counters{Calls: calls}))
		l.say(counters(nil))
		got := o.r.Counters()[0]
		if len(got.GetCalls()) != 2 || got.GetDropped() != 21 || got.GetCalls()[0].GetCalls() != math.MaxUint64 {
			t.Errorf("counters = %v", got)
		}
	})
}

func TestAnnouncesNowAndOnChange(t *testing.T) {
	bubble(t, ReportsConfig{}, func(t *testing.T, o *office) {
		l := o.call(orders)
		l.say(hello("n"))
		for _, want := range [][]string{{"default"}, {"default", "shop"}} {
			o.r.Announce(append([]string{"default"}, want...))
			o.r.Announce(want)
			got, err := l.Recv()
			if err != nil || !slices.Equal(got.GetAnnouncement().GetNamespaces(), want) {
				t.Errorf("announcement = %v, %v, want %v", got, err, want)
			}
		}
		late := o.call(orders)
		late.say(hello("m"))
		if got, err := late.Recv(); err != nil || len(got.GetAnnouncement().GetNamespaces()) != 2 {
			t.Errorf("late announcement = %v, %v", got, err)
		}
	})
}

// answer replies to every question on the stream until it ends.
func (l *line) answer(with string) {
	for {
		m, err := l.Recv()
		if err != nil {
			return
		}
		if q := m.GetExplain(); q != nil {
			_ = l.Send(&reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Explanation{Explanation: &reportpb.Explanation{
				Id: q.GetId(), Decision: &reportpb.Decision{Service: q.GetUrl(), Detail: with}}}})
		}
	}
}

func TestExplainAsksTheNewestLiveClient(t *testing.T) {
	bubble(t, ReportsConfig{}, func(t *testing.T, o *office) {
		ask := func() (*adminpb.ExplainResponse, error) {
			return o.r.Explain(context.Background(), "default", "orders", "GET", "http://cart/", nil)
		}
		if got, err := ask(); err != nil || got.GetAnsweredBy() != "" {
			t.Errorf("with none alive: %v, %v", got, err)
		}
		var wg sync.WaitGroup
		old, fresh := o.call(orders), o.call(orders)
		old.say(hello("old"))
		fresh.say(hello("fresh"))
		wg.Go(func() { old.answer("old") })
		wg.Go(func() { fresh.answer("fresh") })
		got, err := ask()
		if err != nil || got.GetAnsweredBy() != "fresh" || got.GetDecision().GetDetail() != "fresh" || got.GetDecision().GetService() != "http://cart/" {
			t.Errorf("explain = %v, %v", got, err)
		}
		fresh.hang()
		synctest.Wait()
		if got, err := ask(); err != nil || got.GetAnsweredBy() != "old" {
			t.Errorf("after the newest left: %v, %v", got, err)
		}
		old.hang()
		wg.Wait()
	})
}

func TestExplainDoesNotWaitForASilentClient(t *testing.T) {
	bubble(t, ReportsConfig{}, func(t *testing.T, o *office) {
		l := o.call(orders)
		l.say(hello("silent"))
		began := time.Now()
		_, err := o.r.Explain(context.Background(), "default", "orders", "GET", "http://cart/", nil)
		if err == nil || time.Since(began) != 5*time.Second || !strings.Contains(err.Error(), `"silent"`) {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		// An answer that comes late, or that nobody asked for, does nothing.
		l.say(&reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Explanation{Explanation: &reportpb.Explanation{Id: 1}}})
		l.say(&reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Explanation{}})
	})
}

func TestFieldsNotHonouredComeFromTheStatus(t *testing.T) {
	bubble(t, ReportsConfig{}, func(t *testing.T, o *office) {
		l := o.call(orders)
		l.say(hello("n-1"))
		l.say(&reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Status{Status: &reportpb.Status{Resources: []*reportpb.ResourceStatus{
			{Name: "orders.default:8080", NotHonoured: []string{"outlier_detection"}}}}}})
		sdk, fields := o.r.notHonoured("n-1", orders.ID.String())
		if sdk != "0.1" || !slices.Equal(fields, []string{"orders.default:8080: outlier_detection"}) {
			t.Errorf("notHonoured = %q %v", sdk, fields)
		}
		if _, fields := o.r.notHonoured("n-1", "spiffe://inlay.local/ns/default/svc/cart"); fields != nil {
			t.Errorf("another identity's node: %v", fields)
		}
	})
}

func TestReportsRefuse(t *testing.T) {
	for name, tc := range map[string]struct {
		caller attest.Caller
		say    []*reportpb.ReportRequest
		code   codes.Code
	}{
		"nobody":               {attest.Caller{}, []*reportpb.ReportRequest{hello("n")}, codes.Unauthenticated},
		"another trust domain": {attest.Caller{ID: spiffeid.RequireFromString("spiffe://else/ns/a/svc/b")}, []*reportpb.ReportRequest{hello("n")}, codes.PermissionDenied},
		"no service":           {attest.Caller{ID: spiffeid.RequireFromString("spiffe://inlay.local/x")}, []*reportpb.ReportRequest{hello("n")}, codes.PermissionDenied},
		"no hello":             {orders, []*reportpb.ReportRequest{counters(nil)}, codes.FailedPrecondition},
		"two hellos":           {orders, []*reportpb.ReportRequest{hello("n"), hello("n")}, codes.FailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, ReportsConfig{TrustDomain: "inlay.local"}, func(t *testing.T, o *office) {
				l := o.call(tc.caller)
				for _, m := range tc.say {
					l.say(m)
				}
				if _, err := l.Recv(); status.Code(err) != tc.code {
					t.Errorf("err = %v, want %v", err, tc.code)
				}
			})
		})
	}
}

func TestStopEndsStreams(t *testing.T) {
	bubble(t, ReportsConfig{}, func(t *testing.T, o *office) {
		l := o.call(orders)
		l.say(hello("n"))
		o.r.Stop()
		o.r.Stop()
		if _, err := l.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("err = %v", err)
		}
	})
}

// lateStream is a stream whose last message comes at the moment of its end.
type lateStream struct {
	grpc.ServerStream
	ctx  context.Context
	late bool
}

func (s *lateStream) Context() context.Context            { return s.ctx }
func (s *lateStream) Send(*reportpb.ReportResponse) error { return nil }
func (s *lateStream) Recv() (*reportpb.ReportRequest, error) {
	<-s.ctx.Done()
	if s.late {
		return nil, s.ctx.Err()
	}
	s.late = true
	return hello("n"), nil
}

func TestAMessageThatComesWithTheEndDoesNotHideIt(t *testing.T) {
	for range 64 { // which of the two is seen first is chance
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: attest.Info{Caller: orders}}))
			time.AfterFunc(time.Second, cancel)
			if err := (&reportServer{reports: NewReports(ReportsConfig{})}).Report(&lateStream{ctx: ctx}); !errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v, want canceled", err)
			}
		})
	}
}
