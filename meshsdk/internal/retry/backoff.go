package retry

import "time"

// Backoff is how long to wait before a further attempt.
type Backoff struct {
	// Base is the bound of the first wait. Zero means 25 ms (Envoy, RetryPolicy.retry_back_off: "the
	// default base interval is 25 milliseconds").
	Base time.Duration
	// Max bounds every wait. Zero means ten times Base (RetryBackOff.max_interval: "The default
	// is 10 times the base_interval").
	Max time.Duration
}

// Bound is the upper end of the wait before further attempt n, from 0: min(Base * 2^n, Max).
func (b Backoff) Bound(n int) time.Duration {
	base, most := b.Base, b.Max
	if base <= 0 {
		base = 25 * time.Millisecond
	}
	if most <= 0 {
		if most = base * 10; most < base {
			most = base
		}
	}
	for ; n > 0 && base < most; n-- {
		if base > most/2 {
			return most
		}
		base *= 2
	}
	return min(base, most)
}

// Delay is the wait before further attempt n, from 0, drawn with rnd, a uniform 64-bit value.
//
// gRFC A6: "the n-th attempt will occur at random(0,
// min(initialBackoff*backoffMultiplier**(n-1), maxBackoff))", which A44 takes over for xDS with
// "backoffMultiplier = 2": full jitter, so that callers which failed together do not come back
// together.
func (b Backoff) Delay(n int, rnd uint64) time.Duration {
	bound := b.Bound(n)
	return time.Duration(rnd % uint64(bound+1))
}
