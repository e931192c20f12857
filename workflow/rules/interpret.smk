"""What the motion means, for the points that the config asks for."""


rule interpret:
    input:
        particles=rules.prepare.output.particles,
        model=rules.train.output.model,
        latents=latents_of,
        extra=user_files("interpret") + user_files("generate"),
    output:
        bodies=[RUN.interpret().bodies, RUN.interpret().hinges, RUN.interpret().deformation],
        maps=[RUN.interpret().labels, RUN.interpret().rotation, RUN.interpret().strain],
        tables=[RUN.interpret().landscape, RUN.interpret().populations, RUN.interpret().path_points],
        series=directory(RUN.interpret().series.path),
        record=RUN.interpret().record,
    log:
        f"{LOGS}/interpret/{POINT_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/interpret/{POINT_PATTERN}.tsv"
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=memory("interpret", volume=config["generate"]["volume"]),
        runtime=runtime("interpret"),
        disk_mb=disk("interpret"),
    params:
        settings=without_points("interpret"),
        generate={key: value for key, value in config["generate"].items() if key != "series"},
    message:
        "Interpret the motion: {wildcards}"
    script:
        "../scripts/interpret.py"
