package meshsdk

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"

	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
)

// What a Mesh gives while it is disabled: plain clients that find a service by
// INLAY_ADDR_<SERVICE>=host:port, else by DNS.

// plainAddr is where a host of the mesh is found without it: ok is false when no variable says so.
// A name with its namespace is asked for whole first (INLAY_ADDR_ORDERS_SHOP), then by its service.
func (m *Mesh) plainAddr(hostport string) (addr string, ok bool, err error) {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	host = strings.TrimSuffix(host, grpcmesh.Suffix)
	for _, name := range []string{host, firstLabel(host)} {
		if addr, err := m.set.env.AddrOf(name); err != nil || addr != "" {
			return addr, err == nil, err
		}
		if strings.Count(host, ".") != 1 {
			break // "api.example.com" is not the service "api"
		}
	}
	return "", false, nil
}

func firstLabel(host string) string {
	label, _, _ := strings.Cut(host, ".")
	return label
}

func (m *Mesh) plainClient(service string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	if _, _, err := m.plainAddr(strings.TrimPrefix(service, "xds:///")); err != nil {
		return nil, fmt.Errorf("mesh: disabled: %w", err)
	}
	return grpc.NewClient(service, append(m.plainDialOptions(), opts...)...)
}

// plainDialOptions make a channel without the mesh: plaintext unless the caller says otherwise, and
// resolvers that know the variables.
func (m *Mesh) plainDialOptions() []grpc.DialOption {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(plainResolver{m, "dns"}, plainResolver{m, "passthrough"}, plainResolver{m, "xds"}),
	}
	if dial := m.set.dial; dial != nil {
		opts = append(opts, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			network, addr := grpcmesh.DialTarget(addr)
			return dial(ctx, network, addr)
		}))
	}
	return opts
}

// plainResolver stands in for one scheme in the channels of a disabled Mesh.
type plainResolver struct {
	m      *Mesh
	scheme string
}

func (r plainResolver) Scheme() string { return r.scheme }

// Build takes the address of the variable, else gRPC's own resolver; a name of the mesh by xds:///
// is looked up in DNS like the same name without.
func (r plainResolver) Build(target resolver.Target, cc resolver.ClientConn, opts resolver.BuildOptions) (resolver.Resolver, error) {
	addr, ok, err := r.m.plainAddr(target.Endpoint())
	if err != nil {
		return nil, fmt.Errorf("mesh: disabled: %w", err)
	}
	if ok {
		if err := cc.UpdateState(resolver.State{Endpoints: []resolver.Endpoint{{Addresses: []resolver.Address{{Addr: addr}}}}}); err != nil {
			return nil, err
		}
		return doneResolver{}, nil
	}
	scheme := r.scheme
	if scheme == "xds" {
		scheme = "dns"
		target.URL.Scheme = scheme
	}
	own := resolver.Get(scheme)
	if own == nil {
		return nil, fmt.Errorf("mesh: disabled: no resolver for %q", target.String())
	}
	return own.Build(target, cc, opts)
}

// OverrideAuthority keeps the name that was asked for.
func (plainResolver) OverrideAuthority(target resolver.Target) string { return target.Endpoint() }

// doneResolver has said all it knows.
type doneResolver struct{}

func (doneResolver) ResolveNow(resolver.ResolveNowOptions) {}
func (doneResolver) Close()                                {}

// plainTransport is base with the addresses of the variables.
func (m *Mesh) plainTransport(base *http.Transport) *http.Transport {
	if base == nil {
		base = http.DefaultTransport.(*http.Transport)
	}
	t := base.Clone()
	dial := t.DialContext
	if m.set.dial != nil {
		dial = m.set.dial
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		other, ok, err := m.plainAddr(addr)
		if err != nil {
			return nil, fmt.Errorf("mesh: disabled: %w", err)
		}
		if ok {
			addr = other
		}
		return dial(ctx, network, addr)
	}
	if proxy := t.Proxy; proxy != nil {
		t.Proxy = func(r *http.Request) (*url.URL, error) {
			if _, ok, _ := m.plainAddr(r.URL.Host); ok {
				return nil, nil // the variable says where it is
			}
			return proxy(r)
		}
	}
	return t
}
