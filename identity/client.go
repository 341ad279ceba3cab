package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/identity/workloadpb"
)

// The methods of the SPIFFE Workload API by their literal paths (its proto has no package), and
// the header of SPIFFE Workload Endpoint, section 3: "every client request to the SPIFFE Workload
// Endpoint MUST include the static gRPC metadata key `workload.spiffe.io` with a value of `true`".
const (
	MethodFetchX509SVID    = "/SpiffeWorkloadAPI/FetchX509SVID"
	MethodFetchX509Bundles = "/SpiffeWorkloadAPI/FetchX509Bundles"
	SecurityHeader         = "workload.spiffe.io"
)

// ErrDenied is in the chain when the Workload API says that this process has no identity.
var ErrDenied = errors.New("the node gives this process no identity")

// ClientConfig says where the Workload API is.
type ClientConfig struct {
	// Socket is unix:///PATH, tcp://IP:PORT or an absolute path; it is required unless Dial is set.
	Socket string
	// Dial opens a connection to the Workload API; nil dials Socket.
	Dial func(ctx context.Context) (net.Conn, error)
	// Clock decides on expiry and waits between attempts; nil is the real one.
	Clock Clock
	// Rand returns jitter in [0, 1); nil means math/rand/v2.
	Rand func() float64
	Log  *slog.Logger // nil discards
}

// Client is a Source that follows the SPIFFE Workload API of the node. It is safe for concurrent
// use; SVIDs arrive while Run runs.
type Client struct {
	*Var
	dial   func(ctx context.Context) (net.Conn, error)
	random func() float64
	log    *slog.Logger
	where  string
}

// NewClient checks cfg and returns a client at rest; nothing is dialled until Run.
func NewClient(cfg ClientConfig) (*Client, error) {
	c := &Client{Var: NewVarClock(cfg.Clock), dial: cfg.Dial, random: cfg.Rand, log: cfg.Log, where: cfg.Socket}
	if c.dial == nil {
		network, address, err := ParseSocket(cfg.Socket)
		if err != nil {
			return nil, err
		}
		c.dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, address)
		}
	}
	if c.random == nil {
		c.random = rand.Float64
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Bounds of the wait between two attempts. The slow ones are for a refusal, which is decided by
// people; its first step is short, since a node that has just restarted refuses until `inlay run`
// has registered again.
const (
	retryBase, retryMax   = 100 * time.Millisecond, 5 * time.Second
	deniedBase, deniedMax = 500 * time.Millisecond, 10 * time.Second
)

// Run follows the Workload API until ctx is done, then returns nil. A broken stream is opened
// again with back-off; meanwhile the last SVID stays until it expires. It returns an error at
// once only where the specification forbids to try again.
func (c *Client) Run(ctx context.Context) error {
	failures := 0
	for {
		received, err := c.follow(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the end of ctx ends Run; what it broke is no failure
		}
		if received {
			failures = 0
		}
		base, limit := retryBase, retryMax
		switch status.Code(err) {
		case codes.InvalidArgument, codes.Unimplemented:
			// Workload Endpoint, section 6: "Clients encountering the "InvalidArgument" status code
			// SHOULD NOT retry"; appendix A says the same of Unimplemented.
			err = fmt.Errorf("workload API %s does not speak the X.509 profile: %w", c.where, err)
			c.Fail(err)
			return err
		case codes.PermissionDenied:
			// Section 5.2.1: "the client SHOULD cease using the redacted SVIDS". We keep the last one
			// until it expires: a node that has just restarted knows no registration yet, and its
			// restart must not fail calls.
			base, limit = deniedBase, deniedMax
			text := status.Convert(err).Message()
			if !strings.Contains(text, runHint) { // our own node says it itself
				text += "; " + runHint
			}
			err = fmt.Errorf("%w: %s", ErrDenied, text)
		default:
			err = fmt.Errorf("workload API %s: %w", c.where, err)
		}
		c.Fail(err)
		wait := backoff(failures, base, limit, c.random())
		failures++
		c.log.WarnContext(ctx, "identity not received", "err", err, "retry_in", wait)
		if !sleep(ctx, c.clock, wait) {
			return nil
		}
	}
}

// follow opens one stream and takes every response until it breaks; received is true when at
// least one SVID was taken.
func (c *Client) follow(ctx context.Context) (received bool, err error) {
	// One channel a stream: the back-off between attempts is ours alone.
	cc, err := grpc.NewClient("passthrough:///workload",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return c.dial(ctx) }),
		grpc.WithAuthority("localhost"),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return false, err
	}
	defer cc.Close()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, SecurityHeader, "true"))
	defer cancel()
	stream, err := cc.NewStream(ctx, &grpc.StreamDesc{StreamName: "FetchX509SVID", ServerStreams: true}, MethodFetchX509SVID)
	if err != nil {
		return false, err
	}
	if err := stream.SendMsg(&workloadpb.X509SVIDRequest{}); err != nil {
		// The reason is in RecvMsg.
		return false, stream.RecvMsg(&workloadpb.X509SVIDResponse{})
	}
	if err := stream.CloseSend(); err != nil {
		return false, err
	}
	for {
		resp := &workloadpb.X509SVIDResponse{}
		if err := stream.RecvMsg(resp); err != nil {
			return received, err
		}
		s, err := Decode(resp)
		if err != nil {
			// Section 4.5: "Clients receiving a message in which a mandatory field has a default value
			// SHOULD report an error and discard the message." The stream and the last SVID stay.
			err = fmt.Errorf("workload API %s sent an unusable response: %w", c.where, err)
			c.Fail(err)
			c.log.WarnContext(ctx, "identity rejected", "err", err)
			continue
		}
		received = true
		c.Set(s)
		c.log.InfoContext(ctx, "identity received", "spiffe_id", s.ID.String(), "not_after", s.NotAfter())
	}
}

// backoff is how long to wait after so many failures in a row: base, growing by 1.6 up to limit,
// with a jitter of a fifth either way. random is in [0, 1).
func backoff(failures int, base, limit time.Duration, random float64) time.Duration {
	d := float64(base)
	for range min(failures, 64) {
		d *= 1.6
	}
	d = min(d, float64(limit)/1.2) * (0.8 + 0.4*random)
	return time.Duration(d)
}

// sleep waits and reports whether the time has passed; false means that ctx ended first.
func sleep(ctx context.Context, clock Clock, d time.Duration) bool {
	done := make(chan struct{})
	stop := clock.AfterFunc(d, func() { close(done) })
	defer stop()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}
