"""What RO-Crate 1.1 and Process Run Crate 0.5 demand of a crate, but for the licence, which is the user's to choose."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Entity = dict[str, Any]


def read_crate(root: Path) -> dict[str, Entity]:
    """The entities of the crate at ``root`` by their ids, after looking at every rule."""
    content = json.loads((root / "ro-crate-metadata.json").read_text(encoding="utf-8"))
    assert set(content) == {"@context", "@graph"}
    assert content["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    graph = content["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert len(entities) == len(graph), "an id twice"
    assert all(entity["@type"] and entity.get("name", "-") for entity in graph)
    links = [link for entity in graph for link in linked(entity)]
    # of what a specification is, RO-Crate's own descriptor needs no entity
    assert {link for link in links if link not in entities} == {"https://w3id.org/ro/crate/1.1"}

    descriptor = entities["ro-crate-metadata.json"]
    assert descriptor["@type"] == "CreativeWork"
    assert descriptor["about"] == {"@id": "./"}
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    top = entities["./"]
    assert top["@type"] == "Dataset"
    assert top["name"] and top["description"]
    assert datetime.fromisoformat(top["datePublished"])
    assert top["conformsTo"] == {"@id": "https://w3id.org/ro/wfrun/process/0.5"}
    assert entities["https://w3id.org/ro/wfrun/process/0.5"]["@type"] == "CreativeWork"

    parts = {link["@id"] for link in top["hasPart"]}
    data = {name for name, one in entities.items() if one["@type"] in ("File", "Dataset") and name != "./"}
    assert data == parts
    for name in data:
        assert not urlsplit(name).scheme and not name.startswith(("/", "..")), name
        path = root / unquote(name)
        assert path.is_dir() == name.endswith("/") == (entities[name]["@type"] == "Dataset")
        if path.is_file():
            assert int(entities[name]["contentSize"]) == path.stat().st_size, name
            assert entities[name]["encodingFormat"]
        assert path.exists(), name
    action = entities[top["mentions"]["@id"]]
    assert action["@type"] == "CreateAction"
    assert entities[action["instrument"]["@id"]]["@type"] == "SoftwareApplication"
    assert datetime.fromisoformat(action["startTime"]) <= datetime.fromisoformat(action["endTime"])
    assert {link["@id"] for link in action["result"]} <= parts
    return entities


def linked(value: Any) -> list[str]:
    """Every ``@id`` that an entity refers to."""
    if isinstance(value, list):
        return [link for item in value for link in linked(item)]
    if not isinstance(value, dict):
        return []
    if set(value) == {"@id"}:
        return [value["@id"]]
    return [link for key, item in value.items() if key != "@id" for link in linked(item)]
