// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * sock.bpf.c: birth and death of a socket. A raw socket could send what no other hook judges, and of
 * UDP-Lite, SCTP and DCCP policies say nothing: so workloads get none of these unless it is granted.
 *
 * Packet sockets (AF_PACKET) never come here: only the inet families call this hook, and no other
 * cgroup hook sees their creation, bind or packets. They need CAP_NET_RAW, so whoever starts a
 * workload as root must drop that from its bounding set (`inlay run` does).
 */
#include "state.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define SOCK_RAW 3

static __always_inline bool judged(__u32 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_MPTCP ||
	       protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

SEC("cgroup/sock_create")
int sock_create(struct bpf_sock *ctx)
{
	__u64 cgroup = bpf_get_current_ancestor_cgroup_id(managed_level);
	struct sk_state *s;
	struct workload *w;

	if (!cgroup)
		return 1;
	if (ctx->type == SOCK_RAW || !judged(ctx->protocol)) {
		w = bpf_map_lookup_elem(&workloads, &cgroup);
		if (w && !(w->flags & WORKLOAD_RAW)) {
			count(COUNT_RAW_REFUSED);
			return 0;
		}
	}
	s = bpf_sk_storage_get(&sockets, ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return 1;
	s->cgroup = cgroup;
	s->netns = bpf_get_netns_cookie(ctx);
	s->proto = ctx->protocol;
	workload_of(s);
	return 1;
}

/* sock_release forgets that the socket asked the DNS proxy: whoever gets its port next is somebody
 * else. It marks the exchange of a datagram socket as ended, so that its record need not wait
 * until it has been idle. Of a socket with several peers it is the one it sent to last.
 */
SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	struct sk_state *s = bpf_sk_storage_get(&sockets, ctx, 0, 0);
	struct udp_key k = {};
	struct udp_flow *f;

	if (!s || ctx->protocol != IPPROTO_UDP)
		return 1;
	if (s->dns_port) {
		struct svc_key from = { .addr = s->dns_from, .port = s->dns_port, .proto = IPPROTO_UDP };

		bpf_map_delete_elem(&dns_clients, &from);
	}
	if (!s->backend_port)
		return 1;
	k.cookie = bpf_get_socket_cookie(ctx);
	k.addr = s->backend;
	k.port = s->backend_port;
	f = bpf_map_lookup_elem(&udp_flows, &k);
	if (f)
		f->flags |= FLOW_ENDED;
	return 1;
}
