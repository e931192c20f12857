"""Checkpoint choose: the simplest sweep point within one standard error of the best score."""

from _common import run_stage


def run(snakemake):
    from flexlib.workflow_support.points import SweepPoint
    from flexlib.workflow_support.sweep import choose_from_files

    points = [SweepPoint(**point) for point in snakemake.params.points]
    choose_from_files(points, snakemake.input.records, snakemake.output.best, snakemake.params.choose_by)


run_stage(run, snakemake)
