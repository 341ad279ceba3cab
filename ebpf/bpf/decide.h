/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/*
 * decide.h: may this workload speak with that peer? Reads the maps of policies and nothing else:
 * no packet, no socket. Every hook asks here, and so does decide_test (Go: Program.Run).
 */
#ifndef INLAY_DECIDE_H
#define INLAY_DECIDE_H

#include "addr.h"

/* What outcome.gen is when there is no subject, or when breakglass is on. */
#define GEN_NONE 0xfffffffe
#define GEN_ALL  0xffffffff

struct query {
	__u64 subject;
	__u64 peer;
	struct addr addr;	/* the real one of the peer */
	__u16 port;		/* host order: dialled by (egress) or listened on by (ingress) the program */
	__u8  proto;
	__u8  dir;
	__u32 pad;
};

struct outcome {
	__u8  verdict;	/* never VERDICT_NONE */
	__u8  audit;	/* the verdict if audited policies were enforced too */
	__u16 err;	/* errno of a refused connect(); never 0 when denied */
	__u32 rule;
	__u32 audit_rule;
	__u32 gen;
	__u32 flags;	/* FLOW_CLOSED */
};

static __always_inline bool breakglass(void)
{
	__u32 zero = 0;
	struct settings *s = bpf_map_lookup_elem(&settings_map, &zero);

	return s && s->allow_all;
}

/* generation gives what outcome.gen would be now: a decision with another one is out of date. */
static __always_inline __u32 generation(__u64 identity)
{
	struct subject *sub;

	if (breakglass())
		return GEN_ALL;
	sub = bpf_map_lookup_elem(&subjects, &identity);
	if (!sub)
		return GEN_NONE;
	return sub->gen ^ (sub->flags & SUBJECT_CLOSED ? 1u << 31 : 0);
}

/* One step of the search: pos grows by STEP when the segments before pos + STEP end below port.
 * Without branches, since the verifier would follow each of them at every step.
 */
#define STEP(WIDTH)								\
	do {									\
		__u32 last = pos + (WIDTH) - 1;					\
		__s64 in = (__s64)last - n;		/* below 0: there is one */	\
		__s64 less = (__s64)set->segs[last & (MAX_SEGS - 1)].hi - port;	\
		__u64 both = (__u64)(in & less) >> 63;				\
		asm volatile("" : "+r"(both));					\
		pos += both * (WIDTH);						\
	} while (0)

/* find_seg gives what the set says of a port: the first segment that does not end below it. */
static __always_inline const struct seg *find_seg(const struct port_set *set, __u16 port)
{
	__u32 n = set->n;
	__u64 pos = 0;

	STEP(32);
	STEP(16);
	STEP(8);
	STEP(4);
	STEP(2);
	STEP(1);
	STEP(1);
	if (pos >= n || pos >= MAX_SEGS)
		return NULL;
	return port >= set->segs[pos].lo ? &set->segs[pos] : NULL;
}

/* combine adds an entry to what the ones before it said, in both worlds: deny before allow, and
 * what was said first keeps its rule.
 */
static __always_inline void combine(struct outcome *o, const struct seg *g)
{
	if (g->action > o->verdict) { /* VERDICT_NONE < VERDICT_ALLOW < VERDICT_DENY */
		o->verdict = g->action;
		o->rule = g->rule;
		o->err = g->err;
	}
	if (g->audit > o->audit) {
		o->audit = g->audit;
		o->audit_rule = g->audit_rule;
	}
}

/* add_entry adds what policies say under a key; false when its ports are missing. */
static __always_inline bool add_entry(struct outcome *o, const __u32 *set, __u16 port)
{
	struct port_set *ps = bpf_map_lookup_elem(&port_sets, set);
	const struct seg *g;

	if (!ps)
		return false;
	g = find_seg(ps, port);
	if (g)
		combine(o, g);
	return true;
}

