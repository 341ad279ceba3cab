package report

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

const (
	// interval is how often counters, and a status that changed, are sent.
	interval = time.Second
	// explainTimeout bounds one answer.
	explainTimeout = 5 * time.Second
	// maxQueries bounds the questions under way at once; more are refused.
	maxQueries = 16
	// maxNamespaces and maxNamespace bound what an announcement may make us hold.
	maxNamespaces, maxNamespace = 65536, 63

	backoffBase, backoffMax = 200 * time.Millisecond, 4 * time.Second
	// unimplementedWait is for a control plane that has no report service: another of the field.
	unimplementedWait = 5 * time.Minute
)

// Clock tells time; nil is the real one.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// Config is where a Reporter gets what it tells. All functions but Conn and Hello return at once
// and are called from its goroutines.
type Config struct {
	// Conn returns the connection to the control plane, waiting until there is one. Required.
	Conn func(ctx context.Context) (grpc.ClientConnInterface, error)
	// Hello says who we are, waiting until that is known. Required.
	Hello func(ctx context.Context) (*reportpb.Hello, error)
	// Status is the state of configuration and identity; nil sends none.
	Status func() *reportpb.Status
	// Counters takes what was counted since the last time; nil when there is nothing to tell. It is
	// only asked while a stream is there: what is counted meanwhile stays with its owner.
	Counters func() *reportpb.Counters
	// Explain answers a question; nil refuses all.
	Explain func(ctx context.Context, q *reportpb.ExplainQuery) (*reportpb.Decision, error)
	// Announce hears each announcement: namespaces, sorted, without repetition.
	Announce func(namespaces []string)
	Clock    Clock
	Log      *slog.Logger // nil discards
}

// Reporter keeps the stream. Make it with New.
type Reporter struct {
	cfg       Config
	finishing context.Context // done when Finish was called
	finish    context.CancelFunc
	ended     chan struct{} // closed when Run has returned
}

// New returns a reporter at rest; nothing runs until Run.
func New(cfg Config) *Reporter {
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Reporter{cfg: cfg, ended: make(chan struct{})}
	r.finishing, r.finish = context.WithCancel(context.Background())
	return r
}

// Finish sends what was counted last and ends the stream, for as long as ctx allows; Run then
// returns. Without a stream there is nobody to send to, and Run returns at once.
func (r *Reporter) Finish(ctx context.Context) {
	r.finish()
	select {
	case <-r.ended:
	case <-ctx.Done():
	}
}

// Run keeps a stream until ctx is done or Finish is called, opening it again with back-off, and
// returns when every goroutine it started has ended. It may be called once.
func (r *Reporter) Run(ctx context.Context) {
	defer close(r.ended)
	failures := 0
	for {
		heard, err := r.session(ctx)
		if ctx.Err() != nil || r.finishing.Err() != nil {
			return
		}
		if heard {
			failures = 0
		}
		d := min(backoffBase<<min(failures, 8), backoffMax)
		d = d/2 + time.Duration(rand.Int64N(int64(d/2)+1))
		if status.Code(err) == codes.Unimplemented {
			d = unimplementedWait
		}
		failures++
		r.cfg.Log.DebugContext(ctx, "report stream ended", "err", err, "retry_in", d)
		if !r.sleep(ctx, d) {
			return
		}
	}
}

