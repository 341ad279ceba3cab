package ebpf

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// Type URLs of what an agent asks the control plane for.
const (
	ServiceType  = "type.googleapis.com/inlay.node.v1.Service"
	PoliciesType = "type.googleapis.com/inlay.node.v1.Policies"
)

// UserAgent is what an agent calls itself in its xDS node: the control plane serves these types to
// nobody else.
const UserAgent = "inlay-node"

// cacheDebounce gathers changes before the configuration on disk is written: with 100,000 services
// one write takes about 0.3 s of a CPU.
const cacheDebounce = 5 * time.Second

// decoders are those of the agent's own types, for an xds.Client.
var decoders = map[string]func([]byte) (resource.Decoded, error){
	ServiceType: func(b []byte) (resource.Decoded, error) {
		m := &nodepb.Service{}
		if err := proto.Unmarshal(b, m); err != nil {
			return resource.Decoded{}, fmt.Errorf("node service: %w", err)
		}
		return named(m.GetNamespace(), m.GetName(), m)
	},
	PoliciesType: func(b []byte) (resource.Decoded, error) {
		m := &nodepb.Policies{}
		if err := proto.Unmarshal(b, m); err != nil {
			return resource.Decoded{}, fmt.Errorf("node policies: %w", err)
		}
		return named(m.GetNamespace(), m.GetService(), m)
	},
}

func named(namespace, service string, m proto.Message) (resource.Decoded, error) {
	d := resource.Decoded{Name: namespace + "/" + service, Value: m}
	if namespace == "" || service == "" {
		return d, fmt.Errorf("%s %q: want NAMESPACE/NAME", m.ProtoReflect().Descriptor().Name(), d.Name)
	}
	return d, nil
}

// openCache opens the last known configuration. One that cannot be used is told and done without:
// the programs still have what their maps hold.
func (a *Agent) openCache() *xds.Cache {
	c, err := xds.OpenCache(xds.CacheConfig{
		Path: filepath.Join(a.cfg.StateDir, cacheFile), TrustDomain: a.cfg.TrustDomain, Debounce: cacheDebounce, Log: a.log,
	})
	if err != nil {
		a.log.Error("last known configuration cannot be read, and is not kept", "err", err)
		return nil
	}
	return c
}

// loadConfirmed is when the control plane last stood by what is in the cache. The cache itself only
// knows when it was written, which is some seconds after a change and says nothing about the time since.
func (a *Agent) loadConfirmed(cache *xds.Cache) time.Time {
	b, err := os.ReadFile(filepath.Join(a.cfg.StateDir, confirmedFile))
	if err == nil {
		var t time.Time
		if t, err = time.Parse(time.RFC3339Nano, strings.TrimSpace(string(b))); err == nil && !t.After(a.cfg.Clock.Now()) {
			return t
		}
	}
	return cache.Meta().Written
}

// saveConfirmed keeps it for the next agent, which may find no control plane. The lock is held.
func (a *Agent) saveConfirmed() error {
	text := a.confirmed.UTC().Format(time.RFC3339Nano) + "\n"
	if err := replaceFile(filepath.Join(a.cfg.StateDir, confirmedFile), []byte(text)); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// newClient makes the client of the control plane, at rest.
func (a *Agent) newClient(cache *xds.Cache) (*xds.Client, error) {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	clock := a.rooms.clock
	if clock == nil {
		clock = a.cfg.Clock
	}
	return xds.New(xds.Config{
		Bootstrap: &bootstrap.Bootstrap{
			Servers: []bootstrap.Server{{URI: "unix:" + a.cfg.ControlPlane, Creds: bootstrap.Creds{Type: bootstrap.CredsInsecure}}},
			Node:    bootstrap.Node{ID: "inlay-node~" + host + "~" + rand.Text()[:8], Cluster: "inlay"},
		},
		Dial:      func(context.Context, bootstrap.Server) (*grpc.ClientConn, error) { return dialControlPlane(a.cfg.Dial) },
		UserAgent: UserAgent, UserAgentVersion: a.cfg.Version,
		Decoders: decoders, Cache: cache, Log: a.log, Clock: clock,
	})
}

// dialControlPlane makes a channel over a unix socket, where the kernel says who calls.
func dialControlPlane(dial func(context.Context) (net.Conn, error)) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///controlplane",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }),
		grpc.WithAuthority("localhost"),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 10 * time.Second}),
	)
}

// fill gives a new table what was last known, before any program reads it: services and policies
// from disk, the workloads of the agent before, the addresses of this machine.
func (a *Agent) fill(t table, cache *xds.Cache, workloads map[string]*workload) error {
	var faults []error
	if cache != nil {
		for typeURL, set := range map[string]func(any) error{
			ServiceType:  func(v any) error { return t.SetService(v.(*nodepb.Service)) },
			PoliciesType: func(v any) error { return t.SetPolicies(v.(*nodepb.Policies)) },
		} {
			for _, raw := range cache.Resources(typeURL) {
				d, err := decoders[typeURL](raw.Bytes)
				if err == nil {
					err = set(d.Value)
				}
				if err != nil {
					faults = append(faults, fmt.Errorf("%s %q on disk: %w", typeURL, raw.Name, err))
				}
			}
		}
	}
	for _, w := range workloads {
		t.SetWorkload(w.id, w.inTable())
		w.tableKnows = true
	}
	if cookie, addrs, err := a.rooms.localAddrs(); err != nil {
		faults = append(faults, err)
	} else {
		t.SetLocalAddrs(cookie, append(addrs, a.cfg.NodeAddresses...))
	}
	return errors.Join(faults...)
}
