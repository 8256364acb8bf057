#!/usr/bin/env bash
# Train on every GPU of this machine, or on launch.nproc CPU ranks: torchrun with the signals and the grace that a save
# needs. Ends with 0 done, 1 failed, 2 bad configuration, 3 bad data, 75 stopped after a complete save (run it again).
#   bash launch/local.sh +exp=NAME [KEY=VALUE ...]
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
use_venv
cd "$here" # paths on the command line are the caller's
exec sftdist train "$@"
