#!/usr/bin/env bash
# Start a real SLURM on this machine, for tests: up.sh FOLDER. Four nodes of two CPUs, node1 to node4; as root, in seconds.
# Afterwards `FOLDER/exec sbatch ...` runs a command in it. The cluster ends with down.sh, or when whoever holds the other
# end of this script's standard input is gone, however that came about. By hand: `up.sh FOLDER < <(sleep infinity)`.
# Exit codes: 0 all nodes idle, 77 this machine cannot run it (the last line says why), 1 it did not come up.
#
#   GLAM_TEST_SLURM_INSTALL=1    install what is missing by apt-get
#   GLAM_TEST_SLURM_MODE=host    no namespaces: all nodes on the machine's own loopback, their names in /etc/hosts. Else,
#                                wherever the kernel lets us, each node has a network and a host name of its own (ns)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$1
nodes=(node1 node2 node3 node4)
unfit() { echo "$*"; exit 77; }
broken() { tail -n 5 "$root"/log/* >&2 || true; echo "$*"; exit 1; }

[ "$(id -u)" = 0 ] || unfit "a SLURM of one's own wants root"
missing=()
for pair in slurmctld:slurmctld slurmd:slurmd slurm-client:sbatch munge:munged iproute2:ip; do
  PATH=$PATH:/usr/sbin command -v "${pair#*:}" >/dev/null || missing+=("${pair%:*}")
done
if [ ${#missing[@]} -gt 0 ]; then
  [ "${GLAM_TEST_SLURM_INSTALL:-}" = 1 ] || unfit "not installed: ${missing[*]} (GLAM_TEST_SLURM_INSTALL=1 does it)"
  command -v apt-get >/dev/null || unfit "not installed: ${missing[*]}, and no apt-get"
  "$here/install.sh" "${missing[@]}" >"$root/apt.log" 2>&1 || unfit "apt-get failed: $(tail -n 1 "$root/apt.log")"
fi
export PATH=$PATH:/usr/sbin

mode=${GLAM_TEST_SLURM_MODE:-}
if [ -z "$mode" ]; then
  try='ip link add br0 type bridge && ip link add pair1 type veth peer name pair2 && mount -t tmpfs tmpfs /run'
  if unshare --net --uts --ipc --pid --mount --fork --mount-proc sh -c "$try" 2>/dev/null; then mode=ns; else mode=host; fi
fi
mkdir -p "$root"/{etc,run,log,state} && cd "$root"
for node in "${nodes[@]}"; do mkdir -p "spool/$node"; done
echo "$mode" >mode
head -c 1024 /dev/urandom >etc/munge.key && chmod 400 etc/munge.key  # munged refuses a key that others may read
if [ "$mode" = ns ]; then
  controller=controller controller_address=10.77.0.1 bind='#' address=(10.77.0.1{1..4})
else  # bound to the nodes' address: without, srun would wait for ever for peers that seem to come from another
  controller=$(hostname -s) controller_address=127.0.0.1 bind='CommunicationParameters=NoCtldInAddrAny,NoInAddrAny'
  address=(127.0.0.1 127.0.0.1 127.0.0.1 127.0.0.1)
fi
source "$here/slurm_conf.sh" >etc/slurm.conf
echo "CgroupPlugin=cgroup/v1" >etc/cgroup.conf  # some has to be named; none is used
export SLURM_CONF=$root/etc/slurm.conf
{ for at in "${!nodes[@]}"; do echo "${address[at]} ${nodes[at]}"; done; } >etc/nodes

if [ "$mode" = ns ]; then
  { echo "127.0.0.1 localhost"; echo "$controller_address controller"; cat etc/nodes; } >etc/hosts
  setsid unshare --net --uts --ipc --pid --mount --fork --mount-proc --kill-child=KILL \
    "$here/holder.sh" "$root" "$controller_address" <&0 >log/holder.log 2>&1 &
  outside=$!
  for _ in $(seq 200); do [ -e run/ready ] && break; sleep 0.05; done
  [ -e run/ready ] || broken "the namespaces did not come up"
  holder=$(awk '{print $1}' "/proc/$outside/task/$outside/children")
  echo "$holder" >run/holder.pid
  enter="nsenter -t $holder --net --uts --ipc --pid --mount --wd=\"\$PWD\" --"
else
  sed "s|\$| # $root|" etc/nodes >>/etc/hosts  # down.sh takes them out again
  (while read -r _; do :; done; "$here/down.sh" "$root") <&0 >log/holder.log 2>&1 &
  enter=
fi
printf '#!/bin/bash\nexport SLURM_CONF=%q PATH=$PATH:/usr/sbin\nexec %s "$@"\n' "$SLURM_CONF" "$enter" >exec && chmod +x exec

./exec munged --key-file="$root/etc/munge.key" --socket="$root/run/munge.socket" --pid-file="$root/run/munged.pid" \
  --log-file="$root/log/munged.log" --seed-file="$root/run/munge.seed" --num-threads=2 --force </dev/null >log/munged.out 2>&1 ||
  broken "munged did not start"
./exec slurmctld -c </dev/null >log/slurmctld.out 2>&1 || broken "slurmctld did not start"
for node in "${nodes[@]}"; do "$here/mend.sh" "$root" "$node"; done
for _ in $(seq 450); do
  up=$(timeout 5 ./exec sinfo -h -N -p batch -t idle -o %N 2>/dev/null | wc -l) || true
  [ "$up" = ${#nodes[@]} ] && exit 0
  sleep 0.2
done
broken "only $up of ${#nodes[@]} nodes came up"
