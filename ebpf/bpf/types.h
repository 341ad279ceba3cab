/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/*
 * types.h: every value that programs and Go share. bpf2go makes Go types of them (package bpfobj).
 *
 * An address is always 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that one path serves
 * both families and dual-stack sockets. Ports are in network order where the name says "port".
 * Map keys are compared bytewise: padding is written out and always 0.
 */
#ifndef INLAY_TYPES_H
#define INLAY_TYPES_H

#include <linux/types.h>

/* LAYOUT names the shape of maps below. Raise it whenever one changes: pins of another layout
 * are filled anew, never read as if they were of this one.
 */
#define LAYOUT 2

struct addr {
	union {
		__u8   b[16];
		__be32 w[4];
	};
};
_Static_assert(sizeof(struct addr) == 16, "addr is shared with Go");

/* Numeric identities. Those of workloads follow from their names (Go: identity.Number). */
enum id {
	ID_UNKNOWN = 0,
	ID_HOST    = 1,	/* a process of this machine outside every managed cgroup */
	ID_WORLD   = 2,
	ID_AGENT   = 3,	/* the node's own proxy */
	ID_FIRST   = 256, /* the first that a workload may have */
};

/* struct workload: value of workloads, under the id of the workload's cgroup. */
struct workload {
	__u64 identity;
	__u32 flags;	/* WORKLOAD_* */
	__u32 uid;	/* who runs it; told in flows */
	char  ns[64];	/* namespace of its service, NUL-terminated: where short names resolve */
	char  service[64];
};
enum workload_flag {
	WORKLOAD_RAW = 1,	/* raw and packet sockets are granted */
};

/* A service address, or the address of an endpoint. */
struct svc_key {
	struct addr addr;
	__be16 port;
	__u8   proto;	/* IPPROTO_TCP or IPPROTO_UDP */
	__u8   pad;
};
_Static_assert(sizeof(struct svc_key) == 20, "svc_key is shared with Go");

struct backend {
	struct addr addr;
	__be16 port;
	__u16  flags;
	__u32  pad;
	__u64  identity;
};
_Static_assert(sizeof(struct backend) == 32, "backend is shared with Go");

/* struct svc: what a service address leads to. A single endpoint stands here, so that the way to it
 * is one lookup; several are slots (id, gen, 0..slots-1). A new set of endpoints is written under
 * another gen, then this one value is replaced. Under port 0 and proto 0 of each virtual address
 * there is one without slots: it answers for the ports that no service has.
 */
struct svc {
	__u32 id;
	__u32 gen;
	__u32 slots;	/* 0: no endpoint, the connection is refused at once; 1: only */
	__u32 flags;
	struct backend only;
};
_Static_assert(sizeof(struct svc) == 48, "svc is shared with Go");

struct slot_key {
	__u32 svc;	/* svc.id */
	__u32 gen;
	__u32 index;
};

/* struct slot: one column of an alias table (Vose): backend a below cut, else b. */
struct slot {
	__u32 cut;	/* of 2^32 - 1; the maximum means always a */
	__u32 pad;
	struct backend a;
	struct backend b;
};

/* Directions of a decision. */
enum dir { DIR_EGRESS = 0, DIR_INGRESS = 1 };

/* Verdicts. VERDICT_NONE means that no rule speaks of the peer. */
enum verdict { VERDICT_NONE = 0, VERDICT_ALLOW = 1, VERDICT_DENY = 2 };

/* struct subject: how a workload with policies is judged; under its identity. A workload without
 * one may do everything. All keys of its policies carry gen, so that one write of this value
 * changes all of them together.
 */
struct subject {
	__u32 gen;
	__u32 flags;		/* SUBJECT_* */
	__u32 rule[2];		/* by direction: the rule that makes it default-deny, for the flow log */
	__u32 audit_rule[2];
};
enum subject_flag {
	SUBJECT_DENY_EGRESS = 1,	/* default of the enforced policies */
	SUBJECT_DENY_INGRESS = 2,
	SUBJECT_AUDIT_DENY_EGRESS = 4,	/* default when audited policies are counted in too */
	SUBJECT_AUDIT_DENY_INGRESS = 8,
	SUBJECT_CLOSED = 16,	/* its policies found no room: nothing is allowed */
};

