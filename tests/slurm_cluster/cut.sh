#!/usr/bin/env bash
# cut.sh FOLDER NODE: the node and the controller no longer hear each other (mend.sh mends it). All else goes on: the
# node's processes, the other nodes' connections to it, and the file system.
set -euo pipefail
[ "$(cat "$1/mode")" = ns ] || { echo "without a network of its own a node cannot be cut off"; exit 77; }
"$1/exec" ip -n "$2" route add blackhole 10.77.0.1
