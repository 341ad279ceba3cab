package grpcmesh

import "testing"

// The interceptor sees the target as written, the resolver as gRPC completed it: both must come to
// the same name, or a call of the mesh would leave it.
func TestNameOfATarget(t *testing.T) {
	for target, want := range map[string]string{
		"orders":                  "orders",
		"orders:8080":             "orders:8080",
		"dns:///orders:8080":      "orders:8080",
		"dns:orders":              "orders",
		"passthrough:///orders":   "orders",
		"dns://10.0.0.1/orders":   "dns://10.0.0.1/orders",
		"xds:///orders":           "xds:///orders",
		"unix:///run/orders.sock": "unix:///run/orders.sock",
		"consul:///orders":        "consul:///orders",
		"%zz":                     "%zz",
	} {
		if got := nameOf(target); got != want {
			t.Errorf("nameOf(%q) = %q, want %q", target, got, want)
		}
	}
}
