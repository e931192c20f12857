"""What the sweep came to: the best point, the table, the report."""

TRAINED = expand(f"{RESULTS}/train/{{point}}/validation.json", point=POINTS)


checkpoint choose:
    input:
        validation=TRAINED,
    output:
        best=f"{RESULTS}/best_point.json",
    log:
        f"{LOGS}/choose.log",
    benchmark:
        f"{BENCHMARKS}/choose.tsv"
    conda:
        "../../envs/flexlib.yaml"
    threads: 1
    resources:
        mem_mb=600,
        runtime=5,
    params:
        points=list(POINTS.values()),
    message:
        "Choose the simplest point within one standard error of the best"
    script:
        "../scripts/choose.py"


rule summarise:
    input:
        validation=TRAINED,
        resolutions=reconstructed("resolution.json"),
    output:
        table=report(f"{RESULTS}/sweep.csv", caption="../report/sweep.rst", category="Sweep"),
    log:
        f"{LOGS}/summarise.log",
    benchmark:
        f"{BENCHMARKS}/summarise.tsv"
    conda:
        "../../envs/flexlib.yaml"
    threads: 1
    resources:
        mem_mb=600,
        runtime=5,
    params:
        points=list(POINTS.values()),
    message:
        "Write the table of the sweep"
    script:
        "../scripts/summarise.py"


rule report:
    input:
        table=rules.summarise.output.table,
        series=expand(f"{RESULTS}/generate/{{point}}", point=POINTS),
        maps=reconstructed("flex_map.mrc"),
        fsc=reconstructed("fsc.csv"),
        truth=rules.simulate.output.truth if config["simulate"] is not None else [],
    output:
        page=report(f"{RESULTS}/report.html", caption="../report/report.rst", category="Report"),
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{BENCHMARKS}/report.tsv"
    conda:
        "../../envs/flexlib.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=60,
    params:
        config=config,
    message:
        "Write the report"
    script:
        "../scripts/report.py"
