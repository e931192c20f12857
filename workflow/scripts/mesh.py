"""Rule mesh: the tetrahedral mesh of one coarseness."""

from _common import folder, run_stage, use_torch_threads


def run(snakemake):
    from flexlib.mesh import build_mesh
    from flexlib.workflow_support.settings import MeshSettings, make_settings

    use_torch_threads(snakemake)
    build_mesh(
        folder(snakemake.input.consensus),
        folder(snakemake.output.mesh),
        make_settings(MeshSettings, snakemake.params.settings),
    )


run_stage(run, snakemake)
