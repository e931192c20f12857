"""Flow, latents and canonical map, once per point of the sweep.

Checkpoints are written beside the outputs, in checkpoints/, and are not declared: Snakemake removes declared outputs
when a job fails, and a job that is tried again resumes from them.
"""


rule train:
    input:
        particles=rules.prepare.output.particles,
        images=rules.prepare.output.images,
        consensus=rules.prepare.output.consensus,
        mask=rules.prepare.output.mask,
        mesh=rules.mesh.output.mesh,
        segments=rules.mesh.output.segments,
        extra=user_files("train"),
    output:
        model=RUN.train().model,
        canonical=RUN.train().canonical,
        latents=RUN.train().latents,
        history=report(
            RUN.train().log,
            caption="../report/training.rst",
            category="Training",
            labels=POINT_LABELS,
        ),
        spectrum=RUN.train().spectrum,
        validation=RUN.train().validation,
        held_out=RUN.train().held_out,
    log:
        f"{LOGS}/train/{POINT_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/train/{POINT_PATTERN}.tsv"
    conda:
        ENVIRONMENT
    threads: 8 * PROCESSES // TASKS["train"]
    resources:
        mem_mb=memory("train", processes=A_NODE["train"]),
        runtime=runtime("train"),
        disk_mb=disk("train"),
        gpu=MISSING_GPUS["train"],
    params:
        settings=train_settings,
    message:
        "Train: {wildcards.cells} cells, {wildcards.dims} dims, rigidity {wildcards.rigidity}, seed {wildcards.seed}"
    script:
        "../scripts/train.py"
