"""Half-maps at full resolution, for the sweep points that the config asks for."""

RECONSTRUCTED = ["flex", "rigid"] if config["reconstruct"]["rigid_baseline"] else ["flex"]


rule reconstruct:
    input:
        particles=rules.prepare.output.particles,
        mask=rules.prepare.output.full_mask,
        model=rules.train.output.model,
    output:
        halves=[RUN.reconstruct().half(kind, number) for kind in RECONSTRUCTED for number in (1, 2)],
        maps=[RUN.reconstruct().map(kind) for kind in RECONSTRUCTED],
        derived=[RUN.reconstruct().sharpened, RUN.reconstruct().local_resolution, RUN.reconstruct().moving_mask],
        fsc=report(
            RUN.reconstruct().fsc,
            caption="../report/fsc.rst",
            category="Resolution",
            labels=POINT_LABELS,
        ),
        resolution=RUN.reconstruct().resolution,
        convergence=RUN.reconstruct().convergence,
    log:
        f"{LOGS}/reconstruct/{POINT_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/reconstruct/{POINT_PATTERN}.tsv"
    conda:
        ENVIRONMENT
    threads: 8 * PROCESSES // TASKS["reconstruct"]
    resources:
        mem_mb=memory("reconstruct", all_in_ram=config["reconstruct"]["all_in_ram"], processes=A_NODE["reconstruct"]),
        runtime=runtime("reconstruct"),
        disk_mb=disk("reconstruct"),
        gpu=MISSING_GPUS["reconstruct"],
    params:
        settings=without_points("reconstruct"),
    message:
        "Reconstruct half-maps: {wildcards}"
    script:
        "../scripts/reconstruct.py"
