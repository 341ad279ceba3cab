// Package meshsdk links a service into the mesh: routing, retries, mutual TLS, identity and
// telemetry for gRPC and net/http, in the process, without a sidecar.
//
//	m, err := meshsdk.Open(ctx)
//	...
//	defer m.Close()
//	conn, err := m.NewClient("orders")                      // a *grpc.ClientConn
//	resp, err := m.HTTPClient().Get("http://cart/v1/items") // net/http
//	err = m.Run(ctx, meshsdk.GRPC(8080, srv))               // serve, register, drain
//
// # Names
//
// A name of the mesh is a single label ("orders", not localhost), NAME.NAMESPACE for the
// namespaces of the mesh, a name with the suffix ".mesh", or xds:///NAME; "orders", "orders.shop"
// and "xds:///orders" name the same service for a caller of namespace shop. A port is the
// service's port and may be left out when it has one. Every other host is outside: it is called
// over the base transport with its own TLS, unless WithFallback(Deny).
//
// # Ports
//
// A port is always that of the MeshService. Listen binds INLAY_LISTEN when that is set, else the
// port on all addresses, and the control plane hands to callers what was bound.
//
// # Failure
//
// Open never waits for the control plane. Without it the last configuration serves, from memory
// or from the state directory after a start, without time limit. Without an identity every
// connection that needs one fails. An error of a call that never reached the other service is an
// *Error (use errors.As): it says the service, the route, the Reason, the number of attempts and
// what to do next.
//
// # Goroutines and state
//
// A Mesh owns every goroutine it starts; Close and Shutdown wait for them. Nothing is read in
// init, and there is no global state but the registration of a gRPC balancer: several Meshes with
// several identities live in one process. The package never changes what belongs to its caller
// (the request, the base transport, the default HTTP client), and writes no file outside the
// state directory.
package meshsdk
