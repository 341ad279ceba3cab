package call

import (
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/balance"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
	"github.com/inlay-mesh/inlay/meshsdk/internal/limit"
	"github.com/inlay-mesh/inlay/meshsdk/internal/retry"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
)

// Snapshot is all that calls need to know, at one moment. It is immutable once published: a call
// sees all of an update or none.
type Snapshot struct {
	// Services by the name of the listener, as asked for ("orders", "orders.shop:8080").
	Services map[string]*Service
}

// Service is what one name leads to.
type Service struct {
	// Name of the listener.
	Name string
	// Version of the configuration, for texts.
	Version string
	// Err is not nil when the name does not exist or its configuration was never valid; nothing
	// else but Name is then set. NotExist says which.
	Err      error
	NotExist bool
	Routes   *route.Table
	// Clusters by name: every cluster that Routes mentions.
	Clusters map[string]*Cluster
	// Hosts are the authorities a call through this name may carry: the name itself and the Host of
	// each cluster. Sorted.
	Hosts []string
}

// Cluster is where a route leads: endpoints with their policy, limit and budget. Set, All and the
// texts are immutable; Limiter and Budget count, and are the same over snapshots as long as the
// cluster exists.
type Cluster struct {
	// Name is SERVICE.NAMESPACE:PORT or SERVICE.NAMESPACE:PORT|VERSION from this control plane.
	Name string
	// Host is Name without the version: what the authority of a call becomes when it must name the
	// cluster.
	Host string
	// Set is the choice among the endpoints that can be picked; never nil when Err is nil.
	Set *balance.Set
	// All are all endpoints, those with Excluded set as well.
	All []*endpoint.Endpoint
	// HTTP2 is the protocol inside TLS; false is HTTP/1.1.
	HTTP2 bool
	// ConnectTimeout bounds one connect with its handshake; never zero.
	ConnectTimeout time.Duration
	Limiter        *limit.Limiter
	Budget         *retry.Budget
	// EmptyReason says why configuration gives the cluster no endpoints; for texts.
	EmptyReason string
	// Err is not nil when the cluster or its endpoints do not exist or were never valid.
	Err     error
	Version string // the version label all endpoints are of by the cluster's name; empty for the whole service
	// SPIFFEID of the service behind it, for texts.
	SPIFFEID string
}
