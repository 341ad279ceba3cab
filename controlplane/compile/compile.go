// Package compile makes one mesh out of the configuration and the live instances: names resolved,
// defaults filled in, policies merged, routes in the order in which they are tried. The control
// plane calls it on every change, `inlay validate` and `inlay compile` call it once.
//
// It is pure and deterministic: no clock, no network, no log; equal inputs give equal meshes.
// Faults depend on the configuration alone and never on what is registered, so that an instance
// that comes or goes cannot turn a good configuration into a bad one.
package compile

import (
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
)

// Input is all that a mesh is made of.
type Input struct {
	Set         *config.Set // nil means empty
	Instances   registry.Snapshot
	TrustDomain string
	Revision    string // of the configuration; copied into the mesh
}

// Compile resolves and builds. The mesh is nil when there are faults, or when Set is not whole
// because Parse found some. Findings are sorted by place.
func Compile(in Input) (*ir.Mesh, []config.Finding) {
	plan, findings := Resolve(in.Set)
	if plan == nil {
		return nil, findings
	}
	mesh, more := plan.Build(in.Instances, in.TrustDomain, in.Revision)
	return mesh, config.SortFindings(append(findings, more...))
}

// Defaults that hold where neither a route nor a policy says otherwise. docs/config.md repeats
// them.
const (
	defaultAttempts      = 2
	defaultBudgetPercent = 20
	defaultMinPerSecond  = 3
	defaultMaxRequests   = 1024
)
