package meshsdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// drainTimeout bounds the wait for the registry's word that every client has let go of this
// instance (ARCHITECTURE, section 6: "every subscribed client has ACKed, or 5 s").
const drainTimeout = 5 * time.Second

// Bounds of the wait before registering again.
const (
	registerBase = 100 * time.Millisecond
	registerMax  = 4 * time.Second
)

// registrar keeps this instance registered for as long as it has ports. Ports come and go from any
// goroutine; run is the one that talks.
type registrar struct {
	// instance returns all of the instance but its ports; it blocks until that is known.
	instance func(ctx context.Context) (*registrypb.Instance, error)
	// conn returns the connection to the control plane, waiting until there is one.
	conn func(ctx context.Context) (grpc.ClientConnInterface, error)
	// reachable is the address that callers are given for one that was bound.
	reachable func(netip.AddrPort) netip.AddrPort
	clock     Clock
	log       *slog.Logger

	mu       sync.Mutex
	ports    []*binding // by port
	draining bool       // for good
	known    bool       // a registry may hold the instance
	state    registration
	changed  chan struct{} // closed and replaced when ports or draining change
	drained  chan struct{} // closed when the instance has left for good
}

// registration is what the registry said last.
type registration struct {
	registered  bool
	unreachable string
	err         string
}

// binding is a port of the service and where it is served. It is never changed.
type binding struct {
	port     uint16
	protocol registrypb.Protocol
	bound    netip.AddrPort
}

func newRegistrar(clock Clock, log *slog.Logger) *registrar {
	return &registrar{clock: clock, log: log, changed: make(chan struct{}), drained: make(chan struct{})}
}

// add announces a port; it returns at once. While draining it does nothing.
func (r *registrar) add(b *binding) {
	r.update(func() {
		if r.draining {
			return
		}
		r.ports = slices.DeleteFunc(slices.Clone(r.ports), func(have *binding) bool { return have.port == b.port })
		r.ports = append(r.ports, b)
		slices.SortFunc(r.ports, func(a, b *binding) int { return int(a.port) - int(b.port) })
	})
}

// remove takes one port back, without waiting. When the last one is gone the instance leaves; a
// later add registers it again.
func (r *registrar) remove(port uint16) {
	r.update(func() {
		r.ports = slices.DeleteFunc(slices.Clone(r.ports), func(have *binding) bool { return have.port == port })
	})
}

// drain takes the instance out of every client's endpoints for good and waits for the registry's
// word, for at most drainTimeout or until ctx is done. It reports whether that word came; where no
// registry ever heard of the instance there is nothing to wait for.
func (r *registrar) drain(ctx context.Context) bool {
	known := false
	r.update(func() { r.draining, known = true, r.known })
	if !known {
		return true
	}
	timeout := make(chan struct{})
	stop := r.clock.AfterFunc(drainTimeout, func() { close(timeout) })
	defer stop()
	select {
	case <-r.drained:
		return true
	case <-timeout:
	case <-ctx.Done():
	}
	return false
}

func (r *registrar) update(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	close(r.changed)
	r.changed = make(chan struct{})
}

// view is a consistent copy of what is wanted.
func (r *registrar) view() (ports []*binding, draining, known bool, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ports, r.draining, r.known, r.changed
}

// announcing notes that a registry is about to hear of the instance; false means that it must not
// any more, since drain has already said that there is nothing to wait for.
func (r *registrar) announcing() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known = r.known || !r.draining
	return r.known
}

// forget notes that no registry holds the instance.
func (r *registrar) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known, r.state = false, registration{}
}

func (r *registrar) set(s registration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = s
}

// status returns what the registry said last.
func (r *registrar) status() registration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

// run registers whenever there are ports, renews, registers again after a broken stream, and
// drains when asked. It returns when the instance is drained for good or ctx is done.
func (r *registrar) run(ctx context.Context) {
	failures := 0
	var lastPorts []*binding
	var lastErr string
	for {
		ports, draining, known, changed := r.view()
		if !known && draining {
			close(r.drained)
			return
		}
		if !known && len(ports) == 0 {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return
			}
		}
		sent, left, err := r.session(ctx, &lastPorts)
		if ctx.Err() != nil {
			return
		}
		if left {
			r.forget()
			continue
		}
		if sent {
			failures, lastErr = 0, ""
		}
		text := "the registry ended the stream"
		if err != nil && !errors.Is(err, io.EOF) {
			text = status.Convert(err).Message()
		}
		r.set(registration{err: text})
		wait := registerWait(failures, err)
		failures++
		// Said once: the same refusal comes every few seconds until somebody acts, and a control
		// plane that is away is known from elsewhere.
		level := slog.LevelDebug
		if refused(err) && text != lastErr {
			level, lastErr = slog.LevelWarn, text
		}
		r.log.Log(ctx, level, "not registered", "err", text, "retry_in", wait)
		passed := make(chan struct{})
		stop := r.clock.AfterFunc(wait, func() { close(passed) })
		select {
		case <-passed:
		case <-changed:
		case <-ctx.Done():
			stop()
			return
		}
		stop()
	}
}

