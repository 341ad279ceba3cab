package load

import (
	"time"

	"github.com/cilium/ebpf"
)

// Hook is one place in the kernel where a program of the agent decides or watches.
type Hook struct {
	Name     string // also the name of its pinned link
	Gives    string // what it is for, in words
	Since    string // the first Linux that has it
	Without  string // what happens where it is off; empty for a required one
	Why      string // why it is off, or what is special about it; one line
	On       bool
	Required bool // without it there is no agent
}

// ProgramStats is what the kernel counted of one program since it was loaded. Both are 0 unless BPF
// statistics are on (Config.Stats, or the sysctl kernel.bpf_stats_enabled).
type ProgramStats struct {
	Name string // of its hook
	Runs uint64
	Time time.Duration // of all runs together
}

// place is the kind of thing a program is attached to.
type place int

const (
	atCgroup  place = iota // the managed cgroup
	atNetNS                // the network namespace of the agent
	atTracing              // a tracepoint of the kernel
	atIter                 // an iterator; it runs when Sweep asks, so nothing is pinned
)

// hook is a row of the table: how a Hook is made.
type hook struct {
	Hook
	object   string // stem of the object in bpfobj
	program  string // its C function
	fallback string // stem of the object tried when the kernel refuses the first; same program name
	lesser   string // what that one does without
	place    place
	attach   ebpf.AttachType // of a cgroup program

	// beside means that, for a change of layout in which a kept map changes its shape, the new program runs
	// beside the old one until all are in place: whoever reads the new maps finds them written. All
	// others are swapped in one step: two programs that both rewrite or judge one connect() would see
	// each other's work (the second would find the port of the endpoint where the program dialled
	// that of the service).
	beside bool
}

