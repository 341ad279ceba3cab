//go:build linux

package workload

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// late is the receiving half of a stream whose last message comes at the moment of its end.
type late[M any] struct {
	ctx  context.Context
	last *M
}

func (s *late[M]) Context() context.Context { return s.ctx }

func (s *late[M]) Recv() (*M, error) {
	<-s.ctx.Done()
	if m := s.last; m != nil {
		s.last = nil
		return m, nil
	}
	return nil, s.ctx.Err()
}

// lateRegistry answers every registration at the moment when its stream ends.
type lateRegistry struct{ grpc.ClientStream }

type lateAnswer struct {
	lateRegistry
	*late[registrypb.RegisterResponse]
}

func (lateRegistry) Register(ctx context.Context, _ ...grpc.CallOption) (registrypb.Registry_RegisterClient, error) {
	return lateAnswer{late: &late[registrypb.RegisterResponse]{ctx, &registrypb.RegisterResponse{
		Kind: &registrypb.RegisterResponse_Registered{Registered: &registrypb.Registered{LeaseSeconds: 60}}}}}, nil
}

func (lateAnswer) Context() context.Context               { panic("not asked") }
func (lateAnswer) Send(*registrypb.RegisterRequest) error { return nil }

func TestAnAnswerThatComesWithTheEndDoesNotHideIt(t *testing.T) {
	for range 64 { // which of the two is seen first is chance
		synctest.Test(t, func(t *testing.T) {
			i := newInstance(t.Context(), instanceConfig{registry: lateRegistry{}, clock: realClock{}, random: func() float64 { return 0.5 }, log: slog.New(slog.DiscardHandler)})
			go i.run()
			time.Sleep(time.Second)
			i.abandon() // an instance that does not end is a deadlock of the bubble
		})
	}
}

// lateCaller says something at the moment when it is gone.
type lateCaller struct {
	grpc.ServerStream
	*late[nodepb.RunRequest]
}

func (s lateCaller) Context() context.Context     { return s.ctx }
func (lateCaller) Send(*nodepb.RunResponse) error { return nil }

func TestARequestThatComesWithTheEndDoesNotHideIt(t *testing.T) {
	self, err := attest.Proc{}.Stat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	watch, err := attest.NewWatch(self.Process)
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	node, err := New(Config{RunDir: t.TempDir(), ControlPlane: "cp.sock"})
	if err != nil {
		t.Fatal(err)
	}
	for range 64 {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- (&nodeService{node: node}).converse(lateCaller{late: &late[nodepb.RunRequest]{ctx, &nodepb.RunRequest{
				Kind: &nodepb.RunRequest_Stopped{Stopped: &nodepb.Stopped{}}}}}, startRequest{}, &registration{}, watch)
		}()
		cancel()
		select {
		case err := <-ended:
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("ended with %v, want canceled", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the caller is gone and its registration stays")
		}
	}
}
