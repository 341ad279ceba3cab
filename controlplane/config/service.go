package config

import (
	"net/netip"
	"slices"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

const (
	maxPorts     = 64
	maxEndpoints = 10_000
	maxVersions  = 64
	maxWeight    = 10_000 // times the endpoints of a locality this stays within 32 bits
)

// meshService is a MeshService as written. docs/config.md explains each field.
type meshService struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Metadata   check.Metadata  `json:"metadata"`
	Spec       meshServiceSpec `json:"spec"`
}

type meshServiceSpec struct {
	Ports     []servicePort     `json:"ports"`
	MTLS      *string           `json:"mtls"`
	Endpoints []serviceEndpoint `json:"endpoints"`
	Versions  []serviceVersion  `json:"versions"`
}

type servicePort struct {
	Port     int64  `json:"port"`
	Protocol string `json:"protocol"`
}

type serviceEndpoint struct {
	Address  string            `json:"address"`
	Port     *int64            `json:"port"`
	TLS      *string           `json:"tls"`
	Labels   map[string]string `json:"labels"`
	Locality *locality         `json:"locality"`
	Weight   *int64            `json:"weight"`
}

type locality struct {
	Region  string `json:"region"`
	Zone    string `json:"zone"`
	SubZone string `json:"subZone"`
}

type serviceVersion struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
}

func parseService(t *tree.Tree) (object.Service, []object.Finding) {
	o := check.New(t, "MeshService")
	var in meshService
	o.Decode(&in)
	s := object.Service{Meta: o.Meta("MeshService", in.Metadata, true)}
	s.Ports = servicePorts(o, in.Spec.Ports)
	if in.Spec.MTLS != nil && o.Enum(*in.Spec.MTLS, []string{"strict", "permissive"}, "spec", "mtls") {
		s.Permissive = *in.Spec.MTLS == "permissive"
		if len(s.Ports) > 0 && s.Plain() {
			o.Add(object.NoEffect, []any{"spec", "mtls"}, " %q: each port is TCP or UDP, which are plain whatever the mode is: a NetworkPolicy says who may connect", *in.Spec.MTLS)
		}
	}
	if len(in.Spec.Ports) == 0 && len(in.Spec.Endpoints) > 0 && o.Tree.Sound("spec", "ports") {
		o.Add(object.Contradiction, []any{"spec", "endpoints"}, "the service has no ports: want ports that they serve, or no endpoints")
	}
	s.Endpoints = serviceEndpoints(o, in.Spec.Endpoints, s.Ports)
	s.Versions = serviceVersions(o, in.Spec.Versions)
	return s, o.Findings
}

func servicePorts(o *check.Object, in []servicePort) []object.Port {
	if !o.Required("the ports of the service, such as [{port: 8080, protocol: GRPC}], or [] for one that only calls", "spec", "ports") {
		return nil
	}
	o.Count(len(in), 0, maxPorts, "spec", "ports")
	type number struct {
		port int64
		udp  bool
	}
	var out []object.Port
	first := map[number]int{}
	for i, p := range in {
		at := func(field string) []any { return []any{"spec", "ports", i, field} }
		if !o.Tree.Sound("spec", "ports", i) {
			continue
		}
		if o.Required("a number from 1 to 65535", at("port")...) {
			o.Range(p.Port, 1, 65535, at("port")...)
			n := number{p.Port, object.Protocol(p.Protocol) == object.UDP}
			if j, ok := first[n]; ok {
				o.Add(object.Repeated, at("port"), " %d: already ports[%d]: want each once, or once with UDP and once with another protocol", p.Port, j)
			} else {
				first[n] = i
			}
		}
		if o.Required("GRPC, HTTP, HTTP2, TCP or UDP", at("protocol")...) {
			o.Enum(p.Protocol, []string{"GRPC", "HTTP", "HTTP2", "TCP", "UDP"}, at("protocol")...)
		}
		out = append(out, object.Port{Number: uint16(p.Port), Protocol: object.Protocol(p.Protocol), Pos: o.Tree.At("spec", "ports", i)})
	}
	return out
}

