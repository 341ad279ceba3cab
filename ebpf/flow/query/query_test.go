package query

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

func billingFlow() *nodepb.Flow {
	return &nodepb.Flow{
		Kind: "close", Direction: "egress", Protocol: "tcp", Verdict: "allowed", Reason: "ok",
		From:           &nodepb.FlowPeer{Name: "billing.shop", Address: "127.0.0.1:40000", Labels: map[string]string{"version": "v2", "Team": "a b"}},
		To:             &nodepb.FlowPeer{Name: "orders.default", Address: "[fd00::5]:9090"},
		ServiceAddress: "198.18.0.1:8080", Policy: "default/orders", Rule: "from-billing", Source: "mesh.yaml:4",
		BytesSent: 1500, BytesReceived: 9000, Retransmits: 2,
		Rtt: durationpb.New(6 * time.Millisecond), Duration: durationpb.New(2 * time.Second),
	}
}

func deniedFlow() *nodepb.Flow {
	return &nodepb.Flow{
		Kind: "denied", Direction: "ingress", Protocol: "udp", Verdict: "denied", Reason: "denied",
		From: &nodepb.FlowPeer{Name: "host", Address: ":5353"}, To: &nodepb.FlowPeer{Name: "host.default"}, Errno: 111, Reset_: true,
	}
}

func TestMatch(t *testing.T) {
	for text, want := range map[string][2]bool{ // of billingFlow, of deniedFlow
		"":                                     {true, true},
		"  ":                                   {true, true},
		"from=billing":                         {true, false},
		"from=billing.shop":                    {true, false},
		"from=billing.default":                 {false, false},
		"from=bill":                            {false, false},
		"FROM=billing AND verdict=Allowed":     {true, false},
		"from!=billing":                        {false, true},
		"from=host":                            {false, true},
		"to=host.default":                      {false, true},
		"service=orders":                       {true, false},
		"service!=orders":                      {false, true},
		"from.ns=shop":                         {true, false},
		"from.ns!=shop":                        {false, true},
		"to.ns in (default, shop)":             {true, true},
		"from.label.version=v2":                {true, false},
		"from.label.version!=v2":               {false, true},
		`from.label.Team="a b"`:                {true, false},
		"from.label.team=a":                    {false, false},
		"to.label.version~.*":                  {false, false},
		"port=8080":                            {true, false},
		"port=9090":                            {true, false},
		"port!=9090":                           {false, true},
		"from.port=5353":                       {false, true},
		"to.port=9090":                         {true, false},
		"port<8081":                            {true, false},
		"port in (1, 9090)":                    {true, false},
		"port not in (1, 9090)":                {false, true},
		"to.address=fd00::/8":                  {true, false},
		"to.address=10.0.0.0/8":                {false, false},
		"from.address=::ffff:127.0.0.0/104":    {true, false},
		"from.address=::ffff:127.0.0.1":        {true, false},
		"address in (127.0.0.0/8, 10.0.0.0/8)": {true, false},
		"address=198.18.0.1":                   {true, false},
		"address!=198.18.0.1":                  {false, true},
		"protocol=UDP":                         {false, true},
		"protocol~^t":                          {true, false},
		"direction=egress":                     {true, false},
		"verdict=denied or bytes>10k":          {true, true},
		"bytes>10.5k":                          {false, false},
		"bytes=10500":                          {true, false},
		"bytes>=10500B":                        {true, false},
		"bytes<10Ki":                           {false, true},
		"sent<=1.5k and received>8Ki":          {true, false},
		"retransmits>1":                        {true, false},
		"rtt>5ms":                              {true, false},
		"rtt<5ms":                              {false, false}, // one is slower, the other has none
		"rtt!=1ms":                             {true, true},
		"duration>=2s":                         {true, false},
		"reset":                                {false, true},
		"not reset":                            {true, false},
		"reset=false":                          {true, false},
		"reset!=false":                         {false, true},
		"before_agent":                         {false, false},
		"errno=ECONNREFUSED":                   {false, true},
		"errno=0":                              {true, false},
		"errno in (1, 111)":                    {false, true},
		"policy~^default/":                     {true, false},
		"policy!~^default/":                    {false, true},
		`rule=from-billing and reason=ok`:      {true, false},
		`rule~"^(from|to)-"`:                   {true, false},
		"kind=close":                           {true, false},
		"kind in (denied, audit)":              {false, true},
		"reset or from=billing and verdict=denied": {false, true},
		"(reset or from=billing) and kind=close":   {true, false},
		"not (reset or bytes=0)":                   {true, false},
		"not not reset":                            {false, true},
	} {
		t.Run(text, func(t *testing.T) {
			q, err := Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			for _, q := range []*Query{q, reparse(t, q)} {
				if got := q.Match(billingFlow()); got != want[0] {
					t.Errorf("%q matches the flow of billing: %v, want %v", q, got, want[0])
				}
				if got := q.Match(deniedFlow()); got != want[1] {
					t.Errorf("%q matches the denied flow: %v, want %v", q, got, want[1])
				}
			}
		})
	}
}

func reparse(t testing.TB, q *Query) *Query {
	t.Helper()
	again, err := Parse(q.String())
	if err != nil {
		t.Fatalf("String() gives %q, which does not parse: %v", q.String(), err)
	}
	if again.String() != q.String() {
		t.Fatalf("String() gives %q, parsed again %q", q.String(), again.String())
	}
	return again
}

