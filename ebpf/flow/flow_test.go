package flow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/flow"
	"github.com/inlay-mesh/inlay/ebpf/flow/query"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// names is a Namer with one caller, one service, one rule.
type names struct{}

const (
	billing = 1000
	orders  = 2000
	rule    = 7
)

func (names) Identity(n uint64) (flow.Identity, bool) {
	switch n {
	case billing:
		return flow.Identity{Namespace: "shop", Service: "billing", Labels: map[string]string{"version": "v2"}}, true
	case orders:
		return flow.Identity{Namespace: "default", Service: "orders"}, true
	}
	return flow.Identity{}, false
}

func (names) Rule(n uint32) (flow.Rule, bool) {
	return flow.Rule{Policy: "default/orders", Name: "from-billing", Source: "mesh.yaml:14"}, n == rule
}

func (names) ServiceAt(at netip.AddrPort, proto uint8) (string, uint16, bool) {
	return "default/orders", 8080, at == netip.MustParseAddrPort("198.18.0.1:8080") && proto == 6
}

func addr(s string) bpfobj.InlayAddr { return bpfobj.InlayAddr{B: netip.MustParseAddr(s).As16()} }

// be is a port in network order.
func be(port uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], port)
	return binary.NativeEndian.Uint16(b[:])
}

const booted = 1_000_000_000_000 // what the monotonic clock of tests shows, in ns

var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// clock stands still at noon.
type clock struct{}

func (clock) Now() time.Time                                     { return noon }
func (clock) AfterFunc(time.Duration, func()) (stop func() bool) { return func() bool { return false } }

func still(cfg flow.Config) *flow.Log {
	cfg.Namer, cfg.Clock = names{}, clock{}
	cfg.Monotonic = func() uint64 { return booted }
	return flow.New(cfg)
}

// call is a closed connection of billing to orders by its service address.
func call() bpfobj.InlayEvent {
	return bpfobj.InlayEvent{
		Time: booted - 2e9, Start: booted - 5e9, Identity: billing, Peer: orders, Cookie: 77,
		TxBytes: 100, RxBytes: 2000, Local: addr("127.0.0.1"), Remote: addr("10.0.0.9"), Vip: addr("198.18.0.1"),
		LocalPort: be(40000), RemotePort: be(9090), VipPort: be(8080), Rule: rule, Retrans: 3, SrttUs: 250,
		Kind: uint8(bpfobj.InlayEventKindEVENT_CLOSE), Dir: uint8(bpfobj.InlayDirDIR_EGRESS), Proto: 6,
		Verdict: uint8(bpfobj.InlayVerdictVERDICT_ALLOW),
	}
}

func with(e bpfobj.InlayEvent, change func(*bpfobj.InlayEvent)) bpfobj.InlayEvent {
	change(&e)
	return e
}

