#!/usr/bin/env bash
# Everything that a GPU has to show, within ten minutes, on a machine that has nothing but Python 3.12, torch with
# Triton, and the common scientific packages: no network, no installation of this project, whatever torch is there.
#
#     OUT=results benchmarks/gpu_check.sh [--wheels FOLDER] [--quick] [--device cpu] [--steps tests operator ...]
#
# FOLDER holds wheels of what is missing there (benchmarks/gpu_check_wheels.sh fetches them). Figures of each step go to
# $OUT/gpu_check.json as it ends, what it printed to $OUT/STEP.log. With --quick --device cpu it is a rehearsal: the same
# steps in the same order, at tiny sizes. See benchmarks/gpu_check.py for the steps.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/local/gpu_check}
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels)
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$2"/*.whl
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
        shift 2
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" benchmarks/gpu_check.py --out "$out" "${arguments[@]}"
