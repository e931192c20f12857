"""Runs workflow scripts, each in a process of its own forked from this one, with faults in them.

One start of Python and one import of torch serve all. Reads a request (JSON) a line and answers with an exit status a
line. The forked process is what a job of Snakemake is to its script: a main thread without handlers, its folder, its
standard error, ``snakemake`` as a global.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
STAGES = ("simulate", "prepare", "mesh", "train", "generate", "reconstruct", "interpret")
# what they import when they run; none starts a thread
MODULES = (
    *(f"flexlib.{stage}.run" for stage in STAGES if stage != "mesh"),
    "flexlib.provenance.checksums",
    "flexlib.provenance.write",
    "flexlib.report.morph",
    "flexlib.report.page",
    "flexlib.report.summary",
    "flexlib.projection.cpu",
    "numba.core.target_extension",
    "numba.np.arrayobj",
    "numba.np.linalg",
    "numba.parfors.parfor",
    "numba.typed",
    "plotly.graph_objects",
    "scipy.cluster.vq",
    "skimage.measure",
    "torch._dynamo",
)


class Named(list):
    """Snakemake's lists of files, whose parts have names too."""

    def __init__(self, content):
        super().__init__(content.values() if isinstance(content, dict) else content)
        if isinstance(content, dict):
            self.__dict__.update(content)


def run(request):
    """Become the job; returns or raises as the script does."""
    os.chdir(request["folder"])
    os.environ.update(request.get("environment", {}))
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), descriptor)
    job = request["job"]
    snakemake = SimpleNamespace(
        rule=job["rule"],
        threads=job.get("threads", 1),
        resources={},
        config=job.get("config", {}),
        log=[job["log"]],
        input=Named(job.get("input", {})),
        output=Named(job["output"]),
        params=SimpleNamespace(**job.get("params", {})),
    )
    if "fault" in request:
        import inject

        inject.install(**request["fault"])
    script = ROOT / "workflow/scripts" / f"{job['rule']}.py"
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), init_globals={"snakemake": snakemake}, run_name="__main__")


def main():
    """Serve requests; only a forked process comes to the end with one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever whoever started us did with it
    sys.path.insert(0, str(ROOT))
    for name in (*(f"flexlib.{stage}" for stage in STAGES), *MODULES):
        importlib.import_module(name)
    gc.freeze()  # or each forked process copies all of it when it looks for garbage
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if (order := main()) is not None:
    run(order)
