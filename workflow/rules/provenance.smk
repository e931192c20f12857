"""What the run was: checksums of its inputs, and one file with versions, config, inputs, outputs and command."""


rule checksum:
    input:
        particles=config["particles"],
        consensus=config["consensus"],
        others=given("mask", "passthrough"),
        extra=[path for section in ["mesh", "train", "generate", "interpret"] for path in user_files(section)],
    output:
        checksums=update(RUN.checksums),  # so that what is unchanged need not be read again
    log:
        f"{LOGS}/checksum.log",
    benchmark:
        f"{BENCHMARKS}/checksum.tsv"
    priority: -1  # nobody but the report waits for it
    conda:
        ENVIRONMENT
    threads: 4
    resources:
        mem_mb=memory("checksum"),
        runtime=runtime("checksum"),
        disk_mb=disk("checksum"),
    params:
        inputs=input_files(),
        image_root=config["image_root"],
        checksums=config["checksums"],
    message:
        "Take the checksums of the input files"
    script:
        "../scripts/checksum.py"


rule provenance:
    input:
        report=rules.report.output.page,
        checksums=rules.checksum.output.checksums,
    output:
        crate=RUN.crate,
        config=RUN.config,
    log:
        f"{LOGS}/provenance.log",
    benchmark:
        f"{BENCHMARKS}/provenance.tsv"
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory("provenance"),
        runtime=runtime("provenance"),
        disk_mb=disk("provenance"),
    params:
        config=config,
    message:
        "Write down what the run was"
    script:
        "../scripts/provenance.py"
