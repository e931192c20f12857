"""Rule generate: series of maps along the latent space of one sweep point."""

from _common import folder, run_stage, use_torch_threads


def run(snakemake):
    from flexlib.generate import generate_series
    from flexlib.workflow_support.settings import GenerateSettings, make_settings

    use_torch_threads(snakemake)
    generate_series(
        snakemake.input.model,
        snakemake.output.series,
        make_settings(GenerateSettings, snakemake.params.settings),
        folder(snakemake.input.particles),
    )


run_stage(run, snakemake)
