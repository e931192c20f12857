"""Snakemake that asks SLURM every two seconds how its jobs are; on PYTHONPATH of the Snakemakes of test_slurm.py only.

The plugin waits ten seconds longer each time that no job has ended: of a test most of the time would be that.
"""

import sys

if "--slurm-status-command" in sys.orig_argv:
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    RemoteExecutor.next_seconds_between_status_checks = property(lambda executor: 2, lambda executor, seconds: None)
