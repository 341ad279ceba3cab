package main

import (
	"bytes"
	"encoding/json"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// flowLog is a node's flow log with what a test puts in.
type flowLog struct {
	nodepb.UnimplementedFlowsServer
	responses []*nodepb.ObserveResponse
	err       error
	asked     *nodepb.ObserveRequest
}

func (l *flowLog) Observe(req *nodepb.ObserveRequest, s grpc.ServerStreamingServer[nodepb.ObserveResponse]) error {
	l.asked = req
	for _, r := range l.responses {
		if err := s.Send(r); err != nil {
			return err
		}
	}
	return l.err
}

func serveFlows(t *testing.T, l *flowLog) (runDir string) {
	t.Helper()
	dir := t.TempDir()
	lis, err := net.Listen("unix", filepath.Join(dir, "flows.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	nodepb.RegisterFlowsServer(srv, l)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(lis) })
	t.Cleanup(func() { srv.Stop(); wg.Wait() })
	return dir
}

func sampleFlows() []*nodepb.ObserveResponse {
	at := timestamppb.New(time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.Local))
	return []*nodepb.ObserveResponse{
		{Flow: &nodepb.Flow{
			Time: at, Kind: "close", Direction: "egress", Protocol: "tcp",
			From: &nodepb.FlowPeer{Name: "web.default", Identity: 4711}, To: &nodepb.FlowPeer{Name: "legacy.default", Address: "127.0.0.1:4000"},
			ServiceAddress: "198.18.0.1:80", Verdict: "allowed", Reason: "ok", BytesSent: 87, BytesReceived: 12345, Rtt: durationpb.New(310 * time.Microsecond),
		}},
		{Missed: 3},
		{Flow: &nodepb.Flow{
			Time: at, Kind: "denied", Direction: "egress", Protocol: "tcp",
			From: &nodepb.FlowPeer{Name: "curl.default"}, To: &nodepb.FlowPeer{Name: "world", Address: "[2001:db8::1]:443"},
			Verdict: "denied", Reason: "denied", Policy: "default/curl", Rule: "no-world", Source: "mesh.yaml:14", Errno: 1,
		}},
		{Flow: &nodepb.Flow{
			Time: at, Kind: "close", Protocol: "icmp",
			From: &nodepb.FlowPeer{Name: "web.default", Hint: true}, To: &nodepb.FlowPeer{}, Verdict: "allowed",
		}},
	}
}

func TestObserveTable(t *testing.T) {
	l := &flowLog{responses: sampleFlows()}
	out, err := execute("observe", "--run-dir", serveFlows(t, l), "--last", "7", "from=web", "or", "verdict=denied")
	if err != nil {
		t.Fatal(err)
	}
	const want = `inlay observe: 3 flows were missed: they came faster than they were read
TIME          FROM          TO                  PORT     VERDICT  REASON  RULE                                BYTES   RTT
03:04:05.678  web.default   legacy.default      80/tcp   allowed  ok      -                                   87/12k  310µs
03:04:05.678  curl.default  world(2001:db8::1)  443/tcp  denied   denied  default/curl/no-world mesh.yaml:14  0/0     -
03:04:05.678  web.default?  -                   icmp     allowed  -       -                                   0/0     -
`
	if out != want {
		t.Errorf("printed\n%s\nwant\n%s", out, want)
	}
	if l.asked.GetQuery() != "from=web or verdict=denied" || l.asked.GetLast() != 7 || l.asked.GetFollow() {
		t.Errorf("asked %v", l.asked)
	}
}

// With -f each line is there when its flow is, and columns only grow.
func TestObserveFollow(t *testing.T) {
	var w, errw bytes.Buffer
	p := newFlowPrinter(&w, &errw, formatTable, true)
	for _, r := range sampleFlows() {
		before := w.Len()
		if err := p.add(r); err != nil {
			t.Fatal(err)
		}
		if r.Flow != nil && w.Len() == before {
			t.Error("a flow was held back")
		}
	}
	lines := strings.Split(strings.TrimSuffix(w.String(), "\n"), "\n")
	if len(lines) != 4 || !strings.HasPrefix(lines[0], "TIME ") {
		t.Errorf("printed %q", lines)
	}
	if at := strings.Index(lines[0], "VERDICT"); at != strings.Index(lines[1], "allowed") {
		t.Errorf("columns do not stand below each other:\n%s", w.String())
	}
}

// JSON is one object a line, with the names of the .proto and every field.
func TestObserveJSON(t *testing.T) {
	dir := serveFlows(t, &flowLog{responses: sampleFlows()})
	out, err := execute("observe", "--run-dir", dir, "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	_, out, _ = strings.Cut(out, "\n") // the word on those that were missed went to stderr, which is the same buffer here
	if i := strings.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	again, err := execute("observe", "--run-dir", dir, "-o", "yaml")
	if err != nil || strings.Count(again, "---\n") != 3 || !strings.Contains(again, "service_address: 198.18.0.1:80\n") {
		t.Errorf("yaml %v\n%s", err, again)
	}
	last := out[:strings.LastIndexByte(strings.TrimSuffix(out, "\n"), '\n')+1]
	for line := range strings.Lines(last) {
		if !strings.HasPrefix(line, "{") {
			continue
		}
		var f map[string]any
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		if _, ok := f["bytes_sent"]; !ok {
			t.Errorf("no bytes_sent in %s", line)
		}
	}
	if !strings.Contains(out, `"source":"mesh.yaml:14"`) {
		t.Errorf("no source in\n%s", out)
	}
}

func TestObserveFaults(t *testing.T) {
	refused := &flowLog{err: status.Error(codes.InvalidArgument, `query: column 1: no field "frm"`)}
	broken := &flowLog{responses: sampleFlows()[:1], err: status.Error(codes.Internal, "the ring is gone")}
	for name, tc := range map[string]struct {
		args []string
		want string
		code int
	}{
		"no agent":                    {[]string{"--run-dir", t.TempDir()}, "sudo inlay dev --ebpf", exitAbsent},
		"a query with a fault":        {[]string{"from=="}, "column", exitUsage},
		"a field that is none":        {[]string{"frm=web"}, "from", exitUsage},
		"an agent that knows less":    {[]string{"--run-dir", serveFlows(t, refused)}, `no field "frm"`, exitUsage},
		"an agent that fails midway":  {[]string{"--run-dir", serveFlows(t, broken)}, "the ring is gone", exitFailed},
		"a format that is none":       {[]string{"-o", "xml"}, "want json or yaml", exitUsage},
		"a number of flows that is 0": {[]string{"--last", "-1"}, "--last", exitUsage},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := execute(append([]string{"observe"}, tc.args...)...)
			var b bytes.Buffer
			if code := report(&b, err); code != tc.code || !strings.Contains(b.String(), tc.want) {
				t.Errorf("code %d and %q, want %d and %q", code, b.String(), tc.code, tc.want)
			}
		})
	}
}

func TestSizeAndDuration(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1.0k", 9949: "9.9k", 9951: "10k", 999499: "999k", 999500: "1.0M", 1 << 40: "1.1T", 1<<64 - 1: "18447P"} {
		if got := sizeText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		900 * time.Nanosecond: "0µs", 999 * time.Microsecond: "999µs", 1500 * time.Microsecond: "1.50ms", 42 * time.Millisecond: "42ms", 1250 * time.Millisecond: "1.2s",
	} {
		if got := shortDuration(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	if f := (&nodepb.Flow{}); len(flowRow(f)) != len(flowHeader) || !proto.Equal(f, &nodepb.Flow{}) {
		t.Error("an empty flow has another number of columns")
	}
}
