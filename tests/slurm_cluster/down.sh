#!/usr/bin/env bash
# down.sh FOLDER: end what up.sh started, by recorded process ids. Configuration and logs stay.
set -u
root=$1
exec 2>/dev/null
if [ "$(cat "$root/mode")" = ns ]; then
  holder=$(cat "$root/run/holder.pid")
  # process ids are used again: only if it still is ours
  if grep -qa "$root" "/proc/$holder/cmdline"; then
    kill -KILL "$holder"
    for _ in $(seq 100); do [ -d "/proc/$holder" ] || break; sleep 0.05; done
  fi
else
  for node in node{1..4}; do "${BASH_SOURCE[0]%/*}/kill.sh" "$root" $node; done
  for daemon in slurmctld munged; do
    process=$(cat "$root/run/$daemon.pid") && [ "$(cat "/proc/$process/comm")" = $daemon ] && kill -KILL "$process"
  done
  hosts=$(grep -v " # $root\$" /etc/hosts) && echo "$hosts" >/etc/hosts  # written in place: it may be a mount
fi
rm -f "$root/exec" "$root"/run/*.pid "$root/run/ready"
exit 0
