#!/usr/bin/env bash
# What a container image of sftdist is made of. launch/Dockerfile and launch/sftdist.def run it inside the image, so both
# hold the same; it writes to /opt/sftdist and is not meant for a machine of your own (see launch/venv.sh).
#   bash launch/image.sh system      what Python packages do not bring along
#   bash launch/image.sh packages    torch first, then every package, in the versions of launch/constraints.txt
#   bash launch/image.sh program     sftdist itself, from this folder
#   bash launch/image.sh check       that all of it can be loaded
# EXTRAS names the extras of pyproject.toml that go in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=/opt/sftdist
export PIP_CONSTRAINT="$PWD/launch/constraints.txt" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# A C compiler for the kernels that Triton and torch.compile build at run time; the user-space side of InfiniBand, without
# which NCCL goes over TCP between nodes; tini, which passes signals on and reaps processes as number 1 of a container.
system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends g++ libc6-dev libibverbs1 ibverbs-providers librdmacm1 tini
    rm -rf /var/lib/apt/lists/*
}

packages() {
    python3 -m venv "$venv"
    # torch first: what is built from source against it (DeepSpeed) finds it there.
    "$venv/bin/pip" install --quiet "$(grep '^torch==' launch/constraints.txt)"
    requirements | xargs -d '\n' "$venv/bin/pip" install --quiet
}

# The dependencies of pyproject.toml, and those of EXTRAS, a line each.
requirements() {
    "$venv/bin/python" - "${EXTRAS:-}" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [name for name in sys.argv[1].split(",") if name]
unknown = [name for name in extras if name not in project["optional-dependencies"]]
if unknown:
    sys.exit(f"EXTRAS: given {', '.join(unknown)}, required names of {', '.join(project['optional-dependencies'])}")
print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")
PYTHON
}

program() {
    "$venv/bin/pip" install --quiet --no-deps .
}

check() {
    "$venv/bin/pip" check
    (cd / && "$venv/bin/sftdist" --help >/dev/null && "$venv/bin/python" -c 'import sftdist.train, sftdist.evaluate')
}

[ $# -gt 0 ] || { echo "given nothing, required some of: system packages program check" >&2 && exit 2; }
for step in "$@"; do
    case "$step" in
    system | packages | program | check) "$step" ;;
    *) echo "given $step, required some of: system packages program check" >&2 && exit 2 ;;
    esac
done
