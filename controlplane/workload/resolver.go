package workload

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// resolveTimeout bounds one question to the node.
const resolveTimeout = 2 * time.Second

// NewResolver returns what the control plane gives to attest.NewCredentials for its unix socket:
// it asks the node at nodeSocket (RUNDIR/node.sock) whose a process is. It blocks at most 2 s. The
// ID is zero without error for a process outside every registration; an error says that the node
// does not answer or refuses. It is safe for concurrent use and keeps nothing open.
func NewResolver(nodeSocket string) attest.Resolve {
	return func(ctx context.Context, p attest.Process, _ uint32) (spiffeid.ID, error) {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		// One connection a question: there is one a process that connects, and the node may have
		// been restarted in between.
		cc, err := grpc.NewClient("passthrough:///node",
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", nodeSocket)
			}),
			grpc.WithAuthority("localhost"),
			grpc.WithDisableServiceConfig(),
		)
		if err != nil {
			return spiffeid.ID{}, err
		}
		defer cc.Close()
		resp, err := nodepb.NewNodeClient(cc).Attest(ctx, &nodepb.AttestRequest{Pid: uint32(p.PID), StartTime: p.StartTime})
		switch status.Code(err) {
		case codes.OK:
		case codes.PermissionDenied:
			return spiffeid.ID{}, fmt.Errorf("the node refuses process %d: %s", p.PID, status.Convert(err).Message())
		default:
			return spiffeid.ID{}, fmt.Errorf("the node at %s does not say whose process %d is: %s: is `inlay node` running?", nodeSocket, p.PID, status.Convert(err).Message())
		}
		if resp.GetSpiffeId() == "" {
			return spiffeid.ID{}, nil
		}
		id, err := spiffeid.FromString(resp.GetSpiffeId())
		if err != nil {
			return spiffeid.ID{}, fmt.Errorf("the node at %s answered %q: %w", nodeSocket, resp.GetSpiffeId(), err)
		}
		return id, nil
	}
}
