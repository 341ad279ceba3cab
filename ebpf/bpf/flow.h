/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* flow.h: records for the flow log. Each is counted as made; without room in the ring, as lost. */
#ifndef INLAY_FLOW_H
#define INLAY_FLOW_H

#include "decide.h"
#include "state.h"

/* record reserves a zeroed record, to be submitted by the caller; NULL when the ring is full. */
static __always_inline struct event *record(__u8 kind)
{
	struct event *e;

	count(COUNT_MADE);
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(COUNT_LOST);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_ns();
	e->kind = kind;
	return e;
}

/* record_verdict reserves the record of a denial, or of what audited policies would have denied; the
 * caller adds who and where, and submits it. NULL when both worlds allow, or without room.
 */
static __always_inline struct event *record_verdict(const struct outcome *o, __u8 dir)
{
	bool denied = o->verdict == VERDICT_DENY;
	struct event *e;

	if (!denied && o->audit != VERDICT_DENY)
		return NULL;
	if (!denied)
		count(COUNT_AUDITED);
	else
		count(dir == DIR_EGRESS ? COUNT_DENIED_EGRESS : COUNT_DENIED_INGRESS);
	e = record(denied ? EVENT_DENIED : EVENT_AUDIT);
	if (!e)
		return NULL;
	e->err = denied ? o->err : 0;
	e->rule = denied ? o->rule : o->audit_rule;
	e->dir = dir;
	/* An audit record bears the verdict that enforcing would have given. */
	e->verdict = VERDICT_DENY;
	e->flags = o->flags;
	return e;
}

#endif
