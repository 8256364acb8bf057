# shellcheck shell=bash
# What one cluster needs and another does not. Nothing here has to be changed on a plain cluster. To change something,
# write these functions (only those that differ) into a file of your own and name it: export SFTDIST_SITE=/path/my_site.sh

# Runs once per start of a job, on its first node, before anything else. All nodes inherit what it exports.
site_job() {
    # module load python/3.12 cuda/12.8
    :
}

# Runs on every node, right before sftdist: what must differ between nodes, or is known there only.
site_node() {
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
    # Compiled kernels on the node's own disk: nodes that share such a folder would wait for, or break, one another.
    local scratch
    scratch="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/sftdist-$(id -un)"
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$scratch/torch_extensions}"
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"
}