// registerWait is the time before another try: growing, jittered, and at once at its longest when
// the registry refused what we are, which only people change.
func registerWait(failures int, err error) time.Duration {
	if refused(err) {
		failures = 8
	}
	d := min(registerBase<<min(failures, 8), registerMax)
	return d/2 + time.Duration(rand.Int64N(int64(d/2)+1))
}

// refused says that the registry heard us and said no.
func refused(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.AlreadyExists,
		codes.ResourceExhausted, codes.Unimplemented:
		return true
	}
	return false
}

// session registers on one stream and keeps the lease until the stream breaks or the instance has
// left. sent is true when the registry confirmed the instance, left when it confirmed the drain.
// last holds the ports that were announced last: leaving over a new stream needs them.
func (r *registrar) session(ctx context.Context, last *[]*binding) (sent, left bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cc, err := r.conn(ctx)
	if err != nil {
		return false, false, err
	}
	base, err := r.instance(ctx)
	if err != nil {
		return false, false, err
	}
	stream, err := registrypb.NewRegistryClient(cc).Register(ctx)
	if err != nil {
		return false, false, err
	}
	responses := make(chan *registrypb.RegisterResponse)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // before Wait: ends Recv
	broken := make(chan error, 1)
	wg.Go(func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				broken <- err
				return
			}
			select {
			case responses <- resp:
			case <-ctx.Done():
				return
			}
		}
	})
	send := func(req *registrypb.RegisterRequest) error {
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return nil // the reason of an io.EOF comes from Recv
	}

	var announced []*binding
	asked := false // to drain
	renew := make(chan struct{}, 1)
	stop := func() bool { return false }
	defer func() { stop() }()
	for {
		ports, draining, _, changed := r.view()
		leave := draining || len(ports) == 0
		if leave && announced == nil {
			ports = *last // registry.proto: "The first request carries the instance"
		}
		if !asked && len(ports) > 0 && !slices.Equal(ports, announced) { // by pointer
			if !r.announcing() {
				return sent, true, nil
			}
			inst := proto.CloneOf(base)
			for _, b := range ports {
				inst.Ports = append(inst.Ports, &registrypb.Port{Port: uint32(b.port), Protocol: b.protocol, Addresses: []string{r.reachable(b.bound).String()}})
			}
			if err := send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Instance{Instance: inst}}); err != nil {
				return sent, false, err
			}
			announced, *last = ports, ports
		}
		if leave && !asked {
			if err := send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Drain{Drain: &registrypb.Drain{}}}); err != nil {
				return sent, false, err
			}
			asked = true
		}
		select {
		case <-ctx.Done():
			return sent, false, ctx.Err()
		case err := <-broken:
			return sent, false, err
		case <-changed:
		case <-renew:
			if !asked {
				if err := send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Renew{Renew: &registrypb.Renew{}}}); err != nil {
					return sent, false, err
				}
			}
		case resp := <-responses:
			switch kind := resp.GetKind().(type) {
			case *registrypb.RegisterResponse_Registered:
				r.confirmed(ctx, base, kind.Registered, !sent)
				sent = true
				// registry.proto: "renew extends the lease; sent at a third of its length."
				stop()
				lease := time.Duration(max(kind.Registered.GetLeaseSeconds(), 1)) * time.Second
				stop = r.clock.AfterFunc(lease/3, func() {
					select {
					case renew <- struct{}{}:
					default:
					}
				})
			case *registrypb.RegisterResponse_Drained:
				if !asked {
					return sent, false, errors.New("the registry answered drained, which was not asked")
				}
				r.set(registration{})
				r.log.InfoContext(ctx, "instance drained", "all", kind.Drained.GetAll())
				return true, true, nil
			default:
				return sent, false, fmt.Errorf("the registry answered %T: want registered or drained", kind)
			}
		}
	}
}

// confirmed notes the registry's word; said once a stream and when it changes.
func (r *registrar) confirmed(ctx context.Context, inst *registrypb.Instance, m *registrypb.Registered, first bool) {
	before := r.status()
	r.set(registration{registered: true, unreachable: m.GetUnreachable()})
	if first {
		r.log.InfoContext(ctx, "instance registered", "namespace", inst.GetNamespace(), "service", inst.GetService(), "instance", inst.GetInstanceId())
	}
	if u := m.GetUnreachable(); u != "" && u != before.unreachable {
		r.log.WarnContext(ctx, "instance is unreachable", "reason", u)
	}
}

// has reports whether a port is among those to be registered.
func (r *registrar) has(port uint16) bool {
	ports, _, _, _ := r.view()
	return slices.ContainsFunc(ports, func(b *binding) bool { return b.port == port })
}
