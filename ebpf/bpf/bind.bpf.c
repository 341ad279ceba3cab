// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* bind.bpf.c: remembers whose socket it is; refuses nothing. */
#include "state.h"

char _license[] SEC("license") = "Dual BSD/GPL";

static __always_inline int remember(struct bpf_sock_addr *ctx)
{
	struct sk_state *s;

	if (!ctx->sk)
		return 1;
	s = bpf_sk_storage_get(&sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return 1;
	if (!s->cgroup)
		s->cgroup = bpf_get_current_ancestor_cgroup_id(managed_level);
	if (!s->netns)
		s->netns = bpf_get_netns_cookie(ctx);
	workload_of(s);
	return 1;
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	return remember(ctx);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	return remember(ctx);
}
