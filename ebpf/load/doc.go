// Package load brings the node agent's programs into the kernel: it finds the cgroup2 mount, says
// what this kernel can do, creates or reuses the maps, attaches the programs to the managed cgroup,
// replaces them without a gap and takes them away again. It owns every link.
//
// Everything that must outlive the agent is pinned, under a version of the maps' layout:
//
//	/sys/fs/bpf/inlay/v1/maps/NAME
//	/sys/fs/bpf/inlay/v1/links/HOOK
//
// so that programs go on deciding when the agent is dead, and the next Open takes over what it finds.
// The package ebpf calls it, the DNS proxy calls [OpenMaps], and cmd/inlay calls [Probe], [Breakglass]
// and [Cleanup].
//
// It never decides what a map says (that is the room of tables), and it never moves a process into
// a cgroup.
package load