func serviceEndpoints(o *check.Object, in []serviceEndpoint, ports []object.Port) []object.Endpoint {
	o.Count(len(in), 0, maxEndpoints, "spec", "endpoints")
	first := map[listening]int{}
	var out []object.Endpoint
	for i, e := range in {
		at := func(field ...any) []any { return append([]any{"spec", "endpoints", i}, field...) }
		if !o.Tree.Sound(at()...) {
			continue
		}
		ep := object.Endpoint{Labels: e.Labels, Weight: 1, Pos: o.Tree.At(at()...)}
		if o.Required("an IP address", at("address")...) {
			ep.Address = endpointAddress(o, e.Address, at("address"))
		}
		if e.Port != nil && o.Range(*e.Port, 1, 65535, at("port")...) {
			ep.Port = uint16(*e.Port)
			switch is := slices.IndexFunc(ports, func(p object.Port) bool { return p.Number == ep.Port }); {
			case len(ports) == 1:
				ep.ServicePort = ports[0].Number
			case is >= 0:
				ep.ServicePort = ep.Port
			case len(ports) > 1:
				o.Add(object.AmbiguousPort, at("port"), " %d: which of the service's %d ports is it? want one of their numbers, or none for all of them", ep.Port, len(ports))
			}
		}
		for _, a := range listens(&ep, ports) {
			if j, ok := first[a]; ok && j != i {
				o.Add(object.Repeated, at("address"), " %s: endpoints[%d] is at %s already: want each once", ep.Address, j, a.AddrPort)
				break
			}
			first[a] = i
		}
		if e.TLS != nil && o.Enum(*e.TLS, []string{"mesh", "none"}, at("tls")...) {
			ep.MeshTLS = *e.TLS == "mesh"
		}
		o.Labels(e.Labels, at("labels")...)
		if l := e.Locality; l != nil {
			ep.Region, ep.Zone, ep.SubZone = l.Region, l.Zone, l.SubZone
			localityName(o, l.Region, at("locality", "region"))
			localityName(o, l.Zone, at("locality", "zone"))
			localityName(o, l.SubZone, at("locality", "subZone"))
		}
		if e.Weight != nil && o.Range(*e.Weight, 1, maxWeight, at("weight")...) {
			ep.Weight = uint32(*e.Weight)
		}
		if len(ep.Labels) == 0 {
			ep.Labels = nil
		}
		out = append(out, ep)
	}
	return out
}

// listening is where an endpoint takes connections, or datagrams.
type listening struct {
	netip.AddrPort
	udp bool
}

// listens are the addresses at which an endpoint of a service with these ports listens.
func listens(e *object.Endpoint, ports []object.Port) []listening {
	if !e.Address.IsValid() {
		return nil
	}
	var out []listening
	for _, p := range ports {
		udp := p.Protocol == object.UDP
		switch {
		case e.Port == 0:
			out = append(out, listening{netip.AddrPortFrom(e.Address, p.Number), udp})
		case e.ServicePort == p.Number:
			out = append(out, listening{netip.AddrPortFrom(e.Address, e.Port), udp})
		}
	}
	if e.Port != 0 && len(out) == 0 { // the port of the service has a fault of its own
		out = append(out, listening{netip.AddrPortFrom(e.Address, e.Port), false})
	}
	return out
}

func endpointAddress(o *check.Object, s string, path []any) netip.Addr {
	a, err := netip.ParseAddr(s)
	if err != nil {
		o.Add(object.BadFormat, path, " %s: want an IP address such as 10.0.0.7 or 2001:db8::7; host names wait for a later release", check.Quote(s))
		return netip.Addr{}
	}
	a = a.Unmap()
	switch {
	case a.Zone() != "":
		o.Add(object.BadFormat, path, " %s: an address with a zone means something on one machine only: want one without", check.Quote(s))
	case a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		o.Add(object.BadFormat, path, " %s: nothing can be called there: want the address of one machine", s)
	default:
		return a
	}
	return netip.Addr{}
}

func localityName(o *check.Object, s string, path []any) {
	if !o.Length(s, 63, path...) {
		return
	}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			o.Add(object.BadFormat, path, " %s: want printable ASCII without spaces", check.Quote(s))
			return
		}
	}
}

func serviceVersions(o *check.Object, in []serviceVersion) []object.Version {
	o.Count(len(in), 0, maxVersions, "spec", "versions")
	first := map[string]int{}
	var out []object.Version
	for i, v := range in {
		at := func(field string) []any { return []any{"spec", "versions", i, field} }
		if !o.Tree.Sound("spec", "versions", i) {
			continue
		}
		if o.Required("the version's name", at("name")...) && o.DNSLabel(v.Name, at("name")...) {
			if j, ok := first[v.Name]; ok {
				o.Add(object.Repeated, at("name"), " %q: already versions[%d]: want each once", v.Name, j)
			} else {
				first[v.Name] = i
			}
		}
		if o.Required("the labels that its endpoints have", at("labels")...) {
			if len(v.Labels) == 0 {
				o.Add(object.OutOfRange, at("labels"), "no labels: want at least one, or the version would be the whole service")
			}
			o.Labels(v.Labels, at("labels")...)
		}
		out = append(out, object.Version{Name: v.Name, Labels: v.Labels, Pos: o.Tree.At("spec", "versions", i)})
	}
	return out
}
