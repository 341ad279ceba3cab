// Package tcpmesh accepts the connections of a service's port: mesh TLS or, where the service is
// permissive, plaintext, told apart by the first byte. It knows who is at the other end before the
// server sees the connection, and gRPC's credentials and the HTTP middleware ask it.
//
// meshsdk makes a Listener for each port; grpcmesh and httpmesh read the Conn. It never looks at
// what is said inside a connection, and it never lets a peer name itself: an identity is what the
// handshake proved.
package tcpmesh
