package graph

import "github.com/inlay-mesh/inlay/xds/resource"

// Config is all that one listener needs, complete: a consumer never sees a route whose cluster
// has not been decided (gRFC A74). It is immutable and safe to share.
type Config struct {
	// Name of the listener, as subscribed.
	Name string
	// Err is not nil when the listener or its route configuration does not exist or was never
	// valid; nothing else is then set. ErrNotExist is in its chain when the server said so.
	Err error
	// Version identifies this configuration for texts: that of the listener and route configuration.
	Version  string
	Listener *resource.Listener
	// Routes is the route configuration of the listener's API; nil for a server's listener.
	Routes *resource.RouteConfiguration
	// Clusters by name: every cluster that Routes mentions.
	Clusters map[string]*Cluster
}

// Cluster is a cluster with its endpoints, or the reason why it has none.
type Cluster struct {
	Name      string
	Resource  *resource.Cluster   // nil when Err is not nil
	Endpoints *resource.Endpoints // nil when Err is not nil
	// Err says that the cluster or its endpoints do not exist or were never valid. Other clusters
	// of the same Config are not touched by it.
	Err error
}
