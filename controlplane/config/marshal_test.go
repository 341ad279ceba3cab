package config

import (
	"bytes"
	"fmt"
	"strconv"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
)

// Marshal writes a set as YAML, one document an object, in the order of the set, with defaults
// left out where they are the absence of a field. Parse makes an equal set of it but for places.
func Marshal(s *Set) ([]byte, error) {
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	var docs []any
	for i := range s.Services {
		docs = append(docs, document(s.Services[i].Meta, serviceSpec(&s.Services[i])))
	}
	for i := range s.Policies {
		docs = append(docs, document(s.Policies[i].Meta, policySpec(&s.Policies[i])))
	}
	for i := range s.NetworkPolicies {
		docs = append(docs, document(s.NetworkPolicies[i].Meta, networkSpec(&s.NetworkPolicies[i])))
	}
	for i := range s.Routes {
		docs = append(docs, document(s.Routes[i].Meta, routeSpec(&s.Routes[i])))
	}
	for _, d := range docs {
		if err := enc.Encode(d); err != nil {
			return nil, fmt.Errorf("write YAML: %w", err)
		}
	}
	if len(docs) == 0 {
		return nil, nil
	}
	if err := enc.Close(); err != nil {
		return nil, fmt.Errorf("write YAML: %w", err)
	}
	return b.Bytes(), nil
}

// fields is a mapping; yaml writes its keys in order of the alphabet.
type fields map[string]any

// set stores v under key unless it is the zero of its type.
func set[T comparable](f fields, key string, v T) {
	var zero T
	if v != zero {
		f[key] = v
	}
}

func setPtr[T any](f fields, key string, v *T) {
	if v != nil {
		f[key] = *v
	}
}

func setDuration(f fields, key string, d *time.Duration, write func(time.Duration) string) {
	if d != nil {
		f[key] = write(*d)
	}
}

func document(m object.Meta, spec fields) fields {
	meta := fields{"name": m.Name}
	if m.Namespace != check.DefaultNamespace {
		meta["namespace"] = m.Namespace
	}
	return fields{"apiVersion": versionOf[m.Kind], "kind": m.Kind, "metadata": meta, "spec": spec}
}

func serviceSpec(s *object.Service) fields {
	out := fields{}
	var ports, endpoints, versions []any
	for _, p := range s.Ports {
		ports = append(ports, fields{"port": p.Number, "protocol": string(p.Protocol)})
	}
	out["ports"] = ports
	if s.Permissive {
		out["mtls"] = "permissive"
	}
	for _, e := range s.Endpoints {
		f := fields{"address": e.Address.String(), "weight": e.Weight}
		set(f, "port", e.Port)
		if e.MeshTLS {
			f["tls"] = "mesh"
		}
		if len(e.Labels) > 0 {
			f["labels"] = e.Labels
		}
		l := fields{}
		set(l, "region", e.Region)
		set(l, "zone", e.Zone)
		set(l, "subZone", e.SubZone)
		if len(l) > 0 {
			f["locality"] = l
		}
		endpoints = append(endpoints, f)
	}
	if endpoints != nil {
		out["endpoints"] = endpoints
	}
	for _, v := range s.Versions {
		versions = append(versions, fields{"name": v.Name, "labels": v.Labels})
	}
	if versions != nil {
		out["versions"] = versions
	}
	return out
}