/* Kinds of pol_key.peer, from the special to the general. An entry of a special kind holds what
 * the more general ones say of that peer too, so the first entry found is the answer.
 */
enum peer_kind {
	PEER_IDENTITY = 0,	/* peer is an identity: of a workload, ID_HOST, ID_WORLD, ID_AGENT */
	PEER_MESH     = 1,	/* peer is 0: any workload */
	PEER_ANY      = 2,	/* peer is 0: anybody, ID_UNKNOWN included */
	PEER_CIDR     = 3,	/* peer is a class of the cidrs map; joined with one of the above */
};

struct pol_key {
	__u64 subject;
	__u64 peer;
	__u32 gen;
	__u8  dir;
	__u8  proto;	/* IPPROTO_TCP, IPPROTO_UDP or IPPROTO_ICMP (that of IPv6 too) */
	__u8  kind;
	__u8  pad;
};
_Static_assert(sizeof(struct pol_key) == 24, "pol_key is shared with Go");

/* struct seg: what holds on a range of ports, in host order, inclusive. Both worlds: action is
 * that of the enforced policies, audit that of enforced and audited ones together.
 */
struct seg {
	__u16 lo;
	__u16 hi;
	__u8  action;	/* VERDICT_* */
	__u8  audit;
	__u16 err;	/* errno of a refused connect(); 0 means EPERM */
	__u32 rule;	/* of action: number in the agent's table of rules, 0 for none */
	__u32 audit_rule;
};
_Static_assert(sizeof(struct seg) == 16, "seg is shared with Go");

#define MAX_SEGS 64

/* struct port_set: disjoint segments, ascending; shared by all peers with the same ports. */
struct port_set {
	__u32 n;
	__u32 pad;
	struct seg segs[MAX_SEGS];
};

/* struct cidr_key: longest prefix of the address of a peer, for one subject and direction. */
struct cidr_key {
	__u32 prefixlen;	/* bits; CIDR_BASE + those of the address */
	__u32 gen;
	__u64 subject;
	__u32 dir;
	__u32 pad;
	struct addr addr;
};
_Static_assert(sizeof(struct cidr_key) == 40, "cidr_key is shared with Go");
#define CIDR_BASE 160

/* struct tuple: one TCP connection, as its client sees it. */
struct tuple {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u32  proto;	/* in udp_peers: IPPROTO_UDP or IPPROTO_ICMP, whose ports are 0; else 0 */
	__u64  netns;	/* cookie of the client's network namespace; 0 in the entry for other ones */
};
_Static_assert(sizeof(struct tuple) == 48, "tuple is shared with Go");

/* struct peer: who made a connection. */
struct peer {
	__u64 identity;	/* ID_UNKNOWN when two namespaces made the same tuple */
	__u64 cgroup;
	__u64 cookie;	/* of the client's socket; in udp_peers: ns, when this was written */
	__u64 netns;	/* the true one */
};

/* struct listen_key: where somebody listens, in one network namespace. */
struct listen_key {
	__u64 netns;
	struct addr addr;	/* all 0: every address; ::ffff:0.0.0.0: every one of IPv4 */
	__be16 port;
	__u8  proto;	/* IPPROTO_TCP */
	__u8  pad;
	__u32 pad2;
};
_Static_assert(sizeof(struct listen_key) == 32, "listen_key is shared with Go");

/* struct listener: who listens there. */
struct listener {
	__u64 cgroup;	/* 0 when workloads share the port: only their sockets know */
	__u64 identity;
	__u32 refs;	/* sockets (SO_REUSEPORT) */
	__u32 pad;
};

/* struct local_key: an address of this machine in one network namespace. */
struct local_key {
	__u64 netns;
	struct addr addr;
};

/* struct udp_key: a socket and one of its peers. */
struct udp_key {
	__u64 cookie;
	struct addr addr;
	__be16 port;
	__u16  pad;
	__u32  pad2;
};
_Static_assert(sizeof(struct udp_key) == 32, "udp_key is shared with Go");

