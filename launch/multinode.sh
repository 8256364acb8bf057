#!/usr/bin/env bash
# Train on several machines without a batch system. Run it on every node; the run directory and the data are on a file
# system that all of them share. Exit codes as of launch/local.sh, the same on every node.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage, on every node, in the same folder:
  NODES=2 ADDRESS=10.0.0.1:29500 bash launch/multinode.sh +exp=NAME [KEY=VALUE ...]
  bash launch/multinode.sh --nodes 2 --address 10.0.0.1:29500 +exp=NAME [KEY=VALUE ...]

  NODES       how many nodes train together
  ADDRESS     HOST:PORT where they meet: a name or an address of one of them, and a free port of it
  NODE_RANK   (--node-rank) this node's number, 0 to NODES-1, where the node of ADDRESS has 0. Without it all nodes run
              the very same line and agree on their order (torchrun's c10d rendezvous instead of the static one).

Each node starts one rank per GPU (else launch.nproc ranks on the CPU, default 1). A stop signal to one node stops all
after a save, with exit code 75; the same lines go on.
TEXT
}

fail() {
    printf 'launch/multinode.sh: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

nodes="${NODES:-}" address="${ADDRESS:-}" rank="${NODE_RANK:-}" words=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --nodes | --address | --node-rank)
        [ $# -gt 1 ] || fail "$1: given nothing, required a value"
        case "$1" in
        --nodes) nodes="$2" ;;
        --address) address="$2" ;;
        --node-rank) rank="$2" ;;
        esac
        shift 2
        ;;
    *)
        words+=("$1")
        shift
        ;;
    esac
done
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "NODES: given '$nodes', required how many nodes train together, such as NODES=2"
[[ "$address" =~ ^[^\"\']+:[0-9]+$ ]] || fail "ADDRESS: given '$address', required HOST:PORT of one of the nodes, such as ADDRESS=10.0.0.1:29500"
[[ "$rank" =~ ^[0-9]*$ ]] || fail "NODE_RANK: given '$rank', required a number from 0 to $((nodes - 1)), or nothing"
words+=("launch.nodes=$nodes" "launch.address=\"$address\"")
[ -z "$rank" ] || words+=("launch.node_rank=$rank")

exec bash "$(dirname "${BASH_SOURCE[0]}")/local.sh" "${words[@]}"
