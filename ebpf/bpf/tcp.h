/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* tcp.h: what is told of a TCP connection, and who listens. */
#ifndef INLAY_TCP_H
#define INLAY_TCP_H

#include "core.h"
#include "flow.h"
#include "peer.h"

/* tell_tcp makes a record of what happened since the record before. */
static __noinline __attribute__((unused)) int tell_tcp(__u8 kind, struct sk_state *s, struct tcp_sock *tp, __u64 cookie)
{
	struct inet_sock *inet = &tp->inet_conn.icsk_inet;
	struct sock *sk = &inet->sk;
	struct addr local, remote;
	__u64 tx, rx;
	__u32 retrans;
	struct event *e;
	int err;

	if (kind == EVENT_CLOSE) {
		if (s->flags & SK_TOLD)
			return 0;
		s->flags |= SK_TOLD;
	}
	e = record(kind);
	if (!e)
		return 0;
	tx = tp->bytes_sent - tp->bytes_retrans;
	rx = tp->bytes_received;
	if (rx && sk->__sk_common.skc_flags & SOCK_DONE)
		rx--; /* a FIN takes a sequence number too */
	retrans = tp->total_retrans;
	err = sk->sk_err;
	e->start = s->start;
	e->cgroup = s->cgroup;
	e->identity = s->identity;
	e->peer = s->peer;
	e->cookie = cookie;
	e->tx_bytes = tx > s->tx_seen ? tx - s->tx_seen : 0;
	e->rx_bytes = rx > s->rx_seen ? rx - s->rx_seen : 0;
	sock_addrs(sk, &local, &remote);
	e->local = local;
	e->remote = remote;
	e->local_port = inet->inet_sport;
	e->remote_port = sk->__sk_common.skc_dport;
	if (s->flags & (SK_VIP | SK_DNS)) {
		e->vip = s->vip;
		e->vip_port = s->vip_port;
	}
	e->rule = s->rule;
	e->retrans = retrans - s->retrans_seen;
	e->srtt_us = tp->srtt_us >> 3;
	e->dir = s->dir;
	e->proto = IPPROTO_TCP;
	e->verdict = s->verdict ? s->verdict : VERDICT_ALLOW;
	if (s->flags & SK_HINT)
		e->flags |= FLOW_HINT;
	if (s->flags & SK_OLD)
		e->flags |= FLOW_OLD;
	if (s->flags & SK_FULL)
		e->flags |= FLOW_FULL;
	if (kind == EVENT_CLOSE) {
		e->err = err;
		if (err == ECONNRESET || err == EPIPE || err == ECONNABORTED)
			e->flags |= FLOW_RESET;
	}
	s->tx_seen = tx;
	s->rx_seen = rx;
	s->retrans_seen = retrans;
	s->sampled = e->time;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* add_listener counts a socket among those that listen on an address. */
GLOBAL int add_listener(struct sk_state *s, const struct addr *local, __be16 port)
{
	struct listen_key k = { .port = port, .proto = IPPROTO_TCP };
	struct listener l = { .refs = 1 }, *had;

	if (!s || !local)
		return 0;
	k.netns = s->netns;
	k.addr = *local;
	l.cgroup = s->cgroup;
	l.identity = s->identity;
	if (s->flags & SK_LISTENS)
		return 0;
	had = bpf_map_lookup_elem(&listeners, &k);
	if (had) {
		__sync_fetch_and_add(&had->refs, 1);
		if (had->identity != s->identity) {
			had->identity = ID_UNKNOWN;
			had->cgroup = 0;
		}
	} else if (bpf_map_update_elem(&listeners, &k, &l, BPF_NOEXIST)) {
		return 0; /* no room: who dials it sees ID_HOST, and a refusal is a time-out */
	}
	s->flags |= SK_LISTENS;
	return 0;
}

GLOBAL int remove_listener(struct sk_state *s, const struct addr *local, __be16 port)
{
	struct listen_key k = { .port = port, .proto = IPPROTO_TCP };
	struct listener *had;

	if (!s || !local)
		return 0;
	k.netns = s->netns;
	k.addr = *local;
	had = bpf_map_lookup_elem(&listeners, &k);
	if (!had || !(s->flags & SK_LISTENS))
		return 0;
	s->flags &= ~SK_LISTENS;
	if (__sync_fetch_and_add(&had->refs, -1) <= 1)
		bpf_map_delete_elem(&listeners, &k);
	return 0;
}

#endif
