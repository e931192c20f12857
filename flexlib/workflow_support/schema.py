"""The config's JSON schema, and its reference for the user, from the dataclasses in ``settings.py``.

``python -m flexlib.workflow_support.schema --write`` (``make docs``) writes both files, ``--check`` (``make lint``)
compares them. Written by hand, because pydantic, which makes schemas of classes, is no dependency of Snakemake: what
parses the workflow needs nothing that Snakemake does not bring.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from flexlib.workflow_support.run_settings import SECTIONS, RunSettings
from flexlib.workflow_support.settings import PointChoice

ROOT = Path(__file__).parents[2]
SCHEMA_FILE = ROOT / "workflow/schemas/config.schema.yaml"
REFERENCE_FILE = ROOT / "config/README.md"
REFERENCE_BEGINS = "<!-- From here on made by `make docs` from flexlib/workflow_support/settings.py -->"

_NAMES: dict[Any, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    Path: "string",
    NoneType: "null",
}
_NUMBER_LIMITS = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"}
_LIMITS = {
    "integer": _NUMBER_LIMITS,
    "number": _NUMBER_LIMITS,
    "string": {"pattern"},
    "array": {"minItems", "uniqueItems"},
}
_POINTS = "#/$defs/points"


@functools.cache
def config_schema() -> dict[str, Any]:
    """The JSON schema of the whole config. Not to be changed: it is made once."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "flexlib workflow configuration",
        "description": "The settings of a run. Defaults are 3DFlex's where it has one.",
        "required": [item.name for item in fields(RunSettings) if _default(item) is MISSING],
        **_object(RunSettings),
        "$defs": {
            "points": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "minProperties": 1,
                    "properties": {item.name: _one_of(hint, item.metadata["limits"]) for item, hint in _swept()},
                },
            }
        },
    }


def _object(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    properties = {item.name: _property(item, hints[item.name]) for item in fields(kind)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property(item: Field[Any], hint: Any) -> dict[str, Any]:
    """The schema of one key."""
    described = {"description": item.metadata["meaning"]}
    if item.name in SECTIONS and SECTIONS[item.name] in (hint, *get_args(hint)):
        content = _object(SECTIONS[item.name])
        if NoneType in get_args(hint):
            return described | content | {"type": ["object", "null"], "default": None}
        if words := _words(get_args(hint)):  # in place of the whole section
            content |= {"type": ["object", "string"], "pattern": f"^({'|'.join(words)})$(?!\\n)"}
        return described | content | {"default": {}}
    limits = item.metadata["limits"]
    content = _one_of(hint, limits)
    if item.metadata["swept"]:
        listed = {"type": [content["type"], "array"], "minItems": 1, "uniqueItems": True, "items": content}
        content = content | listed
    default = _default(item)
    return described | content | ({} if default is MISSING else {"default": default})


def _one_of(hint: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a type; words beside a path or text are text themselves."""
    kinds = list(get_args(hint)) if get_origin(hint) in (UnionType, Union) else [hint]
    words = _words(kinds)
    kinds = [kind for kind in kinds if get_origin(kind) is not Literal]
    if not kinds:
        return {"enum": words}
    if Path in kinds or str in kinds:
        words = []
    branches = [_typed(kind, limits) for kind in kinds if kind is not NoneType]
    branches += [{"const": word} for word in words]
    if len(branches) > 1 and NoneType in kinds:
        branches.append({"type": "null"})
    if len(branches) > 1:
        return {"anyOf": branches}
    (branch,) = branches
    return branch | {"type": [branch["type"], "null"]} if NoneType in kinds else branch


def _words(kinds: Iterable[Any]) -> list[str]:
    return [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def _typed(kind: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    name = "array" if get_origin(kind) in (list, tuple) else _NAMES[kind]
    own = {key: value for key, value in limits.items() if key in _LIMITS.get(name, ())}
    if kind == list[PointChoice]:
        return {"$ref": _POINTS} | own
    return {"type": name} | own | ({"items": _one_of(get_args(kind)[0], limits)} if name == "array" else {})


def _default(item: Field[Any]) -> Any:
    """The default as YAML has it; ``MISSING`` where there is none."""
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return list(value) if isinstance(value, tuple) else value


def _swept() -> Iterator[tuple[Field[Any], Any]]:
    """Each swept key and its type, in the order of ``points.SweepPoint``."""
    for kind in SECTIONS.values():
        hints = get_type_hints(kind)
        yield from ((item, hints[item.name]) for item in fields(kind) if item.metadata["swept"])


def schema_text() -> str:
    """The schema as YAML, for editors and for those who read it."""
    head = "# Made by `make docs` from flexlib/workflow_support/settings.py\n"
    return head + yaml.safe_dump(
        json.loads(json.dumps(config_schema())), sort_keys=False, width=120, default_flow_style=False
    )


def reference_text() -> str:
    """A table for the top level of the config and for each section, as Markdown."""
    properties = config_schema()["properties"]
    lines = ["## Top level", "", *_table({key: item for key, item in properties.items() if key not in SECTIONS})]
    for name in SECTIONS:
        section = properties[name]
        keys = {f"{name}.{key}": item for key, item in section["properties"].items()}
        lines += ["", f"## `{name}`", "", section["description"], "", *_table(keys)]
    return "\n".join(lines) + "\n"


def _table(properties: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for key, item in properties.items():
        default = item.get("default", "required")
        text = default if isinstance(default, str) else json.dumps(default)
        yield f"| `{key}` | {f'`{text}`' if 'default' in item else text} | {item['description']} |"


def made_files() -> dict[Path, str]:
    """What the files that are made from the settings should hold."""
    by_hand = REFERENCE_FILE.read_text().partition(REFERENCE_BEGINS)[0]
    return {SCHEMA_FILE: schema_text(), REFERENCE_FILE: f"{by_hand}{REFERENCE_BEGINS}\n\n{reference_text()}"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help="write the files")
    choice.add_argument("--check", action="store_true", help="fail where they differ from what would be written")
    arguments = parser.parse_args()
    for path, text in made_files().items():
        if arguments.write:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} does not agree with flexlib/workflow_support/settings.py: make docs")


if __name__ == "__main__":
    main()
