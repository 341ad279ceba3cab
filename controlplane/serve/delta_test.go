package serve_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

// connected gives a server with m published and a delta stream of service cart's SDK.
func connected(t *testing.T, m *ir.Mesh) (*serve.Server, *delta) {
	t.Helper()
	s := serve.New(serve.Config{})
	publish(t, s, m)
	return s, openDelta(t, dial(t, s, svid("/ns/default/svc/cart")), sdkNode())
}

func TestDeltaFollowsWhatItSubscribedTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := connected(t, shop("r1", "cart", "orders"))
		d.subscribe(lds, "orders", "orders.default:80", "inlay/inbound/default/cart/80")
		d.ack("LDS +inlay/inbound/default/cart/80 +orders +orders.default:80")
		d.subscribe(cds, "orders.default:80")
		d.ack("CDS +orders.default:80")
		d.subscribe(eds, "orders.default:80")
		d.ack("EDS +orders.default:80")

		publish(t, s, shop("r2", "cart", "orders"))
		d.want() // nothing that it asked for changed

		m := shop("r3", "cart", "orders")
		m.Services[0].Ports[0].Clusters[0].Endpoints[0].Health = ir.Draining // cart, not asked for
		m.Services[1].Ports[0].Clusters[0].Endpoints[0].Health = ir.Draining
		publish(t, s, m)
		d.ack("EDS +orders.default:80")
		if acked, subscribed, nacked := s.Acks("r3"); acked != 1 || subscribed != 1 || nacked != 0 {
			t.Errorf("Acks = %d, %d, %d; want 1, 1, 0", acked, subscribed, nacked)
		}

		d.unsubscribe(eds, "orders.default:80")
		synctest.Wait()
		publish(t, s, shop("r4", "cart", "orders"))
		d.want()
	})
}

func TestDeltaSaysAtOnceThatANameDoesNotExist(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := connected(t, shop("r1", "cart"))
		d.subscribe(lds, "nobody", "cart")
		d.ack("LDS +cart -nobody")
		publish(t, s, shop("r2", "cart", "nobody"))
		d.ack("LDS +nobody")
		publish(t, s, shop("r3", "cart"))
		d.ack("LDS -nobody")
		publish(t, s, shop("r4", "cart"))
		d.want()
	})
}

func TestDeltaWaitsForTheFirstMesh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		d := openDelta(t, dial(t, s, svid("/ns/default/svc/cart")), sdkNode())
		d.subscribe(lds, "cart", "nobody")
		d.want() // it is not yet known that nobody does not exist
		publish(t, s, shop("r1", "cart"))
		d.ack("LDS +cart -nobody")
	})
}

// A rejected version used to be sent 21,922 times in 3 s elsewhere: it must go out once.
func TestDeltaHoldsARejectedVersionBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := connected(t, shop("r1", "cart", "orders"))
		d.subscribe(cds, "cart.default:80", "orders.default:80")
		d.ack("CDS +cart.default:80 +orders.default:80")

		limited := func(revision string, n uint32) *ir.Mesh {
			m := shop(revision, "cart", "orders")
			for i := range m.Services {
				m.Services[i].Ports[0].Clusters[0].Policy.MaxRequests = n
			}
			return m
		}
		publish(t, s, limited("r2", 7))
		// The text names one of the two: the other one is in use (gRFC A46).
		d.nack(`cluster "orders.default:80": max_requests 7 is an unlucky number`, "CDS +cart.default:80 +orders.default:80")
		time.Sleep(time.Hour) // fake time: nothing is tried again
		d.want()
		c := s.Clients(true)[0]
		if c.State != "nacked" || c.Resources[0].Nack != "" || !strings.Contains(c.Resources[1].Nack, "unlucky") {
			t.Errorf("client %+v, want orders.default:80 alone rejected with the text", c)
		}
		if c.Resources[0].Acked != c.Resources[0].Sent || c.Resources[1].Acked == c.Resources[1].Sent {
			t.Errorf("versions %+v: want the accepted one of cart to be the sent one, and of orders the older one", c.Resources)
		}
		if acked, subscribed, nacked := s.Acks("r2"); acked != 0 || subscribed != 1 || nacked != 1 {
			t.Errorf("Acks = %d, %d, %d; want 0, 1, 1", acked, subscribed, nacked)
		}

		publish(t, s, limited("r3", 7)) // the same bytes
		d.want()
		publish(t, s, limited("r4", 8))
		d.nack("no", "CDS +cart.default:80 +orders.default:80") // names none: blames all
		publish(t, s, limited("r5", 7))
		d.ack("CDS +orders.default:80") // cart kept 7 all the time
		if c := s.Clients(false)[0]; c.State != "acked" {
			t.Errorf("state %s after the repair, want acked", c.State)
		}
	})
}

func TestDeltaReconnectsWithVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart", "orders", "old"))
		client := dial(t, s, svid("/ns/default/svc/cart"))
		d := openDelta(t, client, sdkNode())
		d.subscribe(cds, "cart.default:80", "orders.default:80", "old.default:80")
		have := map[string]string{}
		for _, r := range d.want("CDS +cart.default:80 +old.default:80 +orders.default:80")[0].Resources {
			have[r.Name] = r.Version
		}
		d.cancel()

		m := shop("r2", "cart", "orders")
		m.Services[1].Ports[0].Clusters[0].Policy.LB = ir.RoundRobin
		publish(t, s, m)
		d = openDelta(t, client, sdkNode())
		d.request(&discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: cds, ResourceNamesSubscribe: []string{"cart.default:80", "orders.default:80", "old.default:80"},
			InitialResourceVersions: have,
		})
		d.ack("CDS +orders.default:80", "CDS -old.default:80")
		if clients := s.Clients(false); len(clients) != 1 || clients[0].State != "acked" {
			t.Errorf("clients %+v, want one that is acked", clients)
		}
	})
}

func TestDeltaResubscribeSendsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d := connected(t, shop("r1", "cart"))
		d.subscribe(eds, "cart.default:80")
		d.ack("EDS +cart.default:80")
		d.subscribe(eds, "cart.default:80")
		d.ack("EDS +cart.default:80")
		d.unsubscribe(eds, "cart.default:80")
		d.subscribe(eds, "cart.default:80")
		d.ack("EDS +cart.default:80")
	})
}

func TestDeltaWildcard(t *testing.T) {
	for name, names := range map[string][]string{"star": {"*"}, "empty first request": nil} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, d := connected(t, shop("r1", "cart", "orders"))
				d.subscribe(cds, names...)
				d.ack("CDS +cart.default:80 +orders.default:80")
				publish(t, s, shop("r2", "cart", "pay"))
				d.ack("CDS +pay.default:80", "CDS -orders.default:80")
				d.subscribe(cds, "cart.default:80")
				d.ack("CDS +cart.default:80")
				d.unsubscribe(cds, "*")
				synctest.Wait()
				m := shop("r3", "cart", "pay")
				m.Services[0].Ports[0].Clusters[0].Policy.MaxRequests = 1
				m.Services[1].Ports[0].Clusters[0].Policy.MaxRequests = 1
				publish(t, s, m)
				d.ack("CDS +cart.default:80")
			})
		})
	}
}

func TestDeltaWildcardOfListenersIsTheViewAndNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := connected(t, shop("r1", "cart", "pay"))
		d.subscribe(lds, "*")
		d.ack("LDS +cart +cart.default +cart.default:80 +cart:80 +inlay/inbound/default/cart/80 +pay +pay.default +pay.default:80 +pay:80")
		m := shop("r2", "cart")
		m.Services[0].MTLS = ir.Strict
		publish(t, s, m)
		d.ack("LDS +inlay/inbound/default/cart/80 -pay -pay.default -pay.default:80 -pay:80")
	})
}

// Make before break: what is pointed at comes before what points, and goes after it.
func TestDeltaOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := connected(t, shop("r1", "cart", "old"))
		d.subscribe(lds, "cart.default:80")
		d.subscribe(rds, "cart.default:80")
		d.subscribe(cds, "old.default:80", "new.default:80")
		d.subscribe(eds, "old.default:80", "new.default:80")
		for _, r := range d.take() {
			d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
		}
		synctest.Wait()
		m := shop("r2", "cart", "new")
		m.Services[0].Ports[0].Routes[0].Backends[0].Cluster = "new.default:80"
		publish(t, s, m)
		d.ack("CDS +new.default:80", "EDS +new.default:80", "RDS +cart.default:80", "CDS -old.default:80", "EDS -old.default:80")
	})
}

func TestDeltaIgnoresNoncesThatAreNotItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := connected(t, shop("r1", "cart"))
		d.subscribe(eds, "cart.default:80")
		d.want("EDS +cart.default:80")
		for _, nonce := range []string{"99", "x", "-1", "0", "18446744073709551616"} {
			d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: eds, ResponseNonce: nonce})
		}
		synctest.Wait()
		if c := s.Clients(false)[0]; c.State != "pending" {
			t.Errorf("state %s, want pending: nothing was acknowledged", c.State)
		}
	})
}

func TestResponsesAreSplit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{MaxResponse: 600})
		publish(t, s, shop("r1", "a", "b", "c"))
		d := openDelta(t, dial(t, s, svid("/ns/default/svc/cart")), sdkNode())
		d.subscribe(eds, "a.default:80", "b.default:80", "c.default:80")
		d.ack("EDS +a.default:80", "EDS +b.default:80", "EDS +c.default:80")
		if c := s.Clients(false)[0]; c.State != "acked" {
			t.Errorf("state %s, want acked", c.State)
		}
	})
}

