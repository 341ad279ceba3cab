// Package node tests the node agent with real processes and the real kernel: `inlay dev --ebpf` and
// `inlay node --ebpf` in network namespaces of the tests' own, programs below `inlay run --ebpf`
// that know nothing of a mesh (Go, glibc, Python, curl), and what `inlay observe` says of them.
//
// It has tests only. The test binary is also the Go programs: TestMain runs one of the roles in
// roles_test.go when NODE_ROLE says so. Every cgroup, pin and namespace is made under a random name
// and removed by it; a test fails when something of it is left.
package node
