package controlplane

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/controlplane/source"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// A whole control plane in memory, under a clock that tests own: every goroutine ends with Stop,
// or the bubble would not.
func TestInMemoryUnderAFakeClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lis := bufconn.Listen(1 << 16)
		cp, err := New(Config{
			Plaintext: "127.0.0.1:15010",
			Listen:    func(string, string) (net.Listener, error) { return lis, nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := cp.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-cp.Ready()
		if _, err := cp.Apply(t.Context(), []source.File{{Path: "mesh.yaml", Data: []byte(permissive)}}); err != nil {
			t.Fatal(err)
		}
		conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		x := follow(t, conn, endpoints, "orders.default:8080")
		if got := x.addresses(); got != "127.0.0.1:9001" {
			t.Errorf("endpoints = %q", got)
		}
		if _, err := cp.Apply(t.Context(), []source.File{{Path: "mesh.yaml", Data: []byte(strings.Replace(permissive, "9001", "9002", 1))}}); err != nil {
			t.Fatal(err)
		}
		if got := x.addresses(); got != "127.0.0.1:9002" {
			t.Errorf("endpoints = %q", got)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the change took %v of the fake clock: something polls", took)
		}
		_ = conn.Close()
		if err := cp.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := cp.Apply(expired(t), nil); err == nil {
			t.Error("Apply after Stop succeeded")
		}
	})
}

func expired(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// asOrders are a listener's credentials that have attested one caller.
type asOrders struct {
	credentials.TransportCredentials
}

func (a asOrders) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, attest.Info{Caller: attest.Caller{Local: true, ID: spiffeid.RequireFromString("spiffe://inlay.local/ns/default/svc/orders")}}, nil
}

func (a asOrders) Clone() credentials.TransportCredentials { return a }

// Builds that the registry asks for are bounded: a burst is one or two.
func TestABurstOfInstancesIsBuiltTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		if err := cp.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-cp.Ready()
		builds, stop := 0, make(chan struct{})
		counted := make(chan struct{})
		go func() {
			defer close(counted)
			for {
				views := cp.Server().Views()
				select {
				case <-cp.Server().Changed():
				case <-stop:
					return
				}
				if cp.Server().Views() != views {
					builds++
				}
			}
		}()
		synctest.Wait()
		lis := bufconn.Listen(1 << 16)
		srv := grpc.NewServer(grpc.Creds(asOrders{insecure.NewCredentials()}))
		cp.Registry().Register(srv)
		served := make(chan struct{})
		go func() { defer close(served); _ = srv.Serve(lis) }()
		conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		in := sdkInstance("i-1", "orders", "10.0.0.1:7000")
		s := enrol(t, conn, in)
		for range 50 {
			in.Weight++
			if err := s.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: in}}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second) // of the bubble
		synctest.Wait()
		close(stop)
		<-counted
		if builds < 1 || builds > 2 {
			t.Errorf("%d builds for a burst of 51 changes, want 1 or 2", builds)
		}
		if got := cp.Registry().Snapshot().Instances; len(got) != 1 || got[0].Weight != 50 {
			t.Errorf("instances = %+v", got)
		}
		_ = conn.Close()
		srv.Stop()
		<-served
		if err := cp.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
