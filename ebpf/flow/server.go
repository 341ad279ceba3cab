package flow

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/ebpf/flow/query"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// Server serves inlay.node.v1.Flows from a Log. Whoever registers it guards the socket: it asks
// nobody who they are.
type Server struct {
	nodepb.UnimplementedFlowsServer
	log   *Log
	agent func(context.Context) (*nodepb.Agent, error)
}

// NewServer returns a server of log. agent tells the state of the agent; records made, kept and
// lost are filled in from the log. A nil agent leaves all else empty.
func NewServer(log *Log, agent func(context.Context) (*nodepb.Agent, error)) *Server {
	return &Server{log: log, agent: agent}
}

// Observe implements nodepb.FlowsServer. A query with a fault is InvalidArgument.
func (s *Server) Observe(req *nodepb.ObserveRequest, stream grpc.ServerStreamingServer[nodepb.ObserveResponse]) error {
	err := s.log.Observe(stream.Context(), req, stream.Send)
	var fault *query.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &fault):
		return status.Error(codes.InvalidArgument, fault.Error())
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.FromContextError(err).Err()
}

// GetAgent implements nodepb.FlowsServer.
func (s *Server) GetAgent(ctx context.Context, _ *nodepb.GetAgentRequest) (*nodepb.Agent, error) {
	a := &nodepb.Agent{}
	if s.agent != nil {
		var err error
		if a, err = s.agent(ctx); err != nil {
			return nil, err
		}
	}
	a.Made, a.Kept, a.Lost = s.log.Counts()
	return a, nil
}
