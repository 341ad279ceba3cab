// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* maps.bpf.c: no program; from it come the maps that all others share, and their Go types. */
#include "maps.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* No map holds them, and their Go types are wanted. */
const struct event *event_type __attribute__((unused));
const struct enums *enums_type __attribute__((unused));
const struct decide_case *decide_type __attribute__((unused));
const struct pick_case *pick_type __attribute__((unused));
