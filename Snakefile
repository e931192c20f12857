"""Particles and a consensus map in; latent coordinates, movies and half-maps out: see workflow/Snakefile."""

# as `include:`, which would leave the default target behind
workflow.include("workflow/Snakefile", overwrite_default_target=True)
