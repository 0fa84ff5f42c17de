#!/bin/sh
# What agcl costs on one GPU of 80 to 140 GB, in at most ten minutes: tables and JSON in $OUT
# (default ./gpu-results). `tests/bench/gpu.sh --help` says more; --toy tries it on a CPU.
root=$(cd "$(dirname "$0")/../.." && pwd) || exit 1
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
PYTHONPATH="$root:$root/tests" exec "$python" -m bench.gpu "$@"
