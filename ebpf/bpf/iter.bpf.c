// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* iter.bpf.c: the round of iter.h, ending sockets by bpf_sock_destroy; the program gets ECONNABORTED. */
#include "iter.h"

char _license[] SEC("license") = "Dual BSD/GPL";

extern int bpf_sock_destroy(struct sock_common *sk) __attribute__((section(".ksyms")));

SEC("iter/tcp")
int iter_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct tcp_sock *tp;

	if (!sk)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp && round_tcp(tp))
		bpf_sock_destroy(sk);
	return 0;
}

SEC("iter/udp")
int iter_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = ctx->udp_sk;

	if (sk && round_udp(sk))
		bpf_sock_destroy((struct sock_common *)sk);
	return 0;
}
