/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/*
 * iter.h: the round over living sockets: adopts those that are older than the hooks, judges
 * connections again, ends those that are denied now or whose endpoint is gone, and makes samples of
 * long ones. iter.bpf.c ends a connection by bpf_sock_destroy (6.5); iterdrop.bpf.c does without:
 * there nothing passes any more, and the connection ends by its time-outs.
 *
 * An iterator sees the sockets of the network namespace of the process that opened it.
 */
#ifndef INLAY_ITER_H
#define INLAY_ITER_H

#include "tcp.h"

struct bpf_iter_meta {
	struct seq_file *seq;
} __attribute__((preserve_access_index));

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
} __attribute__((preserve_access_index));

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct sock *udp_sk;
} __attribute__((preserve_access_index));

/* A connection that is told no earlier than this since it began, or since its last sample, gets
 * one, in ns; the loader may set it.
 */
const volatile __u64 sample_after = 9000000000;

/* adopt gives the state of a socket, also of one that no hook has seen; NULL for those that are
 * no workload's. *fresh: it was not known before.
 */
static __always_inline struct sk_state *adopt(struct sock *sk, bool *fresh)
{
	struct sk_state *s = bpf_sk_storage_get(&sockets, sk, 0, 0);
	__u64 cgroup;

	if (!s) {
		cgroup = cgroup_id_of(sk, managed_level);
		if (!cgroup || !bpf_map_lookup_elem(&workloads, &cgroup))
			return NULL;
		s = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (!s)
			return NULL;
	}
	if (!s->cgroup)
		s->cgroup = cgroup_id_of(sk, managed_level);
	if (!s->netns)
		s->netns = netns_of(sk);
	if (!workload_of(s))
		return NULL;
	*fresh = !s->start;
	return s;
}

/* learn fills the state of an old connection as well as can be known: who listens on its local
 * port says which side made it.
 */
GLOBAL int learn(struct sk_state *s, struct tuple *ours, __u64 cookie)
{
	bool hint = false;

	if (!s || !ours)
		return 0;
	s->flags |= SK_OLD;
	s->start = bpf_ktime_get_ns();
	s->proto = IPPROTO_TCP;
	s->verdict = VERDICT_ALLOW;
	if (listener_at(&ours->src, ours->sport, s->netns)) {
		struct tuple theirs = {
			.src = ours->dst, .dst = ours->src, .sport = ours->dport, .dport = ours->sport,
			.netns = ours->netns,
		};

		s->dir = DIR_INGRESS;
		s->peer = maker(&theirs, &hint);
	} else {
		struct svc_key at = { .addr = ours->dst, .port = ours->dport, .proto = IPPROTO_TCP };
		struct peer me = { .identity = s->identity, .cgroup = s->cgroup, .cookie = cookie, .netns = s->netns };

		s->dir = DIR_EGRESS;
		s->peer = dialled(&at, s->netns, &hint);
		s->backend = ours->dst;
		s->backend_port = ours->dport;
		claim(ours, &me);
	}
	if (hint)
		s->flags |= SK_HINT;
	return 0;
}

