"""What the sweep came to: the best point, the table, the report."""

TRAINED = {
    name: expand(f"{RESULTS}/train/{{point}}/{name}", point=POINTS) for name in ["validation.json", "held_out.csv"]
}


checkpoint choose:
    input:
        validation=TRAINED["validation.json"],
        held_out=TRAINED["held_out.csv"],
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
        mem_mb=memory("choose"),
        runtime=runtime("choose"),
        disk_mb=disk("choose"),
    params:
        points=list(POINTS.values()),
    message:
        "Choose the simplest point within one standard error of the best"
    script:
        "../scripts/choose.py"


rule summarise:
    input:
        validation=TRAINED["validation.json"],
        held_out=TRAINED["held_out.csv"],
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
        mem_mb=memory("summarise"),
        runtime=runtime("summarise"),
        disk_mb=disk("summarise"),
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
        mem_mb=memory("report"),
        runtime=runtime("report"),
        disk_mb=disk("report"),
    params:
        config=config,
    message:
        "Write the report"
    script:
        "../scripts/report.py"