/* add_default decides what no entry decided. */
static __always_inline void add_default(struct outcome *o, const struct subject *sub, __u8 dir)
{
	__u32 rule, audit_rule, deny, audit_deny;

	if (dir == DIR_EGRESS) {
		rule = sub->rule[DIR_EGRESS];
		audit_rule = sub->audit_rule[DIR_EGRESS];
		deny = sub->flags & SUBJECT_DENY_EGRESS;
		audit_deny = sub->flags & SUBJECT_AUDIT_DENY_EGRESS;
	} else {
		rule = sub->rule[DIR_INGRESS];
		audit_rule = sub->audit_rule[DIR_INGRESS];
		deny = sub->flags & SUBJECT_DENY_INGRESS;
		audit_deny = sub->flags & SUBJECT_AUDIT_DENY_INGRESS;
	}
	if (o->verdict == VERDICT_NONE) {
		o->verdict = VERDICT_ALLOW;
		if (deny) {
			o->verdict = VERDICT_DENY;
			o->rule = rule;
		}
	}
	if (o->audit == VERDICT_NONE) {
		o->audit = VERDICT_ALLOW;
		if (audit_deny) {
			o->audit = VERDICT_DENY;
			o->audit_rule = audit_rule;
		}
	}
	if (o->verdict == VERDICT_DENY && !o->err)
		o->err = EPERM;
	if (o->verdict != VERDICT_DENY)
		o->err = 0;
}

/* decide_once decides by one generation and reports whether it was whole. */
static __always_inline bool decide_once(const struct query *q, const struct subject *sub, struct outcome *o)
{
	struct pol_key k = {
		.subject = q->subject,
		.gen = o->gen,
		.dir = q->dir,
		.proto = q->proto == IPPROTO_ICMPV6 ? IPPROTO_ICMP : q->proto,
	};
	struct cidr_key ck = {
		.prefixlen = CIDR_BASE + 128,
		.gen = o->gen,
		.subject = q->subject,
		.dir = q->dir,
		.addr = q->addr,
	};
	__u32 *set = NULL, *class;

	/* From the special to the general; the first entry found holds what the others say too. */
	if (q->peer) {
		k.kind = PEER_IDENTITY;
		k.peer = q->peer;
		set = bpf_map_lookup_elem(&policies, &k);
		k.peer = 0;
		if (!set && q->peer >= ID_FIRST) {
			k.kind = PEER_MESH;
			set = bpf_map_lookup_elem(&policies, &k);
		}
	}
	if (!set) {
		k.kind = PEER_ANY;
		set = bpf_map_lookup_elem(&policies, &k);
	}
	if (set && !add_entry(o, set, q->port))
		return false;

	class = bpf_map_lookup_elem(&cidrs, &ck);
	if (class) {
		k.kind = PEER_CIDR;
		k.peer = *class;
		set = bpf_map_lookup_elem(&policies, &k);
		if (set && !add_entry(o, set, q->port))
			return false;
	}
	add_default(o, sub, q->dir);
	return true;
}

/* decide fills o. A workload without policies may do everything. The generation may change while
 * it is read: then what was found is thrown away once, and decided again.
 */
GLOBAL int decide(const struct query *q, struct outcome *o)
{
	struct subject *sub;

	if (!q || !o)
		return 0;
	for (int i = 0; i < 2; i++) {
		*o = (struct outcome){ .verdict = VERDICT_ALLOW, .audit = VERDICT_ALLOW, .gen = GEN_NONE };
		if (breakglass()) {
			o->gen = GEN_ALL;
			return 0;
		}
		sub = bpf_map_lookup_elem(&subjects, &q->subject);
		if (!sub)
			return 0;
		o->gen = sub->gen;
		if (sub->flags & SUBJECT_CLOSED) {
			o->verdict = VERDICT_DENY;
			o->audit = VERDICT_DENY;
			o->err = EPERM;
			o->flags = FLOW_CLOSED;
			o->gen ^= 1u << 31;
			return 0;
		}
		o->verdict = VERDICT_NONE;
		o->audit = VERDICT_NONE;
		if (!decide_once(q, sub, o)) {
			/* An entry without its ports: closed, unless the second try finds them. */
			o->verdict = VERDICT_DENY;
			o->audit = VERDICT_DENY;
			o->err = EPERM;
			o->flags = FLOW_CLOSED;
			continue;
		}
		sub = bpf_map_lookup_elem(&subjects, &q->subject);
		if (sub && sub->gen == o->gen)
			return 0;
	}
	return 0;
}

#endif
