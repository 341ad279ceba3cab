/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/* peer.h: who is at the other end. */
#ifndef INLAY_PEER_H
#define INLAY_PEER_H

#include "state.h"

/* How long an address counts as used by the namespace that last sent from it, in ns. */
#define UDP_CLAIM 30000000000ull
/* How long what its sender wrote counts for a datagram, in ns. It is written anew when a second has
 * passed, before the datagram leaves; so somebody else who takes over the port is taken for the one
 * before him no longer than this.
 */
#define UDP_FRESH 2000000000ull

static __always_inline bool is_local(const struct addr *a, __u64 netns)
{
	struct local_key k = { .netns = netns, .addr = *a };

	return addr_is_loopback(a) || bpf_map_lookup_elem(&local_addrs, &k);
}

/* by_address knows a peer by nothing but its address; *hint tells that somebody registered it. */
static __always_inline __u64 by_address(const struct addr *a, __u64 netns, bool *hint)
{
	__u64 *id;

	if (is_local(a, netns))
		return ID_HOST;
	id = bpf_map_lookup_elem(&addresses, a);
	if (!id)
		return ID_WORLD;
	*hint = true;
	return *id;
}

/* listener_at gives who listens on an address of this machine, whatever address it bound. */
static __always_inline struct listener *listener_at(const struct addr *a, __be16 port, __u64 netns)
{
	struct listen_key k = { .netns = netns, .addr = *a, .port = port, .proto = IPPROTO_TCP };
	struct listener *l = bpf_map_lookup_elem(&listeners, &k);

	if (l)
		return l;
	if (addr_is_v4(a)) {
		addr_v4(&k.addr, 0);
		l = bpf_map_lookup_elem(&listeners, &k);
		if (l)
			return l;
	}
	k.addr = (struct addr){};
	return bpf_map_lookup_elem(&listeners, &k);
}

/* dialled gives who is dialled by an address that is no service's: a registered endpoint, a
 * workload that listens here, else what the address tells, as *hint says.
 */
GLOBAL __u64 dialled(const struct svc_key *at, __u64 netns, bool *hint)
{
	struct listener *l;
	__u64 *id;

	if (!at || !hint)
		return ID_UNKNOWN;
	id = bpf_map_lookup_elem(&endpoints, at);
	if (id)
		return *id;
	if (at->proto == IPPROTO_TCP && is_local(&at->addr, netns)) {
		l = listener_at(&at->addr, at->port, netns);
		if (l && l->identity)
			return l->identity;
	}
	return by_address(&at->addr, netns, hint);
}

/* maker gives who made a TCP connection, as the client told before its SYN left: nobody can
 * forge that, whereas an address proves nothing on loopback or between namespaces. t.netns is
 * the receiver's on entry.
 */
GLOBAL __u64 maker(struct tuple *t, bool *hint)
{
	struct peer *p;
	__u64 netns;

	if (!t || !hint)
		return ID_UNKNOWN;
	netns = t->netns;
	p = bpf_map_lookup_elem(&peers, t);
	if (p)
		return p->identity;
	/* A loopback address means another machine in each namespace. */
	if (!addr_is_loopback(&t->src)) {
		t->netns = 0;
		p = bpf_map_lookup_elem(&peers, t);
		t->netns = netns;
		if (p)
			return p->identity;
	}
	return by_address(&t->src, netns, hint);
}

/* sent_by gives what the sender of a datagram wrote, NULL when no workload sent it. */
static __always_inline struct peer *sent_by(struct tuple *t)
{
	__u64 netns = t->netns, now = bpf_ktime_get_coarse_ns();
	struct peer *p = bpf_map_lookup_elem(&udp_peers, t);

	if (p && now - p->cookie < UDP_FRESH)
		return p;
	if (addr_is_loopback(&t->src))
		return NULL;
	t->netns = 0;
	p = bpf_map_lookup_elem(&udp_peers, t);
	t->netns = netns;
	return p && now - p->cookie < UDP_FRESH ? p : NULL;
}

