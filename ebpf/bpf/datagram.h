/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/*
 * datagram.h: policy for what has no connection. The first datagram between a socket and a peer
 * decides, in its direction; all that follow, both ways, belong to that exchange.
 */
#ifndef INLAY_DATAGRAM_H
#define INLAY_DATAGRAM_H

#include "flow.h"
#include "peer.h"

/* struct datagram: one datagram as its socket sees it. */
struct datagram {
	struct addr local;	/* all 0: not known yet */
	struct addr remote;
	struct addr vip;	/* asked for; all 0: none */
	__be16 lport;
	__be16 rport;
	__be16 vip_port;
	__be16 port;	/* to ask the policy about; known only with DATAGRAM_KNOWN, else found here */
	__u8   proto;
	__u8   dir;
	__u16  flags;	/* DATAGRAM_* */
	__u32  len;	/* payload, in bytes */
	__u64  cookie;
	__u64  peer;	/* with DATAGRAM_KNOWN */
};
#define DATAGRAM_KNOWN 1	/* by connect or sendmsg, before it is made */
#define DATAGRAM_HINT 2

/* identify finds who is at the other end, and the port that the program itself used. */
GLOBAL int identify(const struct sk_state *s, struct datagram *d)
{
	bool hint = false;

	if (!s || !d)
		return 0;
	if (d->dir == DIR_INGRESS) {
		struct tuple t = {
			.src = d->remote, .dst = d->local, .sport = d->rport, .dport = d->lport,
			.proto = d->proto, .netns = s->netns,
		};

		d->peer = sender(&t, &hint);
		d->port = d->lport;
	} else {
		struct svc_key at = { .addr = d->remote, .port = d->rport, .proto = d->proto };
		struct udp_key k = { .cookie = d->cookie, .addr = d->remote, .port = d->rport };
		struct reverse *r = bpf_map_lookup_elem(&udp_reverse, &k);

		if (s->peer && s->backend_port == d->rport && addr_equal(&s->backend, &d->remote))
			d->peer = s->peer; /* as connect or sendmsg found out */
		else
			d->peer = dialled(&at, s->netns, &hint);
		d->port = d->rport;
		if (r) {
			d->port = r->port;
			d->vip = r->addr;
			d->vip_port = r->port;
		}
	}
	if (hint)
		d->flags |= DATAGRAM_HINT;
	return 0;
}

static __always_inline void decide_datagram(const struct query *q, struct outcome *o)
{
	/* The node's own proxy answers everybody: names are no secret between workloads. */
	if (q->peer == ID_AGENT)
		*o = (struct outcome){
			.verdict = VERDICT_ALLOW, .audit = VERDICT_ALLOW, .gen = generation(q->subject),
		};
	else
		decide(q, o);
}