/* struct udp_flow: what was decided about the first datagram, and what followed. */
struct udp_flow {
	__u64 first;	/* ns, CLOCK_MONOTONIC */
	__u64 last;
	__u64 tx_bytes;
	__u64 rx_bytes;
	__u64 tx_packets;
	__u64 rx_packets;
	__u64 cgroup;
	__u64 identity;	/* of the socket's workload */
	__u64 peer;
	__u32 rule;
	__u32 audit_rule;
	__u32 gen;	/* subject.gen of the decision: another one means decide again */
	__be16 local_port;
	__u8  dir;	/* of the first datagram */
	__u8  verdict;
	__u8  flags;	/* FLOW_* */
	__u8  proto;	/* IPPROTO_UDP or IPPROTO_ICMP */
	__be16 port;	/* that the policy was asked about: dialled (egress) or local (ingress) */
	__u32 claimed;	/* 2^30 ns, CLOCK_MONOTONIC: when the sender last told who it is; 0 never */
};

/* struct reverse: the address that a program asked for, under (socket, the address it got). */
struct reverse {
	struct addr addr;
	__be16 port;
	__u16  flags;	/* SK_DNS_DENIED */
};

/* struct dns_proxy: where the node's DNS proxy listens in a network namespace, under the
 * namespace's cookie. A heartbeat older than dns_stale lets port 53 go where it was sent.
 */
struct dns_proxy {
	struct addr addr4;	/* v4-mapped */
	struct addr addr6;
	__be16 port4;		/* 0: none */
	__be16 port6;
	__u32  pad;
	__u64  heartbeat;	/* ns, CLOCK_MONOTONIC */
};

/* struct dns_client: who asks the proxy from this address, and whom it meant to ask. */
struct dns_client {
	struct addr addr;	/* of the resolver that was asked; all 0: one that policy denies */
	__be16 port;
	__u16  pad;
	__u32  pad2;
	__u64  cgroup;
};

/* struct name: the virtual addresses of a service, under NAME.NAMESPACE (NUL-padded). */
struct name_key {
	char text[128];
};

struct name {
	struct addr addr4;	/* v4-mapped; all 0: none */
	struct addr addr6;
};

/* struct sk_state: what is known of a socket; lives and dies with it, an accepted socket starts
 * with its listener's. Grows only into reserved.
 */
struct sk_state {
	__u64 cgroup;
	__u64 netns;
	__u64 identity;
	__u64 peer;
	__u64 start;		/* ns, CLOCK_MONOTONIC: connected or accepted */
	struct addr vip;	/* what the program asked for; with SK_VIP */
	struct addr backend;	/* what it got */
	__be16 vip_port;
	__be16 backend_port;
	__u8  proto;
	__u8  dir;
	__u8  verdict;
	__u8  pad;
	__u32 flags;		/* SK_* */
	__u32 rule;
	__u32 audit_rule;
	__u64 sampled;		/* ns of the last sample */
	__u64 tx_seen;		/* bytes told by earlier samples */
	__u64 rx_seen;
	__u32 retrans;		/* counted by tcp_retransmit_skb */
	__u32 retrans_seen;
	__u32 reset;
	__u32 pad2;
	struct addr dns_from;	/* key in dns_clients of what it asked the proxy last; UDP */
	__be16 dns_port;
	__u16 pad3[3];
	__u64 reserved[5];
};
enum sk_flag {
	SK_MANAGED = 1,	/* in a registered cgroup */
	SK_VIP = 2,	/* vip and backend are set */
	SK_DNS = 4,	/* redirected to the proxy; vip is the resolver that was asked */
	SK_TRACKED = 8,	/* sockops tell its states: its record is made at close */
	SK_DEAD = 16,	/* denied while it lived, or its endpoint is gone: nothing passes */
	SK_OLD = 32,	/* older than the agent: seen first by iter/tcp */
	SK_HINT = 64,	/* peer is only what the address is registered for */
	SK_TOLD = 128,	/* its last record was made */
	SK_LISTENS = 256, /* counted in listeners */
	SK_FULL = 512,	/* dead because a map was full */
	SK_DNS_DENIED = 1024, /* with SK_DNS: policy denies the resolver; the node's own are asked */
	SK_NO_PORT = 2048, /* datagram socket at a port that the service vip does not have: nothing leaves */
};

/* Kinds of records in the ring buffer. */
enum event_kind { EVENT_CLOSE = 1, EVENT_SAMPLE = 2, EVENT_DENIED = 3, EVENT_AUDIT = 4 };

