package serve_test

import (
	"sync"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// A name that is subscribed to while something is published is sent as it was published last, also
// when the stream is just sending something else.
func TestASubscriptionDuringAPublishIsNotStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r0", "cart", "orders"))
		d := openDelta(t, dial(t, s, svid("/ns/default/svc/pay")), sdkNode())
		d.subscribe(eds, "orders.default:80")
		d.ack("EDS +orders.default:80")
		view := xdsgen.View{Kind: xdsgen.SDK, Namespace: "default", Service: "pay"}
		for round := range 500 {
			var publishing sync.WaitGroup
			publishing.Go(func() {
				for n := range 3 {
					m := shop("r", "cart", "orders")
					for i := range m.Services {
						m.Services[i].Ports[0].Clusters[0].Endpoints[0].Weight = uint32(3*round + n + 2)
					}
					publish(t, s, m)
				}
			})
			d.subscribe(eds, "cart.default:80")
			publishing.Wait()
			version := ""
			for _, r := range d.take() {
				for _, x := range r.Resources {
					if x.Name == "cart.default:80" {
						version = x.Version
					}
				}
				d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
			}
			if r, _ := s.Views().Lookup(view, eds, "cart.default:80"); r.Version != version {
				t.Fatalf("round %d: at rest with version %q, while %q is published", round, version, r.Version)
			}
			d.unsubscribe(eds, "cart.default:80")
			synctest.Wait()
		}
	})
}