// hooks is in the order of attaching: first who tells who somebody is, then who undoes a translation,
// then who judges and translates.
var hooks = []hook{
	{
		Hook:   Hook{Name: "sockops", Gives: "who makes a TCP connection, told before its SYN leaves; bytes, round trips and resets at its end", Since: "4.13, with namespace cookies 5.15", Required: true},
		object: "sockops", program: "tcp_events", attach: ebpf.AttachCGroupSockOps, beside: true,
	},
	{
		Hook:   Hook{Name: "egress", Gives: "who sends a datagram; policy of what leaves without connect()", Since: "4.10", Required: true},
		object: "skb", program: "skb_egress", attach: ebpf.AttachCGroupInetEgress, beside: true,
	},
	{
		Hook:   Hook{Name: "recvmsg4", Gives: "answers over UDP come from the service address that was asked", Since: "5.2", Required: true},
		object: "recvmsg", program: "recvmsg4", attach: ebpf.AttachCGroupUDP4Recvmsg, beside: true,
	},
	{
		Hook:   Hook{Name: "recvmsg6", Gives: "the same for IPv6 and dual-stack sockets", Since: "5.2", Required: true},
		object: "recvmsg", program: "recvmsg6", attach: ebpf.AttachCGroupUDP6Recvmsg, beside: true,
	},
	{
		Hook:   Hook{Name: "getpeername4", Gives: "getpeername() shows the service address that was dialled", Since: "5.8", Required: true},
		object: "getpeername", program: "getpeername4", attach: ebpf.AttachCgroupInet4GetPeername, beside: true,
	},
	{
		Hook:   Hook{Name: "getpeername6", Gives: "the same for IPv6 and dual-stack sockets", Since: "5.8", Required: true},
		object: "getpeername", program: "getpeername6", attach: ebpf.AttachCgroupInet6GetPeername, beside: true,
	},
	{
		Hook:   Hook{Name: "inet_sock_set_state", Gives: "the end of connections that are older than the agent", Since: "5.5 with BTF", Without: "they are seen by samples of the iterators only, their last bytes are not told"},
		object: "trace", program: "set_state", place: atTracing, beside: true,
	},
	{
		Hook:   Hook{Name: "tcp_retransmit_skb", Gives: "retransmits, each when it happens", Since: "5.5 with BTF", Without: "retransmits are told at the end of a connection, as the kernel's own counter has them"},
		object: "trace", program: "retransmit", place: atTracing, beside: true,
	},
	{
		Hook:  Hook{Name: "iter_tcp", Gives: "live TCP connections: judged again when a policy changes, ended with their endpoint, sampled, adopted when older than the agent", Since: "6.1; ends sockets at once since 6.5 (bpf_sock_destroy)", Required: true},
		place: atIter, beside: true, object: "iter", program: "iter_tcp",
		fallback: "iterdrop", lesser: "no bpf_sock_destroy: a connection that a new policy denies goes silent instead of being reset",
	},
	{
		Hook:  Hook{Name: "iter_udp", Gives: "the same for UDP sockets", Since: "6.1; ends sockets at once since 6.5 (bpf_sock_destroy)", Required: true},
		place: atIter, beside: true, object: "iter", program: "iter_udp",
		fallback: "iterdrop", lesser: "no bpf_sock_destroy: a socket that a new policy denies goes silent instead of failing",
	},
	{
		Hook:   Hook{Name: "sock_create", Gives: "raw sockets, and protocols that no policy speaks of, are refused to managed workloads that were not granted them", Since: "4.10", Required: true},
		object: "sock", program: "sock_create", attach: ebpf.AttachCGroupInetSockCreate,
	},
	{
		Hook:   Hook{Name: "sock_release", Gives: "the end of UDP sockets", Since: "5.9", Required: true},
		object: "sock", program: "sock_release", attach: ebpf.AttachCgroupInetSockRelease,
	},
	{
		Hook:   Hook{Name: "bind4", Gives: "which workload owns a listening socket", Since: "4.17", Required: true},
		object: "bind", program: "bind4", attach: ebpf.AttachCGroupInet4Bind,
	},
	{
		Hook:   Hook{Name: "bind6", Gives: "the same for IPv6 and dual-stack sockets", Since: "4.17", Required: true},
		object: "bind", program: "bind6", attach: ebpf.AttachCGroupInet6Bind,
	},
	{
		Hook:   Hook{Name: "ingress", Gives: "policy of what arrives, decided on the SYN or the first datagram", Since: "4.10, with identity of sockets 5.8", Required: true},
		object: "skb", program: "skb_ingress", attach: ebpf.AttachCGroupInetIngress,
	},
	{
		Hook:   Hook{Name: "sk_lookup", Gives: "a TCP connection that ingress policy denies is refused", Since: "5.9", Without: "it times out: the SYN is dropped all the same"},
		object: "sklookup", program: "syn_lookup", place: atNetNS,
	},
	{
		Hook:   Hook{Name: "sendmsg4", Gives: "service addresses, names and policy for UDP without connect()", Since: "4.18", Required: true},
		object: "sendmsg", program: "sendmsg4", attach: ebpf.AttachCGroupUDP4Sendmsg,
	},
	{
		Hook:   Hook{Name: "sendmsg6", Gives: "the same for IPv6 and dual-stack sockets", Since: "4.18", Required: true},
		object: "sendmsg", program: "sendmsg6", attach: ebpf.AttachCGroupUDP6Sendmsg,
	},
	{
		Hook:   Hook{Name: "connect4", Gives: "service addresses, names and egress policy at connect()", Since: "4.17, with its own errno 5.18", Required: true},
		object: "connect", program: "connect4", attach: ebpf.AttachCGroupInet4Connect,
	},
	{
		Hook:   Hook{Name: "connect6", Gives: "the same for IPv6 and dual-stack sockets", Since: "4.17, with its own errno 5.18", Required: true},
		object: "connect", program: "connect6", attach: ebpf.AttachCGroupInet6Connect,
	},
}

// parts is what Open works with; tests give others.
type parts struct {
	hooks   []hook
	objects map[string]func() (*ebpf.CollectionSpec, error) // by stem
	// step is called before each effect on the kernel that outlives the process. An error of it stands
	// for the death of the process at that point: nothing is undone. Nil does nothing.
	step func(name string) error
}
