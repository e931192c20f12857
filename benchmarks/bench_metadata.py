"""Time particle metadata: read with all checks, write as prepare does, write and read latents, choose a subset.

    python benchmarks/bench_metadata.py [--count 1000000] [--formats star cs stream] [--out results.json]

Files are made as RELION 3.1 (25 columns) and CryoSPARC (35 fields, plain and compressed) write them, 200 particles a
stack; no image exists. Each format is timed in a process of its own, whose peak memory is reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PER_STACK = 200
DIMS = 2
CHUNK = 100_000

STAR_COLUMNS = {  # label: format and range of a uniform draw, or None for what is not drawn
    "rlnCoordinateX": ("%12.6f", (0, 4000)),
    "rlnCoordinateY": ("%12.6f", (0, 4000)),
    "rlnMicrographName": ("%s", None),
    "rlnImageName": ("%s", None),
    "rlnCtfMaxResolution": ("%12.6f", (3, 6)),
    "rlnCtfFigureOfMerit": ("%12.6f", (0, 0.2)),
    "rlnDefocusU": ("%12.6f", (1e4, 2e4)),
    "rlnDefocusV": ("%12.6f", (1e4, 2e4)),
    "rlnDefocusAngle": ("%12.6f", (0, 180)),
    "rlnCtfBfactor": ("%12.6f", (0, 0)),
    "rlnCtfScalefactor": ("%12.6f", (1, 1)),
    "rlnPhaseShift": ("%12.6f", (0, 0)),
    "rlnAngleRot": ("%12.6f", (-180, 180)),
    "rlnAngleTilt": ("%12.6f", (0, 180)),
    "rlnAnglePsi": ("%12.6f", (-180, 180)),
    "rlnClassNumber": ("%12d", (1, 1)),
    "rlnNormCorrection": ("%12.6f", (0.8, 1.2)),
    "rlnRandomSubset": ("%12d", None),
    "rlnLogLikeliContribution": ("%12.6e", (1e5, 2e5)),
    "rlnMaxValueProbDistribution": ("%12.6f", (0, 1)),
    "rlnNrOfSignificantSamples": ("%12d", (1, 50)),
    "rlnOpticsGroup": ("%12d", None),
    "rlnOriginXAngst": ("%12.6f", (-9, 9)),
    "rlnOriginYAngst": ("%12.6f", (-9, 9)),
    "rlnGroupNumber": ("%12d", (1, 900)),
}
OPTICS = "_rlnOpticsGroup _rlnOpticsGroupName _rlnVoltage _rlnSphericalAberration _rlnAmplitudeContrast"
CS_FIELDS = {  # further fields: type, shape
    **{f"ctf/{name}": ("<f4", ()) for name in ("df_angle_rad", "phase_shift_rad", "bfactor", "scale_const")},
    **{f"ctf/{name}": ("<f4", (2,)) for name in ("shift_A", "tilt_A", "trefoil_A")},
    **{f"ctf/{name}": ("<f4", (4,)) for name in ("tetra_A", "anisomag")},
    **{f"alignments3D/{name}": ("<f4", ()) for name in ("error", "cross_cor", "weight", "class_posterior")},
    **{f"location/{name}": ("<f4", ()) for name in ("center_x_frac", "center_y_frac", "micrograph_psize_A")},
    "location/micrograph_uid": ("<u8", ()),
    "location/micrograph_shape": ("<u4", (2,)),
}


def make_star(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    row_format = " ".join(kind for kind, _ in STAR_COLUMNS.values()) + " \n"
    with path.open("w") as file:
        labels = [*OPTICS.split(), "_rlnImagePixelSize", "_rlnImageSize", "_rlnImageDimensionality"]
        file.write("\n# version 30001\n\ndata_optics\n\nloop_ \n" + "".join(f"{label} \n" for label in labels))
        file.writelines(f"{group} opticsGroup{group} 300 2.7 0.1 1.06 256 2 \n" for group in (1, 2, 3))
        file.write(" \n\n# version 30001\n\ndata_particles\n\nloop_ \n")
        file.writelines(f"_{label} #{number} \n" for number, label in enumerate(STAR_COLUMNS, 1))
        for first in range(0, count, CHUNK):
            rows = range(first, min(first + CHUNK, count))
            named = {
                "rlnMicrographName": [f"MotionCorr/job002/mic_{i // PER_STACK:06d}.mrc" for i in rows],
                "rlnImageName": [f"{i % PER_STACK + 1:06d}@Extract/job9/mic_{i // PER_STACK:06d}.mrcs" for i in rows],
                "rlnRandomSubset": [1 + i % 2 for i in rows],
                "rlnOpticsGroup": [1 + i // PER_STACK % 3 for i in rows],
            }
            columns = [
                named[label] if limits is None else rng.uniform(*limits, len(rows)).tolist()
                for label, (_, limits) in STAR_COLUMNS.items()
            ]
            file.writelines(map(row_format.__mod__, zip(*columns, strict=True)))


def make_cs(path: Path, count: int, compressed: bool) -> None:
    from flexlib.particles.cs_file import CsFile

    rng = np.random.default_rng(0)
    index = np.arange(count)
    known = {
        "uid": (rng.permutation(count).astype(np.uint64) * 7919 + 2**60, "<u8", ()),
        "blob/idx": (index % PER_STACK, "<u4", ()),
        "blob/shape": (256, "<u4", (2,)),
        "blob/psize_A": (1.06, "<f4", ()),
        "blob/sign": (-1, "<f4", ()),
        "ctf/exp_group_id": (index // PER_STACK % 3, "<u4", ()),
        "ctf/accel_kv": (300, "<f4", ()),
        "ctf/cs_mm": (2.7, "<f4", ()),
        "ctf/amp_contrast": (0.1, "<f4", ()),
        "ctf/scale": (1, "<f4", ()),
        "ctf/df1_A": (rng.uniform(1e4, 2e4, count), "<f4", ()),
        "ctf/df2_A": (rng.uniform(1e4, 2e4, count), "<f4", ()),
        "alignments3D/split": (index % 2, "<u4", ()),
        "alignments3D/shift": (rng.normal(size=(count, 2)), "<f4", (2,)),
        "alignments3D/pose": (rng.normal(size=(count, 3)), "<f4", (3,)),
        "alignments3D/psize_A": (1.06, "<f4", ()),
        "alignments3D/alpha": (rng.uniform(0.8, 1.2, count), "<f4", ()),
    } | {name: (0, *kind) for name, kind in CS_FIELDS.items()}
    known["location/micrograph_uid"] = (index // PER_STACK + 2**60, *CS_FIELDS["location/micrograph_uid"])
    paths = [f"J12/extract/mic_{stack:06d}_particles.mrc".encode() for stack in range(-(-count // PER_STACK))]
    if not compressed:
        records = np.zeros(count, [("blob/path", "S64"), *((name, *kind) for name, (_, *kind) in known.items())])
        records["blob/path"] = np.array(paths)[index // PER_STACK]
        for name, (values, *_) in known.items():
            records[name] = values
        CsFile(path, records, {}, {}).write(path)
        return
    stream = {name: np.empty((count, *shape), kind) for name, (_, kind, shape) in known.items()}
    for name, (values, *_) in known.items():
        stream[name][:] = values
    offsets = np.cumsum([1, *(len(text) + 1 for text in paths)])[:-1]
    stream["blob/path"] = offsets[index // PER_STACK].astype(np.uint64)
    dtype = [[name, kind, *([shape] if shape else [])] for name, (_, kind, shape) in known.items()] + [
        ["blob/path", "|O"]
    ]
    header = {
        "length": count,
        "dtype": dtype,
        "compression": "lz4",
        "compressed_fields": [*list(known)[1:], "blob/path"],
    }
    CsFile(path, None, stream, header, b"\0" + b"\0".join(paths) + b"\0").write(path)


def time_format(path: Path) -> dict:
    """(seconds, seconds of CPU) of each step on one particle file, and this process's peak memory in GB."""
    from flexlib.particles import read_particles
    from flexlib.particles.latents_read import read_latents
    from flexlib.particles.latents_table import read_latent_table
    from flexlib.particles.latents_write import write_latents_cs, write_latents_star
    from flexlib.particles.star_write import relion_tables, write_star
    from flexlib.particles.table import Particles
    from flexlib.records import PreparedRecord
    from flexlib.select import in_box, write_subset

    folder = path.parent / f"{path.stem}_run"
    times: dict[str, float] = {}
    cpu_times: dict[str, float] = {}

    def timed(name: str, function):
        start, cpu_start = time.perf_counter(), time.process_time()
        result = function()
        times[name] = time.perf_counter() - start
        cpu_times[name] = time.process_time() - cpu_start  # what it takes on a machine with nothing else to do
        return result

    def peak_GB() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    memory = {"GB of libraries": peak_GB()}
    particles = timed("read and check", lambda: read_particles(path))
    memory["peak GB after reading"] = peak_GB()

    def write_particles(particles: Particles) -> None:
        blocks = relion_tables(particles)
        blocks["particles"]["flexInputRow"] = particles.source_row
        write_star(blocks, folder / "particles/particles.star")

    timed("write particles.star", lambda: write_particles(particles))
    count = len(particles)
    PreparedRecord(
        particles=str(path), passthrough=None, image_root=None, consensus="", mask=None, num_input=count,
        num_particles=count, symmetry="C1", symmetry_copies=1, num_rows=count, half_sets="input", full_box=256,
        full_pixel_size_A=1.06, crop_box=256, train_box=128, train_pixel_size_A=2.12, optics_groups=[],
    ).write(folder / "particles/prepared.json")  # fmt: skip
    latents = np.random.default_rng(1).normal(size=(count, DIMS)).astype(np.float32)
    particles = None  # memory for what follows
    out = folder / "train" / "latents.star"
    timed("write latents.star", lambda: write_latents_star(folder / "particles", latents, out))
    if path.suffix == ".cs":
        timed("write latents.cs", lambda: write_latents_cs(folder / "particles", latents, out.with_suffix(".cs")))
    timed("read latents.star", lambda: read_latents(out, folder / "particles"))

    def choose() -> None:
        table = read_latent_table(out)
        write_subset(table, in_box(table, ["1=0:"]), folder / f"subset{path.suffix}")

    timed("choose half of them", choose)
    memory["peak GB"] = peak_GB()
    return {name: (seconds, cpu_times[name]) for name, seconds in times.items()} | memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--formats", nargs="+", choices=("star", "cs", "stream"), default=["star", "cs", "stream"])
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    parser.add_argument("--time", type=Path, help=argparse.SUPPRESS)  # the child's part
    options = parser.parse_args()
    if options.time:
        print(json.dumps(time_format(options.time)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in options.formats:
            path = Path(name) / f"{kind}.{'star' if kind == 'star' else 'cs'}"
            if kind == "star":
                make_star(path, options.count)
            else:
                make_cs(path, options.count, compressed=kind == "stream")
            done = subprocess.run(
                [sys.executable, __file__, "--time", path], capture_output=True, text=True, check=True
            )
            results[kind] = json.loads(done.stdout.splitlines()[-1])
            print(f"{kind}: {options.count} particles, {path.stat().st_size / 1e6:.0f} MB")
            for step, value in results[kind].items():
                text = f"{value:7.2f}" if "GB" in step else f"{value[0]:7.2f} s ({value[1]:.2f} s CPU)"
                print(f"  {step:24} {text}", flush=True)
    if options.out:
        about = {"count": options.count, "machine": platform.processor() or platform.machine()}
        options.out.write_text(json.dumps(about | {"formats": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
