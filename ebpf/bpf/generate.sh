#!/usr/bin/env bash
# Compiles every hook with clang and writes objects and Go into ebpf/bpfobj: `make generate` runs it.
# The same sources give the same bytes wherever the repository lies.
set -euo pipefail
cd "$(dirname "$0")/../bpfobj"
bpf2go=$(cd ../../tools && GOWORK=off go tool -n bpf2go)
flags="-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu"
types=()
for t in addr workload svc_key svc slot_key backend slot subject pol_key seg port_set cidr_key tuple peer listen_key listener local_key \
	udp_key udp_flow reverse dns_proxy dns_client name_key name sk_state event settings gone_key decide_case pick_case \
	id dir verdict peer_kind event_kind counter workload_flag subject_flag sk_flag flow_flag; do
	types+=(-type "$t")
done
export GOPACKAGE=bpfobj
for c in ../bpf/*.bpf.c; do
	stem=$(basename "$c" .bpf.c)
	extra=()
	case $stem in
	maps) stem=inlay extra=("${types[@]}") ;;
	esac
	"$bpf2go" -cc clang -strip llvm-strip -target bpfel -no-global-types -output-stem "$stem" "${extra[@]}" "${stem^}" "$c" -- $flags
done
