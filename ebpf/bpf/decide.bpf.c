// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * decide.bpf.c: the decisions of decide.h and service.h for Program.Run; attached nowhere. The
 * "packet" is a struct decide_case or pick_case, answered in its place.
 */
#include "decide.h"
#include "service.h"

char _license[] SEC("license") = "Dual BSD/GPL";

SEC("tc")
int decide_test(struct __sk_buff *ctx)
{
	struct decide_case c;
	struct query q = {};
	struct outcome o = {};

	if (bpf_skb_load_bytes(ctx, 0, &c, sizeof(c)))
		return -1;
	q.subject = c.subject;
	q.peer = c.peer;
	q.addr = c.addr;
	q.port = bpf_ntohs(c.port);
	q.proto = c.proto;
	q.dir = c.dir;
	decide(&q, &o);
	c.verdict = o.verdict;
	c.audit = o.audit;
	c.err = o.err;
	c.rule = o.rule;
	c.audit_rule = o.audit_rule;
	c.gen = o.gen;
	c.flags = o.flags;
	return bpf_skb_store_bytes(ctx, 0, &c, sizeof(c), 0);
}

SEC("tc")
int pick_test(struct __sk_buff *ctx)
{
	struct pick_case c;
	struct svc *v;

	if (bpf_skb_load_bytes(ctx, 0, &c, sizeof(c)))
		return -1;
	c.found = 0;
	v = bpf_map_lookup_elem(&services, &c.service);
	if (v)
		c.found = pick(&c.service, v, c.seed, FAMILY_ANY, &c.backend) ? 1 : 2;
	return bpf_skb_store_bytes(ctx, 0, &c, sizeof(c), 0);
}
