/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* outbound.h: where a connect or a sendmsg goes: the DNS proxy, an endpoint of a service, or there. */
#ifndef INLAY_OUTBOUND_H
#define INLAY_OUTBOUND_H

#include "datagram.h"
#include "service.h"

/* A heartbeat of the DNS proxy that is older than this is the sign of its death, in ns. */
const volatile __u64 dns_stale = 2000000000;

#define DNS_PORT bpf_htons(53)

/* struct outbound: one way out. The first three are given, the others follow. */
struct outbound {
	struct svc_key asked;
	__u32 seed;	/* 0: balance at random */
	__u32 family;	/* enum family */
	struct addr addr;
	__be16 port;
	__u16  pad;
	__u32  flags;	/* SK_VIP, SK_DNS, SK_HINT */
	__u32  refusal;	/* FLOW_NO_PORT */
	__u64  peer;
	__u64  resolver; /* with SK_DNS: who was asked; peer is the proxy then */
};

static __always_inline bool to_proxy(struct outbound *o, __u64 netns)
{
	struct dns_proxy *p = bpf_map_lookup_elem(&dns_proxies, &netns);
	bool v4 = addr_is_v4(&o->asked.addr);

	if (p && p->heartbeat + dns_stale >= bpf_ktime_get_ns()) {
		if (!v4 && p->port6) {
			o->addr = p->addr6;
			o->port = p->port6;
			return true;
		}
		if ((v4 || o->family == FAMILY_ANY) && p->port4) {
			o->addr = p->addr4;
			o->port = p->port4;
			return true;
		}
	}
	return false;
}

/* find_way fills o and gives 0 or the errno of a refusal. */
GLOBAL int find_way(struct outbound *o, __u64 netns)
{
	struct svc_key at = {};
	struct backend b;
	bool hint = false;
	struct svc *v;

	if (!o)
		return EINVAL;
	o->addr = o->asked.addr;
	o->port = o->asked.port;
	o->flags = 0;
	o->refusal = 0;
	v = bpf_map_lookup_elem(&services, &o->asked);
	if (v) {
		if (!pick(&o->asked, v, o->seed ? mix(o->seed ^ v->id) | 1 : 0, o->family, &b)) {
			count(COUNT_NO_ENDPOINT);
			return v->slots ? ENETUNREACH : ECONNREFUSED;
		}
		o->addr = b.addr;
		o->port = b.port;
		o->peer = b.identity;
		o->flags = SK_VIP;
		return 0;
	}
	addr_specific(&o->addr);
	at.addr = o->addr;
	if (o->asked.port != DNS_PORT && bpf_map_lookup_elem(&services, &at)) {
		o->refusal = FLOW_NO_PORT;
		return ECONNREFUSED;
	}
	at.port = o->port;
	at.proto = o->asked.proto;
	o->peer = dialled(&at, netns, &hint);
	if (o->asked.port == DNS_PORT) {
		if (to_proxy(o, netns)) {
			o->flags = SK_DNS;
			o->resolver = o->peer;
			o->peer = ID_AGENT;
			count(COUNT_DNS_REDIRECTED);
			return 0;
		}
		count(COUNT_DNS_PASSED);
	}
	if (hint)
		o->flags |= SK_HINT;
	return 0;
}

/* ask_resolver asks the policy about the resolver that a query to the proxy was meant for. The proxy
 * forwards with the rights of the node, so what the workload may not reach, it must not name: then
 * the node's own resolvers are asked.
 */
GLOBAL int ask_resolver(const struct sk_state *s, struct outbound *o)
{
	struct query q = { .dir = DIR_EGRESS };
	struct outcome out = {};

	if (!s || !o)
		return 0;
	q.subject = s->identity;
	q.peer = o->resolver;
	q.addr = o->asked.addr;
	q.port = bpf_ntohs(DNS_PORT);
	q.proto = o->asked.proto;
	addr_specific(&q.addr);
	decide(&q, &out);
	if (out.verdict == VERDICT_DENY)
		o->flags |= SK_DNS_DENIED;
	return 0;
}

