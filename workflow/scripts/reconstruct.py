"""Rule reconstruct: half-maps of one sweep point, with and without its motion."""

from _common import chosen_device, folder, run_stage, use_torch_threads


def run(snakemake):
    from flexlib.reconstruct import reconstruct
    from flexlib.workflow_support.settings import ReconstructSettings, make_settings

    use_torch_threads(snakemake)
    reconstruct(
        folder(snakemake.input.particles),
        folder(snakemake.input.model),
        folder(snakemake.output.fsc),
        make_settings(ReconstructSettings, snakemake.params.settings),
        chosen_device(snakemake),
        processes=snakemake.config["train"]["processes"],
    )


run_stage(run, snakemake, snakemake.config["train"]["processes"])