/* tell_again makes the record of what a living connection is judged to be now. */
GLOBAL int tell_again(const struct sk_state *s, const struct tuple *ours, __u8 proto, __u64 cookie,
		      const struct outcome *o)
{
	struct event *e;

	if (!s || !ours || !o)
		return 0;
	e = record_verdict(o, s->dir);
	if (!e)
		return 0;
	e->start = s->start;
	e->local = ours->src;
	e->remote = ours->dst;
	e->local_port = ours->sport;
	e->remote_port = ours->dport;
	e->proto = proto;
	e->cgroup = s->cgroup;
	e->identity = s->identity;
	e->peer = s->peer;
	e->cookie = cookie;
	if (s->flags & SK_HINT)
		e->flags |= FLOW_HINT;
	if (s->flags & SK_VIP) {
		e->vip = s->vip;
		e->vip_port = s->vip_port;
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* made_by looks again who made an old connection: that one may have been adopted after it. */
GLOBAL int made_by(struct sk_state *s, const struct tuple *ours)
{
	struct tuple theirs = {};
	bool hint = false;

	if (!s || !ours)
		return 0;
	theirs.src = ours->dst;
	theirs.dst = ours->src;
	theirs.sport = ours->dport;
	theirs.dport = ours->sport;
	theirs.netns = ours->netns;
	s->peer = maker(&theirs, &hint);
	return 0;
}

/* condemned judges a connection again and reports whether it must end. */
GLOBAL int condemned(struct sk_state *s, const struct tuple *ours, __u8 proto, __u64 cookie)
{
	struct gone_key gone_at = { .proto = proto };
	struct query q = { .proto = proto };
	struct outcome o = {};
	bool ended;

	if (!s || !ours)
		return false;
	if (s->flags & SK_DNS)
		return false;
	gone_at.addr = ours->dst;
	gone_at.port = ours->dport;
	ended = s->dir == DIR_EGRESS && s->flags & SK_VIP && bpf_map_lookup_elem(&gone, &gone_at);

	if (s->dir == DIR_INGRESS && proto == IPPROTO_TCP && s->flags & SK_OLD)
		made_by(s, ours);
	q.subject = s->identity;
	q.peer = s->peer;
	q.addr = ours->dst;
	q.dir = s->dir;
	if (s->dir == DIR_INGRESS)
		q.port = bpf_ntohs(ours->sport);
	else
		q.port = bpf_ntohs(s->flags & SK_VIP ? s->vip_port : ours->dport);
	decide(&q, &o);
	if (o.verdict == VERDICT_DENY) {
		o.err = ECONNABORTED; /* what the program gets of a socket that is destroyed */
		tell_again(s, ours, proto, cookie, &o);
		s->verdict = VERDICT_DENY;
		s->rule = o.rule;
		return true;
	}
	/* What audited policies would have denied is told once a rule. */
	if (o.audit == VERDICT_DENY && s->audit_rule != o.audit_rule)
		tell_again(s, ours, proto, cookie, &o);
	s->audit_rule = o.audit == VERDICT_DENY ? o.audit_rule : 0;
	s->rule = o.rule;
	return ended;
}

/* round_tcp reports whether the socket must end. */
static __always_inline bool round_tcp(struct tcp_sock *tp)
{
	struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	__u8 state = sk->__sk_common.skc_state;
	struct tuple t = {};
	bool fresh = false;
	struct sk_state *s;
	__u64 since, cookie;

	if (state == BPF_TCP_CLOSE)
		return false;
	s = adopt((struct sock *)tp, &fresh);
	if (!s)
		return false;
	sock_addrs(sk, &t.src, &t.dst);
	t.sport = tp->inet_conn.icsk_inet.inet_sport;
	t.dport = sk->__sk_common.skc_dport;
	t.netns = s->netns;
	if (state == BPF_TCP_LISTEN) {
		if (!(s->flags & SK_LISTENS)) {
			s->flags |= SK_OLD;
			s->proto = IPPROTO_TCP;
			s->dir = DIR_INGRESS;
			add_listener(s, &t.src, t.sport);
		}
		return false;
	}
	if (state == BPF_TCP_SYN_RECV || state == BPF_TCP_SYN_SENT)
		return false; /* judged this moment by its first segment */
	cookie = bpf_get_socket_cookie((struct sock *)tp);
	if (fresh || !(s->flags & (SK_TRACKED | SK_OLD))) {
		learn(s, &t, cookie);
		tell_tcp(EVENT_SAMPLE, s, tp, cookie);
		return false; /* judged by the next round, when its peer has been adopted too */
	}
	if (s->flags & SK_DEAD)
		return true;
	if (condemned(s, &t, IPPROTO_TCP, cookie)) {
		s->flags |= SK_DEAD;
		count(COUNT_DESTROYED);
		return true;
	}
	since = s->sampled ? s->sampled : s->start;
	if (bpf_ktime_get_ns() - since >= sample_after)
		tell_tcp(EVENT_SAMPLE, s, tp, cookie);
	return false;
}

/* round_udp is round_tcp for connected datagram sockets; unconnected ones are judged by datagram. */
static __always_inline bool round_udp(struct sock *sk)
{
	struct inet_sock *inet = (struct inet_sock *)sk;
	struct tuple t = {};
	bool fresh = false;
	struct sk_state *s;

	s = adopt(sk, &fresh);
	if (!s || !sk->__sk_common.skc_dport || s->flags & SK_NO_PORT)
		return false;
	if (fresh) {
		s->flags |= SK_OLD;
		return false; /* its datagrams are judged as they come */
	}
	if (s->flags & SK_DEAD)
		return true;
	sock_addrs(sk, &t.src, &t.dst);
	t.sport = inet->inet_sport;
	t.dport = sk->__sk_common.skc_dport;
	t.netns = s->netns;
	if (s->dir != DIR_EGRESS || !condemned(s, &t, IPPROTO_UDP, bpf_get_socket_cookie(sk)))
		return false;
	s->flags |= SK_DEAD;
	count(COUNT_DESTROYED);
	return true;
}

#endif
