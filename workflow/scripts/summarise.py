"""Rule summarise: one row per point of the sweep."""

from _common import folder, run_stage


def summarise(snakemake):
    from flexlib.sweep import summarise_sweep

    summarise_sweep(snakemake.params.points, folder(snakemake.output.table), snakemake.output.table)


run_stage(summarise, snakemake)
