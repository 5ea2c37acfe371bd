#!/usr/bin/env bash
# holder.sh FOLDER ADDRESS: process 1 of the cluster's namespaces. When it ends, the kernel ends all that runs in them.
set -euo pipefail
root=$1
mount -t tmpfs tmpfs /dev/shm  # what killed ranks leave there goes with the cluster
mount -t tmpfs tmpfs /run      # `ip netns` keeps names there
mount --bind "$root/etc/hosts" /etc/hosts
hostname controller
ip link set lo up
ip link add br0 type bridge
ip addr add "$2/24" dev br0
ip link set br0 up
while read -r address node; do
  ip netns add "$node"
  ip link add "to-$node" type veth peer name eth0 netns "$node"
  ip link set "to-$node" master br0 up
  ip -n "$node" link set lo up
  ip -n "$node" addr add "$address/24" dev eth0
  ip -n "$node" link set eth0 up
done <"$root/etc/nodes"
touch "$root/run/ready"
while read -r _; do :; done  # to the end of standard input; bash reaps orphans meanwhile
