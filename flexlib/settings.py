"""The settings of each stage: one dataclass per section of the config, the contract's keys and defaults.

The config schema (``workflow/schemas/config.schema.yaml``) is tested to say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Auto = Literal["auto"]


@dataclass(frozen=True)
class PrepareSettings:
    """``prepare:``; boxes in pixels."""

    crop_box: int | None = None
    train_box: int = 128
    max_particles: int | None = None
    min_scale: float | None = None
    symmetry: str = "C1"
    resplit: bool = False


@dataclass(frozen=True)
class MeshSettings:
    """``mesh:`` with one value of ``cells``; ``threshold`` is an absolute density level or "auto"."""

    cells: int = 20
    lowpass_A: float = 10.0
    threshold: float | Auto = "auto"
    dilate_A: float = 2.0
    pad_A: float = 5.0
    segmentation: Path | None = None
    connections: str | None = None
    rigid_segments: tuple[int, ...] = ()
    min_rigidity_weight: float = 0.5
    stiffen_low_density: bool = False
    rigidity_weights: Path | None = None
    custom: Path | None = None


@dataclass(frozen=True)
class TrainSettings:
    """``train:`` with one value of each swept key; ``rigidity`` is 3DFlex's lambda."""

    latent_dims: int = 2
    rigidity: float = 2.0
    seed: int = 0
    layers: int = 6
    hidden_units: int = 64
    epochs: int | Auto = "auto"
    noise_injection: float = 0.15
    centering: float | Auto = "auto"
    latent_init: Literal["spectral", "random"] | Path = "spectral"
    init_from: Path | None = None
    freeze_latents: bool = False
    validation_fraction: float = 0.05


@dataclass(frozen=True)
class GenerateSettings:
    """``generate:``; ``volume`` is a map to deform instead of the canonical one."""

    frames: int = 41
    series: str = "axes"
    volume: Path | None = None


@dataclass(frozen=True)
class ReconstructSettings:
    """``reconstruct:``; ``points`` ("best", "all" or a list of points) is the workflow's to interpret."""

    max_bfgs_iterations: int = 20
    rigid_baseline: bool = True
    all_in_ram: bool = False
    cache_dir: Path | None = None
    points: str | list[dict] = field(default="best")
