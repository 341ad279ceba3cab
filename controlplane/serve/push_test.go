package serve_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// However many streams want a resource, it is encoded once, and the streams that do not want it
// hear nothing.
func TestAPushEncodesOnceForAllStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart", "orders"))
		client := dial(t, s, svid("/ns/default/svc/pay"))
		var interested, others []*delta
		for i := range 1000 {
			d := openDelta(t, client, sdkNode())
			if i%10 == 0 {
				d.subscribe(eds, "orders.default:80")
				others = append(others, d)
				continue
			}
			d.subscribe(eds, "cart.default:80")
			interested = append(interested, d)
		}
		synctest.Wait()
		for _, d := range append(interested[:len(interested):len(interested)], others...) {
			d.mu.Lock()
			d.inbox = nil
			d.mu.Unlock()
		}
		publish(t, s, draining("r2", "cart", "orders"))
		synctest.Wait()
		// The endpoints, and the service as nodes have it.
		if n := s.Views().Encoded(); n != 2 {
			t.Errorf("%d resources encoded for one that changed and %d streams, want 2", n, len(interested))
		}
		received := func(ds []*delta) (n int) {
			for _, d := range ds {
				d.mu.Lock()
				n += len(d.inbox)
				d.mu.Unlock()
			}
			return n
		}
		if got := received(interested); got != len(interested) {
			t.Errorf("%d responses to %d interested streams, want one each", got, len(interested))
		}
		if got := received(others); got != 0 {
			t.Errorf("%d responses to streams that did not ask for it, want none", got)
		}
	})
}

// push measures a change of one cluster of 500 endpoints among 100,000 from Publish until the last
// of 1000 streams has it; raw measures the same bytes written to the same streams by a server that
// does nothing else. The budget is a ratio of 4 (ARCHITECTURE, section 7).
func BenchmarkPush(b *testing.B) {
	const services, endpoints, streams = 200, 500, 1000
	meshes := [2]*ir.Mesh{big(services, endpoints, 1), big(services, endpoints, 2)}

	b.Run("push", func(b *testing.B) {
		s := serve.New(serve.Config{Dev: true})
		publish(b, s, meshes[0])
		f := newFleet(b, streams, func(g *grpc.Server) { s.Register(g) })
		b.Cleanup(s.Stop)
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			i++
			publish(b, s, meshes[i%2])
			f.wait()
		}
		b.ReportMetric(float64(f.bytes.Load())/float64(b.N), "wire-B/op")
	})
	b.Run("raw", func(b *testing.B) {
		views, err := xdsgen.New(meshes[0], nil)
		if err != nil {
			b.Fatal(err)
		}
		r, _ := views.Lookup(xdsgen.View{Namespace: "default"}, eds, "s0.default:80")
		raw := &rawADS{resp: &discoveryv3.DeltaDiscoveryResponse{
			TypeUrl: eds, Nonce: "1", Resources: []*discoveryv3.Resource{{Name: r.Name, Version: r.Version, Resource: r.Any}},
		}, goOn: sync.NewCond(new(sync.Mutex))}
		f := newFleet(b, streams, func(g *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, raw) })
		b.ReportAllocs()
		for b.Loop() {
			raw.round()
			f.wait()
		}
	})
}

func big(services, endpoints int, weight uint32) *ir.Mesh {
	m := &ir.Mesh{Revision: "r1", TrustDomain: "inlay.local"}
	for i := range services {
		one := shop("", fmt.Sprintf("s%d", i)).Services[0]
		c := &one.Ports[0].Clusters[0]
		e := c.Endpoints[0]
		c.Endpoints = nil
		for n := range endpoints {
			e.InstanceID = fmt.Sprintf("s%d-%d", i, n)
			e.Addresses = append(e.Addresses[:0:0], addrPort([4]byte{10, byte(i), byte(n >> 8), byte(n)}))
			c.Endpoints = append(c.Endpoints, e)
		}
		if i == 0 {
			c.Endpoints[0].Weight = weight
		}
		m.Services = append(m.Services, one)
	}
	return m
}

// fleet is a number of delta streams that want the endpoints of s0 and acknowledge them.
type fleet struct {
	streams int
	got     chan struct{}
	bytes   atomic.Int64
}

func newFleet(b *testing.B, streams int, register func(*grpc.Server)) *fleet {
	lis := bufconn.Listen(1 << 20)
	srv := grpc.NewServer(grpc.Creds(insecure.NewCredentials()))
	register(srv)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(lis) })
	f := &fleet{streams: streams, got: make(chan struct{}, streams)}
	ctx, cancel := context.WithCancel(b.Context())
	b.Cleanup(func() { cancel(); srv.Stop(); wg.Wait() })
	for range 10 { // connections
		conn, err := grpc.NewClient("passthrough:memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		client := discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
		for range streams / 10 {
			rpc, err := client.DeltaAggregatedResources(ctx)
			if err != nil {
				b.Fatal(err)
			}
			if err := rpc.Send(&discoveryv3.DeltaDiscoveryRequest{
				Node: sdkNode(), TypeUrl: eds, ResourceNamesSubscribe: []string{"s0.default:80"},
			}); err != nil {
				b.Fatal(err)
			}
			wg.Go(func() {
				for {
					r, err := rpc.Recv()
					if err != nil {
						return
					}
					f.bytes.Add(int64(len(r.Resources[0].Resource.Value)))
					if rpc.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: eds, ResponseNonce: r.Nonce}) != nil {
						return
					}
					f.got <- struct{}{}
				}
			})
		}
	}
	f.wait() // the first version
	f.bytes.Store(0)
	return f
}

// wait returns when every stream has received once more.
func (f *fleet) wait() {
	for range f.streams {
		<-f.got
	}
}

// rawADS sends one prepared response to every stream each round.
type rawADS struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	resp   *discoveryv3.DeltaDiscoveryResponse
	goOn   *sync.Cond
	rounds int
}

func (r *rawADS) round() {
	r.goOn.L.Lock()
	r.rounds++
	r.goOn.L.Unlock()
	r.goOn.Broadcast()
}

func (r *rawADS) DeltaAggregatedResources(rpc discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	if _, err := rpc.Recv(); err != nil {
		return err
	}
	acks := make(chan error, 1)
	go func() {
		for {
			if _, err := rpc.Recv(); err != nil {
				acks <- err
				r.goOn.Broadcast()
				return
			}
		}
	}()
	for sent := 0; ; sent++ {
		if err := rpc.Send(r.resp); err != nil {
			return err
		}
		r.goOn.L.Lock()
		for r.rounds == sent {
			r.goOn.Wait()
			select {
			case err := <-acks:
				r.goOn.L.Unlock()
				if errors.Is(err, io.EOF) {
					return nil
				}
				return err
			default:
			}
		}
		r.goOn.L.Unlock()
	}
}
