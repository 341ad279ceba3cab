// Package attest says who is at the other end of a local socket: which process, by the kernel's
// word, and which registration it lives below. The node's Workload API and the control plane's
// unix socket use it. It trusts nothing the caller says of itself.
package attest

import (
	"context"
	"crypto/tls"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/inlay-mesh/inlay/identity"
)

// Caller is who made a gRPC call. The zero value is somebody unknown over plaintext.
type Caller struct {
	// ID is zero when the caller has no identity.
	ID spiffeid.ID
	// Local is true for a unix socket; UID and Process are then what the kernel says.
	Local   bool
	UID     uint32
	Process Process
	// Err says why a local caller has no identity.
	Err error
}

// Process is a process, told from a later one of the same number by its start time.
type Process struct {
	PID int
	// StartTime is field 22 of /proc/PID/stat: clock ticks since boot.
	StartTime uint64
}

// Info is the AuthInfo of a connection over a unix socket.
type Info struct {
	credentials.CommonAuthInfo
	Caller Caller
}

// AuthType names the way of authentication.
func (Info) AuthType() string { return "unix" }

// CallerFrom returns who made the call that ctx belongs to: from Info, or from the verified
// client certificate of a TLS connection.
func CallerFrom(ctx context.Context) Caller {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}
	}
	switch info := p.AuthInfo.(type) {
	case Info:
		return info.Caller
	case credentials.TLSInfo:
		return Caller{ID: peerID(info.State)}
	}
	return Caller{}
}

// peerID is zero for a client that came without SVID. The listener's configuration (identity.ServerTLS)
// has verified what is there.
func peerID(s tls.ConnectionState) spiffeid.ID {
	id, err := identity.PeerID(s)
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

// IsNode reports whether the caller may speak for the node: a local process of one of uids that
// is below no `inlay run`, whatever its user. When nobody could say whose the process is, it may
// be a workload, and is no node either.
func (c Caller) IsNode(uids ...uint32) bool {
	return c.Local && c.ID.IsZero() && c.Err == nil && slices.Contains(uids, c.UID)
}
