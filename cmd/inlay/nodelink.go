package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// nodeLink is one run's registration at the node: a stream that is opened again when the node
// comes back, with the same run id, and says again what it had said.
type nodeLink struct {
	socket string
	reg    registration

	mu        sync.Mutex
	conn      *grpc.ClientConn
	cgroup    string // that the node gave
	local     netip.AddrPort
	stream    grpc.BidiStreamingClient[nodepb.RunRequest, nodepb.RunResponse]
	announced bool          // Listening was said and not taken back
	drained   chan struct{} // not nil while a drain waits
}

func newNodeLink(socket string, reg registration) *nodeLink {
	return &nodeLink{socket: socket, reg: reg}
}

// start registers, and fails with a remedy when no node answers: a program without its identity
// would only fail later and darker.
func (l *nodeLink) start(ctx context.Context) (*nodepb.Started, error) {
	if _, err := os.Stat(l.socket); err != nil {
		return nil, &exitError{exitAbsent, fmt.Errorf("no node runs here (%s does not exist): start one with `%s`, or pass its --run-dir", l.socket, l.remedy())}
	}
	conn, err := grpc.NewClient("passthrough:///node", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", l.socket)
		}),
		// A node that was away for an hour is found within two seconds of its return.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	l.conn = conn
	patience := l.patience()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	started, err := l.open(ctx)
	if err != nil {
		_ = conn.Close()
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, fmt.Errorf("the node at %s did not answer within %v: its own words are in its log", l.socket, patience)
		}
		switch s := status.Convert(err); s.Code() {
		case codes.Unavailable:
			return nil, &exitError{exitAbsent, fmt.Errorf("no node answers at %s: %s; start one with `%s`", l.socket, s.Message(), l.remedy())}
		default:
			return nil, fmt.Errorf("the node refused service %q: %s", l.reg.service, s.Message())
		}
	}
	return started, nil
}

// patience is how long a registration may take.
func (l *nodeLink) patience() time.Duration {
	if l.reg.managed != nil {
		return 30 * time.Second // the node waits for the policies of the service, at most 20 s
	}
	return 10 * time.Second
}

// open opens the stream and says everything again. ctx bounds the opening, not the stream.
func (l *nodeLink) open(ctx context.Context) (*nodepb.Started, error) {
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	defer stop()
	stream, err := nodepb.NewNodeClient(l.conn).Run(streamCtx)
	if err == nil {
		err = stream.Send(&nodepb.RunRequest{Kind: &nodepb.RunRequest_Start{Start: &nodepb.Start{
			Namespace: l.reg.namespace, Service: l.reg.service, Version: l.reg.version, Labels: l.reg.labels, RunId: l.reg.runID,
			Managed: l.managed(),
		}}})
	}
	if err != nil && stream == nil {
		cancel()
		return nil, err
	}
	resp, err := stream.Recv() // after a failed Send, Recv has the status
	if err != nil {
		cancel()
		return nil, err
	}
	started := resp.GetStarted()
	if started == nil {
		cancel()
		return nil, errors.New("the node's first answer is not `started`: is it of another version?")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stream, l.cgroup = stream, started.Cgroup
	if l.announced {
		err = stream.Send(l.listening())
	}
	return started, err
}

// remedy is how to start a node that this run can use.
func (l *nodeLink) remedy() string {
	if l.reg.managed != nil {
		return "sudo inlay dev --ebpf"
	}
	return "inlay dev"
}

func (l *nodeLink) managed() *nodepb.Managed {
	m := l.reg.managed
	if m == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return &nodepb.Managed{Uid: m.account.uid, Cgroup: l.cgroup, RawSockets: m.raw}
}

// listening is said with mu held.
func (l *nodeLink) listening() *nodepb.RunRequest {
	return &nodepb.RunRequest{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{
		Port: uint32(l.reg.port), Address: l.local.String(), Udp: l.reg.udp,
	}}}
}

// keep reads the stream until ctx is done, and opens it again when the node went away.
func (l *nodeLink) keep(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = l.conn.Close() })
	defer stop()
	for ctx.Err() == nil {
		err := l.receive()
		if ctx.Err() != nil {
			return
		}
		say(os.Stderr, "the node went away (%s); registering again until it is back", status.Convert(err).Message())
		l.endDrain()
		told := ""
		for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait/2 + rand.N(wait)):
			}
			bounded, cancel := context.WithTimeout(ctx, l.patience())
			_, err := l.open(bounded)
			cancel()
			if err == nil {
				say(os.Stderr, "registered again")
				break
			}
			// One that answers and refuses will go on to: who looks after the program must know why.
			if s := status.Convert(err); s.Code() != codes.Unavailable && s.Message() != told && ctx.Err() == nil {
				told = s.Message()
				say(os.Stderr, "not registered again: %s; trying on", told)
			}
		}
	}
}

func (l *nodeLink) receive() error {
	l.mu.Lock()
	stream := l.stream
	l.mu.Unlock()
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		switch k := resp.Kind.(type) {
		case *nodepb.RunResponse_Registered:
			switch {
			case k.Registered.Replaced:
				say(os.Stderr, "port %d: the program's own SDK has registered and takes this endpoint's place", l.reg.port)
			case k.Registered.Unreachable != "" && l.reg.managed != nil:
				// Programs without the SDK call the virtual address, and are no part of this.
				say(os.Stderr, "port %d is registered, but no caller with the SDK will use it: %s", l.reg.port, k.Registered.Unreachable)
			case k.Registered.Unreachable != "":
				say(os.Stderr, "port %d is registered, but nobody will call it: %s", l.reg.port, k.Registered.Unreachable)
			}
		case *nodepb.RunResponse_Drained:
			l.endDrain()
		}
	}
}

// announceWhenListening says where the program serves, once it does.
func (l *nodeLink) announceWhenListening(ctx context.Context, p program) {
	local := l.reg.local
	if l.reg.managed == nil {
		if !listening(ctx, local) {
			return
		}
	} else if at, ok := p.awaitListening(ctx, local.Port(), l.reg.udp); ok {
		local = at
	} else {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.announced, l.local = true, local
	_ = l.stream.Send(l.listening()) // a broken stream is opened again and says it then
}

// drain takes the endpoint out of the mesh and waits until every client knows, at most 6 s
// (the registry itself waits 5).
func (l *nodeLink) drain(ctx context.Context) {
	l.mu.Lock()
	if !l.announced {
		l.mu.Unlock()
		return
	}
	l.announced = false
	done := make(chan struct{})
	l.drained = done
	err := l.stream.Send(&nodepb.RunRequest{Kind: &nodepb.RunRequest_Stopped{Stopped: &nodepb.Stopped{}}})
	l.mu.Unlock()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 6*time.Second)
	defer cancel()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

func (l *nodeLink) endDrain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.drained != nil {
		close(l.drained)
		l.drained = nil
	}
}
