"""The tetrahedral mesh, once per coarseness."""


rule mesh:
    input:
        consensus=rules.prepare.output.consensus,
        mask=rules.prepare.output.mask,
        extra=user_files("mesh"),
    output:
        mesh=RUN.mesh().mesh,
        segments=RUN.mesh().segments,
        index=RUN.mesh().tetra_index,
        quality=RUN.mesh().quality,
        chimerax=RUN.mesh().chimerax,
        bild=[RUN.mesh().bild(name) for name in ["segments", "rigidity"]],
    log:
        f"{LOGS}/mesh/{MESH_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/mesh/{MESH_PATTERN}.tsv"
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=memory("mesh"),
        runtime=runtime("mesh"),
        disk_mb=disk("mesh"),
    params:
        settings=mesh_settings,
    message:
        "Build the mesh with {wildcards.cells} cells across"
    script:
        "../scripts/mesh.py"
