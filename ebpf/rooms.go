package ebpf

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/tables"
	"github.com/inlay-mesh/inlay/xds"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// programs is what the agent needs of the attached programs; a *load.Set.
type programs interface {
	Cgroup() string
	Pin() string
	Maps() *bpfobj.InlayMaps
	Hooks() []load.Hook
	Stats() ([]load.ProgramStats, error)
	Sweep() error
	Close() error
	// Breakglass says whether policies are not asked at present.
	Breakglass() (bool, error)
}

// table is what the agent needs of the contents of the maps; a *tables.Table.
type table interface {
	SetService(*nodepb.Service) error
	DeleteService(name string)
	SetPolicies(*nodepb.Policies) error
	DeletePolicies(name string)
	SetWorkload(cgroup uint64, w tables.Workload)
	DeleteWorkload(cgroup uint64)
	SetLocalAddrs(netns uint64, addrs []netip.Addr)
	Commit() (tables.Change, error)
	Prune() error
	MarkGone([]tables.Endpoint) (int, error)
	ClearGone() error
	Identity(n uint64) (tables.Identity, bool)
	Rule(n uint32) (tables.Rule, bool)
	ServiceAt(addr netip.AddrPort, proto uint8) (name string, port uint16, ok bool)
	Services() int
	Usage() []tables.MapUsage
	Count() error
}

// rooms are the parts that need a kernel. Tests of what the agent decides give others.
type rooms struct {
	resolve    func(cgroup string) (root string, err error)
	cgroups    func(root string) (*cgroups, error)
	open       func(load.Config, func(*bpfobj.InlayMaps) error) (programs, error)
	table      func(*bpfobj.InlayMaps, tables.Config) (table, error)
	localAddrs func() (netns uint64, addrs []netip.Addr, err error)
	metrics    func(context.Context, *Agent) (metrics, error)
	clock      xds.Clock // of the control plane's client; nil means that of the agent
}

func realRooms() rooms {
	return rooms{
		resolve: load.ResolveCgroup,
		cgroups: openCgroups,
		open: func(cfg load.Config, fill func(*bpfobj.InlayMaps) error) (programs, error) {
			s, err := load.Open(cfg, fill)
			if err != nil {
				return nil, err
			}
			return kernelPrograms{s}, nil
		},
		table: func(maps *bpfobj.InlayMaps, cfg tables.Config) (table, error) {
			t, err := tables.New(maps, cfg)
			if err != nil {
				return nil, err
			}
			return t, nil
		},
		localAddrs: localAddrs,
		metrics:    exporter,
	}
}

type kernelPrograms struct{ *load.Set }

// Breakglass reads the one entry of settings_map.
func (p kernelPrograms) Breakglass() (bool, error) {
	m := p.Maps()
	if m == nil || m.SettingsMap == nil {
		return false, errors.New("map settings_map is not open")
	}
	var s bpfobj.InlaySettings
	if err := m.SettingsMap.Lookup(uint32(0), &s); err != nil {
		return false, fmt.Errorf("map settings_map: %w", err)
	}
	return s.AllowAll != 0, nil
}
