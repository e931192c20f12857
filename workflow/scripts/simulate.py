"""Rule simulate: particles of a flexible phantom, for the demo and the tests."""

from _common import folder, run_stage, use_torch_threads


def run(snakemake):
    from flexlib.simulate import Simulation, simulate_particles
    from flexlib.workflow_support.settings import make_settings

    use_torch_threads(snakemake)
    simulate_particles(folder(snakemake.output.particles), make_settings(Simulation, snakemake.params.settings))


run_stage(run, snakemake)
