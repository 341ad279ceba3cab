// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * sklookup.bpf.c (optional): a SYN that the listener's ingress policy denies is answered by a
 * reset, so that the client learns it at once instead of by a time-out. Without it skb.bpf.c drops
 * the same SYN. It is attached to one network namespace, and serves the listeners of that one.
 */
#include "flow.h"
#include "peer.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define AF_INET6 10

/* Cookie of the namespace that it is attached to: no helper tells it here. */
const volatile __u64 own_netns;

SEC("sk_lookup")
int syn_lookup(struct bpf_sk_lookup *ctx)
{
	struct tuple t = { .netns = own_netns };
	struct query q = {};
	struct outcome o = {};
	struct listener *l;
	struct event *e;
	bool hint = false;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET6) {
		t.src.w[0] = CTX(ctx, remote_ip6[0]);
		t.src.w[1] = CTX(ctx, remote_ip6[1]);
		t.src.w[2] = CTX(ctx, remote_ip6[2]);
		t.src.w[3] = CTX(ctx, remote_ip6[3]);
		t.dst.w[0] = CTX(ctx, local_ip6[0]);
		t.dst.w[1] = CTX(ctx, local_ip6[1]);
		t.dst.w[2] = CTX(ctx, local_ip6[2]);
		t.dst.w[3] = CTX(ctx, local_ip6[3]);
	} else {
		addr_v4(&t.src, CTX(ctx, remote_ip4));
		addr_v4(&t.dst, CTX(ctx, local_ip4));
	}
	t.sport = ctx->remote_port;
	t.dport = bpf_htons(ctx->local_port);
	l = listener_at(&t.dst, t.dport, own_netns);
	if (!l || !l->identity)
		return SK_PASS;
	q.subject = l->identity;
	q.peer = maker(&t, &hint);
	q.addr = t.src;
	q.port = bpf_ntohs(t.dport);
	q.proto = IPPROTO_TCP;
	q.dir = DIR_INGRESS;
	decide(&q, &o);
	if (o.verdict != VERDICT_DENY)
		return SK_PASS; /* what is audited, skb.bpf.c tells */
	o.err = 0; /* nobody here gets one */
	e = record_verdict(&o, DIR_INGRESS);
	if (e) {
		e->local = t.dst;
		e->remote = t.src;
		e->local_port = t.dport;
		e->remote_port = t.sport;
		e->proto = IPPROTO_TCP;
		e->cgroup = l->cgroup;
		e->identity = l->identity;
		e->peer = q.peer;
		if (hint)
			e->flags |= FLOW_HINT;
		bpf_ringbuf_submit(e, 0);
	}
	return SK_DROP;
}
