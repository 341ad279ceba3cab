package serve

import (
	"fmt"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
	"github.com/inlay-mesh/inlay/identity"
)

// Who an SDK says it is.
const (
	sdkAgent   = "inlay-go"
	sdkFeature = "inlay.sdk"
)

// nodeAgent is who a node agent says it is.
const nodeAgent = "inlay-node"

// client is who is at the other end of a stream, decided once from its first request.
type client struct {
	nodeID       string
	identity     string // SPIFFE ID; empty for none
	view         xdsgen.View
	agent        string // user agent name and version
	agentVersion string
	address      string
}

// identify decides who a client is and which view it is given. The identity of the connection wins
// over anything that the node says of itself; without one the node's word is taken only where
// nothing but outbound names depends on it. The error is a gRPC status.
func identify(node *corev3.Node, caller attest.Caller, address string, cfg Config) (client, error) {
	if node == nil {
		return client{}, status.Errorf(codes.InvalidArgument, "%v: send node in it, once a stream", errNoNode)
	}
	c := client{
		nodeID:       node.GetId(),
		agent:        strings.TrimSpace(node.GetUserAgentName() + " " + node.GetUserAgentVersion()),
		agentVersion: node.GetUserAgentVersion(),
		address:      address,
	}
	switch {
	case node.GetUserAgentName() == nodeAgent && caller.IsNode(cfg.NodeUIDs...):
		// The word of the process alone would not do: the view holds every policy of the mesh.
		c.view = xdsgen.View{Kind: xdsgen.Node}
		return c, nil
	case slices.Contains(node.GetClientFeatures(), sdkFeature) || node.GetUserAgentName() == sdkAgent:
		c.view.Kind = xdsgen.SDK
	case node.GetUserAgentName() == "envoy":
		return client{}, status.Error(codes.Unimplemented,
			"there is no view for Envoy yet; the SDK (meshsdk) and gRPC clients with xDS are served")
	default:
		c.view.Kind = xdsgen.GRPC
	}
	if !caller.ID.IsZero() {
		ns, svc, err := class(caller.ID, cfg.TrustDomain)
		if err != nil {
			return client{}, status.Error(codes.PermissionDenied, err.Error())
		}
		c.identity, c.view.Namespace, c.view.Service = caller.ID.String(), ns, svc
		return c, nil
	}
	switch {
	case caller.Local && node.GetUserAgentName() == nodeAgent && !slices.Contains(cfg.NodeUIDs, caller.UID):
		return client{}, status.Errorf(codes.PermissionDenied,
			"process %d of user %d says that it is a node agent: want one of the users %v", caller.Process.PID, caller.UID, cfg.NodeUIDs)
	case caller.Local && caller.Err != nil:
		return client{}, status.Errorf(codes.PermissionDenied,
			"the calling process has no identity: %v; start it with `inlay run --service NAME -- CMD`", caller.Err)
	case caller.Local:
		return client{}, status.Errorf(codes.PermissionDenied,
			"process %d has no identity; start it with `inlay run --service NAME -- CMD`", caller.Process.PID)
	case !cfg.Dev:
		return client{}, status.Error(codes.Unauthenticated,
			"no identity was shown; connect by the unix socket, or over mTLS with an X.509-SVID of the mesh")
	}
	ns := node.GetMetadata().GetFields()["INLAY_NAMESPACE"].GetStringValue()
	if ns == "" {
		ns = "default"
	}
	if identity.CheckName(ns) != nil {
		return client{}, status.Errorf(codes.InvalidArgument,
			"node metadata INLAY_NAMESPACE %q: want a DNS label (a-z, 0-9, '-', at most 63)", clip(ns))
	}
	c.view.Namespace = ns
	return c, nil
}

// class reads the identity class from a SPIFFE ID of a service.
func class(id spiffeid.ID, trustDomain string) (namespace, service string, err error) {
	if trustDomain != "" && id.TrustDomain().Name() != trustDomain {
		return "", "", fmt.Errorf("identity %s: want one of trust domain %s", id, trustDomain)
	}
	namespace, service, ok := identity.ParseServiceID(id)
	if !ok {
		return "", "", fmt.Errorf("identity %s: want the path /ns/NAMESPACE/svc/SERVICE", id)
	}
	return namespace, service, nil
}

// clip keeps what a client sent from filling logs and statuses.
func clip(s string) string {
	const most = 512
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
