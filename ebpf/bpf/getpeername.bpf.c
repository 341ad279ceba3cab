// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* getpeername.bpf.c: a connected socket shows the address that the program asked for. */
#include "state.h"

char _license[] SEC("license") = "Dual BSD/GPL";

static __always_inline struct sk_state *rewritten(struct bpf_sock_addr *ctx)
{
	struct sk_state *s;

	if (!ctx->sk)
		return NULL;
	s = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (!s || !(s->flags & (SK_VIP | SK_DNS)) || s->dir != DIR_EGRESS)
		return NULL;
	return s;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct sk_state *s = rewritten(ctx);

	if (s && addr_is_v4(&s->vip)) {
		ctx->user_ip4 = s->vip.w[3];
		ctx->user_port = s->vip_port;
	}
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct sk_state *s = rewritten(ctx);

	if (s) {
		ctx->user_ip6[0] = s->vip.w[0];
		ctx->user_ip6[1] = s->vip.w[1];
		ctx->user_ip6[2] = s->vip.w[2];
		ctx->user_ip6[3] = s->vip.w[3];
		ctx->user_port = s->vip_port;
	}
	return 1;
}