func policySpec(p *object.Policy) fields {
	ref := fields{"kind": "Service", "name": p.Target.Service}
	if p.Target.Version != "" {
		ref = fields{"group": "inlay.dev", "kind": "ServiceVersion", "name": p.Target.Service + "." + p.Target.Version}
	}
	out := fields{"targetRef": ref}
	timeouts := fields{}
	setDuration(timeouts, "request", p.Request, time.Duration.String)
	setDuration(timeouts, "perTry", p.PerTry, time.Duration.String)
	setDuration(timeouts, "idle", p.Idle, time.Duration.String)
	if len(timeouts) > 0 {
		out["timeouts"] = timeouts
	}
	if r := p.Retries; r != nil {
		f := fields{}
		setPtr(f, "attempts", r.Attempts)
		if r.On != nil {
			on := append([]string{}, r.On...)
			for _, c := range r.Codes {
				on = append(on, strconv.Itoa(int(c)))
			}
			f["on"] = on
		}
		backoff := fields{}
		setDuration(backoff, "base", r.Base, time.Duration.String)
		setDuration(backoff, "max", r.Max, time.Duration.String)
		if len(backoff) > 0 {
			f["backoff"] = backoff
		}
		setPtr(f, "budgetPercent", r.BudgetPercent)
		setPtr(f, "minPerSecond", r.MinPerSecond)
		out["retries"] = f
	}
	if p.LB != nil {
		out["loadBalancing"] = fields{"policy": string(*p.LB)}
	}
	if p.MaxRequests != nil {
		out["limits"] = fields{"maxRequests": *p.MaxRequests}
	}
	return out
}

func routeSpec(r *object.Route) fields {
	var parents, rules []any
	for _, p := range r.Parents {
		f := fields{"group": "", "kind": "Service", "name": p.Service}
		set(f, "port", p.Port)
		parents = append(parents, f)
	}
	for i := range r.Rules {
		rules = append(rules, ruleFields(r, &r.Rules[i]))
	}
	out := fields{"parentRefs": parents}
	if rules != nil {
		out["rules"] = rules
	}
	return out
}

func ruleFields(route *object.Route, r *object.Rule) fields {
	out := fields{}
	set(out, "name", r.Name)
	var matches, backends []any
	for i := range r.Matches {
		matches = append(matches, matchFields(route, &r.Matches[i]))
	}
	out["matches"] = matches
	for _, b := range r.Backends {
		f := fields{"kind": "Service", "name": b.Service, "weight": b.Weight}
		if b.Version != "" {
			f = fields{"group": "inlay.dev", "kind": "ServiceVersion", "name": b.Service + "." + b.Version, "weight": b.Weight}
		}
		if b.Namespace != route.Namespace {
			f["namespace"] = b.Namespace
		}
		set(f, "port", b.Port)
		backends = append(backends, f)
	}
	if backends != nil {
		out["backendRefs"] = backends
	}
	timeouts := fields{}
	setDuration(timeouts, "request", r.Request, gatewayDuration)
	setDuration(timeouts, "backendRequest", r.PerTry, gatewayDuration)
	if len(timeouts) > 0 {
		out["timeouts"] = timeouts
	}
	if r.Retry != nil {
		f := fields{}
		setPtr(f, "attempts", r.Retry.Attempts)
		if r.Retry.Codes != nil {
			f["codes"] = r.Retry.Codes
		}
		setDuration(f, "backoff", r.Retry.Backoff, gatewayDuration)
		out["retry"] = f
	}
	return out
}

func matchFields(route *object.Route, m *object.Match) fields {
	out := fields{}
	if route.GRPC() {
		method := fields{}
		set(method, "service", m.GRPCService)
		set(method, "method", m.GRPCMethod)
		if len(method) > 0 {
			out["method"] = method
		}
	} else {
		path := fields{"type": "PathPrefix", "value": m.Path}
		if m.Exact {
			path["type"] = "Exact"
		}
		out["path"] = path
		set(out, "method", m.Method)
	}
	var hs []any
	for _, h := range m.Headers {
		hs = append(hs, fields{"name": h.Name, "value": h.Value})
	}
	if hs != nil {
		out["headers"] = hs
	}
	return out
}

// gatewayDuration writes a duration in the standard form of GEP-2257: "descending, nonrepeating
// units"; "the zero duration as `0s`".
func gatewayDuration(d time.Duration) string {
	if d == 0 {
		return "0s"
	}
	out := ""
	for _, unit := range []struct {
		length time.Duration
		name   string
	}{{time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}, {time.Millisecond, "ms"}} {
		if n := int64(d / unit.length); n > 0 {
			out += strconv.FormatInt(n, 10) + unit.name
		}
		d %= unit.length
	}
	return out
}
