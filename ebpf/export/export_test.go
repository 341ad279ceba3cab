package export_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/inlay-mesh/inlay/ebpf/export"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

func serviceAt(at netip.AddrPort, proto uint8) (string, uint16, bool) {
	switch {
	case at == netip.MustParseAddrPort("198.18.0.1:8080") && proto == 6,
		at == netip.MustParseAddrPort("10.0.0.9:9090") && proto == 6: // its endpoint
		return "orders.default", 8080, true
	case at == netip.MustParseAddrPort("198.18.0.2:53") && proto == 17:
		return "names.default", 53, true
	}
	return "", 0, false
}

func exporter(t testing.TB, cfg export.Config) *export.Exporter {
	t.Helper()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
	t.Setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "")
	cfg.ServiceAt = serviceAt
	x, err := export.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close(context.Background()) })
	return x
}

func call(change ...func(*nodepb.Flow)) *nodepb.Flow {
	f := &nodepb.Flow{
		Kind: "close", Direction: "egress", Protocol: "tcp", Verdict: "allowed", Reason: "ok",
		From:           &nodepb.FlowPeer{Name: "billing.shop", Address: "127.0.0.1:40000", Labels: map[string]string{"pod": "x"}},
		To:             &nodepb.FlowPeer{Name: "orders.default", Address: "10.0.0.9:9090"},
		ServiceAddress: "198.18.0.1:8080", BytesSent: 100, BytesReceived: 2000, Retransmits: 3,
		Rtt: durationpb.New(3 * time.Millisecond),
	}
	for _, c := range change {
		c(f)
	}
	return f
}

// page returns the lines of /metrics.
func page(t testing.TB, x *export.Exporter) string {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequest("GET", "http://localhost/metrics", nil)
	x.Handler().ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func wantLines(t testing.TB, page string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains("\n"+page, "\n"+w+"\n") {
			name, _, _ := strings.Cut(w, "{")
			var have []string
			for line := range strings.Lines(page) {
				if strings.HasPrefix(line, name) {
					have = append(have, line)
				}
			}
			t.Errorf("no line %s\nhave\n%s", w, strings.Join(have, ""))
		}
	}
}

