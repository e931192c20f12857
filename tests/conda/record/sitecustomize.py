"""What a job's Python has imported by its end, into the folder RECORD_IMPORTS; found through PYTHONPATH_IN_CONDA."""

import atexit
import json
import os
import sys
from pathlib import Path


def write():
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    record = {
        "script": Path(sys.argv[0]).name,
        "prefix": sys.prefix,
        "files": {name: file for name, file in files.items() if file},
    }
    Path(os.environ["RECORD_IMPORTS"], f"{os.getpid()}.json").write_text(json.dumps(record))


if ".snakemake/scripts" in "".join(sys.orig_argv):
    atexit.register(write)
