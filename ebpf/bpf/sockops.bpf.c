// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * sockops.bpf.c: the life of a TCP connection. Tells who makes it before its SYN leaves, knows who
 * made it when it is accepted, and makes one record when it closes.
 */
#include "tcp.h"

char _license[] SEC("license") = "Dual BSD/GPL";

struct ends {
	struct addr local;
	struct addr remote;
	__be16 lport;
	__be16 rport;
	__u32  pad;
};

static __always_inline void read_ends(struct bpf_sock_ops *ctx, struct ends *e)
{
	if (ctx->family == AF_INET6) {
		e->local.w[0] = CTX(ctx, local_ip6[0]);
		e->local.w[1] = CTX(ctx, local_ip6[1]);
		e->local.w[2] = CTX(ctx, local_ip6[2]);
		e->local.w[3] = CTX(ctx, local_ip6[3]);
		e->remote.w[0] = CTX(ctx, remote_ip6[0]);
		e->remote.w[1] = CTX(ctx, remote_ip6[1]);
		e->remote.w[2] = CTX(ctx, remote_ip6[2]);
		e->remote.w[3] = CTX(ctx, remote_ip6[3]);
	} else {
		addr_v4(&e->local, CTX(ctx, local_ip4));
		addr_v4(&e->remote, CTX(ctx, remote_ip4));
	}
	e->lport = bpf_htons(ctx->local_port);
	e->rport = bpf_htons(bpf_ntohl(ctx->remote_port)); /* network order, in 32 bits */
}

static __always_inline void follow(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* state_of gives the state of a socket, also of one that sock_create did not see: the kernel
 * makes the subflows of MPTCP without it.
 */
static __always_inline struct sk_state *state_of(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sk_state *s;
	struct tcp_sock *tp;

	if (!sk)
		return NULL;
	s = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return NULL;
	if (!s->netns)
		s->netns = bpf_get_netns_cookie(ctx);
	if (!s->cgroup) {
		tp = bpf_skc_to_tcp_sock(sk);
		if (tp)
			s->cgroup = cgroup_id_of((struct sock *)tp, managed_level);
	}
	return s;
}

static __always_inline void connecting(struct bpf_sock_ops *ctx)
{
	struct sk_state *s = state_of(ctx);
	struct ends e = {};

	if (!s || !workload_of(s))
		return;
	read_ends(ctx, &e);
	if (s->flags & SK_DNS) {
		struct svc_key from = { .addr = e.local, .port = e.lport, .proto = IPPROTO_TCP };
		struct dns_client c = { .cgroup = s->cgroup };

		if (!(s->flags & SK_DNS_DENIED)) {
			c.addr = s->vip;
			c.port = s->vip_port;
		}
		bpf_map_update_elem(&dns_clients, &from, &c, BPF_ANY);
	}
	{
		struct tuple t = {
			.src = e.local, .dst = e.remote, .sport = e.lport, .dport = e.rport, .netns = s->netns,
		};
		struct peer me = {
			.identity = s->identity, .cgroup = s->cgroup,
			.cookie = bpf_get_socket_cookie(ctx), .netns = s->netns,
		};

		int err = claim(&t, &me);

		if (err) {
			/* The receiver would take it for another's. The SYN must not leave. */
			struct outcome o = { .verdict = VERDICT_DENY, .err = ETIMEDOUT, .flags = FLOW_CLASH };
			struct event *ev;

			s->flags |= SK_DEAD;
			if (err == ENOSPC) {
				count(COUNT_PEERS_FULL);
				o.flags = FLOW_FULL;
				s->flags |= SK_FULL;
			}
			s->verdict = VERDICT_DENY;
			ev = record_verdict(&o, DIR_EGRESS);
			if (ev) {
				ev->local = e.local;
				ev->remote = e.remote;
				ev->local_port = e.lport;
				ev->remote_port = e.rport;
				ev->proto = IPPROTO_TCP;
				ev->cgroup = s->cgroup;
				ev->identity = s->identity;
				ev->peer = s->peer;
				ev->cookie = me.cookie;
				bpf_ringbuf_submit(ev, 0);
			}
		}
	}
	if (!s->start)
		s->start = bpf_ktime_get_ns();
	s->proto = IPPROTO_TCP;
	s->dir = DIR_EGRESS;
	s->flags |= SK_TRACKED;
	follow(ctx);
}

static __always_inline void accepted(struct bpf_sock_ops *ctx)
{
	struct sk_state *s = state_of(ctx);
	struct ends e = {};
	struct outcome o = {};
	struct query q = {};
	struct tuple t = {};
	bool hint = false;

	if (!s)
		return;
	/* It began as a copy of the listener's. */
	s->flags &= SK_MANAGED;
	if (!workload_of(s))
		return;
	read_ends(ctx, &e);
	t.src = e.remote;
	t.dst = e.local;
	t.sport = e.rport;
	t.dport = e.lport;
	t.netns = s->netns;
	q.subject = s->identity;
	q.peer = maker(&t, &hint);
	q.addr = e.remote;
	q.port = bpf_ntohs(e.lport);
	q.proto = IPPROTO_TCP;
	q.dir = DIR_INGRESS;
	decide(&q, &o);
	s->proto = IPPROTO_TCP;
	s->dir = DIR_INGRESS;
	s->peer = q.peer;
	s->verdict = o.verdict;
	s->rule = o.rule;
	s->audit_rule = o.audit == VERDICT_DENY ? o.audit_rule : 0;
	s->start = bpf_ktime_get_ns();
	s->sampled = 0;
	s->tx_seen = 0;
	s->rx_seen = 0;
	s->retrans = 0;
	s->retrans_seen = 0;
	s->flags |= SK_TRACKED | (hint ? SK_HINT : 0);
	if (o.verdict == VERDICT_DENY) /* the policy changed since the SYN */
		s->flags |= SK_DEAD;
	follow(ctx);
}

static __always_inline void listening(struct bpf_sock_ops *ctx)
{
	struct sk_state *s = state_of(ctx);
	struct ends e = {};

	if (!s || !workload_of(s))
		return;
	read_ends(ctx, &e);
	s->proto = IPPROTO_TCP;
	s->dir = DIR_INGRESS;
	add_listener(s, &e.local, e.lport);
	follow(ctx);
}

static __always_inline void closed(struct bpf_sock_ops *ctx, __u32 was)
{
	struct bpf_sock *sk = ctx->sk;
	struct sk_state *s;
	struct tcp_sock *tp;

	if (!sk)
		return;
	s = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!s)
		return;
	if (was == BPF_TCP_LISTEN) {
		struct ends e = {};

		read_ends(ctx, &e);
		remove_listener(s, &e.local, e.lport);
		return;
	}
	if (!(s->flags & SK_TRACKED))
		return;
	if (s->dir == DIR_EGRESS) {
		struct ends e = {};
		struct tuple t = {};

		read_ends(ctx, &e);
		t.src = e.local;
		t.dst = e.remote;
		t.sport = e.lport;
		t.dport = e.rport;
		t.netns = s->netns;
		disclaim(&t, bpf_get_socket_cookie(ctx));
		if (s->flags & SK_DNS) {
			struct svc_key from = { .addr = e.local, .port = e.lport, .proto = IPPROTO_TCP };

			bpf_map_delete_elem(&dns_clients, &from);
		}
	}
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp)
		tell_tcp(EVENT_CLOSE, s, tp, bpf_get_socket_cookie(ctx));
}

SEC("sockops")
int tcp_events(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		connecting(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		accepted(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		listening(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] == BPF_TCP_CLOSE)
			closed(ctx, ctx->args[0]);
		break;
	}
	return 1;
}
