// Package bpftest holds the tests of the programs in ebpf/bpf: the real objects, loaded by
// cilium/ebpf alone, attached to a cgroup of their own, and asked by real sockets. Nobody imports
// it; how the agent loads, pins and fills is tested in ebpf/load and ebpf/tables.
package bpftest
