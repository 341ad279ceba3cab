package workload

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/identity/workloadpb"
)

// workloadAPI is the X.509 profile of the SPIFFE Workload API. The JWT profile is absent, which
// the server answers with Unimplemented (SPIFFE Workload Endpoint, appendix A).
type workloadAPI struct{ node *Node }

// registerWorkloadAPI writes the service down by hand: the standard's proto has no package, and
// generated code for it would clash with other copies of it in one program.
func registerWorkloadAPI(s grpc.ServiceRegistrar, api *workloadAPI) {
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "SpiffeWorkloadAPI",
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{
			{StreamName: "FetchX509SVID", ServerStreams: true, Handler: handler[workloadpb.X509SVIDRequest](api.fetchSVID)},
			{StreamName: "FetchX509Bundles", ServerStreams: true, Handler: handler[workloadpb.X509BundlesRequest](api.fetchBundles)},
		},
	}, api)
}

// handler checks the header and reads the request, which says nothing.
func handler[T any](serve func(grpc.ServerStream) error) grpc.StreamHandler {
	return func(_ any, stream grpc.ServerStream) error {
		// SPIFFE Workload Endpoint, section 3: "Requests not including this metadata key/value MUST be
		// rejected", section 6: "MUST respond with gRPC status code "InvalidArgument"".
		md, _ := metadata.FromIncomingContext(stream.Context())
		if v := md.Get(identity.SecurityHeader); len(v) != 1 || v[0] != "true" {
			return status.Errorf(codes.InvalidArgument, "metadata %s is missing: want %s: true", identity.SecurityHeader, identity.SecurityHeader)
		}
		if err := stream.RecvMsg(new(T)); err != nil {
			return err
		}
		return serve(stream)
	}
}

func (a *workloadAPI) fetchSVID(stream grpc.ServerStream) error {
	return a.follow(stream, func(s *identity.SVID) (any, error) { return identity.Encode(s) })
}

func (a *workloadAPI) fetchBundles(stream grpc.ServerStream) error {
	return a.follow(stream, func(s *identity.SVID) (any, error) { return identity.EncodeBundles(s.Authorities), nil })
}

// follow sends what the caller's service has now and after each change, and ends when the caller
// is of no service any more. The caller is looked up again before each message.
func (a *workloadAPI) follow(stream grpc.ServerStream, encode func(*identity.SVID) (any, error)) error {
	ctx := stream.Context()
	caller := attest.CallerFrom(ctx)
	var sent *identity.SVID
	for {
		reg, err := a.node.regs.find(caller.Process, caller.UID)
		if err != nil {
			// Workload API, section 5.2.1: "If the client is not entitled to receive any X509-SVIDs, then
			// the server SHOULD respond with the "PermissionDenied" gRPC status code".
			return denied(err)
		}
		svid, changed, err := a.node.issuer.current(reg.entry)
		if err != nil {
			// SPIFFE Workload Endpoint, section 6: "running but unavailable, for instance if it is still
			// initializing ... clients will receive the gRPC status code "Unavailable"".
			return status.Errorf(codes.Unavailable, "no SVID for %s: %v", reg.svc, err)
		}
		if svid != nil && svid != sent {
			msg, err := encode(svid)
			if err != nil {
				return status.Error(codes.Internal, err.Error())
			}
			if err := stream.SendMsg(msg); err != nil {
				return err
			}
			sent = svid
		}
		select {
		case <-changed:
		case <-reg.ended:
		case <-a.node.stopping:
			return status.Error(codes.Unavailable, "the node is stopping: try again")
		case <-ctx.Done():
			return status.FromContextError(context.Cause(ctx)).Err()
		}
	}
}

// denied is the status of a process that find refused.
func denied(err error) error {
	if errors.Is(err, errOutside) || errors.Is(err, errOtherUser) || errors.Is(err, attest.ErrNoProcess) {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	// Reading the process table failed: that says nothing about the caller.
	return status.Error(codes.Unavailable, fmt.Sprintf("attestation: %v", err))
}
