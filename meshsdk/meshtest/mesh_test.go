package meshtest_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/meshsdk/meshtest"
)

const twoServices = `
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: orders}
spec:
  ports: [{port: 8080, protocol: GRPC}]
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: pages}
spec:
  ports: [{port: 80, protocol: HTTP}]
`

// startOrders serves gRPC health as the service orders.
func startOrders(m *meshtest.Mesh) (stop func()) {
	s := m.Open("orders")
	g := s.NewServer()
	healthpb.RegisterHealthServer(g, health.NewServer())
	return m.Serve(s, meshsdk.GRPC(8080, g))
}

func check(ctx context.Context, s *meshsdk.Mesh) error {
	conn, err := s.NewClient("orders")
	if err != nil {
		return err
	}
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	return errors.Join(err, conn.Close())
}

// until waits, in the time of the bubble, until f is nil.
func until(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for range 300 {
		if err = f(); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal(err)
}

func TestGRPC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meshtest.New(t)
		m.Apply(twoServices)
		startOrders(m)
		web := m.Open("web")
		until(t, func() error { return check(t.Context(), web) })
	})
}

func TestHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meshtest.New(t)
		m.Apply(twoServices)
		pages := m.Open("pages")
		m.Serve(pages, meshsdk.HTTP(80, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id, _ := meshsdk.PeerFromContext(r.Context())
			_, _ = io.WriteString(w, id.String())
		})))
		web := m.Open("web")
		until(t, func() error {
			resp, err := web.HTTPClient().Get("http://pages/")
			if err != nil {
				return err
			}
			text, err := io.ReadAll(resp.Body)
			if want := "spiffe://inlay.local/ns/default/svc/web"; err == nil && string(text) != want {
				t.Errorf("the server saw %q, want %s", text, want)
			}
			return errors.Join(err, resp.Body.Close())
		})
	})
}

// TestRotation: a day with certificates of an hour takes no time, and no call fails.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meshtest.New(t)
		m.Apply(twoServices)
		startOrders(m)
		web := m.Open("web")
		until(t, func() error { return check(t.Context(), web) })
		for range 24 {
			time.Sleep(time.Hour)
			if err := check(t.Context(), web); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestControlPlaneAway: without a control plane calls go on, and its return brings new endpoints.
func TestControlPlaneAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meshtest.New(t)
		m.Apply(twoServices)
		stop := startOrders(m)
		web := m.Open("web")
		until(t, func() error { return check(t.Context(), web) })
		m.StopControlPlane()
		time.Sleep(time.Minute)
		if err := check(t.Context(), web); err != nil {
			t.Fatalf("while the control plane is away: %v", err)
		}
		m.StartControlPlane()
		startOrders(m)
		time.Sleep(10 * time.Second)
		stop()
		if err := check(t.Context(), web); err != nil {
			t.Fatalf("after it came back: %v", err)
		}
	})
}

// TestFaults: the mesh refuses bad YAML and keeps the running one, and a test can break an address.
func TestFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meshtest.New(t)
		m.Apply(twoServices)
		if err := m.TryApply(strings.Replace(twoServices, "GRPC", "SMTP", 1)); err == nil || !strings.Contains(err.Error(), "0.yaml:6:") {
			t.Errorf("error %v, want one at 0.yaml:6", err)
		}
		startOrders(m)
		web := m.Open("web")
		until(t, func() error { return check(t.Context(), web) })
		d, err := web.Explain(t.Context(), http.MethodPost, "http://orders/grpc.health.v1.Health/Check", nil)
		if err != nil || len(d.Endpoints) != 1 {
			t.Fatalf("Explain: %v, endpoints %v", err, d.Endpoints)
		}
		m.Break(d.Endpoints[0].Address, meshtest.ErrBroken)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err = check(ctx, web)
		var e *meshsdk.Error
		if !errors.As(err, &e) || e.Reason != meshsdk.ReasonConnectFailed {
			t.Errorf("error %v, want %s", err, meshsdk.ReasonConnectFailed)
		}
		m.Break(d.Endpoints[0].Address, nil)
		until(t, func() error { return check(t.Context(), web) })
	})
}
