//go:build !linux

package attest

import (
	"errors"
	"fmt"
	"net"
	"runtime"
)

// Peer is the process at the other end of a unix socket.
type Peer struct {
	Process Process
	UID     uint32
	Pinned  bool
}

var errPlatform = fmt.Errorf("attestation of processes on %s: %w: run the node on Linux", runtime.GOOS, errors.ErrUnsupported)

// PeerProcess always fails here: attestation needs Linux.
func PeerProcess(*net.UnixConn) (Peer, error) { return Peer{}, errPlatform }

// Watch tells when a process ends.
type Watch struct{}

// NewWatch always fails here.
func NewWatch(Process) (*Watch, error) { return nil, errPlatform }

// Ended never happens.
func (*Watch) Ended() <-chan struct{} { return nil }

// Close does nothing.
func (*Watch) Close() error { return nil }
