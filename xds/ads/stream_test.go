package ads_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/xds/ads"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestBackoffDoublesToItsCap(t *testing.T) {
	for n, want := range map[int]time.Duration{1: 250 * time.Millisecond, 2: 500 * time.Millisecond, 4: 2 * time.Second, 5: 4 * time.Second, 6: 4 * time.Second, 1 << 20: 4 * time.Second} {
		if got := ads.Backoff(n, 0); got != want/2 {
			t.Errorf("attempt %d, least: %v, want %v", n, got, want/2)
		}
		if got := ads.Backoff(n, 0.999999); got > want || got < want*9/10 {
			t.Errorf("attempt %d, most: %v, want just under %v", n, got, want)
		}
	}
}

func TestTextOfANACKIsBounded(t *testing.T) {
	m := ads.NewMachine()
	n := ads.Name{Type: resource.ClusterType, Name: "c"}
	m.Step(ads.Subscribe{Name: n})
	m.Step(ads.Connected{})
	m.Step(ads.Flush{})
	r := ads.Response{Type: n.Type, Nonce: "1"}
	for range 1000 {
		r.Resources = append(r.Resources, ads.Received{Err: errors.New("überall \xff kaputt")})
	}
	for _, a := range m.Step(r) {
		if s, ok := a.(ads.Send); ok {
			if len(s.Error) > 5000 || !utf8.ValidString(s.Error) || !strings.HasSuffix(s.Error, "(1000 faults)") {
				t.Errorf("%d bytes, valid %v, ends in %q", len(s.Error), utf8.ValidString(s.Error), s.Error[len(s.Error)-20:])
			}
			return
		}
	}
	t.Error("no answer")
}

func TestNewNeedsItsFunctions(t *testing.T) {
	dial := func(context.Context, int) (*grpc.ClientConn, error) { return nil, nil }
	check := func(string, []byte) (string, any, error) { return "", nil, nil }
	deliver := func(ads.Update) {}
	for name, cfg := range map[string]ads.Config{
		"no servers": {Dial: dial, Check: check, Deliver: deliver},
		"no dial":    {Servers: []string{"a"}, Check: check, Deliver: deliver},
		"no check":   {Servers: []string{"a"}, Dial: dial, Deliver: deliver},
		"no deliver": {Servers: []string{"a"}, Dial: dial, Check: check},
	} {
		if _, err := ads.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	s, err := ads.New(ads.Config{Servers: []string{"a"}, Dial: dial, Check: check, Deliver: deliver})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Errorf("Run with a done context: %v", err)
	}
	if err := s.Run(ctx); err == nil {
		t.Error("a second Run was accepted")
	}
}
