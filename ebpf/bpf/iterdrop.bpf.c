// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* iterdrop.bpf.c: the round of iter.h for kernels before 6.5: skb.bpf.c drops what is marked dead. */
#include "iter.h"

char _license[] SEC("license") = "Dual BSD/GPL";

SEC("iter/tcp")
int iter_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct tcp_sock *tp;

	if (!sk)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp)
		round_tcp(tp);
	return 0;
}

SEC("iter/udp")
int iter_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = ctx->udp_sk;

	if (sk)
		round_udp(sk);
	return 0;
}
