"""The settings of each stage: one dataclass per section of the config, the contract's keys and defaults.

The config schema (``workflow/schemas/config.schema.yaml``) adds ranges and descriptions; a test holds the two together.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from flexlib.errors import InputError
from flexlib.workflow_support.estimates import MapSize, read_map_size
from flexlib.workflow_support.series import series_files

Auto = Literal["auto"]
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class SimulateSettings:
    """``simulate:`` (demo and tests only); ``box`` in pixels."""

    phantom: str = "antibody"
    num_particles: int = 1000
    box: int = 64
    pixel_size_A: float = 4.0
    snr: float = 0.08
    seed: int = 0


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
    custom: Literal["surface"] | Path | None = None


@dataclass(frozen=True)
class MaskSettings:
    """What of ``mesh:`` makes the solvent mask, which prepare needs; ``threshold`` as in ``MeshSettings``."""

    lowpass_A: float = 10.0
    threshold: float | Auto = "auto"
    dilate_A: float = 2.0
    pad_A: float = 5.0


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
    processes: int = 1


@dataclass(frozen=True)
class GenerateSettings:
    """``generate:``; ``series`` as ``series.py`` reads it; ``volume`` is deformed instead of the canonical map."""

    frames: int = 41
    series: str | list[str] = "axes"
    volume: Path | None = None
    lowpass_A: float | None = None
    bfactor_A2: float | None = None


@dataclass(frozen=True)
class ReconstructSettings:
    """``reconstruct:``; ``points`` ("best", "all" or a list of points) is the workflow's to interpret."""

    max_bfgs_iterations: int = 20
    rigid_baseline: bool = True
    all_in_ram: bool = False
    cache_dir: Path | None = None
    points: str | list[dict] = field(default="best")


SECTIONS: dict[str, type] = {
    "simulate": SimulateSettings,
    "prepare": PrepareSettings,
    "mesh": MeshSettings,
    "train": TrainSettings,
    "generate": GenerateSettings,
    "reconstruct": ReconstructSettings,
}

# What the config names outside its sections, and what prepare reads
INPUT_PATHS = ("particles", "passthrough", "image_root", "consensus", "mask")
# Places that a stage makes itself
OUTPUT_PATHS = ("cache_dir",)

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def make_settings(kind: type[Settings], section: Mapping[str, Any]) -> Settings:
    """One section of a checked config as its dataclass: text becomes ``Path`` and lists become tuples where due.

    Raises
    ------
    InputError
        A key that ``kind`` does not have.
    """
    hints = get_type_hints(kind)
    if unknown := sorted(set(section) - set(hints)):
        raise InputError(f"config: {kind.__name__} has no key {unknown[0]!r}")
    return kind(**{key: _typed(value, hints[key]) for key, value in section.items()})


