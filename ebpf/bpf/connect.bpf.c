// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * connect.bpf.c: connect() of a workload, TCP and connected UDP: to the DNS proxy, to an endpoint
 * of the service address, and only as the egress policy allows.
 */
#include "outbound.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* judge_connect asks the policy about a TCP connection: 0 or the errno. */
GLOBAL int judge_connect(struct sk_state *s, const struct outbound *o, __u64 cookie)
{
	struct outcome out = { .verdict = VERDICT_ALLOW, .audit = VERDICT_ALLOW };
	struct event *e;

	if (!s || !o)
		return EINVAL;
	if (!(o->flags & SK_DNS)) {
		struct query q = {
			.subject = s->identity, .peer = o->peer, .addr = o->addr,
			.port = bpf_ntohs(o->asked.port), .proto = o->asked.proto, .dir = DIR_EGRESS,
		};

		decide(&q, &out);
	}
	e = record_verdict(&out, DIR_EGRESS);
	if (e) {
		e->remote = o->addr;
		e->remote_port = o->port;
		e->proto = o->asked.proto;
		e->cgroup = s->cgroup;
		e->identity = s->identity;
		e->peer = o->peer;
		e->cookie = cookie;
		if (o->flags & SK_HINT)
			e->flags |= FLOW_HINT;
		if (o->flags & SK_VIP) {
			e->vip = o->asked.addr;
			e->vip_port = o->asked.port;
		}
		bpf_ringbuf_submit(e, 0);
	}
	s->verdict = out.verdict;
	s->rule = out.rule;
	s->audit_rule = out.audit == VERDICT_DENY ? out.audit_rule : 0;
	return out.verdict == VERDICT_DENY ? out.err : 0;
}

/* go fills the socket's state and gives 0 or the errno; o->flags tell whether to rewrite. */
static __always_inline int go(struct bpf_sock_addr *ctx, struct sk_state *s, struct outbound *o)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	int err;

	s->flags &= ~(SK_VIP | SK_DNS | SK_DNS_DENIED | SK_NO_PORT | SK_TOLD | SK_OLD | SK_HINT | SK_DEAD | SK_FULL);
	s->proto = ctx->protocol;
	s->dir = DIR_EGRESS;
	s->verdict = VERDICT_NONE;
	o->asked.proto = ctx->protocol;

	err = find_way(o, s->netns);
	if (err && o->refusal && ctx->protocol == IPPROTO_UDP) {
		/* Resolvers sort addresses by connecting datagram sockets to them, whatever the port, and send
		 * nothing (RFC 6724, 10.1 for getaddrinfo): skb.bpf.c refuses what is sent.
		 */
		s->flags |= SK_NO_PORT;
		s->start = bpf_ktime_get_ns();
		s->peer = ID_UNKNOWN;
		s->vip = o->asked.addr;
		s->vip_port = o->asked.port;
		return 0;
	}
	if (err) {
		tell_refused(s, o, cookie, err);
		return err;
	}
	if (o->flags & SK_DNS)
		ask_resolver(s, o);
	else if (ctx->protocol == IPPROTO_UDP)
		ask_socket(ctx, o, s->netns);
	err = ctx->protocol == IPPROTO_TCP ? judge_connect(s, o, cookie) : may_send(s, o, cookie);
	if (err)
		return err;

	s->start = bpf_ktime_get_ns();
	s->peer = o->peer;
	s->flags |= o->flags;
	s->vip = o->asked.addr;
	s->vip_port = o->asked.port;
	s->backend = o->addr;
	s->backend_port = o->port;
	s->sampled = 0;
	s->tx_seen = 0;
	s->rx_seen = 0;
	s->retrans = 0;
	s->retrans_seen = 0;
	s->reset = 0;
	if (o->flags & (SK_VIP | SK_DNS) && ctx->protocol == IPPROTO_UDP)
		remember_asked(o, cookie);
	return 0;
}

/* state_for gives the state of a workload's socket; NULL lets the call go as it is. */
static __always_inline struct sk_state *state_for(struct bpf_sock_addr *ctx)
{
	struct sk_state *s;

	if (!ctx->sk || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return NULL;
	s = bpf_sk_storage_get(&sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return NULL;
	if (!s->cgroup)
		s->cgroup = bpf_get_current_ancestor_cgroup_id(managed_level);
	if (!s->netns)
		s->netns = bpf_get_netns_cookie(ctx);
	return workload_of(s) ? s : NULL;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct outbound o = { .family = FAMILY_V4 };
	struct sk_state *s = state_for(ctx);
	int err;

	if (!s)
		return 1;
	addr_v4(&o.asked.addr, CTX(ctx, user_ip4));
	o.asked.port = ctx->user_port;
	err = go(ctx, s, &o);
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

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct outbound o = { .family = FAMILY_ANY };
	struct sk_state *s = state_for(ctx);
	struct addr mapped = {};
	int err;

	if (!s)
		return 1;
	o.asked.addr.w[0] = CTX(ctx, user_ip6[0]);
	o.asked.addr.w[1] = CTX(ctx, user_ip6[1]);
	o.asked.addr.w[2] = CTX(ctx, user_ip6[2]);
	o.asked.addr.w[3] = CTX(ctx, user_ip6[3]);
	o.asked.port = ctx->user_port;
	/* On a socket bound to IPv4 the kernel makes 127.0.0.1 of :: after this. */
	mapped.w[0] = ctx->sk->src_ip6[0];
	mapped.w[1] = ctx->sk->src_ip6[1];
	mapped.w[2] = ctx->sk->src_ip6[2];
	if (addr_is_v4(&mapped) && !(o.asked.addr.w[0] | o.asked.addr.w[1] | o.asked.addr.w[2] | o.asked.addr.w[3]))
		addr_v4(&o.asked.addr, 0);
	err = go(ctx, s, &o);
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
