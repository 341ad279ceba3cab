package grpcmesh_test

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
)

// loopback is a server on a socket, and two ways to call it: through the mesh, and by gRPC with the
// same TLS.
func loopback(t testing.TB) (inMesh, plain testpb.TestServiceClient) {
	t.Helper()
	ca := newAuthority(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{}
	s.serve(t, l, ca.issue("orders"))
	s.addr = netip.MustParseAddrPort(l.Addr().String())
	svid := ca.issue("cart")
	engine := call.New(call.Config{}) // nobody observes: that is telemetry's budget
	t.Cleanup(engine.Close)
	m := newMesh(t, newNetwork(), svid, func(c *grpcmesh.Config) { c.Dial, c.Engine = nil, engine })
	engine.Publish(snapshotOf(serviceOf("orders", nil, clusterOf("orders.default:8080", s.endpoint()))))
	tls := identity.ClientTLS(identity.Static(svid), identity.Only(ca.id("orders")), []string{"h2"}, nil)
	cc, err := grpc.NewClient(s.addr.String(), grpc.WithTransportCredentials(credentials.NewTLS(tls)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return m.test("orders"), testpb.NewTestServiceClient(cc)
}

// The mesh adds a bounded number of allocations to a call of gRPC itself. The figures are of the
// whole process, server included, so only their difference says something.
func TestAllocationsOfACall(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	inMesh, plain := loopback(t)
	ctx, req := context.Background(), &testpb.SimpleRequest{}
	count := func(c testpb.TestServiceClient) float64 {
		return testing.AllocsPerRun(500, func() {
			if _, err := c.UnaryCall(ctx, req); err != nil {
				t.Fatal(err)
			}
		})
	}
	count(inMesh)
	own, gRPC := count(inMesh), count(plain)
	t.Logf("%v allocations a call, gRPC alone %v", own, gRPC)
	if own-gRPC > 5 {
		t.Errorf("the mesh adds %v allocations to the %v of gRPC, want at most 5", own-gRPC, gRPC)
	}
}

func BenchmarkUnary(b *testing.B) {
	inMesh, plain := loopback(b)
	for name, c := range map[string]testpb.TestServiceClient{"mesh": inMesh, "plain": plain} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			req := &testpb.SimpleRequest{Payload: &testpb.Payload{Body: make([]byte, 100)}}
			for b.Loop() {
				if _, err := c.UnaryCall(context.Background(), req); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
