/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0) */
/*
 * maps.h: every map, each with who writes and who reads it. All are pinned by name. Sizes are
 * the defaults; the loader may set others before it creates a map.
 */
#ifndef INLAY_MAPS_H
#define INLAY_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "types.h"

#define MAP(NAME, TYPE, KEY, VALUE, MAX, FLAGS)		\
	struct {					\
		__uint(type, TYPE);			\
		__uint(max_entries, MAX);		\
		__uint(map_flags, FLAGS);		\
		__type(key, KEY);			\
		__type(value, VALUE);			\
	} NAME SEC(".maps")

/* Written by the agent at registration; read by every hook and by the DNS proxy. */
MAP(workloads, BPF_MAP_TYPE_HASH, __u64, struct workload, 16384, BPF_F_NO_PREALLOC);

/* Service addresses: written by the agent, read by connect and sendmsg. */
MAP(services, BPF_MAP_TYPE_HASH, struct svc_key, struct svc, 1048576, BPF_F_NO_PREALLOC);
MAP(slots, BPF_MAP_TYPE_HASH, struct slot_key, struct slot, 2097152, BPF_F_NO_PREALLOC);

/* Identity of endpoints that are dialled by their own address: the agent; connect, sendmsg, skb. */
MAP(endpoints, BPF_MAP_TYPE_HASH, struct svc_key, __u64, 1048576, BPF_F_NO_PREALLOC);

/* Identity by registered address, 0 where several share it: the agent; skb. A hint. */
MAP(addresses, BPF_MAP_TYPE_HASH, struct addr, __u64, 262144, BPF_F_NO_PREALLOC);

/* Who listens: sockops and iter/tcp; connect (who is dialled), sk_lookup. */
MAP(listeners, BPF_MAP_TYPE_HASH, struct listen_key, struct listener, 65536, BPF_F_NO_PREALLOC);

/* Addresses of this machine: the agent; skb. */
MAP(local_addrs, BPF_MAP_TYPE_HASH, struct local_key, __u8, 4096, BPF_F_NO_PREALLOC);

/* Policy: the agent; connect, sendmsg, skb, sk_lookup, the iterators. */
MAP(subjects, BPF_MAP_TYPE_HASH, __u64, struct subject, 16384, BPF_F_NO_PREALLOC);
MAP(policies, BPF_MAP_TYPE_HASH, struct pol_key, __u32, 1048576, BPF_F_NO_PREALLOC);
MAP(port_sets, BPF_MAP_TYPE_HASH, __u32, struct port_set, 65536, BPF_F_NO_PREALLOC);
MAP(cidrs, BPF_MAP_TYPE_LPM_TRIE, struct cidr_key, __u32, 262144, BPF_F_NO_PREALLOC);

/* Who made a TCP connection: sockops of the client; skb and sockops of the server. */
MAP(peers, BPF_MAP_TYPE_HASH, struct tuple, struct peer, 262144, BPF_F_NO_PREALLOC);
/* Who sent a datagram: skb egress of the sender; skb ingress of the receiver. */
MAP(udp_peers, BPF_MAP_TYPE_LRU_HASH, struct tuple, struct peer, 65536, 0);
/* Denied and audited SYNs by their sequence number, so that each is told once: skb. */
MAP(told, BPF_MAP_TYPE_LRU_HASH, struct tuple, __u32, 16384, 0);
/* Datagram exchanges: skb; swept by the agent. */
MAP(udp_flows, BPF_MAP_TYPE_LRU_HASH, struct udp_key, struct udp_flow, 65536, 0);
/* What a program asked for: sendmsg; recvmsg. */
MAP(udp_reverse, BPF_MAP_TYPE_LRU_HASH, struct udp_key, struct reverse, 65536, 0);

/* What is known of a socket: every hook. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct sk_state);
} sockets SEC(".maps");

/* DNS: the proxy writes where it is, the hooks write who asks; names are the agent's. */
MAP(dns_proxies, BPF_MAP_TYPE_HASH, __u64, struct dns_proxy, 1024, BPF_F_NO_PREALLOC);
MAP(dns_clients, BPF_MAP_TYPE_LRU_HASH, struct svc_key, struct dns_client, 32768, 0);
MAP(names, BPF_MAP_TYPE_HASH, struct name_key, struct name, 262144, BPF_F_NO_PREALLOC);

/* Endpoints that are gone: the agent; the iterators end their connections. */
MAP(gone, BPF_MAP_TYPE_HASH, struct gone_key, __u8, 65536, BPF_F_NO_PREALLOC);

/* Breakglass and times: the agent and `inlay node breakglass`; every hook. */
MAP(settings_map, BPF_MAP_TYPE_ARRAY, __u32, struct settings, 1, 0);

/* Counters: every hook; the agent. */
MAP(counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, COUNT_MAX, 0);

/* Records: every hook; the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} events SEC(".maps");

#endif
