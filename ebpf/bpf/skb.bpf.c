// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * skb.bpf.c: ingress is decided on the SYN or the first datagram, at the socket that receives it.
 * Egress was decided by connect and sendmsg; what came by another way (MPTCP subflows, ICMP,
 * sockets older than the hooks) is decided here. Segments of an established connection pass after
 * one look at the socket's state.
 */
#include "datagram.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define PASS 1
#define DROP 0
#define SOCK_RAW 3
#define AF_INET 2
#define AF_INET6 10
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

/* struct packet: the headers that decide. */
struct packet {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8   proto;
	__u8   tcp_flags;
	__u8   icmp_type;
	__u8   pad;
	__be32 seq;
	__u32  len;	/* payload of a datagram, in bytes */
};

/* read_packet reads what follows the link header; false when it is malformed. Every read is
 * checked against the packet's length by bpf_skb_load_bytes.
 */
GLOBAL int read_packet(struct __sk_buff *ctx, struct packet *p)
{
	__u32 off, head;
	__u8 b[40];

	if (!p)
		return false;
	/* 28 bytes: the headers of most datagrams. Whatever is judged here has 8 after those of IP. */
	if (bpf_skb_load_bytes(ctx, 0, b, 28))
		return false;
	if (b[0] >> 4 == 4) {
		__builtin_memset(&p->src, 0, sizeof(p->src));
		__builtin_memset(&p->dst, 0, sizeof(p->dst));
		p->src.w[2] = bpf_htonl(0xffff);
		p->dst.w[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&p->src.w[3], b + 12, 4);
		__builtin_memcpy(&p->dst.w[3], b + 16, 4);
		p->proto = b[9];
		off = (b[0] & 15) * 4;
		if (off < 20)
			return false;
		if (off == 20 && p->proto == IPPROTO_UDP) {
			__builtin_memcpy(&p->sport, b + 20, 2);
			__builtin_memcpy(&p->dport, b + 22, 2);
			p->len = ctx->len - 28;
			return true;
		}
	} else {
		__u8 next;

		if (b[0] >> 4 != 6 || bpf_skb_load_bytes(ctx, 0, b, 40))
			return false;
		__builtin_memcpy(&p->src, b + 8, 16);
		__builtin_memcpy(&p->dst, b + 24, 16);
		next = b[6];
		off = 40;
		/* RFC 8200: hop-by-hop 0, routing 43, destination 60 come before the transport; a fragment
		 * header 44 is left on a packet that is whole (RFC 6946). More of them than here are no
		 * packet of its socket's protocol.
		 */
		for (int i = 0; i < 5 && (next == 0 || next == 43 || next == 60 || next == 44); i++) {
			if (bpf_skb_load_bytes(ctx, off, b, 2))
				return false;
			off += next == 44 ? 8 : (b[1] + 1) * 8;
			next = b[0];
		}
		p->proto = next;
	}
	head = 4;
	switch (p->proto) {
	case IPPROTO_TCP:
		if (bpf_skb_load_bytes(ctx, off, b, 14))
			return false;
		__builtin_memcpy(&p->seq, b + 4, 4);
		p->tcp_flags = b[13];
		break;
	case IPPROTO_UDP:
		head = 8;
		/* fall through: ports come first in all of these */
	case IPPROTO_UDPLITE:
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
		if (bpf_skb_load_bytes(ctx, off, b, 4))
			return false;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		if (bpf_skb_load_bytes(ctx, off, b, 4))
			return false;
		p->icmp_type = b[0];
		/* fall through: no ports */
	default:
		__builtin_memset(b, 0, 4);
	}
	__builtin_memcpy(&p->sport, b, 2);
	__builtin_memcpy(&p->dport, b + 2, 2);
	p->len = ctx->len > off + head ? ctx->len - off - head : 0;
	return true;
}

/* Errors belong to a connection that was judged, and without neighbour discovery there is none. */
static __always_inline bool always_passes(const struct packet *p)
{
	if (p->proto == IPPROTO_ICMP) /* unreachable, quench, redirect, time exceeded, parameter problem */
		return p->icmp_type == 3 || p->icmp_type == 4 || p->icmp_type == 5 ||
		       p->icmp_type == 11 || p->icmp_type == 12;
	if (p->proto == IPPROTO_ICMPV6) /* RFC 4443: errors are below 128; RFC 4861: 133 to 137 */
		return p->icmp_type < 128 || (p->icmp_type >= 133 && p->icmp_type <= 137);
	return false;
}

