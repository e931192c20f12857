"""What the sweep came to: the best sweep point, the table, the report."""

BY_CROSS = config["sweep"]["choose_by"] == "cross"
VALIDATIONS = [RUN.train(path).validation for path in POINTS]
HELD_OUT = [RUN.train(path).held_out for path in POINTS]
# what chooses among all has read them; each file that Snakemake follows costs time in a sweep of hundreds
IS_CHOSEN = "best" in (config["reconstruct"]["points"], config["validate"]["points"]) and len(CANDIDATES) > 1
ARE_READ = IS_CHOSEN and not BY_CROSS and len(CANDIDATES) == len(POINTS)


checkpoint choose:
    input:
        records=[RUN.validate(path).record if BY_CROSS else RUN.train(path).validation for path in CANDIDATES],
        particles=[RUN.validate(path).cross if BY_CROSS else RUN.train(path).held_out for path in CANDIDATES],
    output:
        best=RUN.best_point,
    log:
        f"{LOGS}/choose.log",
    benchmark:
        f"{BENCHMARKS}/choose.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory("choose"),
        runtime=runtime("choose"),
        disk_mb=disk("choose"),
    params:
        points=[asdict(POINTS[path]) for path in CANDIDATES],
        choose_by=config["sweep"]["choose_by"],
    message:
        "Choose the simplest sweep point within one standard error of the best"
    script:
        "../scripts/choose.py"


rule summarise:
    input:
        scores=rules.choose.output.best if ARE_READ else [*VALIDATIONS, *HELD_OUT],
        reconstructed=reconstructed,
        validated=validated,
        interpreted=interpreted,  # for the report: Snakemake forgets a second rule that waits for the choice
    output:
        table=report(RUN.table, caption="../report/sweep.rst", category="Sweep"),
    log:
        f"{LOGS}/summarise.log",
    benchmark:
        f"{BENCHMARKS}/summarise.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory("summarise"),
        runtime=runtime("summarise"),
        disk_mb=disk("summarise"),
    params:
        points=[asdict(point) for point in POINTS.values()],
        choose_by=config["sweep"]["choose_by"],
    message:
        "Write the table of the sweep"
    script:
        "../scripts/summarise.py"


rule report:
    input:
        table=rules.summarise.output.table,
        series=[RUN.generate(path).path for path in POINTS],
        checksums=ancient(RUN.checksums),  # shown; others of them need no other report
        truth=rules.simulate.output.truth if config["simulate"] is not None else [],
    output:
        page=report(RUN.report, caption="../report/report.rst", category="Report"),
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{BENCHMARKS}/report.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory("report"),
        runtime=runtime("report"),
        disk_mb=disk("report"),
    params:
        config={key: value for key, value in config.items() if key != "checksums"},
    message:
        "Write the report"
    script:
        "../scripts/report.py"
