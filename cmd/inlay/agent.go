package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"go.uber.org/fx"

	"github.com/inlay-mesh/inlay/controlplane/workload"
	"github.com/inlay-mesh/inlay/ebpf"
	"github.com/inlay-mesh/inlay/ebpf/load"
)

// nodeAgent is the eBPF agent beside a node.
type nodeAgent struct {
	cfg   ebpf.Config
	agent *ebpf.Agent   // set when the application is made
	up    chan struct{} // closed when the node serves
}

// newAgent checks what can be checked before anything is attached. Nil without error means that there
// are no programs on this machine and --allow-unmanaged says to go on.
func (f *nodeFlags) newAgent(p places, node workload.Config, stderr io.Writer) (*nodeAgent, error) {
	if err := load.Check(); err != nil {
		if f.agent.allowUnmanaged {
			fmt.Fprintf(stderr, "inlay node: %v; running on without programs (--allow-unmanaged)\n", err)
			return nil, nil
		}
		return nil, coded(err)
	}
	pin, err := load.PinDir(f.agent.cgroup)
	if err != nil {
		return nil, coded(err)
	}
	if err := makeRunDir(p.run); err != nil {
		return nil, err
	}
	if f.stateDir == "" {
		f.stateDir = defaultState(p)
	}
	cfg := ebpf.Config{
		Cgroup: f.agent.cgroup, RunDir: p.run, StateDir: f.stateDir, ControlPlane: node.ControlPlane, TrustDomain: node.TrustDomain,
		NodeAddresses: node.NodeAddresses, Metrics: f.agent.metrics, AllowUnmanaged: f.agent.allowUnmanaged,
		Stats: f.agent.stats, Version: versionText(), Log: node.Log.With("part", "agent"),
	}
	if cfg.MapSizes, err = f.agent.sizes(); err != nil {
		return nil, err
	}
	if f.devUser > 0 {
		cfg.FlowsUID = uint32(f.devUser)
	}
	if !f.agent.noDNS {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("this binary: %w", err)
		}
		cfg.ProxyCommand = []string{self, "node", "proxy", "--pin", pin, "--run-dir", p.run, "--dns-suffix", f.agent.suffix}
	}
	a := &nodeAgent{up: make(chan struct{})}
	// The control plane asks the node who calls; a call before the node answers would be refused.
	cfg.Dial = func(ctx context.Context) (net.Conn, error) {
		select {
		case <-a.up:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		return (&net.Dialer{}).DialContext(ctx, "unix", node.ControlPlane)
	}
	if _, err := ebpf.New(cfg); err != nil {
		return nil, err
	}
	a.cfg = cfg
	return a, nil
}

// module runs the agent with the node, which it gives the cgroups: it starts first and stops last.
func (a *nodeAgent) module() fx.Option {
	return fx.Options(
		ebpf.Module(a.cfg),
		fx.Provide(func(agent *ebpf.Agent) workload.Cgroups {
			a.agent = agent
			return agentCgroups{agent}
		}),
	)
}

func (a *nodeAgent) managed() (cgroup, pin string) { return a.agent.Managed() }

func (a *nodeAgent) metrics() string { return a.agent.MetricsAddr() }

// agentCgroups gives the node the agent's cgroups.
type agentCgroups struct{ agent *ebpf.Agent }

// refusal marks what the agent refuses by rule, in the node's word.
type refusal struct{ error }

func (r refusal) Unwrap() []error { return []error{r.error, workload.ErrRefused} }

func (c agentCgroups) Admit(ctx context.Context, a workload.Admission) (string, error) {
	path, err := c.agent.Admit(ctx, ebpf.Admission{
		RunID: a.RunID, Namespace: a.Namespace, Service: a.Service, Version: a.Version, Labels: a.Labels,
		UID: a.UID, Raw: a.Raw, Cgroup: a.Cgroup,
	})
	if errors.Is(err, ebpf.ErrRefused) {
		return "", refusal{err}
	}
	return path, err
}

func (c agentCgroups) Leave(runID string) { c.agent.Leave(runID) }

func (c agentCgroups) Find(pid int) (string, bool, error) { return c.agent.Find(pid) }
