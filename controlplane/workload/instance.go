package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

type instanceConfig struct {
	registry registrypb.RegistryClient
	start    startRequest
	binding  binding
	// addresses of the node, by which a managed workload is known elsewhere.
	addresses []string
	clock     Clock
	random    func() float64
	log       *slog.Logger
}

// instance keeps a program without the SDK registered: as an endpoint that speaks no mesh TLS, or
// without a port as a workload. Its owner starts run in a goroutine and ends it with drain or abandon.
type instance struct {
	instanceConfig
	ctx      context.Context
	cancel   context.CancelFunc
	draining chan struct{} // closed when the instance is to leave
	done     chan struct{} // closed when run has returned

	once    sync.Once
	drained bool // written before done is closed

	mu      sync.Mutex
	state   *nodepb.Registered // nil until the registry answered
	changed chan struct{}
}

func newInstance(ctx context.Context, cfg instanceConfig) *instance {
	ctx, cancel := context.WithCancel(ctx)
	return &instance{
		instanceConfig: cfg, ctx: ctx, cancel: cancel,
		draining: make(chan struct{}), done: make(chan struct{}), changed: make(chan struct{}),
	}
}

// abandon stops to renew and leaves the lease as it is; it returns when run has.
func (i *instance) abandon() {
	i.cancel()
	<-i.done
}

// drain takes the endpoint out of every client and returns when run has ended; false means that
// this could not be confirmed. It is cut short by stop and by timeout.
func (i *instance) drain(stop <-chan struct{}, timeout time.Duration) bool {
	i.once.Do(func() { close(i.draining) })
	late := make(chan struct{})
	cancel := i.clock.AfterFunc(timeout, func() { close(late) })
	defer cancel()
	select {
	case <-i.done:
	case <-stop:
	case <-late:
	}
	i.abandon()
	return i.drained
}

// changes is closed when news has something.
func (i *instance) changes() <-chan struct{} {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.state != nil {
		now := make(chan struct{})
		close(now)
		return now
	}
	return i.changed
}

// news returns the newest answer of the registry, nil when there is none, and what is closed at
// the next one.
func (i *instance) news() (*nodepb.Registered, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.state, i.changed
}

func (i *instance) publish(unreachable string, replaced bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.state != nil && i.state.GetUnreachable() == unreachable && i.state.GetReplaced() == replaced {
		return
	}
	i.state = &nodepb.Registered{Unreachable: unreachable, Replaced: replaced}
	tell(&i.changed)
}

var (
	errReplaced = errors.New("the SDK of the program has registered in its place")
	errDrained  = errors.New("drained")
)

// run registers and renews until the instance leaves, is replaced, or ctx ends.
func (i *instance) run() {
	defer close(i.done)
	defer i.cancel()
	failures := 0
	for {
		registered, err := i.register()
		switch {
		case errors.Is(err, errDrained):
			i.drained = true
			return
		case errors.Is(err, errReplaced):
			i.drained = true // nothing of ours is left
			i.publish("", true)
			i.log.Info("instance replaced by the SDK", "service", i.start.svc.String(), "run_id", i.start.runID)
			return
		case i.ctx.Err() != nil:
			return
		}
		if registered {
			failures = 0
		}
		limit := retryMax
		switch status.Code(err) {
		case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
			// The registry has decided: only people change that.
			limit = 30 * time.Second
			i.publish(status.Convert(err).Message(), false)
		}
		wait := backoffFor(failures, retryBase, limit, i.random())
		failures++
		i.log.Warn("instance not registered", "service", i.start.svc.String(), "run_id", i.start.runID, "err", err, "retry_in", wait)
		if !sleep(i.ctx, i.clock, wait, i.draining) {
			return // without a stream there is nobody to drain with
		}
	}
}

// register keeps one stream; registered says that the registry confirmed at least once.
func (i *instance) register() (registered bool, err error) {
	ctx, cancel := context.WithCancel(i.ctx)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer cancel()
	stream, err := i.registry.Register(ctx)
	if err != nil {
		return false, err
	}
	// A send that fails because the stream broke says io.EOF; the reason comes from Recv.
	if err := stream.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: i.message()}}); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	answers, broken := make(chan *registrypb.RegisterResponse), make(chan error, 1)
	reader.Go(func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				broken <- err
				return
			}
			select {
			case answers <- resp:
			case <-ctx.Done():
				broken <- ctx.Err() // the loop hears of the end from here alone
				return
			}
		}
	})
	var (
		renew    = make(chan struct{}, 1)
		stop     = func() bool { return false }
		draining = i.draining
		replaced bool
	)
	defer func() { stop() }()
	for {
		select {
		case err := <-broken:
			if replaced && status.Code(err) == codes.AlreadyExists {
				return registered, errReplaced
			}
			return registered, err
		case resp := <-answers:
			switch kind := resp.GetKind().(type) {
			case *registrypb.RegisterResponse_Drained:
				return registered, errDrained
			case *registrypb.RegisterResponse_Registered:
				lease := time.Duration(kind.Registered.GetLeaseSeconds()) * time.Second
				if lease == 0 {
					replaced = true // no lease: the instance is not kept, and the status says why
					continue
				}
				registered = true
				i.publish(kind.Registered.GetUnreachable(), false)
				stop()
				stop = i.clock.AfterFunc(lease/3, func() {
					select {
					case renew <- struct{}{}:
					default:
					}
				})
			default:
				return registered, fmt.Errorf("registry answered with %T: want registered or drained", kind)
			}
		case <-renew:
			if err := stream.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Renew{Renew: &registrypb.Renew{}}}); err != nil && !errors.Is(err, io.EOF) {
				return registered, err
			}
		case <-draining:
			draining = nil
			if err := stream.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Drain{Drain: &registrypb.Drain{}}}); err != nil && !errors.Is(err, io.EOF) {
				return registered, err
			}
		}
	}
}

// message is the instance as the registry takes it. Its id follows from the run, so that a node
// that starts again takes its own instance over instead of adding a second one.
func (i *instance) message() *registrypb.Instance {
	m := &registrypb.Instance{
		InstanceId: "run-" + i.start.runID,
		Namespace:  i.start.svc.namespace,
		Service:    i.start.svc.name,
		Version:    i.start.version,
		Labels:     i.start.labels,
		Weight:     1,
		Tls:        registrypb.Tls_TLS_NONE,
	}
	if i.start.managed != nil {
		m.Addresses = i.addresses
	}
	if i.binding.port == 0 {
		// No run id: an SDK below this run takes the endpoint's place, not the workload's.
		m.InstanceId = "workload-" + i.start.runID
		return m
	}
	m.RunId = i.start.runID
	// Listening does not say a protocol above TCP and the registry wants one. It decides nothing: a
	// declared service has the protocol of its declaration, and one that nobody declared is strict,
	// so that nobody with the SDK calls an instance without mesh TLS.
	protocol := registrypb.Protocol_PROTOCOL_HTTP
	if i.binding.udp {
		protocol = registrypb.Protocol_PROTOCOL_UDP
	}
	m.Ports = []*registrypb.Port{{Port: uint32(i.binding.port), Protocol: protocol, Addresses: []string{i.binding.address.String()}}}
	return m
}