/* ask_socket knows a datagram's receiver on this machine by the socket it will come to: that may be
 * bound to every address, of which only one is registered.
 */
static __always_inline void ask_socket(struct bpf_sock_addr *ctx, struct outbound *o, __u64 netns)
{
	struct bpf_sock_tuple t = {};
	struct sk_state *theirs;
	struct bpf_sock *sk;

	if (o->flags & (SK_VIP | SK_DNS) || !is_local(&o->addr, netns))
		return;
	if (addr_is_v4(&o->addr)) {
		t.ipv4.saddr = ctx->sk->src_ip4;
		t.ipv4.sport = bpf_htons(ctx->sk->src_port);
		t.ipv4.daddr = o->addr.w[3];
		t.ipv4.dport = o->port;
		sk = bpf_sk_lookup_udp(ctx, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		t.ipv6.saddr[0] = ctx->sk->src_ip6[0];
		t.ipv6.saddr[1] = ctx->sk->src_ip6[1];
		t.ipv6.saddr[2] = ctx->sk->src_ip6[2];
		t.ipv6.saddr[3] = ctx->sk->src_ip6[3];
		t.ipv6.sport = bpf_htons(ctx->sk->src_port);
		t.ipv6.daddr[0] = o->addr.w[0];
		t.ipv6.daddr[1] = o->addr.w[1];
		t.ipv6.daddr[2] = o->addr.w[2];
		t.ipv6.daddr[3] = o->addr.w[3];
		t.ipv6.dport = o->port;
		sk = bpf_sk_lookup_udp(ctx, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return;
	theirs = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (theirs && theirs->flags & SK_MANAGED)
		o->peer = theirs->identity;
	bpf_sk_release(sk);
}

/* tell_refused makes the record of a service without endpoint, or port: no rule refused it. */
static __always_inline void tell_refused(const struct sk_state *s, const struct outbound *o, __u64 cookie, int err)
{
	struct event *e;

	if (o->refusal)
		count(COUNT_NO_PORT);
	e = record(EVENT_DENIED);
	if (!e)
		return;
	e->cgroup = s->cgroup;
	e->identity = s->identity;
	e->cookie = cookie;
	e->vip = o->asked.addr;
	e->vip_port = o->asked.port;
	e->err = err;
	e->dir = DIR_EGRESS;
	e->proto = o->asked.proto;
	e->verdict = VERDICT_NONE;
	e->flags = o->refusal;
	bpf_ringbuf_submit(e, 0);
}

/* remember_asked lets recvmsg show the address that was asked. */
static __always_inline void remember_asked(const struct outbound *o, __u64 cookie)
{
	struct udp_key k = { .cookie = cookie, .addr = o->addr, .port = o->port };
	struct reverse r = {
		.addr = o->asked.addr, .port = o->asked.port, .flags = o->flags & SK_DNS_DENIED,
	};

	bpf_map_update_elem(&udp_reverse, &k, &r, BPF_ANY);
}

/* may_send asks the policy about a datagram to o: 0 or the errno. */
GLOBAL int may_send(const struct sk_state *s, const struct outbound *o, __u64 cookie)
{
	struct outcome out = {};
	struct datagram d = { .dir = DIR_EGRESS, .flags = DATAGRAM_KNOWN, .cookie = cookie };

	if (!s || !o)
		return EINVAL;
	d.remote = o->addr;
	d.rport = o->port;
	d.port = o->asked.port;
	d.proto = o->asked.proto;
	d.peer = o->peer;
	if (o->flags & SK_HINT)
		d.flags |= DATAGRAM_HINT;
	if (o->flags & (SK_VIP | SK_DNS)) {
		d.vip = o->asked.addr;
		d.vip_port = o->asked.port;
	}
	judge(s, &d, &out);
	return out.verdict == VERDICT_DENY ? out.err : 0;
}

#endif
