"""Series of maps along the latent space, for every point."""


def generate_memory(wildcards, attempt):
    """A frame needs about 14 times the bytes of the map that is deformed."""
    volume = config["generate"]["volume"]
    size_mb = Path(volume).stat().st_size // 2**20 if volume else 0
    return memory(4000 + 14 * size_mb)(wildcards, attempt)


rule generate:
    input:
        model=rules.train.output.model,
        particles=rules.prepare.output.particles,
        extra=user_files("generate"),
    output:
        series=directory(GENERATE),
    log:
        f"{LOGS}/generate/{POINT_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/generate/{POINT_PATTERN}.tsv"
    conda:
        "../../envs/flexlib.yaml"
    threads: 2
    resources:
        mem_mb=generate_memory,
        runtime=60,
    params:
        settings=config["generate"],
    message:
        "Generate series of maps: {wildcards}"
    script:
        "../scripts/generate.py"
