"""Prepared and meshed particle sets of any length for the benchmarks.

A few hundred particles are simulated and prepared; a longer set is these repeated, on disk as real as any other: what
an image holds makes no difference to the time that it takes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexlib.images.stack import ImageStackWriter, read_stack_header
from flexlib.imaging.maps import Map, write_map
from flexlib.imaging.masks import soft_edge
from flexlib.layout import ParticlesFolder
from flexlib.mesh.build import build_mesh
from flexlib.particles.star import read_tables
from flexlib.particles.star_write import write_star
from flexlib.prepare.run import prepare_particles
from flexlib.records import PreparedRecord
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.settings import MeshSettings, PrepareSettings

FIELD_OF_VIEW_A = 256.0  # the antibody fits
_CHUNK = 500  # images copied at once


def ball(box: int, filling: float) -> np.ndarray:
    """(box, box, box) bool: a ball in the box centre that fills this share of the box's volume."""
    axis = np.arange(box) - box // 2
    distance2 = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
    return distance2 <= np.partition(distance2.reshape(-1), round(filling * box**3) - 1)[round(filling * box**3) - 1]


def make_set(folder: Path, box: int, *, filling: float | None = None, distinct: int = 500) -> None:
    """``folder`` with sim/ and particles/: ``distinct`` simulated antibodies of ``box`` px, prepared.

    With ``filling`` the mask is a ball of that share of the box, else what prepare makes.
    """
    simulate_set(folder, box, distinct)
    prepare_set(folder, box, filling)


def simulate_set(folder: Path, box: int, distinct: int) -> None:
    """The first half of ``make_set``, the stage ``simulate``."""
    simulate_particles(folder / "sim", Simulation(num_particles=distinct, box=box, pixel_size_A=FIELD_OF_VIEW_A / box))


def prepare_set(folder: Path, box: int, filling: float | None, train_box: int | None = None) -> None:
    """The second half of ``make_set``, the stage ``prepare``; ``train_box`` is ``box`` where it is not given."""
    sim, pixel_size_A = folder / "sim", FIELD_OF_VIEW_A / box
    mask = None
    if filling is not None:
        mask = sim / "ball.mrc"
        data = soft_edge(ball(box, filling), pixel_size_A, 0.0, 0.0)
        write_map(mask, data, pixel_size_A, like=Map(data, pixel_size_A))
    prepare_particles(
        sim / "particles.star",
        sim / "consensus.mrc",
        folder / "particles",
        mask=mask,
        settings=PrepareSettings(train_box=train_box or box),
    )


def make_mesh(particles_dir: Path, mesh_dir: Path, cells: int) -> None:
    """The stage ``mesh``, for a prepared set."""
    build_mesh(particles_dir, mesh_dir, MeshSettings(cells=cells))


def repeat_set(folder: Path, out: Path, count: int) -> None:
    """The set of ``make_set`` repeated to ``count`` particles, as if that many had been prepared: ``out``/particles."""
    source, target = ParticlesFolder(folder / "particles"), ParticlesFolder(out / "particles")
    anew = [path.name for path in (source.images, source.particles, source.record)]
    shutil.copytree(source.path, target.path, ignore=shutil.ignore_patterns(*anew))
    header = read_stack_header(source.images)
    rows = np.arange(count) % header.num_images
    record = PreparedRecord.read(source.record)
    with ImageStackWriter(target.images, count, header.box, record.train_pixel_size_A) as stack:
        shape = (header.num_images, header.box, header.box)
        images = np.memmap(header.path, header.dtype, "r", header.offset, shape)
        for first in range(0, count, _CHUNK):
            stack.append(images[rows[first : first + _CHUNK]])
    for original, copy, stack_name in (
        (source.particles, target.particles, target.images.name),
        (Path(record.particles), out / "input.star", "particles.mrcs"),
    ):
        tables = read_tables(original)
        particles = tables.particles.iloc[rows].reset_index(drop=True)
        particles["rlnImageName"] = [f"{number + 1:06d}@{stack_name}" for number in range(count)]
        if "flexInputRow" in particles:
            particles["flexInputRow"] = np.arange(count)
        write_star({"optics": tables.optics, "particles": particles}, copy)
    repeated = replace(record, particles=str(out / "input.star"), num_input=count, num_particles=count, num_rows=count)
    repeated.write(target.record)
