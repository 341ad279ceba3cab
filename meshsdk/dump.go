package meshsdk

import (
	"cmp"
	"slices"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
)

// configDump is the configuration that calls of this moment read.
type configDump struct {
	// Services by the name that was asked for.
	Services []serviceDump `json:"services"`
}

type serviceDump struct {
	Name     string        `json:"name"`
	Version  string        `json:"version,omitempty"`
	Error    string        `json:"error,omitempty"`
	Hosts    []string      `json:"hosts,omitempty"`
	Routes   []routeDump   `json:"routes,omitempty"`
	Clusters []clusterDump `json:"clusters,omitempty"`
}

type routeDump struct {
	call.RouteChoice
	Clusters []call.ClusterShare `json:"clusters,omitempty"`
	Timeout  string              `json:"timeout,omitempty"`
	Retries  uint32              `json:"retries,omitempty"`
	Invalid  string              `json:"invalid,omitempty"`
}

type clusterDump struct {
	Name        string              `json:"name"`
	Error       string              `json:"error,omitempty"`
	HTTP2       bool                `json:"http2"`
	EmptyReason string              `json:"emptyReason,omitempty"`
	Endpoints   []call.EndpointView `json:"endpoints,omitempty"`
}

// dump is the snapshot that calls read, for people: it holds no key and no secret.
func (m *Mesh) dump() configDump {
	out := configDump{Services: []serviceDump{}}
	if m.engine == nil {
		return out
	}
	for _, s := range m.engine.Snapshot().Services {
		d := serviceDump{Name: s.Name, Version: s.Version, Hosts: s.Hosts}
		if s.Err != nil {
			d.Error = s.Err.Error()
		}
		if s.Routes != nil {
			for _, r := range s.Routes.Routes() {
				d.Routes = append(d.Routes, dumpRoute(r))
			}
		}
		for _, c := range s.Clusters {
			d.Clusters = append(d.Clusters, dumpCluster(c))
		}
		slices.SortFunc(d.Clusters, func(a, b clusterDump) int { return cmp.Compare(a.Name, b.Name) })
		out.Services = append(out.Services, d)
	}
	slices.SortFunc(out.Services, func(a, b serviceDump) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func dumpRoute(r *route.Route) routeDump {
	d := routeDump{
		RouteChoice: call.ChoiceOf(r),
		Invalid:     r.Invalid,
	}
	for _, w := range r.Clusters {
		d.Clusters = append(d.Clusters, call.ClusterShare{Cluster: w.Cluster, Weight: w.Weight})
	}
	if r.Timeout > 0 {
		d.Timeout = r.Timeout.String()
	}
	if r.Retry != nil {
		d.Retries = r.Retry.Attempts
	}
	return d
}

func dumpCluster(c *call.Cluster) clusterDump {
	d := clusterDump{Name: c.Name, HTTP2: c.HTTP2, EmptyReason: c.EmptyReason}
	if c.Err != nil {
		d.Error = c.Err.Error()
	}
	for _, e := range c.All {
		d.Endpoints = append(d.Endpoints, call.ViewOf(e))
	}
	return d
}
