//go:build linux

package workload_test

import (
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// A program without the SDK: its port is registered, renewed, and drained.
func TestInstanceOfAProgramWithoutSDK(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	stream := h.register("cart", "r1")
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 8080, Address: "127.0.0.1:4000"}}})
	in := (<-h.reg.requests).GetInstance()
	if in.GetService() != "cart" || in.GetNamespace() != "default" || in.GetTls() != registrypb.Tls_TLS_NONE || in.GetRunId() != "r1" ||
		in.GetPorts()[0].GetPort() != 8080 || in.GetPorts()[0].GetAddresses()[0] != "127.0.0.1:4000" {
		t.Errorf("instance %v", in)
	}
	const lease = 3 * time.Second
	h.reg.answers <- registered(uint32(lease/time.Second), "strict and without mesh TLS")
	answered := time.Now()
	if got := recv(t, stream).GetRegistered(); got.GetUnreachable() != "strict and without mesh TLS" || got.GetReplaced() {
		t.Errorf("run was told %v", got)
	}
	if req := <-h.reg.requests; req.GetRenew() == nil {
		t.Errorf("after a third of the lease: %v, want renew", req)
	}
	if after := time.Since(answered); after < lease/4 || after >= lease {
		t.Errorf("renewed after %s, want a third of %s", after, lease)
	}
	h.reg.answers <- registered(60, "")
	if got := recv(t, stream).GetRegistered(); got == nil || got.GetUnreachable() != "" {
		t.Errorf("run was told %v, want that it is reachable now", got)
	}
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Stopped{Stopped: &nodepb.Stopped{}}})
	if req := <-h.reg.requests; req.GetDrain() == nil {
		t.Errorf("after stopped: %v, want drain", req)
	}
	h.reg.answers <- answer{resp: &registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Drained{Drained: &registrypb.Drained{All: true}}}}
	if got := recv(t, stream); got.GetDrained() == nil {
		t.Errorf("run was told %v, want drained", got)
	}
}

func TestInstanceIsReplacedByTheSDK(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	stream := h.register("cart", "r1")
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 8080, Address: "127.0.0.1:4000"}}})
	<-h.reg.requests
	h.reg.answers <- registered(0, "replaced")
	h.reg.answers <- answer{err: status.Error(codes.AlreadyExists, "replaced")}
	if got := recv(t, stream).GetRegistered(); !got.GetReplaced() {
		t.Errorf("run was told %v, want replaced", got)
	}
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Stopped{Stopped: &nodepb.Stopped{}}})
	if got := recv(t, stream); got.GetDrained() == nil {
		t.Errorf("run was told %v, want drained at once", got)
	}
}

// The control plane restarts: the same instance registers again. The run ends: it is drained.
func TestInstanceRegistersAgainAndLeavesWithItsRun(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	stream := h.register("cart", "r1")
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 8080, Address: "127.0.0.1:4000"}}})
	first := (<-h.reg.requests).GetInstance()
	h.reg.answers <- registered(60, "")
	recv(t, stream)
	h.stopControlPlane()
	h.startControlPlane()
	second := (<-h.reg.requests).GetInstance()
	if second.GetInstanceId() != first.GetInstanceId() {
		t.Errorf("instance %q after the restart, want %q", second.GetInstanceId(), first.GetInstanceId())
	}
	h.reg.answers <- registered(60, "")
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if req := <-h.reg.requests; req.GetDrain() == nil {
		t.Errorf("after the run: %v, want drain", req)
	}
	h.reg.answers <- answer{resp: &registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Drained{Drained: &registrypb.Drained{All: true}}}}
}

// A node that restarts drains nobody: the program lives on and registers again under its id.
func TestNodeRestartKeepsTheLease(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	stream := h.register("cart", "r1")
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 8080, Address: "127.0.0.1:4000"}}})
	first := (<-h.reg.requests).GetInstance()
	h.reg.answers <- registered(60, "")
	recv(t, stream)
	h.stopNode()
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v, want Unavailable", err)
	}
	h.startNode(nil)
	stream = h.register("cart", "r1")
	send(t, stream, &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 8080, Address: "127.0.0.1:4000"}}})
	again := (<-h.reg.requests).GetInstance() // a drain would have come first
	if again.GetInstanceId() != first.GetInstanceId() {
		t.Errorf("instance %q after the restart, want %q", again.GetInstanceId(), first.GetInstanceId())
	}
}

func registered(lease uint32, unreachable string) answer {
	return answer{resp: &registrypb.RegisterResponse{Kind: &registrypb.RegisterResponse_Registered{
		Registered: &registrypb.Registered{LeaseSeconds: lease, Unreachable: unreachable}}}}
}

func send(t *testing.T, s grpc.BidiStreamingClient[nodepb.RunRequest, nodepb.RunResponse], req *nodepb.RunRequest) {
	t.Helper()
	if err := s.Send(req); err != nil {
		t.Fatal(err)
	}
}

func recv(t *testing.T, s grpc.BidiStreamingClient[nodepb.RunRequest, nodepb.RunResponse]) *nodepb.RunResponse {
	t.Helper()
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return resp
}
