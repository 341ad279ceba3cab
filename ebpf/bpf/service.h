/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* service.h: which endpoint a service address leads to. */
#ifndef INLAY_SERVICE_H
#define INLAY_SERVICE_H

#include "addr.h"

/* Which addresses the socket can be sent to. */
enum family {
	FAMILY_V4,	/* an AF_INET socket */
	FAMILY_V6,	/* sendmsg on an AF_INET6 socket: a mapped address is not supported there */
	FAMILY_ANY,	/* connect on an AF_INET6 socket */
};

/* mix spreads a seed over 32 bits (the finalizer of MurmurHash3). */
static __always_inline __u32 mix(__u32 h)
{
	h ^= h >> 16;
	h *= 0x85ebca6b;
	h ^= h >> 13;
	h *= 0xc2b2ae35;
	return h ^ h >> 16;
}

static __always_inline bool reaches(enum family f, const struct backend *b)
{
	return f == FAMILY_ANY || addr_is_v4(&b->addr) == (f == FAMILY_V4);
}

/* pick_slot draws from the alias table: seed 0 at random, else always the same for one seed and
 * one set of endpoints. It draws again, 4 times in all, when the endpoint is of a family that the
 * socket cannot reach.
 */
static __always_inline struct backend *pick_slot(const struct svc *v, __u32 seed, enum family f)
{
	struct slot_key k = { .svc = v->id, .gen = v->gen };
	__u32 n = v->slots;

	for (int i = 0; i < 4; i++) {
		__u32 r = seed ? mix(seed + i) : bpf_get_prandom_u32();
		__u32 cut = seed ? mix(~seed - i) : bpf_get_prandom_u32();
		struct backend *b;
		struct slot *s;

		k.index = (__u64)r * n >> 32;
		s = bpf_map_lookup_elem(&slots, &k);
		if (!s)
			return NULL;
		b = cut < s->cut || s->cut == 0xffffffff ? &s->a : &s->b;
		if (reaches(f, b))
			return b;
	}
	return NULL;
}

/* pick copies the endpoint for a connection to to, false when there is none. The set of endpoints
 * may be replaced while it is read, and the kernel may give the memory of the old value to that of
 * another key at once: what was read counts when the key still leads there afterwards. Otherwise
 * the service is read once more.
 */
static __always_inline bool pick(const struct svc_key *key, const struct svc *v, __u32 seed, enum family f, struct backend *to)
{
	for (int i = 0; i < 2; i++) {
		struct svc had = *v;
		const struct svc *now;
		bool found = false;

		if (had.slots == 1) {
			*to = had.only;
			found = reaches(f, to);
		} else if (had.slots) {
			struct backend *b = pick_slot(&had, seed, f);

			if (b) {
				*to = *b;
				found = true;
			}
		}
		now = bpf_map_lookup_elem(&services, key);
		if (now == v)
			return found;
		if (!now)
			return false;
		v = now;
	}
	return false;
}

#endif
