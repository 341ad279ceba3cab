package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/examples/hellopb"
	"github.com/inlay-mesh/inlay/meshsdk"
)

func TestMain(m *testing.M) {
	role := os.Getenv("E2E_ROLE")
	if role == "" {
		// A program built with the race detector sleeps a second before it exits; these tests run
		// hundreds of them. It still reports what it saw.
		if os.Getenv("GORACE") == "" {
			if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
				panic(err)
			}
		}
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := play(ctx, role); err != nil {
		say(event{Kind: "error", Text: err.Error()})
		os.Exit(1)
	}
}

// event is one line a role writes to stdout.
type event struct {
	Kind string `json:"kind"` // ready, calls, handled, error
	Text string `json:"text,omitempty"`
	// Calls and Failed of a caller; Handled of a server.
	Calls   int64            `json:"calls,omitempty"`
	Failed  int64            `json:"failed,omitempty"`
	Handled int64            `json:"handled,omitempty"`
	Peers   map[string]int64 `json:"peers,omitempty"`
	// Nanos is when a change was seen, in Unix time.
	Nanos int64 `json:"nanos,omitempty"`
}

var out sync.Mutex

func say(e event) {
	out.Lock()
	defer out.Unlock()
	raw, _ := json.Marshal(e) // plain values
	fmt.Println(string(raw))
}

func play(ctx context.Context, role string) error {
	for _, play := range []func(context.Context, string) (bool, error){foreignRole, lonelyRole} {
		if done, err := play(ctx, role); done {
			return err
		}
	}
	level := slog.LevelWarn
	if os.Getenv("E2E_DEBUG") != "" {
		level = slog.LevelDebug
	}
	m, err := meshsdk.Open(ctx, meshsdk.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))))
	if err != nil {
		return err
	}
	switch role {
	case "grpc-server", "http-server":
		err = serve(ctx, m, role)
	case "caller":
		err = callUntilDone(ctx, m)
	case "once":
		err = once(ctx, m)
	case "misspell":
		err = misspell(ctx, m)
	case "counted":
		var conn *grpc.ClientConn
		if conn, err = m.NewClient("greeter"); err == nil {
			err = errors.Join(counted(ctx, conn), conn.Close())
		}
	case "watcher":
		err = watch(ctx, m)
	default:
		err = fmt.Errorf("role %q", role)
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return errors.Join(err, m.Shutdown(bounded))
}

type greeter struct {
	hellopb.UnimplementedGreeterServer
	count func(ctx context.Context)
	name  string
}

func (g greeter) Hello(ctx context.Context, r *hellopb.HelloRequest) (*hellopb.HelloReply, error) {
	g.count(ctx)
	return &hellopb.HelloReply{Text: g.name}, nil
}

// serve answers with the server's own name and says at the end how many calls it handled.
func serve(ctx context.Context, m *meshsdk.Mesh, role string) error {
	var mu sync.Mutex
	var handled int64
	peers := map[string]int64{}
	count := func(ctx context.Context) {
		id, ok := meshsdk.PeerFromContext(ctx)
		who := "nobody"
		if ok {
			who = id.String()
		}
		mu.Lock()
		handled++
		peers[who]++
		mu.Unlock()
	}
	name := os.Getenv("E2E_NAME")
	var srv meshsdk.Server
	if role == "grpc-server" {
		s := m.NewServer()
		hellopb.RegisterGreeterServer(s, greeter{count: count, name: name})
		srv = meshsdk.GRPC(8080, s)
	} else {
		srv = meshsdk.HTTP(8080, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			count(r.Context())
			_, _ = io.WriteString(w, name)
		}))
	}
	err := m.Run(ctx, srv)
	mu.Lock()
	defer mu.Unlock()
	say(event{Kind: "handled", Handled: handled, Peers: peers})
	return err
}

// caller makes calls of one kind: E2E_CALL is grpc:SERVICE or http:SERVICE.
func caller(m *meshsdk.Mesh) (func(ctx context.Context) (string, error), error) {
	kind, service, _ := cut(os.Getenv("E2E_CALL"))
	if kind == "grpc" {
		conn, err := m.NewClient(service)
		if err != nil {
			return nil, err
		}
		c := hellopb.NewGreeterClient(conn)
		return func(ctx context.Context) (string, error) {
			r, err := c.Hello(ctx, &hellopb.HelloRequest{Name: "e2e"})
			return r.GetText(), err
		}, nil
	}
	hc := m.HTTPClient()
	return func(ctx context.Context) (string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+service+"/", nil)
		if err != nil {
			return "", err
		}
		resp, err := hc.Do(req)
		if err != nil {
			return "", err
		}
		text, err := io.ReadAll(resp.Body)
		err = errors.Join(err, resp.Body.Close())
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("status %s: %s", resp.Status, text)
		}
		return string(text), err
	}, nil
}

func cut(s string) (before, after string, ok bool) {
	for i := range len(s) {
		if s[i] == ':' {
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

// callUntilDone keeps E2E_WORKERS calls in flight until SIGTERM; each one it began it ends.
func callUntilDone(ctx context.Context, m *meshsdk.Mesh) error {
	call, err := caller(m)
	if err != nil {
		return err
	}
	workers, err := strconv.Atoi(os.Getenv("E2E_WORKERS"))
	if err != nil {
		return err
	}
	var calls, failed atomic.Int64
	peers := map[string]int64{}
	var mu sync.Mutex
	var first sync.Once
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
				text, err := call(bounded)
				cancel()
				calls.Add(1)
				if err != nil {
					failed.Add(1)
					say(event{Kind: "error", Text: err.Error()})
				} else {
					mu.Lock()
					peers[text]++
					mu.Unlock()
				}
				first.Do(func() { say(event{Kind: "ready"}) })
				select { // a pace, so that two cores serve everybody
				case <-ctx.Done():
				case <-time.After(2 * time.Millisecond):
				}
			}
		})
	}
	wg.Wait()
	say(event{Kind: "calls", Calls: calls.Load(), Failed: failed.Load(), Peers: peers})
	return nil
}

// once makes one call and prints what came of it.
func once(ctx context.Context, m *meshsdk.Mesh) error {
	call, err := caller(m)
	if err != nil {
		return err
	}
	within := 10 * time.Second
	if s := os.Getenv("E2E_WITHIN"); s != "" {
		if within, err = time.ParseDuration(s); err != nil {
			return err
		}
	}
	bounded, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	text, err := call(bounded)
	if err != nil {
		return err
	}
	say(event{Kind: "ready", Text: text})
	return nil
}

// misspell calls a service, then one whose name is not quite that, and says how long the answer took.
func misspell(ctx context.Context, m *meshsdk.Mesh) error {
	if err := once(ctx, m); err != nil {
		return err
	}
	if err := os.Setenv("E2E_CALL", os.Getenv("E2E_WRONG")); err != nil {
		return err
	}
	call, err := caller(m)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	began := time.Now()
	_, err = call(bounded)
	say(event{Kind: "took", Nanos: int64(time.Since(began))})
	return err
}

// watch calls as fast as it can and says when the answer becomes another one.
func watch(ctx context.Context, m *meshsdk.Mesh) error {
	call, err := caller(m)
	if err != nil {
		return err
	}
	last := ""
	for ctx.Err() == nil {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		text, err := call(bounded)
		now := time.Now()
		cancel()
		switch {
		case err != nil:
			return err
		case last == "":
			say(event{Kind: "ready", Text: text})
		case text != last:
			say(event{Kind: "change", Text: text, Nanos: now.UnixNano()})
		}
		last = text
	}
	return nil
}
