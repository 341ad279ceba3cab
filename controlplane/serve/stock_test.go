package serve_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/serve"
)

// listen serves gRPC on loopback until the test ends.
func listen(t *testing.T, register func(*grpc.Server)) netip.AddrPort {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	register(srv)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(lis) })
	t.Cleanup(func() { srv.Stop(); wg.Wait() })
	return netip.MustParseAddrPort(lis.Addr().String())
}

// A real gRPC client takes every resource of its view: it rejects none, and its calls end where
// the routes say.
func TestAStockGRPCClientTakesItsViewWhole(t *testing.T) {
	s := serve.New(serve.Config{Dev: true})
	ads := listen(t, func(g *grpc.Server) { s.Register(g) })
	t.Cleanup(s.Stop)
	backend := listen(t, func(g *grpc.Server) { healthpb.RegisterHealthServer(g, health.NewServer()) })

	m := shop("r1", "cart", "secret")
	m.Services[1].MTLS, m.Services[1].Ports[0].Clusters[0].MTLS = ir.Strict, ir.Strict
	cart := &m.Services[0].Ports[0]
	cart.Clusters[0].Endpoints = []ir.Endpoint{
		{InstanceID: "a", Addresses: []netip.AddrPort{backend}, Weight: 3, MeshTLS: true, Priority: 4,
			Locality: ir.Locality{Region: "r"}, Labels: map[string]string{"version": "v1"}},
		{InstanceID: "a-before", Addresses: []netip.AddrPort{backend}, Weight: 1, Health: ir.Draining},
		{InstanceID: "c", Addresses: []netip.AddrPort{backend}, Weight: 1, Unreachable: "no"},
	}
	cart.Clusters = append(cart.Clusters, cart.Clusters[0])
	cart.Clusters[1].Name, cart.Clusters[1].Version, cart.Clusters[1].Policy.LB = "cart.default:80|v1", "v1", ir.RoundRobin
	to := func(cluster string) []ir.Backend { return []ir.Backend{{Cluster: cluster, Weight: 1}} }
	on := func(h string) []ir.HeaderMatch { return []ir.HeaderMatch{{Name: "to", Value: h}} }
	cart.Routes = []ir.Route{
		{Object: "HTTPRoute/default/r", Rule: "get", Match: ir.Match{Method: "GET"}, Backends: to("secret.default:80")},
		{Object: "HTTPRoute/default/r", Rule: "zero", Match: ir.Match{Headers: on("zero")}, Backends: []ir.Backend{{Cluster: "cart.default:80"}}},
		{Object: "HTTPRoute/default/r", Rule: "secret", Match: ir.Match{Headers: on("secret")}, Backends: to("secret.default:80")},
		{Object: "HTTPRoute/default/r", Rule: "nobody", Match: ir.Match{Headers: on("nobody")},
			Backends: []ir.Backend{{Cluster: "nobody.default:1", Weight: 1, Invalid: "nobody knows it"}}},
		{Object: "HTTPRoute/default/r", Rule: "segment", Match: ir.Match{PathKind: ir.PathPrefix, Path: "/grpc.health.v1.Health/Che", Headers: on("segment")}, Backends: to("cart.default:80")},
		{Object: "GRPCRoute/default/r", Rule: "deep", Match: ir.Match{PathKind: ir.PathPrefix, Path: "/grpc.health.v1.Health/Check", Method: "POST", Headers: on("segment")},
			Backends: to("cart.default:80|v1")},
		{Object: "GRPCRoute/default/r", Rule: "service", Match: ir.Match{PathKind: ir.PathPrefix, Path: "/grpc.health.v1.Health", Headers: on("service")},
			Backends: to("cart.default:80"), Timeout: time.Minute, PerTry: time.Second,
			Retry: &ir.Retry{Attempts: 3, On: []ir.RetryOn{ir.OnUnavailable, ir.OnReset}, Codes: []uint32{503}, Base: time.Millisecond}},
		{Object: "GRPCRoute/default/r", Rule: "method", Match: ir.Match{PathKind: ir.PathSuffix, Path: "/Check", Headers: on("method")}, Backends: to("cart.default:80|v1")},
		{Object: "HTTPRoute/default/r", Rule: "exact", Match: ir.Match{PathKind: ir.PathExact, Path: "/grpc.health.v1.Health/Check", Headers: on("exact")},
			Backends: []ir.Backend{{Cluster: "cart.default:80", Weight: 1}, {Cluster: "cart.default:80|v1", Weight: 1}, {Cluster: "secret.default:80"}}},
	}
	publish(t, s, m)

	builder, err := xds.NewXDSResolverWithConfigForTesting(fmt.Appendf(nil,
		`{"xds_servers": [{"server_uri": %q, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}], "node": {"id": "stock"}}`, ads))
	if err != nil {
		t.Fatal(err)
	}
	dial := func(name string) healthpb.HealthClient {
		conn, err := grpc.NewClient("xds:///"+name, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(builder))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return healthpb.NewHealthClient(conn)
	}
	call := func(c healthpb.HealthClient, header string, bound time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), bound)
		defer cancel()
		_, err := c.Check(metadata.AppendToOutgoingContext(ctx, "to", header), &healthpb.HealthCheckRequest{})
		return err
	}
	client := dial("cart.default:80")
	for header, want := range map[string]codes.Code{
		"service": codes.OK, "segment": codes.OK, "method": codes.OK, "exact": codes.OK,
		"zero": codes.Unavailable, "secret": codes.Unavailable, "nobody": codes.Unavailable,
		"anything else": codes.Unavailable,
	} {
		start := time.Now()
		if err := call(client, header, 10*time.Second); status.Code(err) != want {
			t.Errorf("call to %q: %v, want %s", header, err, want)
		}
		if took := time.Since(start); took > 9*time.Second {
			t.Errorf("call to %q took %s: something stalls", header, took)
		}
	}
	// A name that state-of-the-world leaves out does not exist once the client's timer of 15 s has
	// run out; until then it waits, and no call gets through.
	if err := call(dial("secret"), "service", 300*time.Millisecond); err == nil {
		t.Error("a call to a strict service got through")
	}
	if err := call(dial("cart"), "service", 10*time.Second); err != nil {
		t.Errorf("call by the short name: %v", err)
	}
	settled(t, s)
}

// settled waits until every client has answered, and fails for a rejection.
func settled(t *testing.T, s *serve.Server) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		changed := s.Changed()
		pending := false
		for _, c := range s.Clients(true) {
			pending = pending || c.State == "pending"
			if c.State == "nacked" {
				t.Fatalf("client %+v rejected part of its view", c)
			}
		}
		if !pending && len(s.Clients(false)) > 0 {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("clients %+v: never at rest", s.Clients(true))
		}
	}
}
