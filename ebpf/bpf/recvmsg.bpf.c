// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* recvmsg.bpf.c: the source of a received datagram is the address that the program had asked. */
#include "state.h"

char _license[] SEC("license") = "Dual BSD/GPL";

static __always_inline struct reverse *asked(struct bpf_sock_addr *ctx, const struct addr *from)
{
	struct udp_key k = { .cookie = bpf_get_socket_cookie(ctx), .addr = *from, .port = ctx->user_port };

	return bpf_map_lookup_elem(&udp_reverse, &k);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct reverse *r;
	struct addr from;

	addr_v4(&from, CTX(ctx, user_ip4));
	r = asked(ctx, &from);
	if (r && addr_is_v4(&r->addr)) {
		ctx->user_ip4 = r->addr.w[3];
		ctx->user_port = r->port;
	}
	return 1;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct reverse *r;
	struct addr from;

	from.w[0] = CTX(ctx, user_ip6[0]);
	from.w[1] = CTX(ctx, user_ip6[1]);
	from.w[2] = CTX(ctx, user_ip6[2]);
	from.w[3] = CTX(ctx, user_ip6[3]);
	r = asked(ctx, &from);
	if (r) {
		ctx->user_ip6[0] = r->addr.w[0];
		ctx->user_ip6[1] = r->addr.w[1];
		ctx->user_ip6[2] = r->addr.w[2];
		ctx->user_ip6[3] = r->addr.w[3];
		ctx->user_port = r->port;
	}
	return 1;
}
