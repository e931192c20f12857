"""Bad particle files, as rule ``prepare`` meets them: one line that names file, row and column, and exit status 1."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from particle_files import BOX, COUNT, cs_records, save_cs, star_rows, write_relion_star, write_stacks
from test_round_trip import bomb_files

SCRIPTS = Path(__file__).parents[1] / "workflow/scripts"

# Runs workflow/scripts/prepare.py once for each particle file and prints the exit statuses as JSON
DRIVER = """
import json, sys
from types import SimpleNamespace
scripts, *cases = sys.argv[1:]
sys.path.insert(0, scripts)
code = compile(open(scripts + "/prepare.py").read(), "prepare.py", "exec")
class Files(list):  # Snakemake's are named and numbered
    particles = property(lambda self: self[0])


statuses = []
for case in cases:
    particles, _, passthrough = case.partition("+")
    snakemake = SimpleNamespace(
        rule="prepare", threads=1, log=[particles + ".log"], output=Files(["out/particles.star"]), resources={},
        input=SimpleNamespace(particles=particles, consensus="none.mrc", mask=None, passthrough=passthrough or None),
        params=SimpleNamespace(image_root=None, settings={}, mask_settings={}),
    )
    try:
        exec(code, {"snakemake": snakemake})
        statuses.append(0)
    except SystemExit as stop:
        statuses.append(stop.code)
print(json.dumps(statuses))
"""


def star_with(folder: Path, name: str, old: str, new: str) -> str:
    path = write_relion_star(folder / name, halves=True)
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    return name


def cs_with(folder: Path, name: str, **changes) -> str:
    records = cs_records()
    for column, (row, value) in changes.items():
        records[column.replace("__", "/")][row] = value
    return save_cs(folder / name, records).name


def spoil_stack(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    elif kind == "compressed":
        path.write_bytes(gzip.compress(content))
    else:
        shape = (COUNT // 2, BOX + 2, BOX + 2) if kind == "box" else (2, BOX, BOX)
        with mrcfile.new(path, np.zeros(shape, np.float32), overwrite=True) as file:
            file.set_image_stack()
            file.voxel_size = 2.0


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int, list[str]]]:
    """Exit status and logged lines of each case; one process for all, because importing torch takes seconds."""
    folder = tmp_path_factory.mktemp("bad")
    rows = star_rows(halves=True)
    cases = [
        "missing.star",
        "missing.cs",
        star_with(folder, "nan.star", "30.00000    41.5", "nan 41.5"),
        star_with(folder, "text.star", "30.00000    41.5", "oops 41.5"),
        star_with(folder, "half.star", rows[4], rows[4].rstrip() + "7"),
        star_with(folder, "short.star", rows[5], rows[5].rstrip()[:-2]),
        star_with(folder, "empty.star", "".join(row + "\n" for row in rows), ""),
        star_with(folder, "group.star", "a.mrcs   1 ", "a.mrcs   4 "),
        cs_with(folder, "nan.cs", alignments3D__pose=(7, np.nan)),
        cs_with(folder, "half.cs", alignments3D__split=(2, 5)),
        cs_with(folder, "twice.cs", uid=(9, cs_records()["uid"][4])),
        save_cs(folder / "empty.cs", cs_records()[:0]).name,
        cs_with(folder, "good.cs") + "+" + save_cs(folder / "few.cs", cs_records()[["uid"]][:9]).name,
        *(path.name for path in bomb_files(folder).values()),
    ]
    (folder / "cut.cs").write_bytes((folder / "good.cs").read_bytes()[:-5])
    cases.append("cut.cs")
    for kind in ("gone", "truncated", "short", "box", "compressed"):  # of the second stack, first named in row 2
        write_stacks(folder / kind)
        spoil_stack(folder / kind / "Extract/job1/b.mrcs", kind)
        cases.append(f"{kind}/{write_relion_star(folder / kind / 'stack.star', halves=True).name}")
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(SCRIPTS), *cases], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert not (folder / "unpickled").exists() and not (folder / "out").exists()
    names = [case.partition("+")[0] for case in cases]
    logs = {name: (folder / f"{name}.log").read_text().splitlines() for name in names}
    return {name: (status, logs[name]) for name, status in zip(names, json.loads(result.stdout), strict=True)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.star", "missing.star: particle file not found"),
        ("missing.cs", "missing.cs: particle file not found"),
        ("nan.star", "nan.star: row 4, column rlnAngleRot: nan is not a finite number"),
        ("text.star", "text.star: row 4, column rlnAngleRot: oops is not a finite number"),
        ("half.star", "half.star: row 5, column rlnRandomSubset: 17 is neither 1 nor 2"),
        ("short.star", "short.star: data_particles, row 6: 11 values for 12 columns"),
        ("empty.star", "empty.star: the particle table data_particles has no rows"),
        ("group.star", "group.star: row 1, column rlnOpticsGroup: group 4 is not in data_optics"),
        ("nan.cs", "nan.cs: row 8, column alignments3D/pose: "),
        ("half.cs", "half.cs: row 3, column alignments3D/split: 5 is neither 0 nor 1"),
        ("twice.cs", "twice.cs: row 10, column uid: "),
        ("empty.cs", "empty.cs: no particle rows in this .cs file"),
        ("good.cs", "good.cs: row 10, column uid: "),
        ("cut.cs", "cut.cs: truncated or damaged: its header promises"),
        ("pickle.cs", "pickle.cs: a Python pickle, which is never loaded"),
        ("objects.cs", "objects.cs: column (all): Python objects (a pickle), which are never loaded"),
        ("column.cs", "column.cs: column blob/path: Python objects (a pickle), which are never loaded"),
        ("stream.cs", "stream.cs: column "),
        ("gone/stack.star", "gone/stack.star: row 2, column rlnImageName: image stack not found: "),
        ("truncated/stack.star", "truncated/stack.star: row 2, column rlnImageName: ... b.mrcs: truncated: "),
        ("short/stack.star", "short/stack.star: row 6, column rlnImageName: image 3 of a stack of 2: "),
        ("box/stack.star", f"box/stack.star: row 2, column rlnImageName: images of {BOX + 2} px, others of {BOX} px"),
        (
            "compressed/stack.star",
            "compressed/stack.star: row 2, column rlnImageName: ... b.mrcs: compressed with gzip",
        ),
    ],
)
def test_one_line_and_exit_status(outcomes, name, message):
    status, lines = outcomes[name]
    assert status == 1
    start, *more = message.split("... ")
    assert len(lines) == 1 and f"ERROR prepare: {start}" in lines[0] and all(part in lines[0] for part in more), lines
