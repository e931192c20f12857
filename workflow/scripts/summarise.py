"""Rule summarise: a row for each sweep point."""

from _common import folder, run_stage


def run(snakemake):
    from flexlib.layout import RunFolder
    from flexlib.workflow_support.points import SweepPoint
    from flexlib.workflow_support.sweep import summarise_sweep

    results = RunFolder(folder(snakemake.output.table))
    points = [SweepPoint(**point) for point in snakemake.params.points]
    reconstructed = {folder(path) for path in snakemake.input.reconstructed}
    validated = {folder(path) for path in snakemake.input.validated}
    summarise_sweep(
        points,
        results.path,
        [point for point in points if results.reconstruct(point.path).path in reconstructed],
        [point for point in points if results.validate(point.path).path in validated],
        snakemake.output.table,
        snakemake.params.choose_by,
    )


run_stage(run, snakemake)
