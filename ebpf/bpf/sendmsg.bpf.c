// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * sendmsg.bpf.c: a datagram of a workload that names its destination. One socket stays with one
 * endpoint of a service as long as the set of endpoints stays.
 */
#include "outbound.h"

char _license[] SEC("license") = "Dual BSD/GPL";

static __always_inline int go(struct bpf_sock_addr *ctx, struct outbound *o)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct sk_state *s;
	int err;

	if (!ctx->sk || ctx->protocol != IPPROTO_UDP)
		return 0;
	s = bpf_sk_storage_get(&sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return 0;
	if (!s->cgroup)
		s->cgroup = bpf_get_current_ancestor_cgroup_id(managed_level);
	if (!s->netns)
		s->netns = bpf_get_netns_cookie(ctx);
	if (!workload_of(s))
		return 0;
	/* What a connected dual-stack socket sends to IPv4 comes here with the endpoint as its
	 * destination; connect has judged it, under the address that was asked.
	 */
	if (s->flags & (SK_VIP | SK_DNS) && o->asked.port == s->backend_port &&
	    addr_equal(&o->asked.addr, &s->backend))
		return 0;
	o->asked.proto = IPPROTO_UDP;
	o->seed = mix((__u32)cookie ^ (__u32)(cookie >> 32)) | 1;
	err = find_way(o, s->netns);
	if (err) {
		tell_refused(s, o, cookie, err);
		return err;
	}
	if (o->flags & SK_DNS)
		ask_resolver(s, o);
	else
		ask_socket(ctx, o, s->netns);
	err = may_send(s, o, cookie);
	if (err)
		return err;
	s->proto = IPPROTO_UDP;
	if (!s->start) { /* never connected; the last one: sock_release ends its exchange */
		s->peer = o->peer;
		s->backend = o->addr;
		s->backend_port = o->port;
	}
	if (o->flags & (SK_VIP | SK_DNS))
		remember_asked(o, cookie);
	return 0;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct outbound o = { .family = FAMILY_V4 };
	int err;

	addr_v4(&o.asked.addr, CTX(ctx, user_ip4));
	o.asked.port = ctx->user_port;
	err = go(ctx, &o);
	if (err) {
		bpf_set_retval(-err);
		return 0;
	}
	if (o.flags & (SK_VIP | SK_DNS)) {
		ctx->user_ip4 = o.addr.w[3];
		ctx->user_port = o.port;
	}
	return 1;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	/* The kernel refuses a mapped address that replaces another one here (ENOTSUPP); a mapped
	 * one that the program itself gave comes to sendmsg4.
	 */
	struct outbound o = { .family = FAMILY_V6 };
	int err;

	o.asked.addr.w[0] = CTX(ctx, user_ip6[0]);
	o.asked.addr.w[1] = CTX(ctx, user_ip6[1]);
	o.asked.addr.w[2] = CTX(ctx, user_ip6[2]);
	o.asked.addr.w[3] = CTX(ctx, user_ip6[3]);
	o.asked.port = ctx->user_port;
	err = go(ctx, &o);
	if (err) {
		bpf_set_retval(-err);
		return 0;
	}
	if (o.flags & (SK_VIP | SK_DNS)) {
		ctx->user_ip6[0] = o.addr.w[0];
		ctx->user_ip6[1] = o.addr.w[1];
		ctx->user_ip6[2] = o.addr.w[2];
		ctx->user_ip6[3] = o.addr.w[3];
		ctx->user_port = o.port;
	}
	return 1;
}
