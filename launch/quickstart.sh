#!/usr/bin/env bash
# From nothing to a fine-tuned model on this machine: install, prepare the embedded sample data, train on two CPU ranks
# or on every GPU. Needs no account, no model download and no network beyond the package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
use_venv

ranks=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
cores=$(python -c 'import os; print(os.cpu_count() or 2)')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"

sftdist prepare +exp=quickstart
torchrun --nproc-per-node "$ranks" -m sftdist.train +exp=quickstart