/* sender is maker for datagrams. */
GLOBAL __u64 sender(struct tuple *t, bool *hint)
{
	struct peer *p;

	if (!t || !hint)
		return ID_UNKNOWN;
	p = sent_by(t);
	return p ? p->identity : by_address(&t->src, t->netns, hint);
}

/* same_sender reports whether a datagram is still from whom its exchange was judged for. */
GLOBAL int same_sender(struct tuple *t, __u64 was, __u32 hint)
{
	struct peer *p;

	if (!t)
		return false;
	p = sent_by(t);
	return p ? p->identity == was : was < ID_FIRST || hint;
}

/* claim writes who makes a connection, for receivers in this namespace and in others: 0, ENOSPC when a
 * map is full, EADDRINUSE when another socket of this namespace has made the same tuple and lives
 * (they are bound to different devices). Two namespaces that make the same tuple at one time are
 * told apart by nobody: the receiver is then told that the maker is unknown.
 */
GLOBAL int claim(struct tuple *t, const struct peer *p)
{
	struct peer *had;
	__u64 netns;
	long err;

	if (!t || !p)
		return EINVAL;
	netns = t->netns;
	err = bpf_map_update_elem(&peers, t, p, BPF_NOEXIST);
	if (err == -EEXIST) {
		had = bpf_map_lookup_elem(&peers, t);
		if (had && had->cookie != p->cookie) {
			count(COUNT_PEERS_CLASH);
			return EADDRINUSE;
		}
		err = bpf_map_update_elem(&peers, t, p, BPF_ANY);
	}
	if (err)
		return ENOSPC;
	if (addr_is_loopback(&t->src))
		return 0;
	t->netns = 0;
	err = bpf_map_update_elem(&peers, t, p, BPF_NOEXIST);
	if (err == -EEXIST) {
		err = 0;
		had = bpf_map_lookup_elem(&peers, t);
		if (had && had->netns != p->netns) {
			had->identity = ID_UNKNOWN;
			count(COUNT_PEERS_CLASH);
		} else {
			err = bpf_map_update_elem(&peers, t, p, BPF_ANY);
		}
	}
	t->netns = netns;
	return err ? ENOSPC : 0;
}

/* disclaim takes away what claim wrote for this socket. */
GLOBAL int disclaim(struct tuple *t, __u64 cookie)
{
	struct peer *had;
	__u64 netns;

	if (!t)
		return 0;
	netns = t->netns;
	had = bpf_map_lookup_elem(&peers, t);
	if (had && had->cookie == cookie)
		bpf_map_delete_elem(&peers, t);
	t->netns = 0;
	had = bpf_map_lookup_elem(&peers, t);
	if (had && had->cookie == cookie)
		bpf_map_delete_elem(&peers, t);
	t->netns = netns;
	return 0;
}

/* claim_datagram is claim for datagrams, whose exchanges end without a sign: what a namespace
 * wrote counts for UDP_CLAIM. p.cookie is the time.
 */
GLOBAL int claim_datagram(struct tuple *t, struct peer *p)
{
	struct peer *had;
	__u64 netns;

	if (!t || !p)
		return 0;
	netns = t->netns;
	bpf_map_update_elem(&udp_peers, t, p, BPF_ANY);
	if (addr_is_loopback(&t->src))
		return 0;
	t->netns = 0;
	had = bpf_map_lookup_elem(&udp_peers, t);
	if (had && had->netns != p->netns && p->cookie - had->cookie < UDP_CLAIM) {
		if (had->identity)
			count(COUNT_PEERS_CLASH);
		had->identity = ID_UNKNOWN;
	} else {
		bpf_map_update_elem(&udp_peers, t, p, BPF_ANY);
	}
	t->netns = netns;
	return 0;
}

#endif
