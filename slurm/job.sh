# shellcheck shell=bash
# Sourced by the .sbatch files beside it. What a job does is changed by the options of sbatch and by the environment,
# never by editing:
#   SFTDIST_VENV=DIR          the virtual environment; default: the sftdist that is on the PATH, else the checkout's .venv
#   SFTDIST_CONTAINER=IMAGE   a .sif file or docker://IMAGE runs under apptainer, any other image by srun's
#                             --container-image (enroot with pyxis); sftdist must be installed in it
#   SFTDIST_MOUNTS=A:B,C:D    folders that the container sees beside the working directory and SFTDIST_ROOT
#   SFTDIST_SITE=FILE         what this cluster needs: see site.sh
#   SFTDIST_PORT=N            the rendezvous of several nodes; default: a free port of the first one
#   SFTDIST_MAX_REQUEUES=N    how often a job is started again at most; default 200
#   SFTDIST_ROOT=DIR          the folder that holds slurm/; sbatch copies the script that it is given, so a job asks SLURM
#                             where it came from; default: the folder where sbatch was called
PREEMPTED=75           # sftdist's exit code after a complete save: the same command goes on
AFTER_FIRST_SECONDS=60 # how long srun lets the other nodes end by themselves when one has ended

export SFTDIST_ROOT
source "$SFTDIST_ROOT/slurm/site.sh"
# shellcheck disable=SC1090
[ -z "${SFTDIST_SITE:-}" ] || source "$SFTDIST_SITE"

# run_job WORD ...: `sftdist WORD ...` on every node of this job, then exit with its code. What was stopped after a
# complete save is requeued: SLURM starts this job again under the same number, and it goes on.
run_job() {
    local code=0
    start_job "$1"
    on_all_nodes "$@" || code=$?
    case "$code" in
    "$PREEMPTED" | $((128 + 10)) | $((128 + 15))) # or ended by USR1 or TERM itself: too early to have anything to save
        code=$PREEMPTED
        requeue
        ;;
    esac
    exit "$code"
}

# The first line of the log, and the environment that every node inherits.
start_job() {
    echo "$(date +%FT%T) job $(job_name) on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): sftdist $1"
    set +u # modules and conda do not expect it
    site_job
    set -u
    find_sftdist || exit 2
}

# Put sftdist on the PATH, which every node inherits.
find_sftdist() {
    local venv="${SFTDIST_VENV:-}"
    [ -z "${SFTDIST_CONTAINER:-}" ] || return 0
    if [ -z "$venv" ] && ! command -v sftdist >/dev/null && [ -d "$SFTDIST_ROOT/.venv" ]; then
        venv="$SFTDIST_ROOT/.venv"
    fi
    if [ -n "$venv" ] && [ ! -f "$venv/bin/activate" ]; then
        echo "SFTDIST_VENV: given $venv, which is no virtual environment that node $(hostname) can see" >&2
        return 1
    fi
    # shellcheck disable=SC1091
    [ -z "$venv" ] || source "$venv/bin/activate"
    command -v sftdist >/dev/null && return 0
    echo "node $(hostname) finds no sftdist: submit from a shell where it is installed, on a file system that all" \
        "nodes share, or set SFTDIST_VENV or SFTDIST_CONTAINER" >&2
    return 1
}

step='' signals=0
# SLURM tells the batch shell alone that time is running out; srun passes USR1 on to the ranks, which save and stop. (It
# takes a TERM as its own end, so that is not what it gets.)
stop_signal() {
    signals=$((signals + 1))
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}
trap stop_signal USR1 TERM

# on_all_nodes WORD ...: one `sftdist WORD ...` on every node; returns the highest of their exit codes.
on_all_nodes() {
    local code seen address words=("$@")
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
        address=$(rendezvous) || return 2
        words+=("launch.nodes=$SLURM_JOB_NUM_NODES" "launch.address=$address")
    fi
    srun_options
    [ "$signals" -eq 0 ] || return "$PREEMPTED"
    srun "${options[@]}" bash "$SFTDIST_ROOT/slurm/node.sh" "${words[@]}" &
    step=$!
    while :; do # a signal ends bash's wait, not what it waits for
        seen=$signals code=0
        wait "$step" || code=$?
        [ "$signals" -ne "$seen" ] || return "$code"
    done
}

# One task a node, which has every CPU and GPU that the job has there and shares them out among its ranks.
srun_options() {
    options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none)
    options+=(--export=ALL --wait="$AFTER_FIRST_SECONDS")
    unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK # would take the other CPUs from it
    case "${SFTDIST_CONTAINER:-}" in
    '' | *.sif | docker://*) ;; # node.sh opens those
    *)
        options+=(--container-image="$SFTDIST_CONTAINER" --container-workdir="$PWD")
        options+=(--container-mounts="$PWD:$PWD,$SFTDIST_ROOT:$SFTDIST_ROOT${SFTDIST_MOUNTS:+,$SFTDIST_MOUNTS}")
        ;;
    esac
}

# HOST:PORT at which the nodes meet, on the first one, where this script runs.
rendezvous() {
    local first host port="${SFTDIST_PORT:-}"
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    host=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    if [ -n "$port" ] && in_use "$host" "$port"; then
        echo "SFTDIST_PORT: given $port, which is in use on $first ($host); give a free one, or none" >&2
        return 1
    fi
    while [ -z "$port" ] || in_use "$host" "$port"; do
        port=$((20000 + RANDOM % 12000)) # below those that the kernel hands out
    done
    echo "$host:$port"
}

in_use() {
    (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

# Start this job again, unless SLURM is ending it: after scancel it stays ended, and what SLURM requeues by itself (for
# a preemption, or because somebody asked for it) is requeued already.
requeue() {
    local state
    state=$(squeue --noheader --jobs="$(job_name)" --format=%T) || state=RUNNING # scontrol will say what is wrong
    if [ "$state" != RUNNING ]; then
        echo "stopped after a complete save; SLURM is ending the job ($state), so it does not requeue itself"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${SFTDIST_MAX_REQUEUES:-200}" ]; then
        echo "not requeued any more after $SLURM_RESTART_COUNT times (SFTDIST_MAX_REQUEUES)" >&2
    elif (trap '' TERM && exec scontrol requeue "$(job_name)"); then # what ends this start spares it
        echo "$(date +%FT%T) stopped after a complete save and requeued; it goes on at its next start"
    else
        echo "not requeued, see above; submit the same line again with run.dir=, the folder of this run, to go on" >&2
    fi
}

# The number of this job; of an array, that of its task, where SLURM_JOB_ID may stand for all of them.
job_name() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}
