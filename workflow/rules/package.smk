"""Makes flexlib importable: the one of this very workflow, whatever else is installed where Snakemake is."""

import gc
import os
import sys
from pathlib import Path


def package_root():
    """The folder that holds flexlib: the clone that this file is in; of a workflow on a Git host, Snakemake's cache."""
    rules = workflow.current_basedir
    folder = Path(str(rules))
    if folder.is_dir():
        return folder.parents[1]
    if not hasattr(rules, "hosted_repo"):
        sys.exit(f"ERROR {rules}: only github() and gitlab() of Snakemake 9.15 or newer can be read; clone it instead")
    # of a repository Snakemake keeps only the files that it is asked for
    names = rules.hosted_repo.repo.git.ls_tree("-r", "--name-only", rules.ref, *PACKAGE).splitlines()
    return Path([workflow.source_path(f"../../{name}") for name in names][-1]).parents[2]


# last, for its depth is known: what scripts import from beside them
PACKAGE = ["LICENSE", "README.md", "flexlib", "pyproject.toml", "workflow/scripts/_common.py"]
ROOT = package_root()
sys.path.insert(0, str(ROOT))
os.environ.update(FLEXLIB_ROOT=str(ROOT))  # for envs/*.post-deploy.sh

# Snakemake holds on to all jobs: a look through them for garbage finds little, and takes a tenth of the time to plan 500
# points. A dry run ends before it could matter.
gc.set_threshold(1_000_000, 20, 100)
if workflow.dryrun:
    gc.disable()
