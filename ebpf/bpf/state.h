/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* state.h: whose a socket is. */
#ifndef INLAY_STATE_H
#define INLAY_STATE_H

#include "addr.h"

/* Depth in the hierarchy of a workload's cgroup; the loader sets it. A cgroup further down
 * belongs to its ancestor at this depth.
 */
const volatile __u32 managed_level = 1;

static __always_inline void count(__u32 which)
{
	__u64 *n = bpf_map_lookup_elem(&counters, &which);

	/* Atomic although per CPU: a program may be interrupted by another one on its CPU. */
	if (n)
		__sync_fetch_and_add(n, 1);
}

/* workload_of gives the workload of a socket, NULL when nobody registered its cgroup, and keeps
 * in the socket's state what later hooks, which run on behalf of no process, must know.
 */
static __always_inline struct workload *workload_of(struct sk_state *s)
{
	struct workload *w = bpf_map_lookup_elem(&workloads, &s->cgroup);

	if (!w) {
		s->flags &= ~SK_MANAGED;
		return NULL;
	}
	s->identity = w->identity;
	s->flags |= SK_MANAGED;
	return w;
}

#endif