GLOBAL int tell_datagram(const struct sk_state *s, const struct datagram *d, const struct outcome *o)
{
	struct event *e;

	if (!s || !d || !o)
		return 0;
	e = record_verdict(o, d->dir);
	if (!e)
		return 0;
	if (d->dir == DIR_INGRESS)
		e->err = 0; /* nobody here gets one */
	e->local = d->local;
	e->remote = d->remote;
	e->vip = d->vip;
	e->local_port = d->lport;
	e->remote_port = d->rport;
	e->vip_port = d->vip_port;
	e->proto = d->proto;
	e->cgroup = s->cgroup;
	e->identity = s->identity;
	e->peer = d->peer;
	e->cookie = d->cookie;
	if (d->flags & DATAGRAM_HINT)
		e->flags |= FLOW_HINT;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* remember keeps a decision for the datagrams that follow; the counts of the exchange go on. */
GLOBAL int remember(const struct sk_state *s, const struct datagram *d, const struct outcome *o)
{
	struct udp_flow fresh = {}, *f;
	struct udp_key k = {};

	if (!s || !d || !o)
		return 0;
	k.cookie = d->cookie;
	k.addr = d->remote;
	k.port = d->rport;
	fresh.first = bpf_ktime_get_coarse_ns(); /* as skb.bpf.c does: a tick at most behind */
	fresh.cgroup = s->cgroup;
	fresh.identity = s->identity;
	fresh.peer = d->peer;
	fresh.rule = o->rule;
	fresh.audit_rule = o->audit == VERDICT_DENY ? o->audit_rule : 0;
	fresh.gen = o->gen;
	fresh.local_port = d->lport;
	fresh.dir = d->dir;
	fresh.verdict = o->verdict;
	fresh.flags = (d->flags & DATAGRAM_HINT ? FLOW_HINT : 0) | o->flags;
	fresh.proto = d->proto;
	fresh.port = d->port;
	f = bpf_map_lookup_elem(&udp_flows, &k);
	if (f && f->peer == d->peer) {
		fresh.first = f->first;
		fresh.last = f->last;
		fresh.tx_bytes = f->tx_bytes;
		fresh.rx_bytes = f->rx_bytes;
		fresh.tx_packets = f->tx_packets;
		fresh.rx_packets = f->rx_packets;
	}
	return bpf_map_update_elem(&udp_flows, &k, &fresh, BPF_ANY);
}

/* taken_over reports whether somebody else sends from where the exchange began now. */
GLOBAL int taken_over(const struct sk_state *s, const struct datagram *d, __u64 was, __u32 hint)
{
	struct tuple t = {};

	if (!s || !d)
		return true;
	t.src = d->remote;
	t.dst = d->local;
	t.sport = d->rport;
	t.dport = d->lport;
	t.proto = d->proto;
	t.netns = s->netns;
	return !same_sender(&t, was, hint);
}

/* judge decides about a datagram, remembers it and tells it once; o.verdict is the answer. */
static __always_inline struct udp_flow *judge(const struct sk_state *s, struct datagram *d, struct outcome *o)
{
	struct udp_key k = { .cookie = d->cookie, .addr = d->remote, .port = d->rport };
	struct udp_flow *f = bpf_map_lookup_elem(&udp_flows, &k);
	struct query q = { .subject = s->identity, .addr = d->remote, .proto = d->proto };
	__u32 gen = generation(s->identity);
	bool told = false;

	*o = (struct outcome){ .verdict = VERDICT_ALLOW, .audit = VERDICT_ALLOW, .gen = gen };
	if (f && (d->flags & DATAGRAM_KNOWN) && f->dir == DIR_EGRESS && f->port != d->port) {
		/* The same endpoint, asked for under another port. */
	} else if (f && d->dir == DIR_INGRESS && f->dir == DIR_INGRESS &&
		   taken_over(s, d, f->peer, f->flags & FLOW_HINT)) {
		/* The same port, in other hands. */
	} else if (f && f->gen == gen) {
		if (f->verdict == VERDICT_ALLOW)
			return f;
		told = f->dir == d->dir; /* a denial of the other direction says nothing of this one */
	} else if (f && f->verdict == VERDICT_ALLOW) {
		/* The policy changed: the exchange is judged again as it began. */
		q.peer = f->peer;
		q.port = bpf_ntohs(f->port);
		q.dir = f->dir;
		decide_datagram(&q, o);
		if (o->verdict == VERDICT_ALLOW) {
			if (o->audit == VERDICT_DENY && f->audit_rule != o->audit_rule) {
				d->peer = f->peer;
				d->dir = f->dir;
				tell_datagram(s, d, o);
			}
			f->gen = o->gen;
			f->rule = o->rule;
			f->audit_rule = o->audit == VERDICT_DENY ? o->audit_rule : 0;
			return f;
		}
	}

	if (!(d->flags & DATAGRAM_KNOWN))
		identify(s, d);
	q.peer = d->peer;
	q.port = bpf_ntohs(d->port);
	q.dir = d->dir;
	decide_datagram(&q, o);
	if (told && o->verdict == VERDICT_DENY)
		return f;
	if (o->verdict == VERDICT_DENY || o->audit == VERDICT_DENY)
		tell_datagram(s, d, o);
	remember(s, d, o);
	return bpf_map_lookup_elem(&udp_flows, &k);
}

#endif
