package differential

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	stockxds "google.golang.org/grpc/xds"

	"github.com/inlay-mesh/inlay/examples/hellopb"
	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/meshsdk/meshtest"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
)

// patience bounds every wait: far above what anything takes.
const patience = 60 * time.Second

var seedFlag = flag.Uint64("seed", 0, "seed of the random inputs; 0 draws one")

// seeded returns a source of random inputs and prints how to repeat it.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d: repeat with -args -seed=%d", seed, seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// endpoint is a server without mesh TLS that answers every method with its name.
type endpoint struct {
	name string
	addr netip.AddrPort
}

// answer is a handler of every method.
func answer(name string) grpc.ServerOption {
	return grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		if err := s.RecvMsg(&hellopb.HelloRequest{}); err != nil {
			return err
		}
		return s.SendMsg(&hellopb.HelloReply{Text: name})
	})
}

func startEndpoint(t *testing.T, name string) endpoint {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(answer(name))
	done := make(chan error, 1)
	go func() { done <- s.Serve(lis) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Errorf("server %s: %v", name, err)
		}
	})
	return endpoint{name, netip.MustParseAddrPort(lis.Addr().String())}
}

// fixture is one control plane with two clients: grpc-go's and ours.
type fixture struct {
	t     *testing.T
	mesh  *meshtest.Mesh
	sdk   *meshsdk.Mesh
	stock grpc.DialOption
	root  endpoint
	files string // the services that all tables send calls to
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{t: t, mesh: meshtest.New(t, meshtest.Loopback(), meshtest.Plaintext()), root: startEndpoint(t, "root")}
	var b strings.Builder
	for _, s := range []struct{ name, endpoints string }{
		{"a", "a-v1 a-v2"}, {"b", "b-v1 b-v2-x b-v2-y"}, {"c", "c-x c-y c-z"}, {"d", ""},
	} {
		fmt.Fprintf(&b, "---\napiVersion: inlay.dev/v1alpha1\nkind: MeshService\nmetadata: {name: %s}\nspec:\n  mtls: permissive\n  ports: [{port: 8080, protocol: GRPC}]\n  versions: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]\n", s.name)
		if s.endpoints != "" {
			b.WriteString("  endpoints:\n")
		}
		for name := range strings.FieldsSeq(s.endpoints) {
			e := startEndpoint(t, name)
			fmt.Fprintf(&b, "  - {address: %s, port: %d, labels: {version: %s}}\n", e.addr.Addr(), e.addr.Port(), strings.SplitN(name+"-v0", "-", 3)[1])
		}
	}
	f.files = b.String()
	f.mesh.Apply(f.files)

	d := f.mesh.Open("d")
	f.mesh.Serve(d, meshsdk.GRPC(8080, d.NewServer(answer("d"))))
	f.sdk = f.mesh.Open("probe")

	raw, err := bootstrap.Generate(bootstrap.Client{ServerURI: f.mesh.PlaintextXDS(), NodeID: "probe@test", Service: "probe", Namespace: "default"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := stockxds.NewXDSResolverWithConfigForTesting(raw)
	if err != nil {
		t.Fatal(err)
	}
	f.stock = grpc.WithResolvers(r)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := f.sdk.Ready(ctx, "a", "b", "c", "d"); err != nil {
		t.Fatal(err)
	}
	return f
}

// clients are the names of the two.
var clients = []string{"grpc-go", "inlay"}

// dial opens a channel of each client to a service.
func (f *fixture) dial(service string) map[string]*grpc.ClientConn {
	f.t.Helper()
	stock, err := grpc.NewClient("xds:///"+service, f.stock, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUserAgent("probe"))
	if err != nil {
		f.t.Fatal(err)
	}
	ours, err := f.sdk.NewClient(service, grpc.WithUserAgent("probe"))
	if err != nil {
		f.t.Fatal(err)
	}
	return map[string]*grpc.ClientConn{clients[0]: stock, clients[1]: ours}
}

// hangUp closes the channels, and fails the test when a client rejected anything.
func (f *fixture) hangUp(conns map[string]*grpc.ClientConn) {
	f.t.Helper()
	for _, c := range f.mesh.Clients() {
		for _, r := range c.Resources {
			if r.Nack != "" {
				f.t.Errorf("%s rejected %s: %s", c.Agent, r.Name, r.Nack)
			}
		}
	}
	for _, c := range conns {
		if err := c.Close(); err != nil {
			f.t.Error(err)
		}
	}
}

// call makes one call and returns the name of the server that answered, or the status code.
func call(t *testing.T, conn *grpc.ClientConn, p probe) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, h := range p.headers {
		ctx = metadata.AppendToOutgoingContext(ctx, h[0], h[1])
	}
	var reply hellopb.HelloReply
	if err := conn.Invoke(ctx, p.path, &hellopb.HelloRequest{}, &reply); err != nil {
		return status.Code(err).String(), err
	}
	return reply.Text, nil
}

// targetOf is the target that an answer came from. Every failure of these calls is a backend that
// has no endpoint.
func targetOf(answer string) string {
	for name, servers := range targets {
		if slices.Contains(servers, answer) {
			return name
		}
	}
	if answer == codes.Unavailable.String() {
		return "nobody"
	}
	return answer
}