/* told_before reports whether this very SYN was told already: one that is sent again bears the
 * same sequence number.
 */
static __always_inline bool told_before(const struct tuple *t, __be32 seq)
{
	__u32 *had = bpf_map_lookup_elem(&told, t);

	if (had && *had == seq)
		return true;
	bpf_map_update_elem(&told, t, &seq, BPF_ANY);
	return false;
}

/* judge_syn decides about the first segment of a connection. */
GLOBAL int judge_syn(struct sk_state *s, const struct packet *p, __u8 dir, __u64 cookie)
{
	struct query q = { .proto = IPPROTO_TCP, .dir = dir };
	struct tuple t = {};
	struct outcome o = {};
	struct event *e;
	bool hint = false;

	if (!s || !p)
		return DROP;
	q.subject = s->identity;
	q.addr = dir == DIR_INGRESS ? p->src : p->dst;
	q.port = bpf_ntohs(p->dport);
	t.src = p->src;
	t.dst = p->dst;
	t.sport = p->sport;
	t.dport = p->dport;
	t.netns = s->netns;
	if (dir == DIR_INGRESS) {
		q.peer = maker(&t, &hint);
	} else {
		struct svc_key at = { .addr = p->dst, .port = p->dport, .proto = IPPROTO_TCP };

		q.peer = dialled(&at, s->netns, &hint);
	}
	decide(&q, &o);
	if ((o.verdict == VERDICT_DENY || o.audit == VERDICT_DENY) && !told_before(&t, p->seq)) {
		if (dir == DIR_INGRESS)
			o.err = 0; /* nobody here gets one */
		e = record_verdict(&o, dir);
		if (e) {
			e->local = dir == DIR_INGRESS ? p->dst : p->src;
			e->remote = dir == DIR_INGRESS ? p->src : p->dst;
			e->local_port = dir == DIR_INGRESS ? p->dport : p->sport;
			e->remote_port = dir == DIR_INGRESS ? p->sport : p->dport;
			e->proto = IPPROTO_TCP;
			e->cgroup = s->cgroup;
			e->identity = s->identity;
			e->peer = q.peer;
			e->cookie = cookie;
			if (hint)
				e->flags |= FLOW_HINT;
			bpf_ringbuf_submit(e, 0);
		}
	}
	if (dir == DIR_EGRESS) {
		s->dir = DIR_EGRESS;
		s->proto = IPPROTO_TCP;
		s->peer = q.peer;
		s->verdict = o.verdict;
		s->rule = o.rule;
		s->audit_rule = o.audit == VERDICT_DENY ? o.audit_rule : 0;
		s->backend = p->dst;
		s->backend_port = p->dport;
		s->start = bpf_ktime_get_ns();
	}
	return o.verdict == VERDICT_DENY ? DROP : PASS;
}

/* judge_datagram decides about what has no connection, and counts it. */
GLOBAL int judge_datagram(struct sk_state *s, const struct packet *p, __u8 dir, __u64 cookie)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct udp_flow *f;
	struct outcome o = {};
	struct datagram d = { .dir = dir, .cookie = cookie };
	__u32 second = now >> 30;
	bool agent, claimed;

	if (!s || !p)
		return DROP;
	d.local = dir == DIR_INGRESS ? p->dst : p->src;
	d.remote = dir == DIR_INGRESS ? p->src : p->dst;
	d.lport = dir == DIR_INGRESS ? p->dport : p->sport;
	d.rport = dir == DIR_INGRESS ? p->sport : p->dport;
	d.proto = p->proto == IPPROTO_ICMPV6 ? IPPROTO_ICMP : p->proto;
	d.len = p->len;
	f = judge(s, &d, &o);
	if (!f)
		return o.verdict == VERDICT_DENY ? DROP : PASS;
	claimed = f->claimed == second;
	if (dir == DIR_EGRESS)
		f->claimed = second;
	agent = f->peer == ID_AGENT;
	f->last = now;
	if (dir == DIR_EGRESS) {
		__sync_fetch_and_add(&f->tx_packets, 1);
		__sync_fetch_and_add(&f->tx_bytes, p->len);
	} else {
		__sync_fetch_and_add(&f->rx_packets, 1);
		__sync_fetch_and_add(&f->rx_bytes, p->len);
	}
	if (!f->local_port)
		f->local_port = d.lport;
	if (o.verdict == VERDICT_DENY)
		return DROP;
	if (dir == DIR_INGRESS)
		return PASS;
	if (agent) {
		struct svc_key from = { .addr = p->src, .port = p->sport, .proto = p->proto };
		struct udp_key k = { .cookie = cookie, .addr = p->dst, .port = p->dport };
		struct reverse *r = bpf_map_lookup_elem(&udp_reverse, &k);
		struct dns_client c = { .cgroup = s->cgroup };

		if (r && !(r->flags & SK_DNS_DENIED)) {
			c.addr = r->addr;
			c.port = r->port;
		}
		bpf_map_update_elem(&dns_clients, &from, &c, BPF_ANY);
		s->dns_from = p->src;
		s->dns_port = p->sport;
	} else if (!claimed) {
		struct tuple t = {
			.src = p->src, .dst = p->dst, .sport = p->sport, .dport = p->dport,
			.proto = d.proto, .netns = s->netns,
		};
		struct peer me = { .identity = s->identity, .cgroup = s->cgroup, .cookie = now, .netns = s->netns };

		claim_datagram(&t, &me);
	}
	return PASS;
}

