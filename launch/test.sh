#!/usr/bin/env bash
# Install the test extras, lint, check types and run the tests that this machine can run.
#   bash launch/test.sh        what every change must pass, about 25 minutes on 2 cores
#   bash launch/test.sh all    the long tests, too, and the heart of them with the oldest and the newest torch and transformers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
use_venv dev

ruff check .
mypy
# The ci profile of hypothesis tries the same examples in every run; one thread a process: the tests start ranks of their own, and exact results do not depend on the machine.
export OMP_NUM_THREADS=1
# Two files at a time: the tests wait for processes as long as they compute.
pytest=(-rfEs --hypothesis-profile=ci --durations=15 -n 2 --dist loadfile)
case "${1:-}" in
"") timeout --signal=INT --kill-after=30 3600 pytest "${pytest[@]}" ;;
all) pytest "${pytest[@]}" -m "" && bash launch/matrix.sh ;;
*) echo "given $1, required nothing or all" >&2 && exit 2 ;;
esac
