package telemetry_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/telemetry"
)

func record(service string, d time.Duration) *call.Record {
	return &call.Record{Direction: "client", Service: service, Route: "r", Peer: callee, Version: "v1", Reason: call.ReasonOK, MTLS: true, Duration: d}
}

func TestBuckets(t *testing.T) {
	const step = 100 * time.Microsecond
	for d, want := range map[time.Duration]int{
		-1: 0, 0: 0, 1: 0, step: 0, step + 1: 1, 2 * step: 1, 2*step + 1: 2, 4 * step: 2, 4*step + 1: 3,
		(1 << 19) * step: 19, (1<<19)*step + 1: 20, 1 << 62: 20,
	} {
		c := telemetry.NewCounters(0, epoch)
		c.Add(record("orders", d))
		n := c.Take(epoch).Calls[0]
		if n.Buckets[want] != 1 || n.Calls != 1 || n.Total != d {
			t.Errorf("%v is in %v, want bucket %d", d, n.Buckets, want)
		}
	}
}

func TestTakeStartsAnew(t *testing.T) {
	c := telemetry.NewCounters(0, epoch)
	for range 3 {
		c.Add(record("orders", time.Millisecond))
	}
	plain := record("orders", time.Millisecond)
	plain.MTLS = false
	c.Add(plain)
	failed := record("orders", time.Millisecond)
	failed.Reason = call.ReasonReset
	c.Add(failed)
	first := c.Take(epoch.Add(2 * time.Second))
	if len(first.Calls) != 2 || first.Window != 2*time.Second {
		t.Fatalf("%+v, want one count for each reason", first)
	}
	for _, n := range first.Calls {
		switch n.Reason {
		case "ok":
			if n.Calls != 4 || n.MTLS != 3 || n.Failed != 0 || n.Total != 4*time.Millisecond || n.Buckets[4] != 4 {
				t.Errorf("%+v", n)
			}
		case "reset":
			if n.Calls != 1 || n.Failed != 1 {
				t.Errorf("%+v", n)
			}
		}
	}
	if second := c.Take(epoch.Add(3 * time.Second)); len(second.Calls) != 0 || second.Window != time.Second {
		t.Errorf("%+v, want nothing", second)
	}
}

func TestCountersAreBounded(t *testing.T) {
	c := telemetry.NewCounters(10, epoch)
	for i := range 25 {
		c.Add(record(fmt.Sprint(i), 1))
	}
	got := c.Take(epoch)
	if len(got.Calls) != 10 || got.Dropped != 15 || c.Series() != 10 {
		t.Errorf("%d series, %d dropped; want 10 and 15", len(got.Calls), got.Dropped)
	}
	// Series without calls make room, one in use stays.
	for range 60 {
		c.Add(record("0", 1))
		c.Take(epoch)
	}
	if c.Series() != 1 {
		t.Errorf("%d series are left after 60 takes without calls, want 1", c.Series())
	}
	c.Add(record("new", 1))
	if got := c.Take(epoch); len(got.Calls) != 1 || got.Dropped != 0 {
		t.Errorf("a new series finds no room: %+v", got)
	}
}

// No call is lost or counted twice while others take and series come and go.
func TestCountersUnderContention(t *testing.T) {
	c := telemetry.NewCounters(0, epoch)
	const workers, each = 4, 5000
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				c.Add(record(fmt.Sprint(w, i%7), time.Duration(i)))
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	var sum uint64
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		for _, n := range c.Take(epoch).Calls {
			sum += n.Calls
		}
	}
	if sum != workers*each {
		t.Errorf("counted %d calls, want %d", sum, workers*each)
	}
}
