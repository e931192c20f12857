"""Rule simulate: particles of a flexible phantom, for the demo and the tests."""

from _common import folder, run_stage, use_torch_threads


def simulate(snakemake):
    from flexlib.simulate.run import simulate_particles
    from flexlib.simulate.settings import Simulation
    from flexlib.workflow_support.settings import make_settings

    use_torch_threads(snakemake)
    simulate_particles(folder(snakemake.output.particles), make_settings(Simulation, snakemake.params.settings))


run_stage(simulate, snakemake)