// observe returns what an observer without follow gets.
func observe(t testing.TB, l *flow.Log, req *nodepb.ObserveRequest) []*nodepb.Flow {
	t.Helper()
	var out []*nodepb.Flow
	err := l.Observe(context.Background(), req, func(r *nodepb.ObserveResponse) error {
		out = append(out, r.GetFlow())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRecordBecomesFlow(t *testing.T) {
	full := func() *nodepb.Flow {
		return &nodepb.Flow{
			Time: timestamppb.New(noon.Add(-2 * time.Second)), Kind: "close", Direction: "egress", Protocol: "tcp",
			From:           &nodepb.FlowPeer{Name: "billing.shop", Identity: billing, Address: "127.0.0.1:40000", Labels: map[string]string{"version": "v2"}},
			To:             &nodepb.FlowPeer{Name: "orders.default", Identity: orders, Address: "10.0.0.9:9090"},
			ServiceAddress: "198.18.0.1:8080", Verdict: "allowed", Reason: "ok",
			Policy: "default/orders", Rule: "from-billing", Source: "mesh.yaml:14",
			BytesSent: 100, BytesReceived: 2000, Retransmits: 3,
			Rtt: durationpb.New(250 * time.Microsecond), Duration: durationpb.New(3 * time.Second),
		}
	}
	for name, tc := range map[string]struct {
		event func(*bpfobj.InlayEvent)
		want  func(*nodepb.Flow)
	}{
		"a call by service address": {func(*bpfobj.InlayEvent) {}, func(*nodepb.Flow) {}},
		"ingress is from the peer to the workload": {
			func(e *bpfobj.InlayEvent) {
				e.Dir, e.Vip, e.VipPort = uint8(bpfobj.InlayDirDIR_INGRESS), bpfobj.InlayAddr{}, 0
			},
			func(f *nodepb.Flow) {
				f.Direction, f.ServiceAddress = "ingress", ""
				f.From, f.To = f.To, f.From
			},
		},
		"no rule, no policy": {
			func(e *bpfobj.InlayEvent) { e.Rule, e.Verdict = 0, 0 },
			func(f *nodepb.Flow) { f.Policy, f.Rule, f.Source, f.Reason = "", "", "", "no_policy" },
		},
		"a reset, of a connection older than the agent, to a hinted peer": {
			func(e *bpfobj.InlayEvent) {
				e.Flags = uint8(bpfobj.InlayFlowFlagFLOW_RESET | bpfobj.InlayFlowFlagFLOW_OLD | bpfobj.InlayFlowFlagFLOW_HINT)
			},
			func(f *nodepb.Flow) { f.Reset_, f.BeforeAgent, f.To.Hint, f.Reason = true, true, true, "reset" },
		},
		"a refusal has no duration and names the errno": {
			func(e *bpfobj.InlayEvent) {
				e.Kind, e.Verdict, e.Err, e.Start, e.SrttUs = uint8(bpfobj.InlayEventKindEVENT_DENIED), uint8(bpfobj.InlayVerdictVERDICT_DENY), 1, 0, 0
			},
			func(f *nodepb.Flow) {
				f.Kind, f.Verdict, f.Reason, f.Errno, f.Rtt, f.Duration = "denied", "denied", "denied", 1, nil, nil
			},
		},
		"a service without endpoint is named all the same": {
			func(e *bpfobj.InlayEvent) {
				e.Kind, e.Verdict, e.Err, e.Rule, e.Peer = uint8(bpfobj.InlayEventKindEVENT_DENIED), uint8(bpfobj.InlayVerdictVERDICT_NONE), 111, 0, 0
				e.Remote, e.RemotePort = bpfobj.InlayAddr{}, 0
			},
			func(f *nodepb.Flow) {
				f.Kind, f.Verdict, f.Reason, f.Errno = "denied", "denied", "no_endpoint", 111
				f.Policy, f.Rule, f.Source = "", "", ""
				f.To.Identity, f.To.Address = 0, ""
			},
		},
		"a port that the service does not have": {
			func(e *bpfobj.InlayEvent) {
				e.Kind, e.Verdict, e.Err, e.Rule, e.Peer = uint8(bpfobj.InlayEventKindEVENT_DENIED), uint8(bpfobj.InlayVerdictVERDICT_NONE), 111, 0, 0
				e.Remote, e.RemotePort = bpfobj.InlayAddr{}, 0
				e.Flags = uint8(bpfobj.InlayFlowFlagFLOW_NO_PORT)
			},
			func(f *nodepb.Flow) {
				f.Kind, f.Verdict, f.Reason, f.Errno = "denied", "denied", "no_port", 111
				f.Policy, f.Rule, f.Source = "", "", ""
				f.To.Identity, f.To.Address = 0, ""
			},
		},
		"a connection that a new deny ended": {
			func(e *bpfobj.InlayEvent) { e.Verdict = uint8(bpfobj.InlayVerdictVERDICT_DENY) },
			func(f *nodepb.Flow) { f.Verdict, f.Reason = "denied", "denied" },
		},
		"a policy that denies with ECONNREFUSED is no missing endpoint": {
			func(e *bpfobj.InlayEvent) {
				e.Kind, e.Verdict, e.Err = uint8(bpfobj.InlayEventKindEVENT_DENIED), uint8(bpfobj.InlayVerdictVERDICT_DENY), 111
			},
			func(f *nodepb.Flow) { f.Kind, f.Verdict, f.Reason, f.Errno = "denied", "denied", "denied", 111 },
		},
		"a connection that nobody answered": {
			func(e *bpfobj.InlayEvent) { e.Err, e.SrttUs = 111, 0 },
			func(f *nodepb.Flow) { f.Reason, f.Errno, f.Rtt = "connect_failed", 111, nil },
		},
		"a far end that fell silent": {
			func(e *bpfobj.InlayEvent) { e.Err = 110 },
			func(f *nodepb.Flow) { f.Reason, f.Errno = "timeout", 110 },
		},
		"an audit": {
			func(e *bpfobj.InlayEvent) { e.Kind = uint8(bpfobj.InlayEventKindEVENT_AUDIT) },
			func(f *nodepb.Flow) { f.Kind, f.Verdict, f.Reason = "audit", "audited", "denied" },
		},
		"policies that found no room": {
			func(e *bpfobj.InlayEvent) {
				e.Kind, e.Flags = uint8(bpfobj.InlayEventKindEVENT_DENIED), uint8(bpfobj.InlayFlowFlagFLOW_CLOSED)
			},
			func(f *nodepb.Flow) { f.Kind, f.Verdict, f.Reason = "denied", "denied", "policy_full" },
		},
		"a full map": {
			func(e *bpfobj.InlayEvent) {
				e.Kind, e.Flags = uint8(bpfobj.InlayEventKindEVENT_DENIED), uint8(bpfobj.InlayFlowFlagFLOW_FULL)
			},
			func(f *nodepb.Flow) { f.Kind, f.Verdict, f.Reason = "denied", "denied", "map_full" },
		},
		"host, without an identity": {
			func(e *bpfobj.InlayEvent) { e.Peer = uint64(bpfobj.InlayIdID_HOST) },
			func(f *nodepb.Flow) { f.To.Name, f.To.Identity = "host", 1 },
		},
		"an identity that nobody knows any more": {
			func(e *bpfobj.InlayEvent) { e.Peer = 999_999 },
			func(f *nodepb.Flow) { f.To.Name, f.To.Identity = "unknown", 999_999 },
		},
		"icmp has no ports, and IPv6 is written as such": {
			func(e *bpfobj.InlayEvent) {
				e.Proto, e.LocalPort, e.RemotePort, e.Vip = 58, 0, 0, bpfobj.InlayAddr{}
				e.Local, e.Remote = addr("fd00::1"), addr("fd00::2")
			},
			func(f *nodepb.Flow) {
				f.Protocol, f.ServiceAddress, f.From.Address, f.To.Address = "icmp", "", "fd00::1", "fd00::2"
			},
		},
		"the own address of a datagram exchange is not known": {
			func(e *bpfobj.InlayEvent) { e.Proto, e.Local = 17, bpfobj.InlayAddr{} },
			func(f *nodepb.Flow) { f.Protocol, f.From.Address = "udp", ":40000" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			var sunk *nodepb.Flow
			l := still(flow.Config{Sink: func(f *nodepb.Flow) { sunk = f }})
			if err := l.Add(flow.Encode(with(call(), tc.event))); err != nil {
				t.Fatal(err)
			}
			want := full()
			tc.want(want)
			got := observe(t, l, &nodepb.ObserveRequest{})
			if len(got) != 1 || !proto.Equal(got[0], want) {
				t.Errorf("got %v\nwant %s", got, prototext.Format(want))
			}
			if !proto.Equal(sunk, want) {
				t.Errorf("the sink got %v\nwant %s", sunk, prototext.Format(want))
			}
		})
	}
}

// "event counts are since the sample before": the flow shows the whole connection, the sink gets
// what can be summed.
func TestSamplesAddUp(t *testing.T) {
	var sunk []uint64
	l := still(flow.Config{Sink: func(f *nodepb.Flow) { sunk = append(sunk, f.GetBytesSent()) }})
	part := func(kind bpfobj.InlayEventKind, cookie, tx uint64) {
		t.Helper()
		e := with(call(), func(e *bpfobj.InlayEvent) { e.Kind, e.Cookie, e.TxBytes = uint8(kind), cookie, tx })
		if err := l.Add(flow.Encode(e)); err != nil {
			t.Fatal(err)
		}
	}
	part(bpfobj.InlayEventKindEVENT_SAMPLE, 1, 10)
	part(bpfobj.InlayEventKindEVENT_SAMPLE, 2, 500)
	part(bpfobj.InlayEventKindEVENT_SAMPLE, 1, 20)
	part(bpfobj.InlayEventKindEVENT_CLOSE, 1, 3)
	part(bpfobj.InlayEventKindEVENT_CLOSE, 1, 4) // the cookie is never used again, yet nothing of it is left
	part(bpfobj.InlayEventKindEVENT_CLOSE, 0, 9) // without a cookie nothing is added
	var got []uint64
	for _, f := range observe(t, l, &nodepb.ObserveRequest{}) {
		got = append(got, f.GetBytesSent())
	}
	if want := []uint64{10, 500, 30, 33, 4, 9}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("flows show %v bytes, want %v", got, want)
	}
	if want := []uint64{10, 500, 20, 3, 4, 9}; fmt.Sprint(sunk) != fmt.Sprint(want) {
		t.Errorf("the sink got %v bytes, want %v", sunk, want)
	}
}

func TestDecodeRefusesWhatProgramsNeverMake(t *testing.T) {
	l := still(flow.Config{})
	good := flow.Encode(call())
	for name, raw := range map[string][]byte{
		"empty":             nil,
		"one byte short":    good[:len(good)-1],
		"one byte long":     append(bytes.Clone(good), 0),
		"unknown kind":      flow.Encode(with(call(), func(e *bpfobj.InlayEvent) { e.Kind = 5 })),
		"no kind":           flow.Encode(with(call(), func(e *bpfobj.InlayEvent) { e.Kind = 0 })),
		"unknown verdict":   flow.Encode(with(call(), func(e *bpfobj.InlayEvent) { e.Verdict = 3 })),
		"unknown direction": flow.Encode(with(call(), func(e *bpfobj.InlayEvent) { e.Dir = 2 })),
		"unknown protocol":  flow.Encode(with(call(), func(e *bpfobj.InlayEvent) { e.Proto = 200 })),
	} {
		before := l.Malformed()
		if err := l.Add(raw); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if l.Malformed() != before+1 {
			t.Errorf("%s: not counted", name)
		}
	}
	if got := observe(t, l, &nodepb.ObserveRequest{}); len(got) != 0 {
		t.Errorf("refused records became flows: %v", got)
	}
	if err := l.Add(good); err != nil {
		t.Error(err)
	}
}

// The bytes of a record are those of struct event, field by field.
func TestDecodeReadsEachField(t *testing.T) {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.NativeEndian, call()); err != nil {
		t.Fatal(err)
	}
	got, err := flow.Decode(b.Bytes())
	if err != nil || got != call() {
		t.Errorf("Decode: %+v, %v\nwant %+v", got, err, call())
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(flow.Encode(call()))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		l := still(flow.Config{Capacity: 4})
		e, err := flow.Decode(raw)
		if added := l.Add(raw); (added == nil) != (err == nil) {
			t.Fatalf("Decode: %v, Add: %v", err, added)
		}
		if err != nil {
			return
		}
		if again := flow.Encode(e); !bytes.Equal(again, raw) {
			t.Fatalf("%x became %x", raw, again)
		}
		for _, f := range observe(t, l, &nodepb.ObserveRequest{Query: "from!=x and bytes>=0 and address!=1.2.3.4"}) {
			if _, err := proto.Marshal(f); err != nil {
				t.Fatal(err)
			}
			if d := f.GetDuration(); d != nil && (d.CheckValid() != nil || d.AsDuration() < 0) {
				t.Fatalf("duration %v", d)
			}
		}
	})
}

