package grpcmesh_test

import (
	"testing"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/inlay-mesh/inlay/identity"
)

// peerOf is the SPIFFE ID that a server of these tests saw.
func peerOf(t testing.TB, p *peer.Peer) string {
	t.Helper()
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return "plaintext"
	}
	id, err := identity.PeerID(info.State)
	if err != nil {
		return err.Error()
	}
	return id.String()
}
