package grpcmesh

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/inlay-mesh/inlay/identity"
)

// Describe says in words why a connection could not be made, for the caller of an RPC: SPIFFE IDs,
// but no address, no key and no path. err itself stays in the chain of the call's error and in the
// log. Both skins use it.
func Describe(err error) string {
	var peer *identity.PeerError
	var alert tls.AlertError
	var record tls.RecordHeaderError
	var op *net.OpError
	var errno syscall.Errno
	var timeout interface{ Timeout() bool }
	switch {
	case err == nil:
		return ""
	case errors.As(err, &peer):
		return peer.Error()
	case errors.Is(err, identity.ErrNoIdentity):
		return "this workload has no identity yet"
	case errors.As(err, &record):
		return "the other end does not speak TLS"
	case errors.As(err, &alert):
		return "the other end refused the handshake: " + strings.TrimPrefix(alert.Error(), "tls: ")
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return "connecting took too long"
	case errors.Is(err, context.Canceled):
		return "connecting was cancelled"
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return "the other end closed the connection"
	case errors.As(err, &op) && op.Err != nil:
		// OpError prefixes both addresses; what lies in it may be "remote error: tls: ...".
		return strings.TrimPrefix(op.Err.Error(), "tls: ")
	}
	// What gRPC wraps has the text of the place in front: keep the cause.
	var wrapped interface {
		error
		Origin() error
	}
	if errors.As(err, &wrapped) && wrapped.Origin() != nil && wrapped.Origin() != err { //nolint:errorlint // not itself again
		return Describe(wrapped.Origin())
	}
	return err.Error()
}
