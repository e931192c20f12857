"""Make docs/performance.md of the figures in benchmarks/results/*.json.

python benchmarks/make_page.py [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexlib.files import atomic_path, read_json

ROOT = Path(__file__).parents[1]
HEAD = """\
# Performance

Made by `make bench-page` of `benchmarks/results/*.json`: do not edit. `make bench` measures this machine (minutes),
`make bench BENCH="--device cuda"` one with a GPU; `python benchmarks/bench.py --help` lists the parts.
"""
PROVISIONAL = "\n**Provisional: the machine had other work while this was measured, and times are too long.**\n"
OPERATOR = """
Mask: a ball of 20 % of the box, mesh of 20 cells, {images} images at once. Times are ns per voxel, image and core; the
adjoint gives both gradients, by the map and by the vertices. *Scaling*: how many times quicker than one thread. *Of
adds*, *of reads*: numbers added to (forward) or read from (adjoint) the images a second, over what plain scalar code
that does nothing else adds or reads, in rows of the kernel's width at random pixels of an image of that size; more than
1 comes of vector registers and of neighbours in memory. *Of copy*: bytes that the forward reads of the map a second,
over the bandwidth of copying.
"""
GPU_OPERATOR = """
10^9 voxel-projections a second; mask: a ball of 20 % of the box, mesh of 20 cells, {images} images at once. The adjoint
gives both gradients.
"""
TRAINING = """
Simulated antibodies in a mask that is a ball; whole runs of `train`, all cores, each in a process of its own. An epoch
is the median of the run's; the first two also measure the latents' information, and later ones every fourth. *Before*:
from the start of training to the first epoch (reading, rigid map, elastic modes, spectral start). Memory is the whole
process's largest resident set.
"""
PEERS = """
{particles:,} simulated antibodies, box {box}, signal over noise {snr} a pixel, two hinge angles, exact poses; the same
cores for all, no GPU. *Epoch* and *our quality* are over ours: a median epoch over our median epoch, its CPU seconds
likewise (by the cores that a whole run kept busy), and the time until the latents are as good as ours in the end over
the time of our whole run, start and final inference included. R^2 is of
the true angles predicted from the latents, for particles that the fit has not seen: linear, and by kernel ridge
regression, the measure of our quality, for latents of many dims hold an angle as a curve. The noise leaves
{limit_r2:.2f} to be had. What was chosen: `benchmarks/bench_peers.py`; `make bench-peers` measures this machine.
"""
VARIED = {
    "epochs": "Sizes",
    "voxels": "Against voxels in the mask",
    "latent_dims": "Against latent dims",
    "cells": "Against cells across the box",
    "particles": "Against particles",
}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n" + "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def machine_section(result: dict[str, Any]) -> str:
    """All that one file holds."""
    machine = result["machine"]
    name = f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if machine["gpu"] else "")
    text = f"\n## {name}\n\n{machine['memory_GB']} GB of memory, Python {machine['python']}, torch {machine['torch']}, "
    text += f"numba {machine['numba']}.\n"
    for part, title, write in (
        ("operator", "The operator", gpu_operator if result["device"] == "cuda" else cpu_operator),
        ("training", "Training", training),
        ("run", "A whole run", whole_run),
        ("training_parts", "The parts of a training", training_parts),
        ("reconstruction", "Reconstruction", reconstruction),
        ("memory", "Data larger than memory", memory),
        ("peers", "Other programs", peers),
    ):
        if part in result:
            figures = result[part]
            text += f"\n### {title} ({figures['date']})\n" + (PROVISIONAL if figures["provisional"] else "")
            text += write(figures)
    return text


def cpu_operator(figures: dict[str, Any]) -> str:
    """The operator on a CPU."""
    rows = figures["rows"]
    text = OPERATOR.format(images=rows[0]["images"])
    text += table(
        (
            "box",
            "kernel",
            "threads",
            "voxels",
            "forward",
            "adjoint",
            "both",
            "scaling",
            "of adds",
            "of reads",
            "of copy",
        ),
        (
            (
                *(row["box"], row["kernel"], row["threads"], f"{row['voxels']:,}"),
                *(f"{row[f'{k}_ns']:.2f}" for k in ("forward", "adjoint_both", "forward_and_adjoint")),
                f"{row['scaling']:.2f}",
                *(
                    f"{row[k]:.2f}"
                    for k in ("forward_share_of_adds", "adjoint_share_of_reads", "forward_share_of_copy")
                ),
            )
            for row in rows
        ),
    )
    limits = [
        f"{limit['threads']} thread{'s' if limit['threads'] > 1 else ''}: copies {limit['copy_GB_per_s']:.1f} GB/s "
        "(read and written)"
        for limit in figures["limits"]
    ]
    return text + "\n" + "; ".join(limits) + ".\n"


def gpu_operator(figures: dict[str, Any]) -> str:
    """The operator on a GPU."""
    rows, (limit,) = figures["rows"], figures["limits"]
    kinds = ("forward", "adjoint_values", "adjoint_both", "forward_and_adjoint")
    text = GPU_OPERATOR.format(images=rows[0]["images"])
    text += table(
        ("box", "kernel", "voxels", "forward", "adjoint by the map", "adjoint", "forward and adjoint"),
        (
            (row["box"], row["kernel"], f"{row['voxels']:,}", *(f"{row[f'{kind}_G_per_s']:.2f}" for kind in kinds))
            for row in rows
        ),
    )
    text += f"\n{figures['note']}\n" if "note" in figures else ""
    if "tiles" in figures:
        text += "\nOther tiles (voxels, images and warps of a program):\n" + table(
            ("what", "box", "kernel", "oversampling", "tile", "10^9 a second"),
            (
                (
                    *(tile[key] for key in ("what", "box", "kernel", "oversampling")),
                    *(" x ".join(map(str, tile["tile"])), f"{tile['G_per_s']:.2f}"),
                )
                for tile in sorted(
                    figures["tiles"], key=lambda t: (t["what"], t["oversampling"], t["kernel"], -t["G_per_s"])
                )
            ),
        )
    return text + (
        f"\nThe device copies {limit['copy_GB_per_s']:.0f} GB/s and adds, at random pixels of an image, "
        f"{limit['random_adds_in_image_G_per_s']:.1f} x 10^9 numbers a second, of a batch "
        f"{limit['random_adds_in_batch_G_per_s']:.1f} x 10^9.\n"
    )


def training(figures: dict[str, Any]) -> str:
    """Training, a table for each quantity that varies."""
    lists = {name: figures[name] for name in VARIED if name in figures}
    text = TRAINING
    for name, rows in lists.items():
        text += f"\n{VARIED[name]}, {rows[0]['epochs']} epochs:\n" + table(
            ("particles", "box", "voxels", "cells", "dims", "epoch, s", "before, s", "whole run, s", "peak memory, GB"),
            (
                (
                    *(f"{row['particles']:,}", row["box"], f"{row['voxels']:,}", row["cells"], row["latent_dims"]),
                    *(f"{row[key]:.2f}" for key in ("epoch_s", "start_s", "wall_s", "peak_GB")),
                )
                for row in rows
            ),
        )
    for row in lists.get("epochs", []):
        if row["device"] == "cuda":
            scaled = row["epoch_s"] * 100_000 / row["particles"]
            text += f"\n100,000 particles, by proportion and not measured: {scaled:.1f} s an epoch, with "
            text += f"{row['voxels']:,} voxels at box {row['box']}.\n"
    return text


def whole_run(figures: dict[str, Any]) -> str:
    """A run of the workflow by its stages."""
    total = sum(figures["cpu_s"].values())
    text = (
        f"\n{figures['particles']:,} particles, trained at box {figures['box']}, from the user's files to the report, "
    )
    text += "default settings, one sweep point. CPU seconds, imports of libraries among them.\n\n"
    return text + table(
        ("stage", "CPU s", "share, %"),
        ((stage, f"{spent:.1f}", f"{100 * spent / total:.1f}") for stage, spent in figures["cpu_s"].items()),
    )


def training_parts(figures: dict[str, Any]) -> str:
    """A training by its parts, as ``gpu_check.py`` times them."""
    laps = ("set_up", "start", "first_epoch", "second_epoch", "third_epoch")
    text = "\nSeconds. The first two epochs also measure the latents' information, and the first searches all of "
    text += "latent space. " + figures.get("note", "") + "\n\n"
    text += table(
        ("particles", "box", "voxels", "cells", *(lap.replace("_", " ") for lap in laps)),
        (
            (
                *(f"{row['particles']:,}", row["box"], f"{row['voxels']:,}", row["cells"]),
                *(f"{row[f'{lap}_s']:.1f}" for lap in laps),
            )
            for row in figures["rows"]
        ),
    )
    for row in figures["rows"]:
        profile = row["profile"]
        text += f"\nA mini-batch of {row['batch_size']} that measures the information, {row['cells']} cells: "
        text += f"{profile['wall_ms']:.1f} ms, in {profile['device_ms']:.1f} ms of which the device works, "
        text += f"{profile['operator_ms']:.1f} ms on the operator; {profile['launches']:.0f} launches.\n"
    return text


def reconstruction(figures: dict[str, Any]) -> str:
    """Reconstruction, timed on some of the particles."""
    text = ""
    for row in figures["rows"]:
        minutes = row["both_halves_20_iterations_s_scaled"] / 60
        text += (
            f"\nBox {row['box']}, {row['particles']:,} particles, {row['voxels']:,} voxels, {row['kind']}: both halves "
            f"with 20 iterations take {minutes:.1f} minutes, timed on {row['part_of_half']:,} particles of a half and "
            f"scaled; {row['ms_per_image_and_iteration']:.2f} ms an image and iteration, peak memory "
            f"{row['peak_GB']:.2f} GB"
        )
        text += f", on the GPU {row['peak_gpu_GB']:.2f} GB.\n" if "peak_gpu_GB" in row else ".\n"
    return text


def memory(figures: dict[str, Any]) -> str:
    """Training on more than the memory holds."""
    gigabytes = {name: f"{value / 1e9:.2f} GB" for name, value in figures.items() if name.endswith("_bytes")}
    return (
        f"\n{figures['particles']:,} particles of {figures['box']} px, a stack of {gigabytes['stack_bytes']}, trained "
        f"for an epoch with the process's private memory limited to {gigabytes['limit_bytes']} by Linux "
        f"(`RLIMIT_DATA`): it succeeds, with {gigabytes['peak_resident_bytes']} resident at most, libraries and all "
        f"({gigabytes['resident_before_bytes']} after the imports), in {figures['seconds']:.0f} s.\n"
    )


def peers(figures: dict[str, Any]) -> str:
    """Training by other programs."""
    size, (ours, *others) = figures["size"], figures["rows"]
    rows = []
    for row in (ours, *(other for other in others if "epoch_s" in other)):
        cpu_s, our_cpu_s = (each["epoch_s"] * each["cores"] for each in (row, ours))
        epoch = [f"{row['epoch_s'] / ours['epoch_s']:.1f}", f"{cpu_s / our_cpu_s:.1f}"]
        if row is ours:
            epoch = [f"1 ({row['epoch_s']:.1f} s)", f"1 ({cpu_s:.1f} s)"]
        cells = [row["program"], row["settings"], row["latent_dims"], *epoch]
        if "timed_on" in row:
            cells += ["", f"timed on {row['timed_on']} particles", "", ""]
        else:
            aim = row["wall_s"] if row is ours else row["aim_s"]
            reached = f"{aim / ours['wall_s']:.1f}" if aim else f"not in {row['wall_s'] / ours['wall_s']:.1f}"
            cells += [row["epochs"], f"1 ({aim:.0f} s)" if row is ours else reached]
            cells += [f"{row[kind]:.2f}" for kind in ("r2_linear", "r2_kernel")]
        rows.append(cells)
    header = ("program", "settings", "dims", "epoch", "its CPU", "epochs", "our quality", "R^2, linear", "R^2, kernel")
    text = PEERS.format(**size, limit_r2=figures["limit_r2"]) + table(header, rows)
    cores = ", ".join(f"{row['cores']:.2f}" for row in figures["rows"] if "cores" in row)
    text += f"\nCores that each kept busy on average, in the order of the table: {cores}.\n"
    text += f"\n{figures['note']}\n" if "note" in figures else ""
    for row in others:
        if course := row.get("r2_each_epoch"):
            text += f"\nR^2 (kernel) of {row['program']} after each of its epochs: "
            text += ", ".join(f"{r2:.2f}" for r2 in course) + ".\n"
        if row.get("failed"):
            text += f"\n{row['program']} installs by plain pip and does not start here: `{row['failed']}`"
            text += ", a library for GPUs alone.\n" if "cuml" in row["failed"] else ".\n"
    return text


def page(results: Iterable[dict[str, Any]]) -> str:
    """The whole page."""
    return HEAD + "".join(machine_section(result) for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(options.results.glob("*.json")):  # a machine's own, then its peers-*.json
        machine = path.stem.removeprefix("peers-")
        results[machine] = read_json(path) | results.get(machine, {})
    with atomic_path(options.out) as temporary:
        temporary.write_text(page(results.values()))


if __name__ == "__main__":
    main()
