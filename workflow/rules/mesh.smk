"""The tetrahedral mesh, once per coarseness."""


rule mesh:
    input:
        consensus=rules.prepare.output.consensus,
        mask=rules.prepare.output.mask,
        extra=user_files("mesh"),
    output:
        mesh=f"{MESH}/mesh.vtu",
        segments=f"{MESH}/segments.mrc",
        index=f"{MESH}/tetra_index.mrc",
        quality=f"{MESH}/mesh_quality.json",
        chimerax=f"{MESH}/mesh.cxc",
        bild=expand(f"{MESH}/mesh_{{name}}.bild", name=["segments", "rigidity"], allow_missing=True),
    log:
        f"{LOGS}/mesh/{MESH_PATTERN}.log",
    benchmark:
        f"{BENCHMARKS}/mesh/{MESH_PATTERN}.tsv"
    conda:
        "../../envs/flexlib.yaml"
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
