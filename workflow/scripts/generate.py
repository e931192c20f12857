"""Rule generate: series of maps along the latent space of one point."""

from _common import folder, run_stage, use_torch_threads


def generate(snakemake):
    from flexlib.generate.run import generate_series
    from flexlib.workflow_support.settings import GenerateSettings, make_settings

    use_torch_threads(snakemake)
    generate_series(
        snakemake.input.model,
        snakemake.output.series,
        make_settings(GenerateSettings, snakemake.params.settings),
        folder(snakemake.input.particles),
    )


run_stage(generate, snakemake)
