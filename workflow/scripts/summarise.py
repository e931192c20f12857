"""Rule summarise: a row for each sweep point."""

from _common import folder, run_stage


def run(snakemake):
    from flexlib.layout import RunFolder
    from flexlib.workflow_support.points import SweepPoint
    from flexlib.workflow_support.sweep import summarise_sweep

    results = RunFolder(folder(snakemake.output.table))
    folders = {folder(path) for path in snakemake.input.reconstructed}
    points = [SweepPoint(**point) for point in snakemake.params.points]
    reconstructed = [point for point in points if results.reconstruct(point.path).path in folders]
    summarise_sweep(points, results.path, reconstructed, snakemake.output.table)


run_stage(run, snakemake)
