package attest

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
)

// Resolve says which SPIFFE ID a local process of user uid has. A zero ID without error is a
// process outside every registration.
type Resolve func(ctx context.Context, p Process, uid uint32) (spiffeid.ID, error)

// NewCredentials returns server credentials for a unix socket: every connection carries Info,
// read from the kernel. No byte is exchanged, so that clients use plaintext credentials. A caller
// whom resolve does not know, or whom it fails for, is let in without ID and with Caller.Err: who
// may do what is each method's decision. A nil resolve leaves ID empty. A process that has ended,
// or a connection that is no unix socket, is refused.
func NewCredentials(resolve Resolve) credentials.TransportCredentials {
	return unixCredentials{resolve: resolve}
}

type unixCredentials struct{ resolve Resolve }

// ServerHandshake implements credentials.TransportCredentials.
func (c unixCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("connection is a %T: want a unix socket: only there does the kernel say who calls", conn)
	}
	p, err := PeerProcess(u)
	if err != nil {
		return nil, nil, err
	}
	caller := Caller{Local: true, UID: p.UID, Process: p.Process}
	if c.resolve != nil {
		// grpc gives no context here; resolve bounds itself.
		caller.ID, caller.Err = c.resolve(context.Background(), p.Process, p.UID)
		if caller.Err != nil {
			caller.ID = spiffeid.ID{}
		}
	}
	return conn, Info{
		// What moves through a unix socket never leaves the kernel.
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Caller:         caller,
	}, nil
}

// ClientHandshake implements credentials.TransportCredentials: these are for servers.
func (unixCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("attest credentials are for servers: clients of a unix socket use insecure.NewCredentials")
}

// Info implements credentials.TransportCredentials.
func (unixCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (c unixCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials: a socket has no server name.
func (unixCredentials) OverrideServerName(string) error { return nil }
