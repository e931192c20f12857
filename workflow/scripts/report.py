"""Rule report: one self-contained page."""

from _common import folder, optional, run_stage


def run(snakemake):
    from flexlib.report import write_report

    write_report(
        folder(snakemake.output.page),
        snakemake.output.page,
        snakemake.params.config,
        truth=optional(snakemake.input.truth),
    )


run_stage(run, snakemake)