func TestFlowsAreCountedByServices(t *testing.T) {
	x := exporter(t, export.Config{})
	x.Observe(call())
	x.Observe(call(func(f *nodepb.Flow) { f.From.Address = "127.0.0.1:50000"; f.Reset_ = true }))
	// A sample is no connection, and its bytes count.
	x.Observe(call(func(f *nodepb.Flow) { f.Kind = "sample"; f.Rtt, f.Retransmits = nil, 0 }))
	// The same connection as the server's node sees it: by the endpoint's own port.
	x.Observe(call(func(f *nodepb.Flow) { f.Direction, f.ServiceAddress = "ingress", "" }))
	x.Observe(call(func(f *nodepb.Flow) { f.Kind, f.Verdict, f.Reason, f.BytesSent = "denied", "denied", "denied", 9 }))
	x.Observe(call(func(f *nodepb.Flow) { f.Kind, f.Verdict, f.Reason = "audit", "audited", "denied" }))
	x.Observe(call(func(f *nodepb.Flow) {
		f.Protocol, f.ServiceAddress, f.To.Name, f.To.Address, f.Rtt = "udp", "198.18.0.2:53", "names.default", ":5353", nil
	}))
	// Ports and addresses outside the mesh make no series.
	for port := range 100 {
		x.Observe(call(func(f *nodepb.Flow) {
			f.ServiceAddress, f.To = "", &nodepb.FlowPeer{Name: "world", Address: fmt.Sprintf("93.184.216.%d:%d", port, 1000+port)}
		}))
	}
	x.Observe(call(func(f *nodepb.Flow) { f.Protocol, f.ServiceAddress, f.To.Address = "icmp", "", "10.0.0.9" }))
	x.Observe(&nodepb.Flow{}) // nothing known is no reason to panic
	x.Observe(nil)

	got := page(t, x)
	const egress = `inlay_destination="orders.default",inlay_direction="egress",inlay_source="billing.shop",inlay_verdict="allowed",network_transport="tcp",server_port="8080"`
	const world = `inlay_destination="world",inlay_direction="egress",inlay_source="billing.shop",inlay_verdict="allowed",network_transport="tcp",server_port="0"`
	wantLines(t, got,
		`inlay_flow_connections_total{`+egress+`} 2`,
		`inlay_flow_connections_total{`+strings.Replace(egress, "egress", "ingress", 1)+`} 1`,
		`inlay_flow_connections_total{`+strings.Replace(egress, "allowed", "denied", 1)+`} 1`,
		`inlay_flow_connections_total{`+world+`} 100`,
		`inlay_flow_connections_total{inlay_destination="names.default",inlay_direction="egress",inlay_source="billing.shop",inlay_verdict="allowed",network_transport="udp",server_port="53"} 1`,
		`inlay_flow_connections_total{inlay_destination="orders.default",inlay_direction="egress",inlay_source="billing.shop",inlay_verdict="allowed",network_transport="icmp",server_port="0"} 1`,
		`inlay_flow_io_bytes_total{`+strings.Replace(egress, `network_transport`, `network_io_direction="transmit",network_transport`, 1)+`} 300`,
		`inlay_flow_io_bytes_total{`+strings.Replace(egress, `network_transport`, `network_io_direction="receive",network_transport`, 1)+`} 6000`,
		`inlay_flow_retransmits_total{`+egress+`} 6`,
		`inlay_flow_resets_total{`+egress+`} 1`,
		`inlay_flow_rtt_seconds_count{`+egress+`} 2`,
		`inlay_flow_rtt_seconds_bucket{`+egress+`,le="0.0025"} 0`,
		`inlay_flow_rtt_seconds_bucket{`+egress+`,le="0.005"} 2`,
		`inlay_flow_denied_total{inlay_destination="orders.default",inlay_direction="egress",inlay_reason="denied",inlay_source="billing.shop",inlay_verdict="denied",network_transport="tcp",server_port="8080"} 1`,
		`inlay_flow_denied_total{inlay_destination="orders.default",inlay_direction="egress",inlay_reason="denied",inlay_source="billing.shop",inlay_verdict="audited",network_transport="tcp",server_port="8080"} 1`,
	)
	for _, secret := range []string{"127.0.0.1", "93.184", "10.0.0.9", "pod", "50000", "1042"} {
		if strings.Contains(got, secret) {
			t.Errorf("the page holds %q", secret)
		}
	}
	if strings.Contains(got, `inlay_flow_io_bytes_total{inlay_destination="orders.default",inlay_direction="egress",inlay_source="billing.shop",inlay_verdict="denied"`) {
		t.Error("a refused call has bytes")
	}
	for line := range strings.Lines(got) {
		if strings.HasPrefix(line, "inlay_flow_connections_total") && strings.Contains(line, "audited") {
			t.Errorf("an audited connection is counted at its end, and here: %s", line)
		}
	}
}

func TestSeriesAreBounded(t *testing.T) {
	x := exporter(t, export.Config{MaxSeries: 50})
	for n := range 500 {
		x.Observe(call(func(f *nodepb.Flow) { f.From.Name = fmt.Sprintf("s%d.default", n) }))
	}
	x.Observe(call(func(f *nodepb.Flow) { f.From.Name = "s7.default" })) // an early one keeps its series
	got := page(t, x)
	wantLines(t, got,
		`inlay_flow_connections_total{inlay_destination="other",inlay_direction="egress",inlay_source="other",inlay_verdict="allowed",network_transport="tcp",server_port="0"} 450`,
		`inlay_flow_connections_total{inlay_destination="orders.default",inlay_direction="egress",inlay_source="s7.default",inlay_verdict="allowed",network_transport="tcp",server_port="8080"} 2`,
		`inlay_flow_overflow_total 450`,
		`inlay_flow_series 50`,
	)
	if n := strings.Count(got, "\ninlay_flow_connections_total{"); n != 51 {
		t.Errorf("%d series of connections, want 51", n)
	}
}

// More than the 2,000 that the SDK would cut at without a word.
func TestDefaultBoundIsOurs(t *testing.T) {
	x := exporter(t, export.Config{})
	for n := range 3000 {
		x.Observe(call(func(f *nodepb.Flow) { f.Kind, f.From.Name = "denied", fmt.Sprintf("s%d.default", n) }))
	}
	got := page(t, x)
	if n := strings.Count(got, "\ninlay_flow_connections_total{"); n != 3000 || strings.Contains(got, "overflow=") {
		t.Errorf("%d series, want 3000", n)
	}
}

