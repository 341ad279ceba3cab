/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/*
 * core.h: the few fields of kernel structures that programs read, relocated at load (CO-RE), and
 * what follows from them: the cgroup, namespace and addresses of a socket.
 */
#ifndef INLAY_CORE_H
#define INLAY_CORE_H

#include "addr.h"
#include <bpf/bpf_core_read.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct net {
	__u64 net_cookie;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	__u8 bytes[16];	/* only its place is used */
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16  skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned long skc_flags;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	int level;
	struct kernfs_node *kn;
	struct cgroup *ancestors[];	/* since 6.1 */
};

struct sock_cgroup_data {
	struct cgroup *cgroup;
};

struct sock {
	struct sock_common __sk_common;
	struct sock_cgroup_data sk_cgrp_data;
	__u16 sk_protocol;
	int sk_err;
};

struct inet_sock {
	struct sock sk;
	__be16 inet_sport;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 srtt_us;		/* eighths of a microsecond */
	__u32 total_retrans;
	__u64 bytes_sent;	/* retransmissions included */
	__u64 bytes_retrans;
	__u64 bytes_received;
};
#pragma clang attribute pop

#define SOCK_DONE (1ul << 1) /* in skc_flags: the peer's FIN came */

#define AF_INET  2
#define AF_INET6 10

/* cgroup_id_of gives the id of the ancestor at managed_level of the socket's cgroup, as
 * bpf_sk_ancestor_cgroup_id does where that exists; 0 when its cgroup lies above.
 */
static __always_inline __u64 cgroup_id_of(struct sock *sk, __u32 level)
{
	struct cgroup *c = sk->sk_cgrp_data.cgroup, *a = NULL;

	if (!c || c->level < (int)level)
		return 0;
	bpf_core_read(&a, sizeof(a), &c->ancestors[level]);
	return a ? BPF_CORE_READ(a, kn, id) : 0;
}

static __always_inline __u64 netns_of(struct sock *sk)
{
	struct net *n = sk->__sk_common.skc_net.net;

	return n ? n->net_cookie : 0;
}

/* sock_addrs reads both ends of a socket. */
static __always_inline void sock_addrs(struct sock *sk, struct addr *local, struct addr *remote)
{
	if (sk->__sk_common.skc_family == AF_INET6) {
		bpf_core_read(local, sizeof(*local), &sk->__sk_common.skc_v6_rcv_saddr);
		bpf_core_read(remote, sizeof(*remote), &sk->__sk_common.skc_v6_daddr);
		return;
	}
	addr_v4(local, sk->__sk_common.skc_rcv_saddr);
	addr_v4(remote, sk->__sk_common.skc_daddr);
}

#endif