func TestString(t *testing.T) {
	for text, want := range map[string]string{
		" from = billing  AND( verdict=denied) ":      "from=billing and verdict=denied",
		"(reset or reset) or (bytes>10k and (reset))": "reset or reset or bytes>10k and reset",
		"(reset or reset) and not (reset and reset)":  "(reset or reset) and not (reset and reset)",
		`from="billing" and rule="a b"`:               `from=billing and rule="a b"`,
		"port NOT IN (1,2)":                           "port not in (1, 2)",
		"From.Label.X=`y\\z`":                         `from.label.X="y\\z"`,
	} {
		q, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if q.String() != want {
			t.Errorf("Parse(%q).String() = %q, want %q", text, q, want)
		}
	}
}

func TestErrorsTeach(t *testing.T) {
	for text, want := range map[string]struct {
		column int
		text   string
	}{
		"form=billing":                 {1, "did you mean from?"},
		"from=billing and verdit=x":    {18, "did you mean verdict?"},
		"colour=red":                   {1, "want one of from, to, service"},
		"verdict=deny":                 {9, "want one of allowed, denied, audited"},
		"from":                         {5, "want an operator after from (one of = != ~ !~ in)"},
		"from=":                        {6, "want a value for from"},
		"from==a":                      {6, "want a value for from"},
		"from<a":                       {5, "from does not take <"},
		"bytes>lots":                   {7, "a number of bytes: 1500, 10k"},
		"bytes>99999999T":              {7, "a number of bytes"},
		"port=80 port=81":              {9, "want `and`, `or` or the end"},
		"port=70000":                   {6, "want 0 to 65535"},
		"port=-1":                      {6, "a whole number"},
		"rtt>5":                        {5, "a duration: 5ms"},
		"(reset":                       {7, "want `)` for the `(` of column 1"},
		"reset)":                       {6, "want `and`, `or` or the end"},
		"to.address=10.0.0.0/33":       {12, "an IP address or a range"},
		"policy~\"a(\"":                {8, "missing closing )"},
		"port in 80":                   {9, "want ( after `in`"},
		"port in (80":                  {12, "want `,` or `)`"},
		"port in ()":                   {10, "want a value"},
		"not":                          {4, "want a field"},
		"and":                          {1, "want a field"},
		"reset=maybe":                  {7, "true or false"},
		"from.label.=x":                {1, "without a key"},
		"errno=EWHAT":                  {7, "ECONNREFUSED"},
		"from!billing":                 {5, "want != or !~"},
		"rule=\"a":                     {6, "quotation never ends"},
		"from='a'":                     {6, `a value in "..."`},
		"rüle=a and b\xff=c":           {12, "not UTF-8"},
		strings.Repeat("(", 70):        {65, "nested deeper than 64"},
		strings.Repeat("not ", 70):     {257, "nested deeper than 64"},
		strings.Repeat(" ", 5000):      {1, "5000 bytes long"},
		"from=a\x00":                   {7, "want"},
		"reset and\n  verdict~denied(": {27, "want `and`, `or` or the end"},
	} {
		t.Run(text[:min(len(text), 20)], func(t *testing.T) {
			_, err := Parse(text)
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("Parse(%q): %v, want an *Error", text, err)
			}
			if e.Column != want.column || !strings.Contains(e.Text, want.text) {
				t.Errorf("Parse(%q): %v, want column %d and %q", text, err, want.column, want.text)
			}
		})
	}
}

// Every field that the help shows can be asked for, with each operator that it names.
func TestFieldsAreWhatParses(t *testing.T) {
	samples := map[string]string{"protocol": "tcp", "direction": "egress", "verdict": "denied", "kind": "close"}
	for _, f := range Fields() {
		value := samples[f.Name]
		if value == "" {
			for _, v := range []string{"true", "10.0.0.1", "5ms", "7"} {
				if _, err := Parse(f.Name + "=" + v); err == nil {
					value = v
					break
				}
			}
		}
		for _, op := range f.Operators {
			texts := []string{f.Name + op + value}
			if op == "in" {
				texts = []string{f.Name + " in (" + value + ")", f.Name + " not in (" + value + ", " + value + ")"}
			}
			for _, text := range texts {
				q, err := Parse(text)
				if err != nil {
					t.Errorf("%v", err)
					continue
				}
				q.Match(&nodepb.Flow{}) // a flow with nothing set is no reason to panic
				q.Match(nil)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"from=billing and verdict=denied", `not (a~"x" or port in (1,2))`, "bytes>10k", "to.label.a/b.c!=\"\\xff\"", "reset", "rtt<=5ms", "address=fd00::/8"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		q, err := Parse(text)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Column < 1 || e.Column > len(text)+1 {
				t.Fatalf("Parse(%q): %v", text, err)
			}
			return
		}
		again := reparse(t, q)
		for _, flow := range []*nodepb.Flow{billingFlow(), deniedFlow(), {}} {
			if q.Match(flow) != again.Match(flow) {
				t.Fatalf("%q and %q differ", text, q)
			}
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	q, err := Parse("from=billing and verdict=denied or to.address=10.0.0.0/8")
	if err != nil {
		b.Fatal(err)
	}
	f := billingFlow()
	b.ReportAllocs()
	for b.Loop() {
		q.Match(f)
	}
}
