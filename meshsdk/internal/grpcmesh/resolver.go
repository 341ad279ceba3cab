package grpcmesh

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// builder stands in for one scheme in the channels of a Client, and only there.
type builder struct {
	client *Client
	scheme string
}

func (b builder) Scheme() string { return b.scheme }

// Build resolves a name of the mesh by the engine, any other by gRPC's own resolver.
func (b builder) Build(target resolver.Target, cc resolver.ClientConn, opts resolver.BuildOptions) (resolver.Resolver, error) {
	c := b.client
	// gRPC gives no context here. A call has waited before it came this far, within its deadline.
	listener, mesh, err := c.channel(nameOf(target.URL.String())).decide(context.Background(), c)
	if err != nil {
		return nil, err
	}
	if !mesh {
		if c.cfg.External == Deny {
			return nil, fmt.Errorf("mesh: %q: %w", target.Endpoint(), errDenied)
		}
		own := resolver.Get(b.scheme)
		if own == nil {
			return nil, fmt.Errorf("mesh: %q is not a name of the mesh: want xds:///NAME or xds:///NAME.NAMESPACE", target.String())
		}
		return own.Build(target, cc, opts)
	}
	if opts.DisableServiceConfig {
		// The balancer is chosen by the service configuration; without it gRPC would connect to the
		// addresses by itself, past route and identity.
		return nil, fmt.Errorf("mesh: %q: the channel has WithDisableServiceConfig, which would take it out of the mesh: leave it out", listener)
	}
	config := cc.ParseServiceConfig(`{"loadBalancingConfig":[{"` + balancerName + `":{}}]}`)
	if config.Err != nil {
		return nil, config.Err
	}
	r := &meshResolver{client: c, cc: cc, config: config, wake: make(chan struct{}, 1), stop: make(chan struct{})}
	r.wg.Go(r.run)
	r.cancel = c.cfg.Engine.Watch(listener, r.changed)
	return r, nil
}

// OverrideAuthority gives the authority that calls are matched by and sent with: the target as gRPC
// would have it, with the host in canonical spelling (RFC 9110, 4.2.3: "The scheme and host are
// case-insensitive and normally provided in lowercase").
func (b builder) OverrideAuthority(target resolver.Target) string {
	endpoint := target.Endpoint()
	if strings.HasPrefix(endpoint, ":") {
		endpoint = "localhost" + endpoint
	}
	host, port, found := strings.Cut(endpoint, ":")
	if !strings.HasPrefix(endpoint, "[") {
		host = strings.TrimSuffix(strings.ToLower(host), ".")
		if endpoint = host; found {
			endpoint += ":" + port
		}
	}
	return escapeAuthority(endpoint)
}

// escapeAuthority escapes what RFC 3986, 3.2, does not allow in an authority.
func escapeAuthority(s string) string {
	const allowed = "-._~!$&'()*+,;=:[]@"
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(allowed, c) >= 0 {
			b.WriteByte(c)
			continue
		}
		b.Write([]byte{'%', digits[c>>4], digits[c&15]})
	}
	return b.String()
}

// state is what the resolver hands the balancer.
type state struct {
	client  *Client
	service *call.Service
}

// String keeps texts of gRPC short.
func (s *state) String() string { return s.service.Name + " " + s.service.Version }

type stateKey struct{}

// meshResolver hands each configuration of a listener to the channel. The addresses stay inside the
// service: the balancer reads them there, by cluster.
type meshResolver struct {
	client *Client
	cc     resolver.ClientConn
	config *serviceconfig.ParseResult
	cancel func()

	next atomic.Pointer[call.Service]
	wake chan struct{}
	stop chan struct{}
	wg   sync.WaitGroup
}

// changed is called by the engine and must not block, while telling the channel waits for the
// balancer; so run does that.
func (r *meshResolver) changed(s *call.Service) {
	r.next.Store(s)
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *meshResolver) run() {
	for {
		select {
		case <-r.stop:
			return
		case <-r.wake:
		}
		// An error asks to resolve again, which a watch does by itself.
		_ = r.cc.UpdateState(resolver.State{
			ServiceConfig: r.config,
			Attributes:    attributes.New(stateKey{}, &state{r.client, r.next.Load()}),
		})
	}
}

// ResolveNow does nothing: the engine tells of every change.
func (r *meshResolver) ResolveNow(resolver.ResolveNowOptions) {}

// Close returns when nothing of the resolver runs any more.
func (r *meshResolver) Close() {
	r.cancel()
	close(r.stop)
	r.wg.Wait()
}
