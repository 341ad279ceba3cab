// Package endpoint is one place that calls can go to: how it is reached, what it is, and how busy
// it is now.
//
// meshsdk/internal/apply makes the values, balance picks among them, the skins connect to them. It
// never connects, never decides and imports nothing of the engine.
package endpoint

import (
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Endpoint is one endpoint of a cluster in one snapshot. It is immutable but for State, and safe to
// share. The same Key in two clusters or two snapshots has the same *State.
type Endpoint struct {
	// Key is one distinct way of connecting: connections are pooled by it. See Key.
	Key string
	// Addresses are tried in order; there is at least one.
	Addresses  []netip.AddrPort
	InstanceID string
	Labels     map[string]string
	// Version is Labels["version"]; empty means none.
	Version string
	// Region, Zone and SubZone are where it runs.
	Region, Zone, SubZone string
	// LocalityWeight is the share of its locality among those of its priority.
	LocalityWeight uint32
	// Weight is its share within its locality; zero counts as 1.
	Weight uint32
	// Priority: the lowest number that has endpoints gets the calls.
	Priority uint32
	// TLS is nil for plaintext.
	TLS *TLS
	// Excluded says why it cannot be picked now (draining, unhealthy); empty when it can.
	Excluded string
	// State is never nil in a snapshot.
	State *State
}

// TLS is what a connection to an endpoint must prove and offer.
type TLS struct {
	// Peers are the SPIFFE IDs of which the other end must have one. Empty accepts nobody.
	Peers []spiffeid.ID
	// ALPN in the order of preference; empty leaves the choice to the protocol of the cluster.
	ALPN []string
}

// Locality is "region/zone/sub_zone" without empty tails, for texts.
func (e *Endpoint) Locality() string {
	return strings.TrimRight(e.Region+"/"+e.Zone+"/"+e.SubZone, "/")
}

// Key names the way of connecting to addr with tls. Two endpoints with the same Key can share
// connections: same first address, same accepted peers, same ALPN.
func Key(addr netip.AddrPort, tls *TLS) string {
	if tls == nil {
		return "plaintext " + addr.String()
	}
	peers := make([]string, len(tls.Peers))
	for i, p := range tls.Peers {
		peers[i] = p.String()
	}
	slices.Sort(peers)
	return "mtls " + addr.String() + " " + strings.Join(peers, ",") + " " + strings.Join(tls.ALPN, ",")
}

// State is what changes about an endpoint while calls go to it. The zero value is at rest. It is
// safe for concurrent use and never blocks.
type State struct{ inFlight atomic.Int64 }

// crowd is the number of endpoints from which on states lie close together.
const crowd = 256

// NewState returns a state at rest for an endpoint among so many of its cluster. Among few, each has
// a cache line of its own: neighbours are written by other processors all the time. Among many that
// is rare, and what counts is that a random pick finds them in the cache.
func NewState(among int) *State {
	if among >= crowd {
		return new(State)
	}
	return &new(struct {
		State
		_ [56]byte
	}).State
}

// InFlight is how many attempts the endpoint has now.
func (s *State) InFlight() int64 { return s.inFlight.Load() }

// Acquire counts an attempt; each needs one Release.
func (s *State) Acquire() { s.inFlight.Add(1) }

// Release ends an attempt counted by Acquire.
func (s *State) Release() { s.inFlight.Add(-1) }