func TestStateIsAskedAtEachCollection(t *testing.T) {
	state := export.State{
		Made: 10, Kept: 7, Lost: 3, Malformed: 1, Events: map[string]uint64{"dns_passed": 4}, Queries: map[string]uint64{"malformed": 6},
		Programs:  []export.Program{{Name: "connect4", Runs: 100, Time: 50 * time.Microsecond}},
		Maps:      []export.Map{{Name: "services", Entries: 9, Capacity: 10, Refused: 2}},
		ConfigAge: 90 * time.Second, HeartbeatAge: 250 * time.Millisecond, Breakglass: true, Workloads: 2, Services: 5,
	}
	x := exporter(t, export.Config{State: func(context.Context) export.State { return state }})
	wantLines(t, page(t, x),
		`inlay_records_total{inlay_state="made"} 10`, `inlay_records_total{inlay_state="kept"} 7`,
		`inlay_records_total{inlay_state="lost"} 3`, `inlay_records_total{inlay_state="malformed"} 1`,
		`inlay_ebpf_events_total{inlay_event="dns_passed"} 4`,
		`inlay_ebpf_program_runs_total{inlay_program="connect4"} 100`, `inlay_ebpf_program_time_seconds_total{inlay_program="connect4"} 5e-05`,
		`inlay_ebpf_map_entries{inlay_map="services"} 9`, `inlay_ebpf_map_capacity{inlay_map="services"} 10`,
		`inlay_ebpf_map_refused_total{inlay_map="services"} 2`, `inlay_dns_queries_total{inlay_outcome="malformed"} 6`,
		`inlay_config_age_seconds 90`, `inlay_proxy_heartbeat_age_seconds 0.25`, `inlay_breakglass 1`, `inlay_workloads 2`, `inlay_services 5`,
	)
	state = export.State{ConfigAge: -1, HeartbeatAge: -1}
	got := page(t, x)
	wantLines(t, got, `inlay_breakglass 0`, `inlay_records_total{inlay_state="made"} 0`)
	for _, gone := range []string{"inlay_config_age", "inlay_proxy_heartbeat", "connect4"} {
		if strings.Contains(got, gone) {
			t.Errorf("%s is told although there is none", gone)
		}
	}
}

func TestServeOnLoopbackOnly(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "192.0.2.1:80", "[::]:0", "example.org:80", "127.0.0.1"} {
		if _, err := export.New(t.Context(), export.Config{Addr: addr}); err == nil || !strings.Contains(err.Error(), "want HOST:PORT on loopback") {
			t.Errorf("%s: %v", addr, err)
		}
	}
	x := exporter(t, export.Config{Addr: "127.0.0.1:0"})
	if x.Addr() != "" {
		t.Errorf("Addr: %s before Listen", x.Addr())
	}
	addr, err := x.Listen()
	if err != nil {
		t.Fatal(err)
	}
	if x.Addr() != addr {
		t.Errorf("Addr: %s, want %s", x.Addr(), addr)
	}
	if again, err := x.Listen(); again != addr || err != nil {
		t.Errorf("Listen again: %s, %v, want %s", again, err, addr)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- x.Serve(ctx) }()
	_, port, _ := net.SplitHostPort(addr)
	for name, tc := range map[string]struct {
		method, path, host string
		want               int
	}{
		"by address":             {"GET", "/metrics", addr, 200},
		"by name":                {"GET", "/metrics", "localhost:" + port, 200},
		"by IPv6":                {"GET", "/metrics", "[::1]:" + port, 200},
		"by IPv6, without port":  {"GET", "/metrics", "[::1]", 200},
		"a name that was turned": {"GET", "/metrics", "evil.example:" + port, 421},
		"another address":        {"GET", "/metrics", "10.0.0.1", 421},
		"another path":           {"GET", "/", addr, 404},
		"another method":         {"POST", "/metrics", addr, 405},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := http.NewRequest(tc.method, "http://"+addr+tc.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Host = tc.host
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			io.Copy(io.Discard, resp.Body)
			if resp.StatusCode != tc.want {
				t.Errorf("%s, want %d", resp.Status, tc.want)
			}
		})
	}
	cancel()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := net.Dial("tcp", addr); err == nil {
		t.Error("the address is still served")
	}
}