enum flow_flag {
	FLOW_HINT = 1,
	FLOW_RESET = 2,
	FLOW_OLD = 4,
	FLOW_CLOSED = 8,	/* the subject's policies found no room */
	FLOW_FULL = 16,	/* a map was full, so it was refused */
	FLOW_ENDED = 32,	/* the socket of this datagram exchange is closed */
	FLOW_NO_PORT = 64,	/* refused: the service has no such port */
	FLOW_CLASH = 128,	/* refused: another socket has made the same connection and lives */
};

/* struct event: one record of the ring buffer. */
struct event {
	__u64 time;	/* ns, CLOCK_MONOTONIC */
	__u64 start;	/* of the connection; 0 when there was none */
	__u64 cgroup;
	__u64 identity;	/* of the workload of this node */
	__u64 peer;
	__u64 cookie;	/* of the socket; 0 when unknown */
	__u64 tx_bytes;	/* since the sample before, as all counts */
	__u64 rx_bytes;
	struct addr local;
	struct addr remote;
	struct addr vip;	/* all 0: none */
	__be16 local_port;
	__be16 remote_port;
	__be16 vip_port;
	__u16  err;	/* errno that the call got */
	__u32 rule;
	__u32 retrans;
	__u32 srtt_us;	/* smoothed round trip time; 0 when unknown */
	__u8  kind;
	__u8  dir;
	__u8  proto;
	__u8  verdict;
	__u8  flags;	/* FLOW_* */
	__u8  pad[3];
	__u32 pad2;
};
_Static_assert(sizeof(struct event) == 144, "event is shared with Go");

/* struct settings: index 0 of settings_map. */
struct settings {
	__u32 allow_all;	/* breakglass: policies are not asked */
	__u32 pad;
};

/* struct gone_key: an endpoint whose connections end at the next round of the iterators. */
struct gone_key {
	struct addr addr;
	__be16 port;
	__u8   proto;
	__u8   pad;
};

/* Counters, index of counters (per CPU). */
enum counter {
	COUNT_MADE,		/* records that should be in the ring */
	COUNT_LOST,		/* those that found no room */
	COUNT_DENIED_EGRESS,
	COUNT_DENIED_INGRESS,
	COUNT_AUDITED,
	COUNT_RAW_REFUSED,
	COUNT_NO_ENDPOINT,
	COUNT_PEERS_FULL,	/* a connection whose maker found no room: it will be unknown */
	COUNT_PEERS_CLASH,	/* one tuple made twice: by two namespaces, or by sockets of two devices */
	COUNT_DNS_REDIRECTED,
	COUNT_DNS_PASSED,	/* let through for want of a live proxy */
	COUNT_DESTROYED,	/* sockets ended by policy or with their endpoint */
	COUNT_RETRANSMITS,
	COUNT_NO_PORT,
	COUNT_MAX = 32,
};

/* struct decide_case: what Program.Run gives to decide_test, and gets back. */
struct decide_case {
	__u64 subject;
	__u64 peer;
	struct addr addr;
	__be16 port;
	__u8  proto;
	__u8  dir;
	__u8  verdict;	/* out, as all that follows */
	__u8  audit;
	__u16 err;
	__u32 rule;
	__u32 audit_rule;
	__u32 gen;	/* of the subject; the two highest values mean none and breakglass */
	__u32 flags;	/* FLOW_CLOSED */
};
_Static_assert(sizeof(struct decide_case) == 56, "decide_case is shared with Go");

/* struct pick_case: what Program.Run gives to pick_test, and gets back. */
struct pick_case {
	struct svc_key service;
	__u32 seed;	/* of the slot; 0: random */
	struct backend backend;	/* out, as all that follows */
	__u32 found;	/* 0: no service address, 1: backend is set, 2: a service without endpoint */
	__u32 pad;
};
_Static_assert(sizeof(struct pick_case) == 64, "pick_case is shared with Go");

/* Never made: it lets bpf2go see the names of the enums. */
struct enums {
	enum id id;
	enum dir dir;
	enum verdict verdict;
	enum peer_kind peer_kind;
	enum event_kind event_kind;
	enum counter counter;
	enum workload_flag workload_flag;
	enum subject_flag subject_flag;
	enum sk_flag sk_flag;
	enum flow_flag flow_flag;
};

#endif
