/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* addr.h: addresses, IPv4 as ::ffff:a.b.c.d. */
#ifndef INLAY_ADDR_H
#define INLAY_ADDR_H

#include "maps.h"
#include <stdbool.h>
#include <linux/in.h>
#include <linux/errno.h>
#include <bpf/bpf_endian.h>

/* <linux/in6.h> would redefine struct in6_addr of core.h. */
#define IPPROTO_ICMPV6 58

/* CTX reads a field of the context where it stands: the verifier knows each by its offset, which
 * the compiler must therefore not compute.
 */
#define CTX(PTR, FIELD)									\
	({										\
		__u64 field;								\
		asm volatile("%[v] = *(u32 *)(%[p] + %[o])"				\
			     : [v] "=r"(field)						\
			     : [p] "r"(PTR), [o] "i"(__builtin_offsetof(typeof(*(PTR)), FIELD))); \
		(__u32)field;								\
	})

/* BOOL makes the answer of a GLOBAL function one that the verifier knows to be 0 or 1. */
#define BOOL(CALL)						\
	({							\
		int answer = (CALL);				\
		asm volatile("" : "+r"(answer));		\
		answer & 1;					\
	})

/* GLOBAL is for a function that the verifier proves once, by its arguments' types alone, not again
 * for each caller: so a pointer may be NULL there, and is tested. It has a stack frame of its own.
 */
#define GLOBAL __noinline __attribute__((unused))

static __always_inline void addr_v4(struct addr *a, __be32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = v4;
}

static __always_inline bool addr_is_v4(const struct addr *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static __always_inline bool addr_is_loopback(const struct addr *a)
{
	if (a->w[0] || a->w[1])
		return false;
	if (a->w[2] == bpf_htonl(0xffff))
		return a->b[12] == 127;
	return !a->w[2] && a->w[3] == bpf_htonl(1);
}

/* addr_specific makes of the unspecified address the loopback address that connecting to it
 * reaches, so that 0.0.0.0 is no way round what is said of 127.0.0.1.
 */
static __always_inline void addr_specific(struct addr *a)
{
	if (a->w[0] || a->w[1] || a->w[3])
		return;
	if (a->w[2] == bpf_htonl(0xffff))
		a->w[3] = bpf_htonl(0x7f000001);
	else if (!a->w[2])
		a->w[3] = bpf_htonl(1);
}

#endif
