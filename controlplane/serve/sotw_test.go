package serve_test

import (
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/serve"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func namespace(t *testing.T, ns string) *structpb.Struct {
	t.Helper()
	m, err := structpb.NewStruct(map[string]any{"INLAY_NAMESPACE": ns})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// nameOf reads the name out of any resource.
func nameOf(t testing.TB, a *anypb.Any) string {
	t.Helper()
	m, err := a.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	switch m := m.(type) {
	case interface{ GetName() string }:
		return m.GetName()
	case interface{ GetClusterName() string }:
		return m.GetClusterName()
	}
	t.Fatalf("%T has no name", m)
	return ""
}

// stock gives a server with m published and a stream of a plain gRPC client without identity.
func stock(t *testing.T, m *ir.Mesh) (*serve.Server, *sotw) {
	t.Helper()
	s := serve.New(serve.Config{Dev: true})
	publish(t, s, m)
	return s, openSotW(t, dial(t, s, attest.Caller{}), grpcNode())
}

func TestSotWFollowsWhatItNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := stock(t, shop("r1", "cart", "orders"))
		c.names(lds, "cart")
		c.want("LDS cart")
		c.names(lds, "cart") // the ACK is not answered
		c.want()
		c.names(cds, "cart.default:80", "orders.default:80")
		c.want("CDS cart.default:80 orders.default:80")
		c.names(cds, "cart.default:80", "orders.default:80")
		c.names(eds, "cart.default:80", "orders.default:80")
		c.want("EDS cart.default:80 orders.default:80")
		c.names(eds, "cart.default:80", "orders.default:80")

		m := shop("r2", "cart", "orders")
		m.Services[0].Ports[0].Clusters[0].Endpoints[0].Health = ir.Draining
		m.Services[0].Ports[0].Clusters[0].Policy.MaxRequests = 1
		publish(t, s, m)
		// Endpoints: only the one that changed. Clusters: all of them, absence would remove.
		c.want("CDS cart.default:80 orders.default:80", "EDS cart.default:80")
		c.names(cds, "cart.default:80", "orders.default:80")
		c.names(eds, "cart.default:80", "orders.default:80")
		if acked, subscribed, _ := s.Acks("r2"); acked != 1 || subscribed != 1 {
			t.Errorf("Acks = %d, %d; want 1, 1", acked, subscribed)
		}

		c.names(eds, "orders.default:80")
		publish(t, s, shop("r3", "cart", "orders"))
		c.want("CDS cart.default:80 orders.default:80") // no endpoints of cart
	})
}

func TestSotWRemovesByAbsence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := stock(t, shop("r1", "cart", "old"))
		c.names(lds, "cart", "old", "nobody")
		c.want("LDS cart old")
		c.names(lds, "cart", "old", "nobody")
		c.names(rds, "cart.default:80")
		c.want("RDS cart.default:80")
		c.names(rds, "cart.default:80")
		c.names(cds, "cart.default:80", "old.default:80")
		c.want("CDS cart.default:80 old.default:80")
		c.names(cds, "cart.default:80", "old.default:80")

		m := shop("r2", "cart")
		m.Services[0].Ports[0].Routes[0].Timeout = time.Second
		publish(t, s, m)
		// The cluster goes after the routes and listeners that may name it.
		c.want("LDS cart", "RDS cart.default:80", "CDS cart.default:80")
		c.names(lds, "cart", "old", "nobody")
		c.names(rds, "cart.default:80")
		c.names(cds, "cart.default:80", "old.default:80")
		if st := s.Clients(false)[0]; st.State != "acked" {
			t.Errorf("state %s, want acked", st.State)
		}
	})
}

func TestSotWHoldsARejectedVersionBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := stock(t, shop("r1", "cart", "orders"))
		c.names(cds, "cart.default:80", "orders.default:80")
		c.want("CDS cart.default:80 orders.default:80")
		c.names(cds, "cart.default:80", "orders.default:80")
		before := version(s, "cart.default:80")

		m := shop("r2", "cart", "orders")
		m.Services[0].Ports[0].Clusters[0].Policy.MaxRequests = 7
		publish(t, s, m)
		c.want("CDS cart.default:80 orders.default:80")
		for range 3 { // a client that says it again is not answered either
			c.send(cds, "cart.default:80: 7 is an unlucky number", []string{"cart.default:80", "orders.default:80"})
		}
		time.Sleep(time.Hour)
		c.want()

		m = shop("r3", "cart", "orders")
		m.Services[0].Ports[0].Clusters[0].Policy.MaxRequests = 7
		m.Services[1].Ports[0].Clusters[0].Policy.MaxRequests = 2
		publish(t, s, m)
		// The other cluster changed. The rejected one is there in the version that the client kept:
		// its absence would remove it.
		c.want("CDS cart.default:80 orders.default:80")
		c.names(cds, "cart.default:80", "orders.default:80")
		st := s.Clients(true)[0]
		if st.State != "nacked" || st.Resources[0].Acked != before {
			t.Errorf("client %+v, want cart rejected and at version %s", st, before)
		}
		publish(t, s, shop("r4", "cart", "orders"))
		c.want("CDS cart.default:80 orders.default:80")
		c.names(cds, "cart.default:80", "orders.default:80")
		if st := s.Clients(true)[0]; st.State != "acked" {
			t.Errorf("client %+v, want acked", st)
		}
	})
}

func version(s *serve.Server, cluster string) string {
	for _, c := range s.Clients(true) {
		for _, r := range c.Resources {
			if r.Name == cluster && r.TypeURL == cds {
				return r.Acked
			}
		}
	}
	return ""
}

func TestSotWIgnoresAStaleNonce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := stock(t, shop("r1", "cart", "orders"))
		c.names(eds, "cart.default:80")
		c.want("EDS cart.default:80")
		m := shop("r2", "cart", "orders")
		m.Services[0].Ports[0].Clusters[0].Endpoints[0].Health = ir.Draining
		publish(t, s, m)
		c.want("EDS cart.default:80")
		// An answer to the first response crosses the second: its names are not looked at.
		if err := c.rpc.Send(&discoveryv3.DiscoveryRequest{
			TypeUrl: eds, ResponseNonce: "1", ResourceNames: []string{"orders.default:80"},
		}); err != nil {
			t.Fatal(err)
		}
		c.want()
		c.names(eds, "cart.default:80", "orders.default:80")
		c.want("EDS orders.default:80")
	})
}

func TestSotWWildcard(t *testing.T) {
	for name, names := range map[string][]string{"star": {"*"}, "no names": nil} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, c := stock(t, shop("r1", "cart", "orders"))
				c.names(cds, names...)
				c.want("CDS cart.default:80 orders.default:80")
				c.names(cds, names...)
				publish(t, s, shop("r2", "cart", "pay"))
				c.want("CDS cart.default:80 pay.default:80")
				c.names(cds, names...)
				c.names(cds, "pay.default:80")
				c.want()
				c.names(cds) // had named something: now it wants nothing
				m := shop("r3", "pay")
				publish(t, s, m)
				c.want()
			})
		})
	}
}

func TestSotWWaitsForTheFirstMesh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{Dev: true})
		c := openSotW(t, dial(t, s, attest.Caller{}), grpcNode())
		c.names(lds, "nobody")
		c.want()
		publish(t, s, shop("r1", "cart"))
		c.want("LDS")
	})
}

func TestAStrictServiceIsWithheldFromAStockClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := shop("r1", "cart")
		m.Services[0].MTLS = ir.Strict
		s, c := stock(t, m)
		c.names(lds, "cart")
		c.want("LDS")
		st := s.Clients(true)[0]
		if len(st.Resources) != 1 || st.Resources[0].Withheld == "" || st.Kind.String() != "grpc" || st.Protocol != "sotw" {
			t.Errorf("client %+v, want the reason why cart is withheld", st)
		}
		publish(t, s, shop("r2", "cart")) // permissive now
		c.want("LDS cart")
		if st := s.Clients(true)[0]; st.Resources[0].Withheld != "" {
			t.Errorf("withheld %q, want nothing", st.Resources[0].Withheld)
		}
	})
}

func TestTheListenerOfAStockServerFollowsItsService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve.New(serve.Config{})
		publish(t, s, shop("r1", "cart"))
		c := openSotW(t, dial(t, s, svid("/ns/default/svc/cart")), grpcNode())
		name := "grpc/server?xds.resource.listening_address=0.0.0.0:50051"
		c.names(lds, name)
		c.want("LDS " + name)
		c.names(lds, name)
		publish(t, s, shop("r2", "cart"))
		c.want()
		m := shop("r3", "cart")
		m.Services[0].MTLS = ir.Strict
		publish(t, s, m)
		c.want("LDS")
	})
}
