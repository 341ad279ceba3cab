package retry_test

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/retry"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestMatches(t *testing.T) {
	policy := func(words ...string) *retry.Policy {
		return retry.FromResource(&resource.Retry{On: words, Attempts: 1})
	}
	none := retry.Failure{GRPCCode: -1}
	with := func(set func(*retry.Failure)) retry.Failure { f := none; set(&f); return f }
	connect := with(func(f *retry.Failure) { f.Connect = true })
	refused := with(func(f *retry.Failure) { f.Refused = true })
	reset := with(func(f *retry.Failure) { f.NoAnswer = true })
	status := func(n int) retry.Failure { return with(func(f *retry.Failure) { f.HTTPStatus = n }) }
	code := func(n int) retry.Failure { return with(func(f *retry.Failure) { f.GRPCCode = n }) }
	for name, tc := range map[string]struct {
		policy *retry.Policy
		f      retry.Failure
		want   bool
	}{
		"no policy":                                   {nil, connect, false},
		"a policy without attempts":                   {retry.FromResource(&resource.Retry{On: []string{"5xx"}}), connect, false},
		"connect-failure names it":                    {policy("connect-failure"), connect, true},
		"connect-failure is not a reset":              {policy("connect-failure"), reset, false},
		"reset includes connect failures":             {policy("reset"), connect, true},
		"reset names a reset":                         {policy("reset"), reset, true},
		"refused-stream names it":                     {policy("refused-stream"), refused, true},
		"refused-stream is not a reset":               {policy("refused-stream"), reset, false},
		"5xx is any 5xx":                              {policy("5xx"), status(599), true},
		"5xx includes a reset":                        {policy("5xx"), reset, true},
		"5xx includes a refused stream":               {policy("5xx"), refused, true},
		"5xx is not 404":                              {policy("5xx"), status(404), false},
		"gateway-error is 502":                        {policy("gateway-error"), status(502), true},
		"gateway-error is not 500":                    {policy("gateway-error"), status(500), false},
		"a code by number":                            {policy("503"), status(503), true},
		"another code":                                {policy("503"), status(500), false},
		"a code by number is not a reset":             {policy("503"), reset, false},
		"unavailable is status 14":                    {policy("unavailable"), code(14), true},
		"unavailable includes what never got there":   {policy("unavailable"), connect, true},
		"internal is status 13":                       {policy("internal"), code(13), true},
		"resource-exhausted is status 8":              {policy("resource-exhausted"), code(8), true},
		"deadline-exceeded is status 4":               {policy("deadline-exceeded"), code(4), true},
		"cancelled is status 1":                       {policy("cancelled"), code(1), true},
		"unavailable is not status 13":                {policy("unavailable"), code(13), false},
		"status 0 is no failure":                      {policy("unavailable", "5xx"), code(0), false},
		"a per-try timeout is meant by any policy":    {policy("unavailable"), with(func(f *retry.Failure) { f.PerTry = true }), true},
		"but not by one without attempts":             {retry.FromResource(&resource.Retry{On: []string{"5xx"}, PerTry: time.Second}), with(func(f *retry.Failure) { f.PerTry = true }), false},
		"retriable codes need their word or a number": {retry.FromResource(&resource.Retry{On: []string{"retriable-status-codes"}, Codes: []uint32{429}, Attempts: 1}), status(429), true},
		"an unknown word names nothing":               {policy("retriable-4xx", "9999"), status(409), false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tc.policy.Matches(tc.f); got != tc.want {
				t.Errorf("Matches(%+v) = %v, want %v", tc.f, got, tc.want)
			}
		})
	}
	if got := policy("unavailable", "reset").On.String(); got != "reset,unavailable" {
		t.Errorf("On = %q", got)
	}
	for _, w := range retry.Words() {
		if policy(w).On.String() != w {
			t.Errorf("word %q is not understood", w)
		}
	}
}

