"""Rule checksum: sizes, times and SHA-256 of the user's files and image stacks."""

from _common import optional, run_stage


def run(snakemake):
    from flexlib.provenance import checksum_inputs

    checksum_inputs(
        snakemake.params.inputs,
        snakemake.output.checksums,
        image_root=optional(snakemake.params.image_root),
        stacks=snakemake.params.checksums == "all",
        threads=snakemake.threads,
    )


run_stage(run, snakemake)
