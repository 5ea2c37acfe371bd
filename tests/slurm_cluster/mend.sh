#!/usr/bin/env bash
# mend.sh FOLDER NODE: bring a node back: its network, and its slurmd where that does not run.
set -euo pipefail
root=$1 node=$2
unset "${!SLURM_@}"
cd /
if [ "$(cat "$root/mode")" = ns ]; then
  "$root/exec" ip link set "to-$node" up
  "$root/exec" ip -n "$node" route del blackhole 10.77.0.1 2>/dev/null || true
  on_node=(nsenter --net="/run/netns/$node" unshare --uts sh -c 'hostname "$1" && shift && exec "$@"' sh "$node")
else
  on_node=()
fi
"$root/exec" sh -c '[ "$(cat "/proc/$(cat "$1" 2>/dev/null)/comm" 2>/dev/null)" = slurmd ]' sh "$root/run/$node.pid" ||
  "$root/exec" "${on_node[@]}" slurmd -N "$node" </dev/null >"$root/log/$node.out" 2>&1