func TestWhoIsServed(t *testing.T) {
	for name, tc := range map[string]struct {
		caller   attest.Caller
		cfg      serve.Config
		agent    string
		metadata string
		ask      string
		want     string
		code     codes.Code
		text     string
	}{
		"short names resolve in the namespace of the SVID, not of the metadata": {
			caller: svid("/ns/shop/svc/x"), metadata: "default", ask: "cart", want: "LDS -cart"},
		"without identity the metadata's namespace": {
			cfg: serve.Config{Dev: true}, metadata: "default", ask: "cart", want: "LDS +cart"},
		"the namespace default when the metadata has none": {
			cfg: serve.Config{Dev: true}, ask: "cart", want: "LDS +cart"},
		"no inbound listener without identity": {
			cfg: serve.Config{Dev: true}, ask: "inlay/inbound/default/cart/80", want: "LDS -inlay/inbound/default/cart/80"},
		"no inbound listener of another": {
			caller: svid("/ns/default/svc/pay"), ask: "inlay/inbound/default/cart/80", want: "LDS -inlay/inbound/default/cart/80"},
		"no identity outside dev": {
			code: codes.Unauthenticated, text: "unix socket"},
		"local process without registration": {
			cfg: serve.Config{Dev: true}, caller: attest.Caller{Local: true, Err: context.DeadlineExceeded},
			code: codes.PermissionDenied, text: "inlay run"},
		"another trust domain": {
			cfg: serve.Config{TrustDomain: "other"}, caller: svid("/ns/default/svc/cart"),
			code: codes.PermissionDenied, text: "trust domain other"},
		"an identity that is no service": {
			caller: svid("/node/n1"), code: codes.PermissionDenied, text: "/ns/NAMESPACE/svc/SERVICE"},
		"Envoy": {
			caller: svid("/ns/default/svc/cart"), agent: "envoy", code: codes.Unimplemented, text: "Envoy"},
		"a namespace that is none": {
			cfg: serve.Config{Dev: true}, metadata: "a/../b", code: codes.InvalidArgument, text: "DNS label"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := serve.New(tc.cfg)
				publish(t, s, shop("r1", "cart", "pay"))
				node := sdkNode()
				if tc.agent != "" {
					node.UserAgentName, node.ClientFeatures = tc.agent, nil
				}
				if tc.metadata != "" {
					node.Metadata = namespace(t, tc.metadata)
				}
				caller := tc.caller
				d := openDelta(t, dial(t, s, caller), node)
				d.subscribe(lds, cmpOr(tc.ask, "cart"))
				if tc.code == codes.OK {
					d.ack(tc.want)
					return
				}
				if err := d.failed(); status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.text) {
					t.Errorf("error %v, want %s with %q", err, tc.code, tc.text)
				}
				if n := len(s.Clients(false)); n != 0 {
					t.Errorf("%d clients, want none", n)
				}
			})
		})
	}
}

func TestBadRequestsEndTheStreamWithAReason(t *testing.T) {
	long := strings.Repeat("x", 3000)
	for name, tc := range map[string]struct {
		req  *discoveryv3.DeltaDiscoveryRequest
		code codes.Code
	}{
		"no type":        {&discoveryv3.DeltaDiscoveryRequest{}, codes.InvalidArgument},
		"empty name":     {&discoveryv3.DeltaDiscoveryRequest{TypeUrl: lds, ResourceNamesSubscribe: []string{""}}, codes.InvalidArgument},
		"long name":      {&discoveryv3.DeltaDiscoveryRequest{TypeUrl: lds, ResourceNamesSubscribe: []string{long}}, codes.InvalidArgument},
		"long type":      {&discoveryv3.DeltaDiscoveryRequest{TypeUrl: long}, codes.ResourceExhausted},
		"too many names": {&discoveryv3.DeltaDiscoveryRequest{TypeUrl: lds, ResourceNamesSubscribe: []string{"a", "b", "c", "d"}}, codes.ResourceExhausted},
		"too many versions": {&discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: lds, ResourceNamesSubscribe: []string{"*"},
			InitialResourceVersions: map[string]string{"a": "1", "b": "1", "c": "1", "d": "1"},
		}, codes.ResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := serve.New(serve.Config{MaxNames: 3})
				publish(t, s, shop("r1", "cart"))
				d := openDelta(t, dial(t, s, svid("/ns/default/svc/cart")), sdkNode())
				d.request(tc.req)
				if err := d.failed(); status.Code(err) != tc.code {
					t.Errorf("error %v, want %s", err, tc.code)
				}
			})
		})
	}
	t.Run("no node", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := serve.New(serve.Config{})
			d := openDelta(t, dial(t, s, svid("/ns/default/svc/cart")), nil)
			d.subscribe(lds, "cart")
			if err := d.failed(); status.Code(err) != codes.InvalidArgument {
				t.Errorf("error %v, want InvalidArgument", err)
			}
		})
	})
}

func TestTypesThatNobodyServesHaveNoResources(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d := connected(t, shop("r1", "cart"))
		d.subscribe("type.googleapis.com/nothing", "a")
		d.ack(" -a")
		d.subscribe(lds, "cart")
		d.ack("LDS +cart")
	})
}
