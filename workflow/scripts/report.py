"""Rule report: one self-contained page."""

from _common import folder, optional, run_stage


def run(snakemake):
    from flexlib.report import write_report

    checksums = snakemake.config["checksums"]  # no parameter: another choice must not repeat the report
    write_report(
        folder(snakemake.output.page),
        snakemake.output.page,
        {**snakemake.params.config, "checksums": checksums},
        truth=optional(snakemake.input.truth),
    )


run_stage(run, snakemake)
