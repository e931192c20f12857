"""``ro-crate-metadata.json``: a run as an RO-Crate 1.1 of the profile Process Run Crate 0.5, and its config beside it.

Written by hand. rocrate (ro-crate-py) was considered: its strength is to copy files into a new crate, and here they
stay where they are; we should use its dictionary of entities only, for five packages more in every job's environment.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from flexlib import __version__
from flexlib.files import atomic_path, write_json
from flexlib.layout import RunFolder
from flexlib.provenance.crate import CONTEXT, CRATE, FORMATS, PROCESS_RUN, Entity, data_entity, links, property_value
from flexlib.provenance.machine import code_commit, operating_system, public_command
from flexlib.provenance.outputs import main_outputs
from flexlib.records import AgreementRecord, ChecksumsRecord, InputFile, ResolutionRecord, ValidationRecord
from flexlib.runtime import package_versions, processor_name
from flexlib.workflow_support.points import SweepPoint, sweep_points


def write_provenance(results_dir: str | Path, config: Mapping[str, Any], command: str = "") -> None:
    """Write ``ro-crate-metadata.json`` and ``config.yaml`` into the folder of a finished run.

    Parameters
    ----------
    results_dir
        The run's folder, results/<name>, which becomes the crate's root.
    config
        The checked config.
    command
        The command line that started the run.
    """
    run = RunFolder(Path(results_dir))
    with atomic_path(run.config) as temporary:
        temporary.write_text(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    write_json(run.crate, {"@context": CONTEXT, "@graph": crate_entities(run, _plain(config), command)})


def crate_entities(run: RunFolder, config: Mapping[str, Any], command: str) -> list[Entity]:
    """The crate's graph; ``config`` holds plain values only."""
    points = sweep_points(config)
    outputs = [data_entity(run.path, path, what) for path, what in main_outputs(run, points)]
    config_file = data_entity(run.path, run.config, "The config, complete with defaults")
    checksums = ChecksumsRecord.read(run.checksums).files if run.checksums.is_file() else []
    inputs = [_input_entity(number, file) for number, file in enumerate(checksums, 1)]
    settings = [property_value(f"config/{key}", key, value) for key, value in _flat(config)]
    circumstances = list(_circumstances(run, points))
    software = _software()
    begin, end = _run_times(run)
    action = {
        "@id": "#run",
        "@type": "CreateAction",
        "name": f"Flexible refinement of {config['name']}",
        **({"description": public_command(command)} if command else {}),
        "startTime": begin,
        "endTime": end,
        "instrument": {"@id": software[0]["@id"]},
        "object": links([config_file, *inputs, *settings]),
        "result": links(outputs),
        "additionalProperty": links(circumstances),
    }
    extra = [data_entity(run.path, run.checksums, "Sizes, times and SHA-256 of the inputs")] if checksums else []
    files = [config_file, *extra, *outputs]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"flexlib results: {config['name']}",
        "description": "Continuous motion of a molecule in cryo-EM images: a flexible refinement by flexlib, with its "
        "settings, inputs and results.",
        "datePublished": datetime.now(UTC).isoformat(timespec="seconds"),
        "conformsTo": {"@id": PROCESS_RUN["@id"]},
        "hasPart": links(files),
        "mentions": {"@id": action["@id"]},
    }
    return [CRATE, root, PROCESS_RUN, action, *software, *circumstances, *files, *inputs, *settings, *FORMATS]


def _input_entity(number: int, file: InputFile) -> Entity:
    """An input: no file of the crate, whose files lie below its root."""
    return {
        "@id": f"#input-{number}",
        "@type": "CreativeWork",
        "name": file.path,
        "description": f"Input: {', '.join(file.used_as)}",
        "contentSize": str(file.size_bytes),
        "dateModified": _iso(file.modified_ns / 1e9),
        **({"sha256": file.sha256} if file.sha256 else {}),
    }


def _software() -> list[Entity]:
    """Flexlib, with the commit of its code, and what it needs; flexlib first."""
    needed = [
        {
            "@id": f"pkg:pypi/{name}@{version.partition('+')[0]}",
            "name": name,
            "softwareVersion": version,
        }
        for name, version in package_versions().items()
    ]
    python = {
        "@id": "https://www.python.org/",
        "url": "https://www.python.org/",
        "name": "Python",
        "softwareVersion": platform.python_version(),
    }
    required = [{**entity, "@type": "SoftwareApplication"} for entity in (python, *needed)]
    commit = code_commit()
    about = [] if commit is None else [property_value("commit", "git commit", commit.sha)]
    about += [] if commit is None else [property_value("modified", "modified since the commit", commit.modified)]
    own = {
        "@id": "#flexlib",
        "@type": "SoftwareApplication",
        "name": "flexlib",
        "description": "Flexible refinement in cryo-EM, a Snakemake workflow",
        "softwareVersion": __version__,
        "softwareRequirements": links(required),
        **({"additionalProperty": links(about)} if about else {}),
    }
    return [own, *required, *about]


def _circumstances(run: RunFolder, points: Iterable[SweepPoint]) -> Iterable[Entity]:
    """Seeds, devices and the machine that wrote this."""
    points = list(points)
    yield property_value("seeds", "seeds of the random numbers", sorted({point.seed for point in points}))
    trained = [run.train(point.path).validation for point in points]
    reconstructed = [run.reconstruct(point.path).resolution for point in points]
    validated = [run.validate(point.path) for point in points]
    trained += [folder.half(number).validation for folder in validated for number in (1, 2)]
    devices = {
        "training": {ValidationRecord.read(path).device for path in trained if path.is_file()},
        "reconstruction": {ResolutionRecord.read(path).device for path in reconstructed if path.is_file()},
        "validation": {AgreementRecord.read(one.record).device for one in validated if one.record.is_file()},
    }
    for stage, found in devices.items():
        if known := sorted(found - {""}):
            yield property_value(f"device-{stage}", f"device of the {stage}", known)
    yield property_value("system", "operating system", operating_system())
    yield property_value("processor", "processor of the machine that wrote this file", processor_name())


def _run_times(run: RunFolder) -> tuple[str, str]:
    """When the first job started and the last one ended, by their benchmarks; without any, by the files."""
    jobs = [(path.stat().st_mtime, _seconds(path)) for path in run.benchmarks.rglob("*.tsv")]
    if not jobs:
        jobs = [(path.stat().st_mtime, 0.0) for path in run.path.rglob("*") if path.is_file()]
    return _iso(min(end - seconds for end, seconds in jobs)), _iso(max(end for end, _ in jobs))


def _seconds(benchmark: Path) -> float:
    """How long a job took, the first column of its benchmark; 0 where that is not known."""
    lines = benchmark.read_text().splitlines()
    try:
        return float(lines[1].split("\t")[0])
    except (IndexError, ValueError):
        return 0.0


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every key of the config by its dotted name."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as text, tuples as lists."""
    return json.loads(json.dumps(config, default=str))