def _typed(value: Any, hint: Any) -> Any:
    kinds = get_args(hint)
    words = [word for kind in kinds for word in get_args(kind)]
    if isinstance(value, str) and Path in kinds and value not in words:
        return Path(value)
    if isinstance(value, list) and Ellipsis in kinds:
        return tuple(value)
    if float in (hint, *kinds) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def check_config(config: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A config that is valid and complete: numbers read as numbers, defaults filled in.

    Parameters
    ----------
    config
        As read from YAML; empty sections (``mesh:`` and nothing below) are allowed.
    schema
        ``workflow/schemas/config.schema.yaml``, read.

    Raises
    ------
    InputError
        The first thing wrong, in one line that names the key; an unknown key with the nearest known one.
    """
    import jsonschema

    checked = _fill(_understand_numbers(config, schema), schema)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(checked)
    if error := min(
        errors, key=lambda error: ([str(part) for part in error.absolute_path], error.message), default=None
    ):
        raise InputError(f"config: {_explain(error)}")
    return checked


def _understand_numbers(config: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy in which 1e-3, text to YAML 1.1 for want of a point, is a number; empty sections are empty dicts."""

    def understand(value: Any) -> Any:
        if isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
            return float(value)
        if isinstance(value, list):
            return [understand(item) for item in value]
        if isinstance(value, dict):
            return {key: understand(item) for key, item in value.items()}
        return copy.deepcopy(value)

    def is_section(key: str) -> bool:
        return schema["properties"].get(key, {}).get("type") == "object"

    result = {key: understand(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: {} if value is None and is_section(key) else value for key, value in result.items()}


def _fill(instance: Any, schema: Mapping[str, Any]) -> Any:
    """``instance`` with the schema's defaults where it says nothing, section by section.

    Keys come in the schema's order: Snakemake compares parameters as text, and a config that says the same in another
    order must not repeat what is done.
    """
    if not isinstance(instance, dict):
        return instance
    filled = {}
    for key, subschema in schema.get("properties", {}).items():
        if key in instance:
            filled[key] = _fill(instance[key], subschema)
        elif "default" in subschema:
            filled[key] = _fill(copy.deepcopy(subschema["default"]), subschema)
    return {**filled, **{key: value for key, value in instance.items() if key not in filled}}


def _explain(error: Any) -> str:
    """One line for one jsonschema error."""
    where = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = min(str(key) for key in error.instance if key not in known)
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
        return f"unknown key {unknown!r}{f' in {where}' if where else ''}; {hint}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return f"the key {missing!r} is missing{f' in {where}' if where else ''}"
    if error.validator in ("anyOf", "oneOf", "pattern"):
        return f"{where}: {error.instance!r} is not understood; {error.schema.get('description', error.message)}"
    return f"{where}: {error.message}"


def input_paths(config: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Every path that a checked config asks to be read, as (dotted key, path).

    Raises
    ------
    InputError
        ``generate.series`` is not understood.
    """
    for key in INPUT_PATHS:
        if config.get(key) is not None:
            yield key, Path(config[key])
    for section, kind in SECTIONS.items():
        values: Any = make_settings(kind, _without_lists(config.get(section) or {}))
        for item in fields(kind):
            value = getattr(values, item.name)
            if isinstance(value, Path) and item.name not in OUTPUT_PATHS:
                yield f"{section}.{item.name}", value
    for path in series_files((config.get("generate") or {}).get("series", "axes")):
        yield "generate.series", path


def _without_lists(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if not isinstance(value, list)}


def check_paths(config: Mapping[str, Any]) -> None:
    """Refuse a config that names a file that is not there, before any job; what ``simulate`` will make is excused.

    Raises
    ------
    InputError
        Names the key and the path.
    """
    made = Path(config["particles"]).parent if config.get("simulate") is not None else None
    for key, path in input_paths(config):
        if not path.exists() and path.parent != made:
            raise InputError(f"config: {key}: {path} does not exist (looked for at {path.absolute()})")


def check_maps(config: Mapping[str, Any]) -> None:
    """Refuse a consensus or mask that no preparation can use, by their headers alone; what is not there is passed over.

    A mask may have another box than the consensus (it is resampled), but must be a cube of the same extent.

    Raises
    ------
    InputError
        Names the file and both sizes.
    """
    sizes = {
        key: size
        for key in ("consensus", "mask")
        if config.get(key) is not None and Path(config[key]).is_file() and (size := read_map_size(config[key]))
    }
    for key, size in sizes.items():
        if len(set(size.voxels)) != 1:
            box = " x ".join(str(side) for side in size.voxels)
            raise InputError(f"config: {key}: {config[key]} has {box} voxels; a cubic map is needed")
    if len(sizes) < 2 or not all(size.extent_A[0] > 0 for size in sizes.values()):
        return
    consensus, mask = sizes["consensus"], sizes["mask"]
    voxel_A = max(size.extent_A[0] / size.voxels[0] for size in sizes.values())
    if abs(mask.extent_A[0] - consensus.extent_A[0]) > max(voxel_A, 0.01 * consensus.extent_A[0]):
        raise InputError(
            f"config: mask: {config['mask']} is {_extent(mask)}, but the consensus {config['consensus']} is "
            f"{_extent(consensus)}: make the mask in the consensus' box"
        )


def _extent(size: MapSize) -> str:
    voxels, extent_A = size.voxels[0], size.extent_A[0]
    return f"{extent_A:.5g} A wide ({voxels} voxels of {extent_A / voxels:.5g} A)"


def gpu_complaint(device: str, local: bool, asked_for: Mapping[str, Any], processes: int = 1) -> str | None:
    """Why the GPUs that the config wants cannot be had here, in one line; None where they can, or none are wanted.

    Parameters
    ----------
    device : ``device`` of the config
    local : whether jobs run on this machine
    asked_for : GPUs that each rule which uses one asks the scheduler for
    processes : ``train.processes``; where there is a GPU each needs its own
    """
    if device == "cpu":
        return None
    gpus = _count_gpus() if local else min((int(n) for n in asked_for.values() if str(n).isdecimal()), default=0)
    if processes > gpus > 0:
        more = "lower it, or set device: cpu" if local else "raise gpu of train and reconstruct in the profile"
        found = "this machine shows" if local else "jobs are given"
        return f"config: train.processes: {processes}, one a GPU, but {found} {gpus}: {more}"
    if device == "auto":
        return None
    if local and not gpus:
        return (
            "config: device: cuda, but this machine shows no GPU: set device: auto, "
            "or run on a cluster with --profile slurm"
        )
    without = [rule for rule, gpus in asked_for.items() if str(gpus) == "0"]
    if not local and without:
        return (
            f"config: device: cuda, but no GPU is asked for {' and '.join(without)}: give them gpu: 1 in the profile's "
            "set-resources, or set device: auto"
        )
    return None


def _count_gpus() -> int:
    """How many GPUs there are and are not hidden, without importing torch (seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return 0
    if visible:
        return len(visible.split(","))
    # WSL and ROCm do not show how many: the job, where torch counts them, will tell
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]) or 64
