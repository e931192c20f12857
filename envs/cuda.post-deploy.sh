#!/usr/bin/env bash
# flexlib itself, of the workflow that this environment is made for, for its commands: the workflow's jobs take flexlib
# from the workflow's own folder. Copied first, because pip would build inside that folder.
set -euo pipefail
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cp -R "$FLEXLIB_ROOT"/{flexlib,pyproject.toml,README.md,LICENSE} "$source"
python -m pip install --quiet --no-deps --no-build-isolation "$source"
