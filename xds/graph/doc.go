// Package graph puts listener, route configuration, clusters and endpoints together: complete or
// nothing. It is the one consumer of xds.Client; meshsdk/internal/apply consumes what it yields.
// It decides values from values; the client owns network and time.
package graph
