package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/inlay-mesh/inlay/ebpf/flow/query"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

func observeCommand() *cobra.Command {
	var runDir string
	var follow bool
	var last uint32
	var out format
	cmd := &cobra.Command{
		Use:   "observe [QUERY]",
		Short: "Show the flows of this node: who called whom, and which rule said what",
		Long: `Show the flows that the node's eBPF programs recorded: a line for each connection when it closes, for
each long one every few seconds, and for each refusal with the policy, its file and its line. The
newest are kept in memory; --last says how many of them to show, -f goes on with what comes.

A QUERY compares fields (from, to, port, verdict, reason, policy, rule, bytes, rtt, address and more)
by = != < > ~ and "in (A, B)", joined by and, or, not and parentheses. -o json writes one object a line.`,
		Example: `  inlay observe
  inlay observe -f verdict=denied
  inlay observe 'from=billing and (bytes>10k or rtt>5ms)' -o json`,
		RunE: func(c *cobra.Command, args []string) error {
			text := strings.Join(args, " ")
			if _, err := query.Parse(text); err != nil {
				return usageError(err)
			}
			p, err := placesOf(runDir)
			if err != nil {
				return err
			}
			req := &nodepb.ObserveRequest{Query: text, Follow: follow, Last: last}
			return observe(c.Context(), p.flowsSocket(), req, newFlowPrinter(c.OutOrStdout(), c.ErrOrStderr(), out, follow))
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", "", "run directory of the node (default $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run, else "+systemRun+")")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with the flows that come")
	cmd.Flags().Uint32Var(&last, "last", 100, "how many of the past to show at most; 0: all that are kept")
	outputFlag(cmd, &out)
	return cmd
}

// dialFlows opens the flow log of a node.
func dialFlows(socket string) (nodepb.FlowsClient, func(), error) {
	switch _, err := os.Stat(socket); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, &exitError{exitAbsent, fmt.Errorf("no node agent runs here (%s does not exist): start one with `sudo inlay dev --ebpf`, or pass its --run-dir", socket)}
	case err != nil:
		return nil, nil, err
	}
	conn, err := grpc.NewClient("passthrough:///flows", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"), grpc.WithDisableServiceConfig(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		return nil, nil, fmt.Errorf("flows: %w", err)
	}
	return nodepb.NewFlowsClient(conn), func() { _ = conn.Close() }, nil
}

// flowsError turns an error of the flow log into one for a person.
func flowsError(socket string, err error) error {
	switch s := status.Convert(err); s.Code() {
	case codes.InvalidArgument:
		return usageError(errors.New(s.Message()))
	case codes.Unavailable:
		if strings.Contains(s.Message(), "permission denied") {
			return fmt.Errorf("the flows of this machine are not everybody's to read; run: %s", sudoLine(os.Args))
		}
		return &exitError{exitAbsent, fmt.Errorf("no node agent answers at %s: %s; start one with `sudo inlay dev --ebpf`", socket, s.Message())}
	default:
		return fmt.Errorf("flows: %s", s.Message())
	}
}

// observe prints flows until the past is shown, or with follow until ctx is done.
func observe(ctx context.Context, socket string, req *nodepb.ObserveRequest, p *flowPrinter) error {
	client, hangUp, err := dialFlows(socket)
	if err != nil {
		return err
	}
	defer hangUp()
	stream, err := client.Observe(ctx, req)
	for err == nil {
		var resp *nodepb.ObserveResponse
		if resp, err = stream.Recv(); err == nil {
			err = p.add(resp)
			if err != nil {
				return err
			}
		}
	}
	if e := p.flush(); e != nil {
		return e
	}
	if errors.Is(err, io.EOF) || ctx.Err() != nil {
		return nil
	}
	return flowsError(socket, err)
}

// flowPrinter writes flows as asked: as lines in columns, or as JSON or YAML.
type flowPrinter struct {
	w, errw io.Writer
	out     format
	follow  bool

	rows   [][]string // kept until the widths are known; with follow written at once
	widths []int
	headed bool
}

var flowHeader = []string{"TIME", "FROM", "TO", "PORT", "VERDICT", "REASON", "RULE", "BYTES", "RTT"}

