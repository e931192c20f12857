#!/usr/bin/env bash
# Fetch, into FOLDER, wheels of what benchmarks/gpu_check.sh needs beside torch, numba, pandas, h5py, scikit-image and
# matplotlib, for CPython 3.12 on x86-64 Linux.    benchmarks/gpu_check_wheels.sh FOLDER
set -euo pipefail
folder=${1:?the folder to write}
platforms=()
for version in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$folder" \
    mrcfile meshio pyamg cramjam starfile threadpoolctl tqdm
