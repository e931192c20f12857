"""Two models that never meet, one of each half-set, and what they agree on, for the points that the config asks for."""


# as a sweep point is trained, checkpoints included; from scratch, whatever the whole starts from
use rule train as train_half with:
    output:
        model=RUN.validate().half().model,
        canonical=RUN.validate().half().canonical,
        latents=RUN.validate().half().latents,
        history=RUN.validate().half().log,
        spectrum=RUN.validate().half().spectrum,
        validation=RUN.validate().half().validation,
        held_out=RUN.validate().half().held_out,
        cross=RUN.validate().half().cross,
    log:
        f"{LOGS}/train_half/{POINT_PATTERN}/{HALF_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/train_half/{POINT_PATTERN}/{HALF_PATTERN}.tsv"
    threads: 8 * PROCESSES // TASKS["train_half"]
    resources:
        mem_mb=memory("train_half", processes=A_NODE["train_half"]),
        runtime=runtime("train_half"),
        disk_mb=disk("train_half"),
        gpu=MISSING_GPUS["train_half"],
    params:
        half=lambda wildcards: int(wildcards.half),
    message:
        "Train half-set {wildcards.half} alone: {wildcards}"


rule validate:
    input:
        particles=rules.prepare.output.particles,
        mask=rules.prepare.output.full_mask,
        model=rules.train.output.model,
        halves=[RUN.validate().half(number).model for number in (1, 2)],
    output:
        half_maps=[RUN.validate().half_map(number) for number in (1, 2)],
        map=RUN.validate().map,
        fsc=report(
            RUN.validate().fsc,
            caption="../report/agreement.rst",
            category="Resolution",
            labels=POINT_LABELS,
        ),
        motion=[RUN.validate().motion_error, RUN.validate().motion_size],
        tables=[RUN.validate().modes, RUN.validate().latents, RUN.validate().regions, RUN.validate().calibration],
        cross=RUN.validate().cross,
        convergence=RUN.validate().convergence,
        record=RUN.validate().record,
    log:
        f"{LOGS}/validate/{POINT_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/validate/{POINT_PATTERN}.tsv"
    conda:
        ENVIRONMENT
    threads: 8 * PROCESSES // TASKS["validate"]
    resources:
        mem_mb=memory("validate", all_in_ram=config["reconstruct"]["all_in_ram"], processes=A_NODE["validate"]),
        runtime=runtime("validate"),
        disk_mb=disk("validate"),
        gpu=MISSING_GPUS["validate"],
    params:
        settings=without_points("reconstruct"),
    message:
        "Compare the models of the half-sets: {wildcards}"
    script:
        "../scripts/validate.py"
