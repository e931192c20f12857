"""Rule validate: what the models of the two half-sets agree on, at one sweep point."""

from _common import chosen_device, folder, run_stage, use_torch_threads


def run(snakemake):
    from flexlib.validate import validate
    from flexlib.workflow_support.settings import ReconstructSettings, make_settings

    use_torch_threads(snakemake)
    validate(
        folder(snakemake.input.particles),
        folder(snakemake.input.model),
        [folder(model) for model in snakemake.input.halves],
        folder(snakemake.output.record),
        make_settings(ReconstructSettings, snakemake.params.settings),
        chosen_device(snakemake),
        processes=snakemake.config["train"]["processes"],
    )


run_stage(run, snakemake, snakemake.config["train"]["processes"])
