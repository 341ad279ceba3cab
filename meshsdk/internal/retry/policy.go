// Package retry decides whether an attempt may be repeated and when: the policy of a route, the
// back-off between attempts and the budget of a cluster.
//
// call asks it after each failed attempt. It decides values from values: it starts no timer, sends
// nothing and knows neither gRPC nor HTTP beyond their codes.
package retry

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/inlay-mesh/inlay/xds/resource"
)

// Condition is a set of kinds of failure, one bit each, by the words of Envoy's retry_on.
type Condition uint32

// Conditions that a policy can name.
const (
	// ConnectFailure: the connection could not be made, so nothing was sent.
	ConnectFailure Condition = 1 << iota
	// RefusedStream: the server refused before it processed anything.
	RefusedStream
	// Reset: the server did not answer at all (disconnect, reset, per-try timeout).
	Reset
	// ServerError ("5xx"): any 5xx or no answer at all.
	ServerError
	// GatewayError: 502, 503, 504 or no answer at all.
	GatewayError
	// RetriableStatus: the codes in Policy.Codes.
	RetriableStatus
	// Cancelled and the rest: the gRPC status of that name.
	Cancelled
	DeadlineExceeded
	Internal
	ResourceExhausted
	Unavailable
)

var words = []struct {
	word string
	bit  Condition
}{
	{"connect-failure", ConnectFailure},
	{"refused-stream", RefusedStream},
	{"reset", Reset},
	{"5xx", ServerError},
	{"gateway-error", GatewayError},
	{"retriable-status-codes", RetriableStatus},
	{"cancelled", Cancelled},
	{"deadline-exceeded", DeadlineExceeded},
	{"internal", Internal},
	{"resource-exhausted", ResourceExhausted},
	{"unavailable", Unavailable},
}

// Words are the words of retry_on that a policy can honour, for texts.
func Words() []string {
	var all []string
	for _, w := range words {
		all = append(all, w.word)
	}
	return all
}

// String lists the words, joined with ",".
func (c Condition) String() string {
	var all []string
	for _, w := range words {
		if c&w.bit != 0 {
			all = append(all, w.word)
		}
	}
	return strings.Join(all, ",")
}

// Policy is the retry policy of a route. It is immutable and safe to share; nil retries nothing
// that was sent.
type Policy struct {
	On Condition
	// Codes are HTTP statuses to retry; they count when On has RetriableStatus.
	Codes []uint32
	// Attempts are further attempts after the first; zero means none.
	Attempts uint32
	// PerTry bounds each attempt; zero means none.
	PerTry time.Duration
	// Backoff is the wait before each further attempt.
	Backoff Backoff
}

// FromResource makes a policy of its xDS form; nil gives nil. A word of three digits counts as an
// HTTP status; other unknown words are skipped (xds/resource reports them as not honoured).
func FromResource(r *resource.Retry) *Policy {
	if r == nil {
		return nil
	}
	p := &Policy{
		Codes:    slices.Clone(r.Codes),
		Attempts: r.Attempts,
		PerTry:   r.PerTry,
		Backoff:  Backoff{Base: r.Base, Max: r.Max},
	}
	for _, word := range r.On {
		word = strings.TrimSpace(word)
		found := false
		for _, w := range words {
			if w.word == word {
				p.On |= w.bit
				found = true
			}
		}
		if code, err := strconv.ParseUint(word, 10, 32); !found && err == nil && code >= 100 && code <= 599 {
			p.Codes = append(p.Codes, uint32(code))
			p.On |= RetriableStatus
		}
	}
	return p
}

// Failure is what an attempt ended with, in the terms a policy is written in.
type Failure struct {
	// Connect: no connection could be made. Refused: the server did not process it. NoAnswer: reset
	// or disconnected before a response. PerTry: the time of the attempt ran out.
	Connect, Refused, NoAnswer, PerTry bool
	// HTTPStatus of the response; zero means none.
	HTTPStatus int
	// GRPCCode of the status; -1 means none.
	GRPCCode int
}

// gRPC codes that a policy can name (https://grpc.io/docs/guides/status-codes/).
const (
	codeCancelled         = 1
	codeDeadlineExceeded  = 4
	codeResourceExhausted = 8
	codeInternal          = 13
	codeUnavailable       = 14
)

// Matches reports whether the policy names this kind of failure. It says nothing of attempts left,
// budget or idempotence.
func (p *Policy) Matches(f Failure) bool {
	if p == nil || p.Attempts == 0 {
		return false
	}
	// Envoy, retry_on "5xx": "Envoy will attempt a retry if the upstream server responds with any
	// 5xx response code, or does not respond at all (disconnect/reset/read timeout). (Includes
	// connect-failure and refused-stream)". "gateway-error" is the same for 502, 503 and 504.
	const noAnswer = Reset | ServerError | GatewayError
	switch {
	case f.Connect && p.On&(ConnectFailure|noAnswer) != 0:
		return true
	case f.Refused && p.On&(RefusedStream|noAnswer) != 0:
		return true
	case f.NoAnswer && p.On&noAnswer != 0:
		return true
	case f.PerTry:
		// Gateway API, HTTPRouteRetry: "Implementations SHOULD retry on connection errors
		// (disconnect, reset, timeout, TCP failure) if a retry stanza is configured." Envoy asks for
		// "reset" or "5xx" here; whoever bounds each try and asks for another one means this case,
		// so PerTry with Attempts is enough.
		return true
	}
	if (f.Connect || f.Refused || f.NoAnswer) && p.On&Unavailable != 0 {
		// The gRPC library reports each of them as status UNAVAILABLE: the author of the policy sees
		// one word for all of them.
		return true
	}
	switch f.GRPCCode {
	case codeCancelled:
		return p.On&Cancelled != 0
	case codeDeadlineExceeded:
		return p.On&DeadlineExceeded != 0
	case codeResourceExhausted:
		return p.On&ResourceExhausted != 0
	case codeInternal:
		return p.On&Internal != 0
	case codeUnavailable:
		return p.On&Unavailable != 0
	}
	switch s := f.HTTPStatus; {
	case s == 0:
		return false
	case p.On&ServerError != 0 && s >= 500 && s <= 599:
		return true
	case p.On&GatewayError != 0 && s >= 502 && s <= 504:
		return true
	case p.On&RetriableStatus != 0:
		return slices.Contains(p.Codes, uint32(s))
	}
	return false
}
