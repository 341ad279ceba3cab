package bench

import (
	"context"
	"flag"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	rounds = flag.Int("rounds", 3, "rounds of each variant at each number of callers")
	round  = flag.Duration("round", 200*time.Millisecond, "length of a round")
)

// requestTimeout bounds each call of every variant: the SDK by its policy, the plain ones by a
// context. A deadline costs a timer at both ends and, with gRPC, a header.
const requestTimeout = 10 * time.Second

// variant is one way of making the call.
type variant struct {
	name string
	call func() error
}

// sample is one round; both ends are in this process.
type sample struct {
	calls  int
	cpu    time.Duration // per call, of the process
	allocs float64       // per call
	bytes  float64       // allocated, per call
	p50    time.Duration
}

// compare runs a and b with each number of callers in rotated rounds, logs the ratios, and fails
// when a allocates more than most times what b does. Times are only logged: they are the machine's.
func compare(t *testing.T, a, b variant, most float64, callers ...int) {
	t.Helper()
	variants := []variant{a, b}
	for _, v := range variants {
		measure(t, v, slices.Max(callers), *round) // warm: connections, pools, series
	}
	for _, n := range callers {
		var got [2][]sample
		for r := range *rounds {
			for i := range variants {
				at := (i + r) % len(variants)
				got[at] = append(got[at], measure(t, variants[at], n, *round))
			}
		}
		ratio := func(of func(sample) float64) []float64 {
			x := make([]float64, *rounds)
			for r := range x {
				x[r] = of(got[0][r]) / of(got[1][r])
			}
			return x
		}
		allocs := ratio(func(s sample) float64 { return s.allocs })
		x, y := middle(got[0]), middle(got[1])
		t.Logf("%s / %s, %2d callers: CPU %s, p50 %s, allocations %s; a call %v and %v of CPU, %.0f and %.0f allocations, %.0f and %.0f bytes; %d and %d calls a round",
			a.name, b.name, n,
			spread(ratio(func(s sample) float64 { return float64(s.cpu) })), spread(ratio(func(s sample) float64 { return float64(s.p50) })), spread(allocs),
			x.cpu, y.cpu, x.allocs, y.allocs, x.bytes, y.bytes, x.calls, y.calls)
		if m := median(allocs); m > most {
			t.Errorf("%d callers: %s allocates %.2f times what %s does, want at most %.2f", n, a.name, m, b.name, most)
		}
	}
}

// measure keeps callers busy for d and counts what the whole process spent.
func measure(t *testing.T, v variant, callers int, d time.Duration) sample {
	t.Helper()
	times := make([][]time.Duration, callers)
	for i := range times {
		times[i] = make([]time.Duration, 0, 1<<12)
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu := cpuTime(t)
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				start := time.Now()
				if err := v.call(); err != nil {
					t.Errorf("%s: %v", v.name, err)
					return
				}
				times[i] = append(times[i], time.Since(start))
			}
		})
	}
	wg.Wait()
	cpu = cpuTime(t) - cpu
	runtime.ReadMemStats(&after)
	all := slices.Concat(times...)
	if len(all) == 0 {
		t.Fatalf("%s: no call", v.name)
	}
	slices.Sort(all)
	n := len(all)
	return sample{
		calls: n, cpu: cpu / time.Duration(n), p50: all[n/2],
		allocs: float64(after.Mallocs-before.Mallocs) / float64(n), bytes: float64(after.TotalAlloc-before.TotalAlloc) / float64(n),
	}
}

func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// middle is the round whose CPU is the median.
func middle(s []sample) sample {
	s = slices.SortedFunc(slices.Values(s), func(a, b sample) int { return int(a.cpu - b.cpu) })
	return s[len(s)/2]
}

func median(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	return s[len(s)/2]
}

func spread(x []float64) string {
	return fmt.Sprintf("×%.2f (%.2f to %.2f)", median(x), slices.Min(x), slices.Max(x))
}