func TestBackoff(t *testing.T) {
	const ms = time.Millisecond
	for name, tc := range map[string]struct {
		b    retry.Backoff
		want []time.Duration
	}{
		"the default is 25 ms, doubled up to ten times that": {retry.Backoff{}, []time.Duration{25 * ms, 50 * ms, 100 * ms, 200 * ms, 250 * ms, 250 * ms}},
		"max bounds":                      {retry.Backoff{Base: 30 * ms, Max: 100 * ms}, []time.Duration{30 * ms, 60 * ms, 100 * ms}},
		"max below base bounds the first": {retry.Backoff{Base: 30 * ms, Max: 10 * ms}, []time.Duration{10 * ms, 10 * ms}},
		"a huge base does not overflow":   {retry.Backoff{Base: 1 << 62}, []time.Duration{1 << 62, 1 << 62}},
	} {
		t.Run(name, func(t *testing.T) {
			for n, want := range tc.want {
				if got := tc.b.Bound(n); got != want {
					t.Errorf("Bound(%d) = %v, want %v", n, got, want)
				}
			}
			if got := tc.b.Bound(10_000); got > max(tc.b.Max, tc.b.Base, 250*ms) {
				t.Errorf("Bound(10000) = %v", got)
			}
		})
	}
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	b := retry.Backoff{Base: 100 * ms, Max: time.Second}
	var sum time.Duration
	for range 10_000 {
		d := b.Delay(1, rnd.Uint64())
		if d < 0 || d > 200*ms {
			t.Fatalf("seed %d: Delay(1) = %v, want 0 to 200 ms", seed, d)
		}
		sum += d
	}
	if mean := sum / 10_000; mean < 97*ms || mean > 103*ms {
		t.Errorf("seed %d: mean delay %v, want about 100 ms: the jitter is full", seed, mean)
	}
}

// Whatever the calls do: retries granted <= share * calls + floor * seconds touched.
func TestBudgetNeverGrantsMore(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		percent, floor := float64(rnd.IntN(60)+1), rnd.Int64N(4)+1
		now := time.Unix(1_700_000_000, rnd.Int64N(1e9))
		b := retry.NewBudget(retry.BudgetConfig{Percent: percent, MinPerSecond: floor}, now)
		epoch := now
		var calls, retries float64
		for range rnd.IntN(5000) {
			switch rnd.IntN(6) {
			case 0:
				now = now.Add(time.Duration(rnd.Int64N(int64(400 * time.Millisecond))))
			case 1:
				if rnd.IntN(100) == 0 {
					now = now.Add(time.Duration(rnd.IntN(30)) * time.Second)
				}
			case 2, 3:
				b.Call(now)
				calls++
			default:
				if b.Take(now) {
					retries++
				}
			}
			seconds := float64(now.Sub(epoch)/time.Second) + 1
			if most := calls*percent/100 + float64(floor)*seconds; retries > most {
				t.Fatalf("seed %d: %v retries for %v calls in %v s at %v %% and %d/s, want at most %v", seed, retries, calls, seconds, percent, floor, most)
			}
		}
	}
}

func TestBudgetGrantsItsShare(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	b := retry.NewBudget(retry.BudgetConfig{}, now)
	granted := 0
	for range 1000 { // every call fails and asks for one retry
		b.Call(now)
		if b.Take(now) {
			granted++
		}
		now = now.Add(5 * time.Millisecond)
	}
	// 5 s at 200 calls/s: 20 % of 1000, and the floor of 3 a second lies within.
	if granted < 195 || granted > 200+5*3 {
		t.Errorf("granted %d retries for 1000 calls, want about 200", granted)
	}
	now = now.Add(time.Hour)
	quiet := 0
	for range 10 {
		if b.Take(now) {
			quiet++
		}
	}
	if quiet != 3 {
		t.Errorf("without calls %d retries in a second, want the floor of 3", quiet)
	}
	if now = now.Add(time.Second); !b.Take(now) {
		t.Error("the floor is not there again a second later")
	}
	b.Set(retry.BudgetConfig{Percent: -1, MinPerSecond: 1})
	now = now.Add(time.Minute)
	for range 100 {
		b.Call(now)
	}
	if !b.Take(now) || b.Take(now) {
		t.Error("a share of none and a floor of 1 must grant exactly 1 in a second")
	}
}

func TestBudgetUnderContention(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	b := retry.NewBudget(retry.BudgetConfig{Percent: 10, MinPerSecond: 1}, now)
	var granted atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 2500 {
				b.Call(now)
				if b.Take(now) {
					granted.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n := granted.Load(); n > 1001 || n < 500 {
		t.Errorf("granted %d retries for 10000 calls at 10 %%, want close to 1000 and never more than 1001", n)
	}
}

func TestBudgetAllocatesNothing(t *testing.T) {
	now := time.Now()
	b := retry.NewBudget(retry.BudgetConfig{}, now)
	if n := testing.AllocsPerRun(100, func() { b.Call(now); b.Take(now) }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}
