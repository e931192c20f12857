"""The pieces of an RO-Crate: https://w3id.org/ro/crate/1.1, https://w3id.org/ro/wfrun/process/0.5."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flexlib.layout import RunFolder

Entity = dict[str, Any]

# The profile's term for a SHA-256, which the context of 1.1 lacks
CONTEXT = ["https://w3id.org/ro/crate/1.1/context", {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}]

CRATE: Entity = {
    "@id": RunFolder(Path()).crate.name,
    "@type": "CreativeWork",
    "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
    "about": {"@id": "./"},
}
PROCESS_RUN: Entity = {
    "@id": "https://w3id.org/ro/wfrun/process/0.5",
    "@type": "CreativeWork",
    "name": "Process Run Crate",
    "version": "0.5",
}

_MRC = "https://www.ccpem.ac.uk/mrc-format/mrc2014/"
_STAR = "https://relion.readthedocs.io/en/latest/Reference/Conventions.html"
FORMATS: list[Entity] = [
    {"@id": _MRC, "@type": "WebSite", "name": "MRC2014, a map"},
    {"@id": _STAR, "@type": "WebSite", "name": "STAR, RELION's metadata"},
]
_BINARY = "application/octet-stream"
_ENCODINGS: dict[str, Any] = {
    ".html": "text/html",
    ".png": "image/png",
    ".webp": "image/webp",
    ".csv": "text/csv",
    ".json": "application/json",
    ".yaml": "application/yaml",
    ".vtu": "application/xml",
    ".mrc": [_BINARY, {"@id": _MRC}],
    ".star": ["text/plain", {"@id": _STAR}],
}


def data_entity(root: Path, path: Path, what: str) -> Entity:
    """A file or a folder below the crate's root; ``what`` describes it."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"@id": f"{quote(name)}/", "@type": "Dataset", "name": name, "description": what}
    return {
        "@id": quote(name),
        "@type": "File",
        "name": name,
        "description": what,
        "contentSize": str(path.stat().st_size),
        "encodingFormat": _ENCODINGS.get(path.suffix, _BINARY),
    }


def property_value(identifier: str, name: str, value: Any) -> Entity:
    """A named value; what JSON-LD would drop or take apart (null, lists of lists, dicts) becomes JSON text."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, (bool, int, float, str)) for item in items):
        value = json.dumps(value)
    elif len(items) == 1:
        value = items[0]
    return {"@id": f"#{quote(identifier)}", "@type": "PropertyValue", "name": name, "value": value}


def links(entities: Iterable[Entity]) -> list[dict[str, str]]:
    """References to entities."""
    return [{"@id": entity["@id"]} for entity in entities]
