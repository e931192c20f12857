"""Rules train and train_half: flow, latents and canonical map of one sweep point, of all particles or of a half-set."""

from _common import chosen_device, folder, run_stage, use_torch_threads


def run(snakemake):
    from dataclasses import replace

    from flexlib.train import train
    from flexlib.workflow_support.settings import TrainSettings, make_settings

    use_torch_threads(snakemake)
    processes = snakemake.config["train"]["processes"]  # no parameter: another number must not repeat what is done
    train(
        folder(snakemake.input.particles),
        folder(snakemake.input.mesh),
        folder(snakemake.output.model),
        replace(make_settings(TrainSettings, snakemake.params.settings), processes=processes),
        chosen_device(snakemake),
        half=getattr(snakemake.params, "half", None),
        discard_other_checkpoint=True,  # Snakemake runs this when settings or inputs have changed
    )


run_stage(run, snakemake, snakemake.config["train"]["processes"])
