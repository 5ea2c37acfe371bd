#!/usr/bin/env bash
# kill.sh FOLDER NODE [node|slurmd|slurmstepd|tasks]: SIGKILL to processes of a kind, or (default) to all of the node, after
# its wire was pulled: a machine without power closes no connection. mend.sh brings it back.
set -euo pipefail
root=$1 node=$2 what=${3:-node}
[ "$what:$(cat "$root/mode")" != node:ns ] || "$root/exec" ip link set "to-$node" down
"$root/exec" bash -s "$(cat "$root/mode")" "$root/run/$node.pid" "$node" "$what" <<'INSIDE'
mode=$1 pid_file=$2 node=$3 what=$4
is_task() {  # of this cluster: others on the machine may have a node of the same name
  local words
  words=$(tr '\0' '\n' 2>/dev/null <"/proc/$1/environ") &&
    grep -qxF "SLURMD_NODENAME=$node" <<<"$words" && grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$words"
}
is_here() {  # process $1 of the name $2
  if [ "$mode" = ns ]; then  # a slurmd and all it started share a host name of their own
    nsenter -t "$1" --uts hostname 2>/dev/null | grep -qx "$node"
  elif [ "$2" = slurmd ]; then
    [ "$1" = "$(cat "$pid_file" 2>/dev/null)" ]
  elif [ "$2" = slurmstepd ]; then
    for child in $(cat "/proc/$1/task/$1/children" 2>/dev/null); do is_task "$child" && return 0; done
    return 1
  else
    is_task "$1"
  fi
}
found=()
for folder in /proc/[0-9]*; do
  process=${folder#/proc/}
  name=$(cat "$folder/comm" 2>/dev/null) && [ "$process" != $$ ] || continue
  case $what:$name in
    node:* | slurmd:slurmd | slurmstepd:slurmstepd) ;;
    tasks:slurmd | tasks:slurmstepd) continue ;;
    tasks:*) ;;
    *) continue ;;
  esac
  if is_here "$process" "$name"; then found+=("$process") && echo "$process $name"; fi
done
[ ${#found[@]} = 0 ] || kill -KILL "${found[@]}" 2>/dev/null
true
INSIDE
