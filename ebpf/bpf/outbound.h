/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* outbound.h: where a connect or a sendmsg goes: the DNS proxy, an endpoint of a service, or there. */
#ifndef INLAY_OUTBOUND_H
#define INLAY_OUTBOUND_H

#include "datagram.h"
#include "service.h"

/* A heartbeat of the DNS proxy that is older than this is the sign of its death, in ns. */
const volatile __u64 dns_stale = 1000000000;

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
	__u32  pad2;
	__u64  peer;
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
	struct backend *b;
	struct svc *v;

	if (!o)
		return EINVAL;
	o->addr = o->asked.addr;
	o->port = o->asked.port;
	o->flags = 0;
	if (o->asked.port == DNS_PORT) {
		if (to_proxy(o, netns)) {
			o->flags = SK_DNS;
			o->peer = ID_AGENT;
			count(COUNT_DNS_REDIRECTED);
			return 0;
		}
		count(COUNT_DNS_PASSED);
	}
	v = bpf_map_lookup_elem(&services, &o->asked);
	if (v) {
		b = pick(&o->asked, v, o->seed ? mix(o->seed ^ v->id) | 1 : 0, o->family);
		if (!b) {
			count(COUNT_NO_ENDPOINT);
			return v->slots ? ENETUNREACH : ECONNREFUSED;
		}
		o->addr = b->addr;
		o->port = b->port;
		o->peer = b->identity;
		o->flags = SK_VIP;
		return 0;
	}
	addr_specific(&o->addr);
	{
		struct svc_key at = { .addr = o->addr, .port = o->port, .proto = o->asked.proto };
		bool hint = false;

		o->peer = dialled(&at, netns, &hint);
		if (hint)
			o->flags |= SK_HINT;
	}
	return 0;
}

/* tell_refused makes the record of a service without endpoint: no rule refused it. */
static __always_inline void tell_refused(const struct sk_state *s, const struct outbound *o, __u64 cookie, int err)
{
	struct event *e = record(EVENT_DENIED);

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
	bpf_ringbuf_submit(e, 0);
}

/* remember_asked lets recvmsg show the address that was asked. */
static __always_inline void remember_asked(const struct outbound *o, __u64 cookie)
{
	struct udp_key k = { .cookie = cookie, .addr = o->addr, .port = o->port };
	struct reverse r = { .addr = o->asked.addr, .port = o->asked.port };

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
