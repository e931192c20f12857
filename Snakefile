"""Particles and a consensus map in; latent coordinates, movies and half-maps out. See docs/architecture.md."""

from snakemake.utils import min_version

min_version("9.0")


# --configfile replaces the demo's config; it is never merged with it
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/mesh.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/reconstruct.smk"
include: "workflow/rules/summary.smk"


localrules:
    all,
    choose,
    summarise,


onstart:
    check_gpu()


rule all:
    default_target: True
    input:
        f"{RESULTS}/sweep.csv",
        f"{RESULTS}/report.html",
        expand(f"{RESULTS}/generate/{{point}}", point=POINTS),
        reconstructed("flex_map.mrc"),
