// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/*
 * trace.bpf.c (optional): tells the close of connections that are older than the agent, for which
 * sockops are not called, and counts retransmitted segments.
 */
#include "tcp.h"
#include <bpf/bpf_tracing.h>

char _license[] SEC("license") = "Dual BSD/GPL";

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(set_state, struct sock *sk, int was, int now)
{
	struct sk_state *s;
	struct tcp_sock *tp;
	struct tuple t = {};

	if (now != BPF_TCP_CLOSE || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	s = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!s || !(s->flags & SK_OLD) || s->flags & SK_TRACKED)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	sock_addrs(&tp->inet_conn.icsk_inet.sk, &t.src, &t.dst);
	t.sport = tp->inet_conn.icsk_inet.inet_sport;
	t.dport = tp->inet_conn.icsk_inet.sk.__sk_common.skc_dport;
	t.netns = s->netns;
	if (was == BPF_TCP_LISTEN)
		return remove_listener(s, &t.src, t.sport);
	if (s->dir == DIR_EGRESS)
		disclaim(&t, bpf_get_socket_cookie(sk));
	return tell_tcp(EVENT_CLOSE, s, tp, bpf_get_socket_cookie(sk));
}

SEC("tp_btf/tcp_retransmit_skb")
int BPF_PROG(retransmit, struct sock *sk)
{
	struct sk_state *s = bpf_sk_storage_get(&sockets, sk, 0, 0);

	if (!s || !(s->flags & SK_MANAGED))
		return 0;
	__sync_fetch_and_add(&s->retrans, 1);
	count(COUNT_RETRANSMITS);
	return 0;
}
