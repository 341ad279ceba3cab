// Package config reads the configuration: files in, a Set of objects with positions or all faults
// at once out. The control plane, `inlay validate` and `inlay compile` call Parse; compile
// resolves the names in a Set.
//
// It is strict: a field, kind or value it does not know is a fault with file, line and column, and
// never ignored. It is pure: no clock, no disk, no log, and it never panics on any bytes.
// Kinds: MeshService, TrafficPolicy and NetworkPolicy (inlay.dev/v1alpha1), HTTPRoute and GRPCRoute
// (gateway.networking.k8s.io/v1). docs/config.md is their reference.
package config

import (
	"github.com/inlay-mesh/inlay/controlplane/config/object"
)

// The values of this package live in package object, which the translators of config/... share.
type (
	// Set is a whole configuration.
	Set = object.Set
	// Finding is a fault or a warning.
	Finding = object.Finding
	// Severity is Fault or Warning.
	Severity = object.Severity
)

// Severities.
const (
	Fault   = object.Fault
	Warning = object.Warning
)

// HasFaults reports whether a finding refuses the set.
func HasFaults(f []Finding) bool { return object.HasFaults(f) }

// SortFindings orders findings by place and drops repetitions. It works in place.
func SortFindings(f []Finding) []Finding { return object.SortFindings(f) }
