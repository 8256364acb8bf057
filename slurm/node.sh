#!/usr/bin/env bash
# What srun runs on every node of a job, started by job.sh: `sftdist "$@"`, in the container where there is one.
set -euo pipefail
source "$SFTDIST_ROOT/slurm/site.sh"
# shellcheck disable=SC1090
[ -z "${SFTDIST_SITE:-}" ] || source "$SFTDIST_SITE"
set +u
site_node
set -u
export PYTHONUNBUFFERED=1 # the job's log is a file

command=(sftdist "$@")
[ "$SLURM_NNODES" -eq 1 ] || command+=("launch.node_rank=$SLURM_NODEID")
case "${SFTDIST_CONTAINER:-}" in
*.sif | docker://*)
    command=(apptainer exec --nv --bind "$PWD,$SFTDIST_ROOT${SFTDIST_MOUNTS:+,$SFTDIST_MOUNTS}" --pwd "$PWD" "$SFTDIST_CONTAINER" "${command[@]}")
    ;;
esac
exec "${command[@]}"
