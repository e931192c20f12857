"""What is refused before any job: a config that is not understood, files that are not there, maps that do not fit."""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from flexlib.errors import InputError
from flexlib.files import is_there, reading
from flexlib.workflow_support.estimates import MapSize, read_map_size
from flexlib.workflow_support.run_settings import SECTIONS, RunSettings
from flexlib.workflow_support.schema import config_schema
from flexlib.workflow_support.series import series_files
from flexlib.workflow_support.settings import make_settings

_MOST_VALUES, _DEEPEST, _LARGEST = 20_000, 10, 1e15
_HEADER_BYTES = 1 << 20  # of a particle file, that its columns' names are in
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that is valid and complete: numbers read as numbers, defaults filled in.

    Parameters
    ----------
    config
        As read from YAML; empty sections (``mesh:`` and nothing below) are allowed.

    Raises
    ------
    InputError
        The first thing wrong, in one line that names the key; an unknown key with the nearest known one.
    """
    import jsonschema

    if not isinstance(config, Mapping):
        raise InputError(f"config: keys and values are needed, such as name: run, not a {type(config).__name__}")
    _check_plain(config)
    schema = config_schema()
    understood = _understand_numbers(config, schema)
    for stage in ("validate", "interpret"):
        if understood.get(stage) == "none":
            understood[stage] = {"points": "none"}
    checked = _fill(understood, schema)
    _check_plain(checked)  # text that was understood as a number may be none either
    errors = jsonschema.Draft202012Validator(schema).iter_errors(checked)
    if error := min(
        errors, key=lambda error: ([str(part) for part in error.absolute_path], error.message), default=None
    ):
        raise InputError(f"config: {_explain(error)}")
    return checked


def _check_plain(config: Mapping[str, Any]) -> None:
    """Refuse what no setting is: values that are no plain data, and aliases that unfold to more than a config can be.

    Texts become paths and names, and numbers enter arithmetic: neither may hold what is in no name or no number.
    """
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    for number in itertools.count(1):
        if not waiting:
            return
        where, value, depth = waiting.pop()
        if number + len(waiting) > _MOST_VALUES or depth > _DEEPEST:
            raise InputError(f"config: {where}: more values, or deeper in one another, than a config has")
        if isinstance(value, Mapping):
            waiting += [(f"{where}.{key}".lstrip("."), item, depth + 1) for key, item in value.items()]
            waiting += [(where, str(key), depth + 1) for key in value]
        elif isinstance(value, list):
            waiting += [(f"{where}.{at}", item, depth + 1) for at, item in enumerate(value)]
        elif isinstance(value, str):
            if _CONTROL.search(value):
                raise InputError(f"config: {where}: {value[:80]!r} holds a control character")
        elif value is not None and not isinstance(value, bool | int | float):
            raise InputError(f"config: {where}: {str(value)[:80]!r} is read as a {type(value).__name__}: quote it")
        elif value is not None and not -_LARGEST <= value <= _LARGEST:
            raise InputError(f"config: {where}: is not a number that any setting can have")


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
        return schema["properties"].get(key, {}).get("default") == {}

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
    for key, hint in get_type_hints(RunSettings).items():
        if Path in (hint, *get_args(hint)) and config.get(key) is not None:
            yield key, Path(config[key])
    for section, kind in SECTIONS.items():
        hints = get_type_hints(kind)
        for key, value in (config.get(section) or {}).items():
            if isinstance(value, list) and list[Path] in (hints[key], *get_args(hints[key])):
                yield from ((f"{section}.{key}", Path(path)) for path in value)
        values: Any = make_settings(kind, _without_lists(config.get(section) or {}))
        for item in fields(kind):
            value = getattr(values, item.name)
            if isinstance(value, Path) and not item.metadata["written"]:
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
        if re.search(r"[{}\x00-\x1f\x7f]", str(path)):
            raise InputError(
                f"config: {key}: {str(path)!r}: braces (wildcards to Snakemake) and control characters cannot be part "
                "of a path: rename it, or make a link"
            )
        if not is_there(path) and path.parent != made:
            raise InputError(f"config: {key}: {path} does not exist (looked for at {path.absolute()})")


def check_choice(config: Mapping[str, Any], num_points: int) -> None:
    """Refuse, before any training, a sweep whose best point is to be reconstructed and could not be told.

    Raises
    ------
    InputError
        Nothing is held out of training.
    """
    if config["reconstruct"]["points"] == "best" and (complaint := _no_best(config, num_points)):
        raise InputError(f"config: {complaint}, or name points in reconstruct.points")


def _no_best(config: Mapping[str, Any], num_points: int) -> str | None:
    """Why none of several points is the best, in one line that an alternative may follow; None where one is."""
    held_out = config["train"]["validation_fraction"] > 0
    if held_out or num_points == 1 or config["sweep"]["choose_by"] == "cross":
        return None
    return (
        f"train.validation_fraction: 0 holds no particle out, so that none of {num_points} points is best: "
        "set it above 0"
    )


def settle_validation(given: Mapping[str, Any], config: dict[str, Any], num_candidates: int) -> str | None:
    """Write into ``validate.points`` of a checked config which points are validated, where this is not what it says.

    With ``sweep.choose_by: cross`` all are. None is where that cannot be and nothing but the default asks for it.

    Parameters
    ----------
    given
        The config as the user has it.
    config
        The same, checked; changed.
    num_candidates
        How many points are reconstructed, or may be.

    Returns
    -------
    str | None
        Why nothing is validated by a config that does not say so, and what to change, in one line.

    Raises
    ------
    InputError
        What the config asks for cannot be.
    """
    validate, by_cross = config["validate"], config["sweep"]["choose_by"] == "cross"
    if validate["points"] == "none":
        if by_cross:
            raise InputError(
                "config: sweep.choose_by: cross chooses by the scores of a validation, which validate.points: none "
                "leaves out: change one of them"
            )
        return None
    complaint = None
    if config["train"]["freeze_latents"]:
        complaint = (
            "train.freeze_latents: true gives both half-sets' models latents from outside, so that they are not "
            "independent: set it to false"
        )
    elif validate["points"] == "best":
        complaint = _no_best(config, num_candidates)
    if complaint is None:
        validate["points"] = "all" if by_cross else validate["points"]
        return None
    told = f"{complaint}, or {'sweep.choose_by: held_out' if by_cross else 'validate: none'}"
    if by_cross or given.get("validate"):
        raise InputError(f"config: {told}")
    validate["points"] = "none"
    return told


def check_conditions(config: Mapping[str, Any]) -> None:
    """Refuse conditions by a column whose name is nowhere in the particles' files; what is not there is passed over.

    The stage that reads the column comes after the training; its own check is the strict one.

    Raises
    ------
    InputError
        Names the column and the file.
    """
    column = config["interpret"]["conditions"]
    if not isinstance(column, str):
        return
    paths = [Path(config[key]) for key in ("particles", "passthrough") if config.get(key) is not None]
    if not all(is_there(path, as_file=True) for path in paths):
        return
    for path in paths:
        with reading(path), path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
        is_named = re.search(rf"(?<!\w)_?{re.escape(column)}(?!\w)".encode(), start)
        is_whole = len(start) < _HEADER_BYTES or path.suffix == ".cs" or b"\ndata_particles" in start
        if is_named or not is_whole:
            return
    raise InputError(f"config: interpret.conditions: {paths[0]} has no column {column!r}")


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
        if config.get(key) is not None and is_there(config[key], as_file=True) and (size := read_map_size(config[key]))
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
