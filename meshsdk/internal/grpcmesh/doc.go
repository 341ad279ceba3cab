// Package grpcmesh is the mesh as grpc-go sees it: resolver, balancer, transport credentials and
// interceptors over the engine of meshsdk/internal/call, and the interceptors of a server.
//
// meshsdk makes one Client for each Mesh and hands out its channels; httpmesh shares the names.
// Only the public API of grpc-go is used. The interceptor owns the life of a call (route, timeouts,
// retries, replay), the balancer owns connections, the picker joins the two by the context of an
// attempt. It decides no route, counts no budget and knows no configuration: that is the engine's.
//
// The one thing registered globally is the balancer "inlay"; it finds its Mesh by the attributes
// of the resolver, so several meshes in one process do not meet.
package grpcmesh
