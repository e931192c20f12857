"""What the workflow asks before any job: nothing here needs more than Snakemake brings."""
