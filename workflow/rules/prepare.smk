"""Particles and consensus as the later stages read them."""

if config["simulate"] is not None:
    SIMULATION = SimulationFolder(Path(config["particles"]).parent)

    rule simulate:
        output:
            particles=config["particles"],
            consensus=config["consensus"],
            truth=SIMULATION.truth,
        log:
            f"{LOGS}/simulate.log",
        benchmark:
            f"{BENCHMARKS}/simulate.tsv"
        conda:
            ENVIRONMENT
        threads: 8
        resources:
            mem_mb=memory("simulate"),
            runtime=runtime("simulate"),
            disk_mb=disk("simulate"),
        params:
            settings=config["simulate"],
        message:
            "Simulate particles of a flexible phantom"
        script:
            "../scripts/simulate.py"


rule prepare:
    input:
        particles=config["particles"],
        consensus=config["consensus"],
        mask=given("mask"),
        passthrough=given("passthrough"),
    output:
        particles=RUN.particles.particles,
        images=RUN.particles.images,
        consensus=RUN.particles.consensus,
        mask=RUN.particles.mask,
        full_consensus=RUN.particles.full_consensus,
        full_mask=RUN.particles.full_mask,
        noise=RUN.particles.noise,
        stacks=RUN.particles.stacks,
        left_out=RUN.particles.left_out,
        record=RUN.particles.record,
    log:
        f"{LOGS}/prepare.log",
    benchmark:
        f"{BENCHMARKS}/prepare.tsv"
    conda:
        ENVIRONMENT
    threads: 8
    resources:
        mem_mb=memory("prepare"),
        runtime=runtime("prepare"),
        disk_mb=disk("prepare"),
    params:
        settings=config["prepare"],
        mask_settings=mask_settings,
        image_root=config["image_root"],
    message:
        "Prepare the particles and the consensus"
    script:
        "../scripts/prepare.py"
