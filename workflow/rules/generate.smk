"""Series of maps along the latent space, for every sweep point."""


rule generate:
    input:
        model=rules.train.output.model,
        particles=rules.prepare.output.particles,
        extra=user_files("generate"),
    output:
        series=report(
            directory(RUN.generate().path),
            patterns=[RUN.generate().film("{series}").name],
            caption="../report/series.rst",
            category="Motion",
            labels={**POINT_LABELS, "series": "{series}"},
        ),
    log:
        f"{LOGS}/generate/{POINT_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/generate/{POINT_PATTERN}.tsv"
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=memory("generate", volume=config["generate"]["volume"]),
        runtime=runtime("generate"),
        disk_mb=disk("generate"),
    params:
        settings=config["generate"],
    message:
        "Generate series of maps: {wildcards}"
    script:
        "../scripts/generate.py"