func add(t testing.TB, l *flow.Log, sent ...uint64) {
	t.Helper()
	for _, n := range sent {
		e := with(call(), func(e *bpfobj.InlayEvent) { e.Cookie, e.TxBytes = 0, n })
		if err := l.Add(flow.Encode(e)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestObserveTheNewestThatMatch(t *testing.T) {
	l := still(flow.Config{Capacity: 4})
	add(t, l, 1, 2, 3, 4, 5, 6)
	for name, tc := range map[string]struct {
		req  *nodepb.ObserveRequest
		want []uint64
	}{
		"all that are kept":     {&nodepb.ObserveRequest{}, []uint64{3, 4, 5, 6}},
		"the last two":          {&nodepb.ObserveRequest{Last: 2}, []uint64{5, 6}},
		"more than there are":   {&nodepb.ObserveRequest{Last: 9}, []uint64{3, 4, 5, 6}},
		"the last that matches": {&nodepb.ObserveRequest{Last: 1, Query: "sent<=4"}, []uint64{4}},
		"those that match":      {&nodepb.ObserveRequest{Query: "sent in (1, 3, 5)"}, []uint64{3, 5}},
		"none":                  {&nodepb.ObserveRequest{Query: "verdict=denied"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var got []uint64
			for _, f := range observe(t, l, tc.req) {
				got = append(got, f.GetBytesSent())
			}
			if fmt.Sprint(got) != fmt.Sprint(tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

func TestFollowerGetsWhatComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := flow.New(flow.Config{Capacity: 8, Namer: names{}})
		add(t, l, 1, 2)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var got []uint64
		done := make(chan error, 1)
		go func() {
			done <- l.Observe(ctx, &nodepb.ObserveRequest{Follow: true, Last: 1, Query: "sent!=4"}, func(r *nodepb.ObserveResponse) error {
				got = append(got, r.GetFlow().GetBytesSent())
				return nil
			})
		}()
		synctest.Wait()
		add(t, l, 3, 4, 5)
		synctest.Wait()
		add(t, l, 6)
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if want := "[2 3 5 6]"; fmt.Sprint(got) != want {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

// A follower that is stuck holds up nobody, and is told exactly how many flows it did not get.
func TestSlowFollowerIsToldWhatItMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const capacity, total = 16, 1000
		l := flow.New(flow.Config{Capacity: capacity, Namer: names{}})
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		gate := make(chan struct{})
		var got, missed, last uint64
		done := make(chan error, 1)
		go func() {
			done <- l.Observe(ctx, &nodepb.ObserveRequest{Follow: true}, func(r *nodepb.ObserveResponse) error {
				<-gate
				missed += r.GetMissed()
				if r.GetFlow() != nil {
					got++
					last = r.GetFlow().GetBytesSent()
				}
				return nil
			})
		}()
		synctest.Wait()
		for n := range uint64(total) {
			add(t, l, n+1) // would never return if it waited for the follower
			if n == 0 {
				synctest.Wait() // the follower is in its first send now
			}
		}
		close(gate)
		synctest.Wait()
		cancel()
		<-done
		if missed != total-1-capacity || got != 1+capacity || last != total {
			t.Errorf("got %d flows and %d missed, the last %d: want %d, %d and %d", got, missed, last, 1+capacity, total-1-capacity, total)
		}
	})
}

func TestServer(t *testing.T) {
	l := flow.New(flow.Config{Namer: names{}})
	add(t, l, 1, 2)
	listener := bufconn.Listen(1 << 16)
	srv := grpc.NewServer()
	nodepb.RegisterFlowsServer(srv, flow.NewServer(l, func(context.Context) (*nodepb.Agent, error) {
		return &nodepb.Agent{Version: "v1"}, nil
	}))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()
	t.Cleanup(func() {
		srv.Stop()
		<-served
	})
	conn, err := grpc.NewClient("passthrough:///flows", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client := nodepb.NewFlowsClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	stream, err := client.Observe(ctx, &nodepb.ObserveRequest{Query: "from=billing", Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	for want := range uint64(3) {
		if want == 2 {
			add(t, l, 3)
		}
		r, err := stream.Recv()
		if err != nil || r.GetFlow().GetBytesSent() != want+1 {
			t.Fatalf("got %v, %v", r, err)
		}
	}

	bad, err := client.Observe(ctx, &nodepb.ObserveRequest{Query: "from=billing and verdit=x"})
	if err == nil {
		_, err = bad.Recv()
	}
	if status.Code(err) != codes.InvalidArgument || status.Convert(err).Message() != `query: column 18: unknown field "verdit": did you mean verdict?` {
		t.Errorf("a query with a fault: %v", err)
	}
	a, err := client.GetAgent(ctx, &nodepb.GetAgentRequest{})
	if err != nil || a.GetVersion() != "v1" {
		t.Errorf("GetAgent: %v, %v", a, err)
	}
}

func TestObserveRefusesABadQuery(t *testing.T) {
	err := flow.New(flow.Config{}).Observe(t.Context(), &nodepb.ObserveRequest{Query: "("}, nil)
	var fault *query.Error
	if !errors.As(err, &fault) {
		t.Errorf("got %v, want a *query.Error", err)
	}
}

func TestRunWithoutMapsWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		l := flow.New(flow.Config{})
		if err := l.Run(ctx); err != nil || ctx.Err() == nil {
			t.Errorf("Run: %v, context %v", err, ctx.Err())
		}
		if made, kept, lost := l.Counts(); made+kept+lost != 0 {
			t.Errorf("counts %d %d %d without maps", made, kept, lost)
		}
	})
}

func BenchmarkAdd(b *testing.B) {
	l := flow.New(flow.Config{Namer: names{}, Sink: func(*nodepb.Flow) {}})
	raw := flow.Encode(call())
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Add(raw); err != nil {
			b.Fatal(err)
		}
	}
}