func TestServeOff(t *testing.T) {
	x := exporter(t, export.Config{Addr: "off"})
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- x.Serve(ctx) }()
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if addr, err := x.Listen(); addr != "" || err != nil {
		t.Errorf("Listen: %q, %v", addr, err)
	}
}

func TestAddressInUseIsSaid(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	x := exporter(t, export.Config{Addr: l.Addr().String()})
	if err := x.Serve(t.Context()); err == nil || !strings.Contains(err.Error(), "choose another address") {
		t.Error(err)
	}
}

// collector is a real OTLP server; it refuses the first n exports.
type collector struct {
	collectorpb.UnimplementedMetricsServiceServer
	mu     sync.Mutex
	refuse bool
	values map[string]int64
}

func (c *collector) Export(_ context.Context, r *collectorpb.ExportMetricsServiceRequest) (*collectorpb.ExportMetricsServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse {
		return nil, status.Error(codes.PermissionDenied, "no")
	}
	for _, rm := range r.GetResourceMetrics() {
		for _, a := range rm.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				c.values[a.GetValue().GetStringValue()] = 1
			}
		}
		for _, sm := range rm.GetScopeMetrics() {
			for _, m := range sm.GetMetrics() {
				for _, p := range m.GetSum().GetDataPoints() {
					c.values[m.GetName()] += p.GetAsInt()
				}
			}
		}
	}
	return &collectorpb.ExportMetricsServiceResponse{}, nil
}

func startCollector(t testing.TB, c *collector) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	collectorpb.RegisterMetricsServiceServer(srv, c)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		<-done
	})
	return "http://" + l.Addr().String()
}

func TestCollector(t *testing.T) {
	for _, byEnv := range []bool{false, true} {
		t.Run(fmt.Sprintf("by environment %v", byEnv), func(t *testing.T) {
			c := &collector{values: map[string]int64{}}
			url := startCollector(t, c)
			cfg := export.Config{Addr: "off", ServiceAt: serviceAt, OTLP: url}
			if byEnv {
				cfg.OTLP = ""
				t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
			}
			x, err := export.New(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			x.Observe(call())
			x.Observe(call())
			if err := x.Close(t.Context()); err != nil { // flushes
				t.Fatal(err)
			}
			if err := x.Close(t.Context()); err != nil {
				t.Errorf("Close again: %v", err)
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.values["inlay.flow.connections"] != 2 || c.values["inlay.flow.io"] != 4200 || c.values["inlay-node"] != 1 {
				t.Errorf("the collector got %v", c.values)
			}
		})
	}
}

func TestCollectorThatRefusesIsLogged(t *testing.T) {
	c := &collector{values: map[string]int64{}, refuse: true}
	var out bytes.Buffer
	x, err := export.New(t.Context(), export.Config{Addr: "off", OTLP: startCollector(t, c), Log: slog.New(slog.NewTextHandler(&out, nil))})
	if err != nil {
		t.Fatal(err)
	}
	x.Observe(call())
	if err := x.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if !strings.Contains(out.String(), "metrics not taken by the collector") || !strings.Contains(out.String(), "no") {
		t.Errorf("log: %s", out.String())
	}
}

func TestObserveWhileCollecting(t *testing.T) {
	x := exporter(t, export.Config{MaxSeries: 20})
	var wg sync.WaitGroup
	for w := range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for n := range 500 {
				x.Observe(call(func(f *nodepb.Flow) { f.From.Name = fmt.Sprintf("s%d.n%d", n%30, w) }))
				if n%100 == 0 {
					page(t, x)
				}
			}
		})
	}
	wg.Wait()
	total := 0
	for line := range strings.Lines(page(t, x)) {
		var n int
		if i := strings.LastIndexByte(line, ' '); strings.HasPrefix(line, "inlay_flow_connections_total{") {
			fmt.Sscan(line[i:], &n)
		}
		total += n
	}
	if want := 500 * runtime.GOMAXPROCS(0); total != want {
		t.Errorf("%d connections counted, want %d", total, want)
	}
}

func BenchmarkObserve(b *testing.B) {
	x := exporter(b, export.Config{})
	f := call()
	b.ReportAllocs()
	for b.Loop() {
		x.Observe(f)
	}
}
