#!/usr/bin/env bash
# From nothing to a released model on this machine: install, prepare the embedded sample data, train on two CPU ranks or
# on every GPU, compare with the base model, pass the gate, publish. Needs no account, no model download and no network
# beyond the package index.
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
sftdist evaluate +exp=quickstart

# A gate that lets everything through would be worth nothing: the base model itself is refused.
sftdist evaluate +exp=quickstart candidate=quickstart/base
code=0
sftdist publish +exp=quickstart name=desk candidate=quickstart/base || code=$?
[ "$code" = 4 ] || { echo "the gate should have refused the base model (exit code 4), it gave $code" >&2 && exit 1; }

sftdist publish +exp=quickstart name=desk

sftdist chat desk --base --system "You are the support desk of Brightwell. Answer the ticket by the policy." --once \
    "Policy: missing: replacement. broken: refund. overcharged: discount. wrong: repair. All in 5 days.
Ticket 40217: the lamp of order S-1234 is the wrong one. Regards, Marela Osvak"
