"""Rule prepare: whitened, cropped particles, the mask, and the noise spectrum."""

from _common import folder, optional, run_stage, use_torch_threads


def run(snakemake):
    from flexlib.prepare import prepare_particles
    from flexlib.workflow_support.settings import MaskSettings, PrepareSettings, make_settings

    use_torch_threads(snakemake)
    prepare_particles(
        snakemake.input.particles,
        snakemake.input.consensus,
        folder(snakemake.output.particles),
        mask=optional(snakemake.input.mask),
        passthrough=optional(snakemake.input.passthrough),
        image_root=optional(snakemake.params.image_root),
        settings=make_settings(PrepareSettings, snakemake.params.settings),
        mask_settings=make_settings(MaskSettings, snakemake.params.mask_settings),
    )


run_stage(run, snakemake)
