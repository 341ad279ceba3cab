package bench

import (
	"fmt"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/meshsdk/meshtest"
)

// A unary call by the last of 1000 routes beside one by the only route.
func TestRoutes(t *testing.T) {
	mesh := meshtest.New(t, meshtest.Loopback())
	mesh.Apply(service("one", "GRPC"), service("many", "GRPC"), routes("many", 1000))
	client := mesh.Open("web")
	serveGreeter(t, mesh.Open("one"))
	serveGreeter(t, mesh.Open("many"))
	compare(t, overMesh(t, "1000 routes", client, "many"), overMesh(t, "1 route", client, "one"), 1.1, 16)
}

// routes is n routes of a service: methods of other names, each for a tenant, and in the last place
// one that takes everything.
func routes(service string, n int) string {
	const perObject = 16 // Gateway API allows no more rules in one
	var b strings.Builder
	for i := range n - 1 {
		if i%perObject == 0 {
			fmt.Fprintf(&b, `---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: %[1]s-%[2]d}
spec:
  parentRefs: [{group: "", kind: Service, name: %[1]s}]
  rules:
`, service, i/perObject)
		}
		fmt.Fprintf(&b, `  - matches: [{method: {service: inlay.bench.Other%d, method: Call}, headers: [{name: x-tenant, value: t%d}]}]
    backendRefs: [{name: %s}]
`, i, i, service)
	}
	fmt.Fprintf(&b, `---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: %[1]s-rest}
spec:
  parentRefs: [{group: "", kind: Service, name: %[1]s}]
  rules:
  - backendRefs: [{name: %[1]s}]
`, service)
	return b.String()
}
