package bench

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/inlay-mesh/inlay/examples/hellopb"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/meshsdk/meshtest"
)

// service is the YAML of a service and its policy: timeout and retries are what most services have.
func service(name, protocol string) string {
	return fmt.Sprintf(`
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: %[1]s}
spec:
  ports: [{port: 8080, protocol: %[2]s}]
---
apiVersion: inlay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: %[1]s}
spec:
  targetRef: {kind: Service, name: %[1]s}
  timeouts: {request: %[3]s}
  retries: {attempts: 2, on: [unavailable, connect-failure, refused-stream]}
`, name, protocol, requestTimeout)
}

// A unary call of gRPC: the SDK at both ends beside plain grpc-go at both ends, which has the same
// certificates and the same deadline.
func TestUnary(t *testing.T) {
	mesh := meshtest.New(t, meshtest.Loopback())
	mesh.Apply(service("greeter", "GRPC"))
	client := mesh.Open("web")
	serveGreeter(t, mesh.Open("greeter"))
	compare(t, overMesh(t, "sdk", client, "greeter"), plain(t, mesh), 1.15, 1, 16, 64)
}

type greeter struct {
	hellopb.UnimplementedGreeterServer
}

func (greeter) Hello(_ context.Context, r *hellopb.HelloRequest) (*hellopb.HelloReply, error) {
	return &hellopb.HelloReply{Text: r.Name}, nil
}

func hello() *hellopb.HelloRequest { return &hellopb.HelloRequest{Name: strings.Repeat("x", 100)} }

// serveGreeter is a server of the mesh.
func serveGreeter(t *testing.T, m *meshsdk.Mesh) {
	t.Helper()
	s := m.NewServer()
	hellopb.RegisterGreeterServer(s, greeter{})
	lis, err := m.Listen(t.Context(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, lis)
}

// overMesh calls it: mutual TLS, routing, retries, timeout, metrics.
func overMesh(t *testing.T, name string, client *meshsdk.Mesh, service string) variant {
	t.Helper()
	if err := client.Ready(t.Context(), service); err != nil {
		t.Fatal(err)
	}
	conn, err := client.NewClient(service)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stub, req := hellopb.NewGreeterClient(conn), hello()
	return variant{name, func() error {
		_, err := stub.Hello(context.Background(), req)
		return err
	}}
}

// plain is grpc-go with the same certificates.
func plain(t *testing.T, mesh *meshtest.Mesh) variant {
	t.Helper()
	serverID, clientID := mesh.Identity("greeter"), mesh.Identity("web")
	svid, err := serverID.Wait(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(identity.ServerTLS(serverID, identity.ServerOptions{RequireClient: true, ALPN: []string{"h2"}}))))
	hellopb.RegisterGreeterServer(s, greeter{})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, lis)
	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(identity.ClientTLS(clientID, identity.Only(svid.ID), []string{"h2"}, nil))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stub, req := hellopb.NewGreeterClient(conn), hello()
	return variant{"grpc", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
		defer cancel()
		_, err := stub.Hello(ctx, req)
		return err
	}}
}

func serve(t *testing.T, s *grpc.Server, lis net.Listener) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(lis) // Stop ends it
	}()
	t.Cleanup(func() { s.Stop(); <-done })
}
