"""CUDA backend of the operator: not written yet; ``op.py`` falls back to plain torch on a CUDA device.

It will provide ``splat`` and ``splat_adjoint`` with the signatures of ``cpu.py`` and be registered in ``op.py`` with
``splat_voxels.register_kernel("cuda")``.
"""
