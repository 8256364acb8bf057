# shellcheck shell=bash
# Sourced by the scripts beside it: `use_venv [EXTRA]` activates a virtual environment with sftdist installed from
# this checkout, in the versions of constraints.txt. SFTDIST_VENV names the environment; else the active one, else .venv.

# shellcheck disable=SC2120
use_venv() {
    local extra="${1:-}" venv="${SFTDIST_VENV:-${VIRTUAL_ENV:-$PWD/.venv}}" stamp
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "sftdist needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2
            return 1
        }
        echo "Making a virtual environment in $venv"
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    stamp="$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -c1-16) $PWD"
    if [ "$(cat "$venv/sftdist-dev" 2>/dev/null)" = "$stamp" ] || [ "$(cat "$venv/sftdist-$extra" 2>/dev/null)" = "$stamp" ]; then
        return 0
    fi
    # torch first: what is built from source against it (DeepSpeed) finds it there.
    pip install --quiet "$(grep '^torch==' launch/constraints.txt)"
    pip install --quiet -c launch/constraints.txt -e ".${extra:+[$extra]}"
    echo "$stamp" >"$venv/sftdist-$extra"
}
