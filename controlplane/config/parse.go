package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/gateway"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

// The apiVersions of the kinds that are accepted.
const (
	inlayVersion   = "inlay.dev/v1alpha1"
	gatewayVersion = gateway.Version
)

// versionOf maps each kind to its only apiVersion.
var versionOf = map[string]string{
	"MeshService":   inlayVersion,
	"TrafficPolicy": inlayVersion,
	"NetworkPolicy": inlayVersion,
	"HTTPRoute":     gatewayVersion,
	"GRPCRoute":     gatewayVersion,
}

const accepted = "MeshService, TrafficPolicy, NetworkPolicy (" + inlayVersion + "), HTTPRoute, GRPCRoute (" + gatewayVersion + ")"

// maxFindings bounds what one Parse says.
const maxFindings = 1000

// Parse reads every object of every file and returns them with all findings, sorted by place. It
// judges each object alone and finds duplicates; what an object names is for compile to resolve.
//
// The set is never nil. With faults it holds the sound objects and says that others are missing
// (Set.Refused, Set.Incomplete), so that Compile can find more faults in it and returns no mesh.
func Parse(files []source.File) (*Set, []Finding) {
	p := parser{set: &Set{}, seen: map[string]object.Meta{}}
	sorted := slices.SortedFunc(slices.Values(files), func(a, b source.File) int { return cmp.Compare(a.Path, b.Path) })
	for _, f := range sorted {
		docs, findings := tree.Parse(f.Path, f.Data)
		p.findings = append(p.findings, findings...)
		if object.HasFaults(findings) {
			p.set.Incomplete = true
		}
		for _, d := range docs {
			p.document(d)
		}
	}
	p.sort()
	p.findings = object.SortFindings(p.findings)
	if n := len(p.findings) - maxFindings; n > 0 {
		last := p.findings[maxFindings-1]
		last.Message += fmt.Sprintf(" (and %d more findings)", n)
		hidden := object.HasFaults(p.findings[maxFindings:])
		p.findings = append(p.findings[:maxFindings-1], last)
		if hidden && !object.HasFaults(p.findings) {
			p.findings[maxFindings-1].Severity = Fault
		}
	}
	return p.set, p.findings
}

type parser struct {
	set      *Set
	seen     map[string]object.Meta
	findings []Finding
}

func (p *parser) fault(pos object.Pos, c object.Code, format string, args ...any) {
	p.findings = append(p.findings, object.At(pos, c, format, args...))
	p.set.Incomplete = true
}

func (p *parser) document(d *tree.Tree) {
	if d.Kind != tree.Map {
		p.fault(d.Pos, object.WrongType, "%s: want an object with apiVersion, kind, metadata and spec", d.Describe())
		return
	}
	kind, ok := p.kind(d)
	if !ok {
		return
	}
	switch kind {
	case "MeshService":
		s, f := parseService(d)
		if p.keep(s.Meta, f) {
			p.set.Services = append(p.set.Services, s)
		}
	case "TrafficPolicy":
		t, f := parsePolicy(d)
		if p.keep(t.Meta, f) {
			p.set.Policies = append(p.set.Policies, t)
		}
	case "NetworkPolicy":
		n, f := parseNetworkPolicy(d)
		if p.keep(n.Meta, f) {
			p.set.NetworkPolicies = append(p.set.NetworkPolicies, n)
		}
	case "HTTPRoute":
		r, f := gateway.HTTPRoute(d)
		if p.keep(r.Meta, f) {
			p.set.Routes = append(p.set.Routes, r)
		}
	case "GRPCRoute":
		r, f := gateway.GRPCRoute(d)
		if p.keep(r.Meta, f) {
			p.set.Routes = append(p.set.Routes, r)
		}
	}
}

// kind returns the kind of a document when its apiVersion is the one that the kind has here.
func (p *parser) kind(d *tree.Tree) (string, bool) {
	kind, kindOK := d.Get("kind").Text()
	version, versionOK := d.Get("apiVersion").Text()
	switch {
	case !d.Has("kind"):
		p.fault(d.Pos, object.MissingField, "kind: missing: want %s", accepted)
	case !kindOK:
		p.fault(d.At("kind"), object.WrongType, "kind: %s: want %s", d.Get("kind").Describe(), accepted)
	case versionOf[kind] == "":
		hint := ""
		switch near := tree.Nearest(kind, []string{"MeshService", "TrafficPolicy", "NetworkPolicy", "HTTPRoute", "GRPCRoute"}); {
		case kind == "CiliumNetworkPolicy" || kind == "CiliumClusterwideNetworkPolicy" || kind == "GlobalNetworkPolicy":
			hint = "; policies of other systems wait for a later release: write a NetworkPolicy of " + inlayVersion
		case near != "":
			hint = fmt.Sprintf("; did you mean %s?", near)
		case kind == "Service":
			hint = "; a service of the mesh is a MeshService"
		case strings.HasSuffix(kind, "List"):
			hint = "; write the items as documents with --- between them"
		}
		p.fault(d.At("kind"), object.UnknownKind, "kind %s is not known: want %s%s", check.Quote(kind), accepted, hint)
	case !d.Has("apiVersion"):
		p.fault(d.Pos, object.MissingField, "apiVersion: missing: want %s for kind %s", versionOf[kind], kind)
	case !versionOK:
		p.fault(d.At("apiVersion"), object.WrongType, "apiVersion: %s: want %s for kind %s", d.Get("apiVersion").Describe(), versionOf[kind], kind)
	case version != versionOf[kind]:
		hint := ""
		if kind == "NetworkPolicy" {
			hint = ", whose fields are its own: see the reference"
		}
		p.fault(d.At("apiVersion"), object.UnknownKind, "apiVersion %s: want %s for kind %s%s", check.Quote(version), versionOf[kind], kind, hint)
	default:
		return kind, true
	}
	return "", false
}

// keep records an object and its findings, and reports whether it may go into the set.
func (p *parser) keep(m object.Meta, findings []Finding) bool {
	p.findings = append(p.findings, findings...)
	if m.Name == "" || m.Namespace == "" {
		p.set.Incomplete = true
		return false
	}
	if first, ok := p.seen[m.String()]; ok {
		p.findings = append(p.findings, object.At(m.Pos, object.DuplicateObject,
			"%s %q in namespace %q is already at %s: remove or rename one", m.Kind, m.Name, m.Namespace, first.Pos))
		return false
	}
	p.seen[m.String()] = m
	if object.HasFaults(findings) {
		p.set.Refused = append(p.set.Refused, m)
		return false
	}
	return true
}

func byName(a, b object.Meta) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

func (p *parser) sort() {
	slices.SortFunc(p.set.Services, func(a, b object.Service) int { return byName(a.Meta, b.Meta) })
	slices.SortFunc(p.set.Policies, func(a, b object.Policy) int { return byName(a.Meta, b.Meta) })
	slices.SortFunc(p.set.Routes, func(a, b object.Route) int { return byName(a.Meta, b.Meta) })
	slices.SortFunc(p.set.NetworkPolicies, func(a, b object.NetworkPolicy) int { return byName(a.Meta, b.Meta) })
	slices.SortFunc(p.set.Refused, byName)
}
