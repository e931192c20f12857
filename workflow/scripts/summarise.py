"""Rule summarise: one row per point of the sweep."""

from _common import folder, run_stage


def summarise(snakemake):
    from flexlib.workflow_support.sweep import summarise_sweep

    results_dir = folder(snakemake.output.table)
    folders = {folder(path) for path in snakemake.input.resolutions}
    points = snakemake.params.points
    reconstructed = [point for point in points if results_dir / "reconstruct" / point.path in folders]
    summarise_sweep(points, results_dir, reconstructed, snakemake.output.table)


run_stage(summarise, snakemake)
