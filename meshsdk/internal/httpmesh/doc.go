// Package httpmesh is the mesh as net/http sees it: a RoundTripper over the engine of
// meshsdk/internal/call with a pool of connections for each endpoint, and the middleware of a
// server.
//
// meshsdk makes one Transport for each base transport it is given. Connections are net/http's own
// (http.Transport.NewClientConn); which endpoint, how often and how long is the engine's to say.
// It makes up no response: what a server answered is passed on, whatever failed on the way is an
// error.
package httpmesh
