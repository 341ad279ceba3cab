package ca

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/capb"
)

// Register serves inlay.ca.v1.CA on s. Only nodes are answered: callers over a unix socket whose
// user is one of Config.NodeUIDs. The server's credentials are those of package attest.
func (c *CA) Register(s grpc.ServiceRegistrar) { capb.RegisterCAServer(s, service{ca: c}) }

type service struct {
	capb.UnimplementedCAServer
	ca *CA
}

func (s service) authorize(ctx context.Context) error {
	caller := attest.CallerFrom(ctx)
	switch {
	case caller.IsNode(s.ca.uids...):
		return nil
	case !caller.ID.IsZero():
		return status.Errorf(codes.PermissionDenied, "certificate authority: %s is a workload: only a node may ask; a workload's SVID comes from the Workload API of its node", caller.ID)
	case !caller.Local:
		return status.Error(codes.PermissionDenied, "certificate authority: only a node on this machine may ask, over the control plane's unix socket")
	case caller.Err != nil:
		return status.Errorf(codes.PermissionDenied, "certificate authority: it is not known whether process %d is a workload: %v", caller.Process.PID, caller.Err)
	}
	return status.Errorf(codes.PermissionDenied, "certificate authority: user %d is not a node's: want one of %v; run the node as such a user", caller.UID, s.ca.uids)
}

// Sign implements capb.CAServer.
func (s service) Sign(ctx context.Context, req *capb.SignRequest) (*capb.SignResponse, error) {
	if err := s.authorize(ctx); err != nil {
		return nil, err
	}
	signed, err := s.ca.Sign(ctx, SignRequest{
		Namespace: req.GetNamespace(), Service: req.GetService(), CSR: req.GetCsr(), UID: req.GetUid(),
	})
	switch {
	case errors.Is(err, ErrRequest):
		return nil, status.Error(codes.InvalidArgument, err.Error())
	case err != nil:
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &capb.SignResponse{
		Chain: signed.Chain, SpiffeId: signed.ID.String(), NotAfter: timestamppb.New(signed.NotAfter),
	}, nil
}

// WatchBundle implements capb.CAServer. The root is one for the life of the process, so the stream
// says it once and stays open: a node that sees it end asks again.
func (s service) WatchBundle(_ *capb.WatchBundleRequest, stream grpc.ServerStreamingServer[capb.Bundle]) error {
	if err := s.authorize(stream.Context()); err != nil {
		return err
	}
	b := &capb.Bundle{TrustDomain: s.ca.td.Name()}
	for _, root := range s.ca.Bundle() {
		b.Roots = append(b.Roots, root.Raw)
	}
	if err := stream.Send(b); err != nil {
		return err
	}
	<-stream.Context().Done()
	return status.FromContextError(stream.Context().Err()).Err()
}
