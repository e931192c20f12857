"""Half-maps at full resolution, for the points that the config asks for."""

RECONSTRUCTED = ["flex", "rigid"] if config["reconstruct"]["rigid_baseline"] else ["flex"]


rule reconstruct:
    input:
        particles=rules.prepare.output.particles,
        mask=rules.prepare.output.full_mask,
        model=rules.train.output.model,
    output:
        maps=expand(
            f"{RECONSTRUCT}/{{kind}}_{{map}}.mrc",
            kind=RECONSTRUCTED,
            map=["half1", "half2", "map"],
            allow_missing=True,
        ),
        derived=expand(
            f"{RECONSTRUCT}/{{map}}.mrc",
            map=["flex_sharpened", "flex_local_resolution", "moving_mask"],
            allow_missing=True,
        ),
        fsc=report(
            f"{RECONSTRUCT}/fsc.csv",
            caption="../report/fsc.rst",
            category="Resolution",
            labels=POINT_LABELS,
        ),
        resolution=f"{RECONSTRUCT}/resolution.json",
        convergence=f"{RECONSTRUCT}/convergence.csv",
    log:
        f"{LOGS}/reconstruct/{POINT_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/reconstruct/{POINT_PATTERN}.tsv"
    conda:
        "../../envs/flexlib.yaml"
    threads: 8 * PROCESSES
    resources:
        mem_mb=memory("reconstruct", all_in_ram=config["reconstruct"]["all_in_ram"], processes=PROCESSES),
        runtime=runtime("reconstruct"),
        disk_mb=disk("reconstruct"),
        gpu=GPUS,
    params:
        settings=reconstruct_settings,
    message:
        "Reconstruct half-maps: {wildcards}"
    script:
        "../scripts/reconstruct.py"
