// Package bpfobj holds the compiled programs of ebpf/bpf and the Go types of the values that they
// share with the agent. ebpf/load loads it, ebpf/tables and ebpf/flow use its types. Everything but
// this file is written by ebpf/bpf/generate.sh (bpf2go) and is never edited.
package bpfobj
