"""Time and memory of building a mesh on a large box: one segment, and several.

    python benchmarks/bench_mesh.py [--box 256] [--cells 40] [--filling 0.2] [--segments 4]

Prints one line per mesh. Set NUMBA_NUM_THREADS and OMP_NUM_THREADS to the number of cores to time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PIXEL_SIZE_A = 1.5


def write_inputs(folder: Path, box: int, filling: float, segments: int) -> None:
    """A bumpy ellipsoid that fills part of the box, its density, and slabs of it as segments."""
    from flexlib.imaging.maps import Map, write_map
    from flexlib.imaging.masks import soft_edge

    axis = ((np.arange(box) - box // 2) / (box / 2)).astype(np.float32)
    z, y, x = axis[:, None, None], axis[None, :, None], axis[None, None, :]
    radius = np.sqrt((x / 1.0) ** 2 + (y / 0.8) ** 2 + (z / 0.7) ** 2) + 0.03 * np.sin(9 * x + 7 * y) * np.sin(8 * z)
    level = np.quantile(radius, filling * 0.93)  # the soft edge adds the rest
    inside = radius < level
    like = Map(inside.astype(np.float32), PIXEL_SIZE_A)
    write_map(folder / "mask.mrc", soft_edge(inside, PIXEL_SIZE_A, 0.0, 3.0), PIXEL_SIZE_A, like=like)
    write_map(folder / "consensus.mrc", np.clip(level - radius, 0, None), PIXEL_SIZE_A, like=like)
    slab = np.clip(((x + level) / (2 * level) * segments).astype(int), 0, segments - 1)
    labels = np.where(inside, np.broadcast_to(slab, inside.shape), -1)
    write_map(folder / "segments.mrc", labels, PIXEL_SIZE_A, like=like, dtype=np.int8)


def build(folder: Path, cells: int, kind: str) -> None:
    """Build one mesh and print its line; run in a process of its own, so that its memory is its own."""
    from flexlib.mesh.build import build_mesh
    from flexlib.tetra.io import read_mesh
    from flexlib.workflow_support.settings import MeshSettings

    began = time.perf_counter()
    segmentation = folder / "segments.mrc" if kind == "segmented" else None
    build_mesh(folder, folder / kind, MeshSettings(cells=cells, segmentation=segmentation))
    wall_s = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory too
    peak_mb = int(status.split("VmHWM:")[1].split()[0]) / 1024
    mesh = read_mesh(folder / kind / "mesh.vtu")
    print(
        f"{kind}: {wall_s:.1f} s, peak {peak_mb:.0f} MB, {len(mesh.cells)} cells, "
        f"{len(np.unique(mesh.segment))} segments"
    )


def main() -> None:
    """Write the inputs, then build each mesh in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--filling", type=float, default=0.2, help="share of the box that the mask fills")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        build(options.inside, options.cells, options.kind)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.box, options.filling, options.segments)
        from flexlib.imaging.maps import read_map

        share = float((read_map(folder / "mask.mrc").data > 0).mean())
        print(f"box {options.box}, {options.cells} cells across, mask {100 * share:.1f} % of the box")
        for kind in ("plain", "segmented"):
            command = [sys.executable, __file__, "--inside", name, "--kind", kind, "--cells", str(options.cells)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
