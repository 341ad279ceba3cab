package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/cmd/inlay/demopb"
	"github.com/inlay-mesh/inlay/meshsdk"
)

// demoMesh is the configuration of the demo: five services, and one split.
const demoMesh = `# The mesh of ` + "`inlay demo`" + `.
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: cart}
spec:
  ports: [{port: 8080, protocol: HTTP}]
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: orders}
spec:
  ports: [{port: 8080, protocol: GRPC}]
  versions:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: orders-canary}
spec:
  parentRefs: [{kind: Service, group: "", name: orders}]
  rules:
  - name: canary
    backendRefs:
    - {group: inlay.dev, kind: ServiceVersion, name: orders.v1, weight: 90}
    - {group: inlay.dev, kind: ServiceVersion, name: orders.v2, weight: 10}
---
apiVersion: inlay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders}
spec:
  targetRef: {kind: Service, name: orders}
  timeouts: {request: 5s}
  retries: {attempts: 2, on: [unavailable, connect-failure, refused-stream]}
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: payments}
spec:
  ports: [{port: 8080, protocol: HTTP}]
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: stock}
spec:
  ports: [{port: 8080, protocol: GRPC}]
`

// demoProcesses are started in this order and stopped in the reverse one: callers last, first out.
var demoProcesses = []struct{ service, version string }{
	{"stock", ""}, {"payments", ""}, {"cart", ""}, {"orders", "v1"}, {"orders", "v2"}, {"web", ""},
}

func demoServiceCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "demo-service stock|payments|cart|orders|web|clerk",
		Short:  "One service of the demo",
		Hidden: true,
		Args:   exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
			m, err := meshsdk.Open(c.Context(), meshsdk.WithLogger(log))
			if err != nil {
				return err
			}
			err = demoService(c.Context(), m, args[0])
			ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context()), 10*time.Second)
			defer cancel()
			return errors.Join(err, m.Shutdown(ctx))
		},
	}
}

func demoService(ctx context.Context, m *meshsdk.Mesh, name string) error {
	switch name {
	case "stock":
		s := m.NewServer()
		demopb.RegisterStockServer(s, stock{})
		return m.Run(ctx, meshsdk.GRPC(8080, s))
	case "payments":
		mux := http.NewServeMux()
		mux.HandleFunc("POST /pay/{order}", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "paid %s\n", r.PathValue("order"))
		})
		return m.Run(ctx, meshsdk.HTTP(8080, mux))
	case "cart":
		conn, err := m.NewClient("stock")
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		return m.Run(ctx, meshsdk.HTTP(8080, cart(demopb.NewStockClient(conn))))
	case "orders":
		s := m.NewServer()
		demopb.RegisterOrdersServer(s, orders{http: m.HTTPClient(), version: os.Getenv("INLAY_LABELS")})
		return m.Run(ctx, meshsdk.GRPC(8080, s))
	case "web":
		return browse(ctx, m)
	case "clerk":
		return askLegacy(ctx, m)
	}
	return usageError(fmt.Errorf("demo service %q: want stock, payments, cart, orders, web or clerk", name))
}

type stock struct {
	demopb.UnimplementedStockServer
}

func (stock) Check(_ context.Context, r *demopb.CheckRequest) (*demopb.CheckResponse, error) {
	return &demopb.CheckResponse{Left: uint32(len(r.Item)) * 7}, nil
}

func (stock) Watch(r *demopb.CheckRequest, s grpc.ServerStreamingServer[demopb.CheckResponse]) error {
	for left := range uint32(3) {
		if err := s.Send(&demopb.CheckResponse{Left: uint32(len(r.Item)) + left}); err != nil {
			return err
		}
	}
	return nil
}

// cart asks stock over gRPC for what it answers over HTTP.
func cart(stock demopb.StockClient) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /items/{item}", func(w http.ResponseWriter, r *http.Request) {
		left, err := stock.Check(r.Context(), &demopb.CheckRequest{Item: r.PathValue("item")})
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		fmt.Fprintf(w, "%d left\n", left.Left)
	})
	return mux
}

type orders struct {
	demopb.UnimplementedOrdersServer
	http    *http.Client
	version string
}

// Place pays over HTTP for what was ordered over gRPC.
func (o orders) Place(ctx context.Context, r *demopb.PlaceRequest) (*demopb.PlaceResponse, error) {
	order := fmt.Sprintf("%s-%d", r.Item, r.Count)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://payments/pay/"+order, nil)
	if err != nil {
		return nil, err
	}
	if err := fetch(o.http, req); err != nil {
		return nil, err
	}
	return &demopb.PlaceResponse{Order: order, Version: o.version}, nil
}

// fetch reads a response to its end, and fails on any status but 200.
func fetch(c *http.Client, req *http.Request) error {
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = errors.Join(err, fmt.Errorf("%s %s: %s", req.Method, req.URL, resp.Status))
	}
	return errors.Join(err, resp.Body.Close())
}

// browse plays four visitors until ctx is done; each finishes the page it is on.
func browse(ctx context.Context, m *meshsdk.Mesh) error {
	conn, err := m.NewClient("orders")
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	stockConn, err := m.NewClient("stock")
	if err != nil {
		return err
	}
	defer func() { _ = stockConn.Close() }()
	if err := m.Ready(ctx, "cart", "orders", "stock"); err != nil {
		return err
	}
	v := visitor{m.HTTPClient(), demopb.NewOrdersClient(conn), demopb.NewStockClient(stockConn)}
	var wg sync.WaitGroup
	defer wg.Wait()
	for range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-ctx.Done():
					return
				case <-time.After(time.Duration(5+rand.IntN(10)) * time.Millisecond): // a visitor reads
				}
				page, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
				if err := v.page(page, n); err != nil {
					fmt.Fprintln(os.Stderr, "web:", err)
				}
				cancel()
			}
		})
	}
	return nil
}

// askLegacy calls the program without the SDK by its name, ten times a second until ctx is done.
func askLegacy(ctx context.Context, m *meshsdk.Mesh) error {
	if err := m.Ready(ctx, "legacy"); err != nil {
		return err
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	client := m.HTTPClient()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		req, err := http.NewRequestWithContext(call, http.MethodGet, "http://legacy/", nil)
		if err == nil {
			err = fetch(client, req)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "clerk:", err)
		}
		cancel()
	}
}

type visitor struct {
	http   *http.Client
	orders demopb.OrdersClient
	stock  demopb.StockClient
}

func (v visitor) page(ctx context.Context, n int) error {
	item := [...]string{"lamp", "chair", "teapot"}[n%3]
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://cart/items/"+item, nil)
	if err != nil {
		return err
	}
	if err := fetch(v.http, req); err != nil {
		return err
	}
	if _, err := v.orders.Place(ctx, &demopb.PlaceRequest{Item: item, Count: uint32(n)}); err != nil {
		return err
	}
	if n%16 != 0 {
		return nil
	}
	s, err := v.stock.Watch(ctx, &demopb.CheckRequest{Item: item})
	for err == nil {
		_, err = s.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
