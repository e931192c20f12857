"""Rule provenance: versions, config, inputs, outputs and command in one file."""

import os

from _common import folder, run_stage


def run(snakemake):
    from flexlib.provenance import write_provenance

    command = os.environ.get("FLEXLIB_COMMAND", "")  # no parameter: another command must not repeat anything
    write_provenance(folder(snakemake.output.crate), snakemake.params.config, command)


run_stage(run, snakemake)