func newFlowPrinter(w, errw io.Writer, out format, follow bool) *flowPrinter {
	// Widths that most lines keep, so that those that follow stand below each other.
	return &flowPrinter{w: w, errw: errw, out: out, follow: follow, widths: []int{12, 18, 18, 9, 8, 10, 24, 13, 6}}
}

func (p *flowPrinter) add(resp *nodepb.ObserveResponse) error {
	if n := resp.GetMissed(); n > 0 {
		fmt.Fprintf(p.errw, "inlay observe: %d flows were missed: they came faster than they were read\n", n)
	}
	f := resp.GetFlow()
	if f == nil {
		return nil
	}
	switch p.out {
	case formatTable:
		p.rows = append(p.rows, flowRow(f))
		if p.follow {
			return p.flush()
		}
		return nil
	case formatYAML:
		raw, err := jsonOf(f)
		if err == nil {
			raw, err = yamlOf(raw)
		}
		if err == nil {
			_, err = fmt.Fprintf(p.w, "---\n%s", raw)
		}
		return err
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(f)
	if err != nil {
		return err
	}
	line := json.RawMessage(raw) // protojson varies its blanks on purpose; Marshal takes them out
	if raw, err = json.Marshal(line); err != nil {
		return err
	}
	_, err = p.w.Write(append(raw, '\n'))
	return err
}

// flush writes the rows that are kept.
func (p *flowPrinter) flush() error {
	rows := p.rows
	p.rows = nil
	if p.out != formatTable {
		return nil
	}
	if !p.headed {
		p.headed = true
		rows = slices.Insert(rows, 0, flowHeader)
		if !p.follow { // all rows are here
			clear(p.widths)
		}
	}
	for _, r := range rows {
		for i, cell := range r {
			p.widths[i] = max(p.widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, r := range rows {
		for i, cell := range r {
			if i == len(r)-1 {
				b.WriteString(cell)
				break
			}
			b.WriteString(cell)
			b.WriteString(strings.Repeat(" ", p.widths[i]-utf8.RuneCountInString(cell)+2))
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(p.w, b.String())
	return err
}

// flowRow is a flow in the columns of flowHeader.
func flowRow(f *nodepb.Flow) []string {
	rule := "-"
	if f.GetPolicy() != "" {
		rule = f.GetPolicy()
		if f.GetRule() != "" {
			rule += "/" + f.GetRule()
		}
		if f.GetSource() != "" {
			rule += " " + f.GetSource()
		}
	}
	rtt := "-"
	if d := f.GetRtt().AsDuration(); d > 0 {
		rtt = shortDuration(d)
	}
	return []string{
		f.GetTime().AsTime().Local().Format("15:04:05.000"), peerText(f.GetFrom()), peerText(f.GetTo()), portText(f), dash(f.GetVerdict()),
		dash(f.GetReason()), rule, sizeText(f.GetBytesSent()) + "/" + sizeText(f.GetBytesReceived()), rtt,
	}
}

// peerText names one end; where the mesh has no name for it, its address says more.
func peerText(p *nodepb.FlowPeer) string {
	name := dash(p.GetName())
	switch name {
	case "-", "world", "host", "unknown":
		if a, err := netip.ParseAddrPort(p.GetAddress()); err == nil {
			name += "(" + a.Addr().String() + ")"
		}
	}
	if p.GetHint() {
		name += "?" // its address says so, nobody has proven it
	}
	return name
}

// portText is the port that was dialled: that of the service, where one was.
func portText(f *nodepb.Flow) string {
	for _, s := range []string{f.GetServiceAddress(), f.GetTo().GetAddress()} {
		if a, err := netip.ParseAddrPort(s); err == nil && a.Port() != 0 {
			return fmt.Sprintf("%d/%s", a.Port(), f.GetProtocol())
		}
	}
	return dash(f.GetProtocol())
}

// sizeText is a number of bytes in three digits, in powers of 1000.
func sizeText(n uint64) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	x, unit := float64(n)/1000, 0
	for x >= 999.5 && unit < 4 {
		x, unit = x/1000, unit+1
	}
	digits := 0
	if x < 9.95 {
		digits = 1
	}
	return fmt.Sprintf("%.*f%c", digits, x, "kMGTP"[unit])
}

// shortDuration is a duration in about three digits.
func shortDuration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%dµs", d.Microseconds())
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2fms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1fs", d.Seconds())
}
