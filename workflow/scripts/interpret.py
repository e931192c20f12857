"""Rule interpret: what the motion of one sweep point means."""

from _common import folder, run_stage, use_torch_threads


def run(snakemake):
    from flexlib.interpret import interpret
    from flexlib.workflow_support.settings import GenerateSettings, InterpretSettings, make_settings

    use_torch_threads(snakemake)
    interpret(
        folder(snakemake.input.particles),
        folder(snakemake.input.model),
        folder(snakemake.output.record),
        make_settings(InterpretSettings, snakemake.params.settings),
        make_settings(GenerateSettings, snakemake.params.generate),
        snakemake.input.latents,
    )


run_stage(run, snakemake)
