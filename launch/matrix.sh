#!/usr/bin/env bash
# The heart of the tests with the oldest and the newest torch and transformers that pyproject.toml allows and that have
# been tried, each in a virtual environment of its own. All other packages are those of constraints.txt.
#   bash launch/matrix.sh              both
#   bash launch/matrix.sh oldest       one of them
#   PYTHON=python3.13 bash launch/matrix.sh newest
# SFTDIST_MATRIX names the folder for the environments (default .matrix): 7 GB each with CUDA's libraries, 2 GB where
# pip's index has builds of torch for the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions() {
    case "$1" in
    oldest) echo "torch==2.12.0 transformers==5.23.0 peft==0.21.0" ;;
    newest) echo "torch==2.15.0 transformers==5.24.0 peft==0.21.2" ;;
    *) echo "given $1, required oldest or newest" >&2 && return 2 ;;
    esac
}

# What depends on either: the promises in numbers, the steps on two ranks, templates, loading, adapters, and a whole job.
tests=(
    tests/numerics/test_x1_packed_loss.py
    tests/numerics/test_x2_isolation.py
    tests/numerics/test_x7_chunked_loss.py
    tests/numerics/test_x8_merge.py
    tests/numerics/test_x11_parity.py
    tests/dist/test_x3_steps.py
    tests/dist/test_x3b_bf16.py
    tests/dist/test_checkpoint_resume.py
    tests/unit/data/test_template.py
    tests/unit/data/test_families.py
    tests/unit/model
    tests/e2e/test_train.py
)

run() {
    local name="$1" chosen venv="${SFTDIST_MATRIX:-$PWD/.matrix}/$1" constraints stamp
    read -ra chosen <<<"$(versions "$name")"
    constraints="$venv/constraints.txt"
    stamp="$(cat pyproject.toml launch/constraints.txt launch/matrix.sh | sha256sum | cut -c1-16) $PWD"
    if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
        "${PYTHON:-python3}" -m venv --clear "$venv"
        others "${chosen[@]}" >"$constraints"
        "$venv/bin/pip" install --quiet "${chosen[0]}"
        "$venv/bin/pip" install --quiet -c "$constraints" -e '.[dev]'
        echo "$stamp" >"$venv/stamp"
    fi
    echo "$name: $("$venv/bin/python" --version), ${chosen[*]}"
    OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q --hypothesis-profile=ci -p no:cacheprovider -n 2 --dist loadfile "${tests[@]}"
}

# constraints.txt with the chosen versions in place of its own.
others() {
    local pattern
    pattern="$(printf '%s\n' "${@%%==*}" | paste -sd'|')"
    grep -vE "^($pattern)==" launch/constraints.txt
    printf '%s\n' "$@"
}

[ $# -gt 0 ] || set -- oldest newest
for name in "$@"; do versions "$name" >/dev/null; done
for name in "$@"; do run "$name"; done