/* leads_nowhere reports whether a datagram is for a port that the service does not have, and tells the
 * first one: connect let the socket be.
 */
GLOBAL int leads_nowhere(struct sk_state *s, const struct packet *p, __u64 cookie)
{
	struct event *e;

	if (!s || !p || p->proto != IPPROTO_UDP || p->dport != s->vip_port || !addr_equal(&p->dst, &s->vip))
		return false;
	if (s->flags & SK_TOLD)
		return true;
	s->flags |= SK_TOLD;
	count(COUNT_NO_PORT);
	e = record(EVENT_DENIED);
	if (!e)
		return true;
	e->cgroup = s->cgroup;
	e->identity = s->identity;
	e->cookie = cookie;
	e->local = p->src;
	e->local_port = p->sport;
	e->vip = s->vip;
	e->vip_port = s->vip_port;
	e->err = EPERM; /* what a dropped datagram gives its sender */
	e->dir = DIR_EGRESS;
	e->proto = IPPROTO_UDP;
	e->verdict = VERDICT_NONE;
	e->flags = FLOW_NO_PORT;
	bpf_ringbuf_submit(e, 0);
	return true;
}

static __always_inline int judge_packet(struct __sk_buff *ctx, __u8 dir)
{
	struct bpf_sock *sk = ctx->sk;
	struct packet p = {};
	struct sk_state *s;
	bool tcp;

	if (!sk)
		return PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return PASS;
	s = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return DROP; /* no memory: closed */
	tcp = sk->protocol == IPPROTO_TCP && sk->type != SOCK_RAW;
	if (s->flags & SK_DEAD) /* a reset may tell the other end */
		return tcp && read_packet(ctx, &p) && p.tcp_flags & TCP_RST ? PASS : DROP;
	if (tcp) {
		__u32 state = sk->state;

		if (state != (dir == DIR_INGRESS ? BPF_TCP_LISTEN : BPF_TCP_SYN_SENT))
			return PASS;
		if (dir == DIR_EGRESS && s->dir == DIR_EGRESS && s->verdict == VERDICT_ALLOW)
			return PASS; /* by connect */
	}
	if (!s->cgroup)
		s->cgroup = bpf_sk_ancestor_cgroup_id(sk, managed_level);
	if (!(s->flags & SK_MANAGED)) {
		struct workload *w = bpf_map_lookup_elem(&workloads, &s->cgroup);

		if (!w)
			return PASS;
		s->identity = w->identity;
		s->flags |= SK_MANAGED;
	}
	if (!read_packet(ctx, &p))
		return DROP;
	if (sk->type != SOCK_RAW && (tcp || sk->protocol == IPPROTO_UDP) && p.proto != sk->protocol)
		return DROP; /* hidden behind more headers than are read */
	if (s->flags & SK_NO_PORT && dir == DIR_EGRESS && leads_nowhere(s, &p, bpf_get_socket_cookie(ctx)))
		return DROP;
	if (!tcp)
		return always_passes(&p) ? PASS : BOOL(judge_datagram(s, &p, dir, bpf_get_socket_cookie(ctx)));
	if ((p.tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return PASS;
	return BOOL(judge_syn(s, &p, dir, bpf_get_socket_cookie(ctx)));
}

SEC("cgroup_skb/ingress")
int skb_ingress(struct __sk_buff *ctx)
{
	return judge_packet(ctx, DIR_INGRESS);
}

SEC("cgroup_skb/egress")
int skb_egress(struct __sk_buff *ctx)
{
	return judge_packet(ctx, DIR_EGRESS);
}
