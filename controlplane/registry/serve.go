package registry

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// Replaced is what the stream of a program without the SDK is told when the SDK of the same
// program registers: first in Registered.unreachable, then as the message of the status
// AlreadyExists that ends the stream. It must not be tried again.
const Replaced = "replaced by the SDK of the program"

// Register serves inlay.registry.v1.Registry on s. It belongs on listeners that say who calls: the
// unix socket and mTLS.
func (r *Registry) Register(s grpc.ServiceRegistrar) {
	registrypb.RegisterRegistryServer(s, &server{reg: r})
}

type server struct {
	registrypb.UnimplementedRegistryServer
	reg *Registry
}

// Register is one instance's stream.
func (s *server) Register(stream registrypb.Registry_RegisterServer) error {
	r := s.reg
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	// Recv ends only with the stream, whose end is this function's return; so the reader outlives
	// it by a moment, and hands on nothing after that.
	requests := make(chan *registrypb.RegisterRequest)
	ended := make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				ended <- ctx.Err() // the loop hears of the end from here alone
				return
			}
		}
	}()

	caller := attest.CallerFrom(ctx)
	o := &owner{lost: make(chan struct{})}
	var id string
	defer func() { r.release(id, o) }()
	for {
		select {
		case <-r.done:
			return status.Error(codes.Unavailable, "the control plane is stopping: register again")
		case <-o.lost:
			return s.lost(stream, o.why)
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case req := <-requests:
			resp, err := r.step(ctx, caller, o, &id, req)
			if err != nil {
				if errors.Is(err, errReplaced) {
					return s.lost(stream, lostToReplacement)
				}
				return err
			}
			// The registry may have given the entry away while the step ran; its reason is better.
			select {
			case <-o.lost:
				return s.lost(stream, o.why)
			default:
			}
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
	}
}

// lost ends the stream of an instance that was taken from it.
func (s *server) lost(stream registrypb.Registry_RegisterServer, why loss) error {
	switch why {
	case lostToReplacement:
		_ = stream.Send(registered(0, Replaced)) // the status says the same
		return status.Error(codes.AlreadyExists, Replaced)
	case lostToReconnection:
		return status.Error(codes.Aborted, "the instance registered again on another stream")
	default:
		return status.Error(codes.DeadlineExceeded, "the lease ended without renewal: register again")
	}
}

// step answers one request; id is the instance of the stream, empty before the first.
func (r *Registry) step(ctx context.Context, caller attest.Caller, o *owner, id *string, req *registrypb.RegisterRequest) (*registrypb.RegisterResponse, error) {
	switch kind := req.GetKind().(type) {
	case *registrypb.RegisterRequest_Instance:
		in, err := decode(kind.Instance)
		if err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "instance: %s", oneLine(err))
		}
		if *id != "" && *id != in.ID {
			return nil, status.Errorf(codes.InvalidArgument, "instance_id %q on the stream of %q: want one stream for each instance", in.ID, *id)
		}
		if in.Identity, err = r.admit(caller, in); err != nil {
			return nil, err
		}
		switch err := r.put(in, o); {
		case errors.Is(err, errFull):
			return nil, status.Errorf(codes.ResourceExhausted, "the registry holds %d instances, its bound: instances that are gone leave when their lease ends", r.cfg.MaxInstances)
		case errors.Is(err, errTaken):
			return nil, status.Errorf(codes.AlreadyExists, "instance_id %q: %v: choose another one, unique for the life of the instance", in.ID, err)
		case err != nil:
			return nil, err
		}
		*id = in.ID
		r.cfg.Log.Info("instance registered", "namespace", in.Namespace, "service", in.Service, "instance", in.ID, "mesh_tls", in.MeshTLS, "sdk_version", in.SDKVersion)
		return registered(r.leaseSeconds(), r.unreachable(in)), nil
	case *registrypb.RegisterRequest_Renew:
		if *id == "" {
			return nil, status.Error(codes.FailedPrecondition, "renew before instance: the first request of a stream carries the instance")
		}
		if !r.renew(*id, o) {
			return nil, status.Errorf(codes.NotFound, "instance %q is not registered by this stream: register again", *id)
		}
		r.mu.Lock()
		var in Instance
		if e, ok := r.entries[*id]; ok {
			in = e.inst
		}
		r.mu.Unlock()
		return registered(r.leaseSeconds(), r.unreachable(in)), nil
	case *registrypb.RegisterRequest_Drain:
		if *id == "" {
			return nil, status.Error(codes.FailedPrecondition, "drain before instance: the first request of a stream carries the instance")
		}
		all := r.drain(ctx, *id, o)
		r.cfg.Log.Info("instance left", "instance", *id, "all", all)
		return &registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Drained{Drained: &registrypb.Drained{All: all}}}, nil
	default:
		return nil, status.Error(codes.InvalidArgument, "request without a kind: want instance, renew or drain (a newer client?)")
	}
}

// admit decides whether the caller may register the instance, and returns who it is: a SPIFFE ID,
// or nothing for a node that registers a program without the SDK.
func (r *Registry) admit(caller attest.Caller, in Instance) (identity string, err error) {
	if caller.ID.IsZero() {
		switch {
		case !caller.Local:
			return "", status.Error(codes.Unauthenticated, "registration needs an identity: use the unix socket, or mTLS with an SVID")
		case !caller.IsNode(r.cfg.NodeUIDs...):
			return "", status.Errorf(codes.Unauthenticated, "the process has no identity (%s): start it with: inlay run --service %s -- CMD", why(caller.Err), in.Service)
		case in.MeshTLS:
			return "", status.Errorf(codes.Unauthenticated, "the process has no identity (%s), so it cannot speak mesh TLS: start it with: inlay run --service %s -- CMD", why(caller.Err), in.Service)
		}
		return "", nil
	}
	if td := caller.ID.TrustDomain().Name(); r.cfg.TrustDomain != "" && td != r.cfg.TrustDomain {
		return "", status.Errorf(codes.PermissionDenied, "the caller %s is of trust domain %s: want %s", caller.ID, td, r.cfg.TrustDomain)
	}
	if want := "/ns/" + in.Namespace + "/svc/" + in.Service; caller.ID.Path() != want {
		return "", status.Errorf(codes.PermissionDenied, "the caller is %s and may not register for %s.%s: want the SPIFFE ID path %s", caller.ID, in.Service, in.Namespace, want)
	}
	return caller.ID.String(), nil
}

func why(err error) string {
	if err == nil {
		return "it is below no registration"
	}
	return err.Error()
}

// unreachable says why no caller will reach the instance, if so.
func (r *Registry) unreachable(in Instance) string {
	plain := !slices.ContainsFunc(in.Ports, func(p PortBinding) bool { return !r.cfg.Plain(in.Namespace, in.Service, p) })
	if in.MeshTLS || plain || r.cfg.MTLSMode(in.Namespace, in.Service) == ir.Permissive {
		return ""
	}
	return "service " + in.Service + "." + in.Namespace + " is strict and this instance does not speak mesh TLS: use the SDK in it, or set mtls: permissive on the MeshService"
}

func (r *Registry) leaseSeconds() uint32 { return uint32(r.cfg.LeaseTTL.Seconds()) }

func registered(lease uint32, unreachable string) *registrypb.RegisterResponse {
	return &registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Registered{
		Registered: &registrypb.Registered{LeaseSeconds: lease, Unreachable: unreachable}}}
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