// session is one stream. heard is true when the control plane said anything.
func (r *Reporter) session(ctx context.Context) (heard bool, err error) {
	cc, hello, err := r.prepare(ctx)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // runs first
	stream, err := reportpb.NewReportClient(cc).Report(ctx)
	if err != nil {
		return false, err
	}
	send := func(m *reportpb.ReportRequest) error { return stream.Send(m) }
	if err := send(&reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Hello{Hello: hello}}); err != nil {
		_, err := stream.Recv() // the reason is there
		return false, err
	}

	got := make(chan *reportpb.ReportResponse)
	broken := make(chan error, 1)
	wg.Go(func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				broken <- err
				return
			}
			select {
			case got <- m:
			case <-ctx.Done():
				return
			}
		}
	})

	answers := make(chan *reportpb.Explanation, maxQueries)
	pending := 0
	tick := make(chan struct{}, 1)
	arm := func() func() bool {
		return r.cfg.Clock.AfterFunc(interval, func() { tick <- struct{}{} })
	}
	stop := arm()
	defer func() { stop() }()
	var told *reportpb.Status
	if told, err = r.tellStatus(send, nil); err != nil {
		return false, err
	}
	finishing := r.finishing.Done()
	for {
		var err error
		select {
		case <-ctx.Done():
			return heard, ctx.Err()
		case err := <-broken:
			return heard, err
		case m := <-got:
			heard = true
			switch kind := m.GetKind().(type) {
			case *reportpb.ReportResponse_Announcement:
				r.announce(kind.Announcement.GetNamespaces())
			case *reportpb.ReportResponse_Explain:
				q := kind.Explain
				if r.cfg.Explain == nil || pending == maxQueries {
					err = send(explanation(&reportpb.Explanation{Id: q.GetId(), Error: "too many questions at once: ask again"}))
					break
				}
				pending++
				wg.Go(func() { answers <- r.answer(ctx, q) }) // never blocks: one place for each pending
			default:
				// A newer control plane says something that this SDK need not hear.
			}
		case a := <-answers:
			pending--
			err = send(explanation(a))
		case <-tick:
			if told, err = r.tellStatus(send, told); err != nil {
				break
			}
			err = r.counters(send)
			stop = arm()
		case <-finishing:
			finishing = nil // the end of the stream comes by broken
			if err = r.counters(send); err == nil {
				err = stream.CloseSend()
			}
		}
		if err != nil {
			// The reason of a failed Send comes from Recv.
			select {
			case err = <-broken:
			case <-ctx.Done():
				err = ctx.Err()
			}
			return heard, err
		}
	}
}

// prepare waits for what a stream needs, until Finish.
func (r *Reporter) prepare(ctx context.Context) (grpc.ClientConnInterface, *reportpb.Hello, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.finishing, cancel)()
	cc, err := r.cfg.Conn(ctx)
	if err != nil {
		return nil, nil, err
	}
	hello, err := r.cfg.Hello(ctx)
	return cc, hello, err
}

func (r *Reporter) counters(send func(*reportpb.ReportRequest) error) error {
	if r.cfg.Counters == nil {
		return nil
	}
	c := r.cfg.Counters()
	if c == nil {
		return nil
	}
	return send(&reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Counters{Counters: c}})
}

func explanation(e *reportpb.Explanation) *reportpb.ReportRequest {
	return &reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Explanation{Explanation: e}}
}

// tellStatus sends the status if it is another than told, and returns what is told now.
func (r *Reporter) tellStatus(send func(*reportpb.ReportRequest) error, told *reportpb.Status) (*reportpb.Status, error) {
	if r.cfg.Status == nil {
		return nil, nil
	}
	s := r.cfg.Status()
	if s == nil || proto.Equal(s, told) {
		return told, nil
	}
	return s, send(&reportpb.ReportRequest{Kind: &reportpb.ReportRequest_Status{Status: s}})
}

// answer explains within bounds.
func (r *Reporter) answer(ctx context.Context, q *reportpb.ExplainQuery) *reportpb.Explanation {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := r.cfg.Clock.AfterFunc(explainTimeout, func() {
		cancel(errors.New("no answer within 5 s"))
	})
	defer stop()
	d, err := r.cfg.Explain(ctx, q)
	out := &reportpb.Explanation{Id: q.GetId(), Decision: d}
	if err != nil {
		out.Error = err.Error()
	}
	return out
}

func (r *Reporter) announce(names []string) {
	if r.cfg.Announce == nil || len(names) > maxNamespaces {
		return
	}
	kept := make([]string, 0, len(names))
	for _, n := range names {
		if n != "" && len(n) <= maxNamespace {
			kept = append(kept, n)
		}
	}
	slices.Sort(kept)
	r.cfg.Announce(slices.Compact(kept))
}

func (r *Reporter) sleep(ctx context.Context, d time.Duration) bool {
	passed := make(chan struct{})
	stop := r.cfg.Clock.AfterFunc(d, func() { close(passed) })
	defer stop()
	select {
	case <-passed:
		return true
	case <-ctx.Done():
		return false
	case <-r.finishing.Done():
		return false
	}
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}
