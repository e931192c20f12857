"""Training beside other programs: seconds an epoch, seconds to our latents' quality, and that quality.

    python benchmarks/bench_peers.py [--particles 2000] [--box 32] [--snr 0.3] [--epochs 20] [--peers cryodrgn hax]
                                     [--provisional] [--out FILE]

One simulated set of antibodies with two hinge angles and exact poses; every program has all cores of this machine and
no GPU. Each has an environment of its own in ``benchmarks/peers/``, made by pip at the first run.

- ours: ``train`` as it is, with two latent dims and ``epochs: auto``, after prepare and mesh, which are not timed;
- cryoDRGN (``cryodrgn train_vae``) reads the simulated STAR file by its own parse commands. Its defaults (8 latent
  dims, batches of 16, learning rate 1e-4, networks of 3 layers of 1024 units) want hours here: networks of 3 x 256 are
  trained for ``--epochs`` epochs, and the default ones are timed on some particles;
- hax-em (Zernike3Deep, HetSIREN) is installed and started; what stands in its way is kept as text.

Quality: R^2 of each true angle predicted from all latents, mean over the angles, for particles that the fit has not
seen (five parts in turn): linear, and by kernel ridge regression (Gaussian kernel, the best of a small grid, the same
for all), because latents of eight dims hold an angle as a bent curve. Seconds to our quality count from the start of
the program to the end of the first epoch whose kernel R^2 reaches ours; ours is the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BENCHMARKS = Path(__file__).resolve().parent
PEERS = {"cryodrgn": "cryodrgn==4.3.1", "hax": "hax-em==1.0.4"}
SMALL, DEFAULT = 256, 1024  # units of a layer of cryoDRGN
TIMED = 200  # particles that its default networks are timed on
SCORED = 500  # particles at most, whose angles are predicted


@dataclass(frozen=True)
class Size:
    """The set."""

    particles: int
    box: int
    snr: float


def make_set(folder: Path, size: Size) -> None:
    """``folder`` with sim/, particles/ and mesh/."""
    from particle_sets import FIELD_OF_VIEW_A, make_mesh, prepare_set

    from flexlib.simulate.run import simulate_particles
    from flexlib.simulate.settings import Simulation

    pixel_size_A = FIELD_OF_VIEW_A / size.box
    settings = Simulation(num_particles=size.particles, box=size.box, pixel_size_A=pixel_size_A, snr=size.snr)
    simulate_particles(folder / "sim", settings)
    prepare_set(folder, size.box, None)
    make_mesh(folder / "particles", folder / "mesh", 20)


def environment_of(peer: str) -> Path:
    """The folder of a peer's commands; made by pip at the first call."""
    folder = BENCHMARKS / "peers" / peer
    if not (folder / "made").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [folder / "bin/pip", "install", "--quiet"]
        needs = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text())["project"]["dependencies"]
        # torch first and pinned, as the Makefile has it
        subprocess.run([*pip, next(need for need in needs if need.startswith("torch=="))], check=True)
        subprocess.run([*pip, PEERS[peer]], check=True)
        (folder / "made").touch()
    return folder / "bin"


def run_timed(command: list[object], log: Path, cwd: Path) -> dict[str, float]:
    """Run a program to its end: when it began (seconds of the epoch), how long it took, and cores that it kept busy."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    with log.open("w") as output:
        subprocess.run([str(word) for word in command], check=True, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
    wall_s, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"began": began, "wall_s": wall_s, "cores": cpu_s / wall_s}


def train_ours(folder: Path) -> dict[str, object]:
    """Our training, in a process of its own."""
    import starfile

    out = folder / "ours"
    program = (
        "import sys; from flexlib.train import train; from flexlib.workflow_support.settings import TrainSettings\n"
        "train(*sys.argv[1:], TrainSettings(), 'cpu')"
    )
    command = [sys.executable, "-c", program, folder / "particles", folder / "mesh", out]
    run = run_timed(command, folder / "ours.log", BENCHMARKS.parent)
    seconds = np.atleast_1d(np.genfromtxt(out / "log.csv", delimiter=",", names=True)["seconds"])
    table = starfile.read(out / "latents.star", always_dict=True)["particles"]
    latents = table.filter(regex=r"^flexLatent\d+$").to_numpy(np.float64)
    return {
        "program": "ours",
        "settings": "defaults, 2 latent dims",
        "epochs": len(seconds),
        "epoch_s": round(float(np.median(seconds)), 2),
        "wall_s": round(run["wall_s"], 1),
        "cores": round(run["cores"], 2),
        "latent_dims": latents.shape[1],
        **quality(latents, folder),
    }


def train_cryodrgn(folder: Path, epochs: int, aim: float) -> list[dict[str, object]]:
    """cryoDRGN with small networks to the bound, and with its default ones for an epoch of some particles."""
    program, sim = environment_of("cryodrgn") / "cryodrgn", folder / "sim" / "particles.star"
    for parse, out in (("parse_pose_star", "poses.pkl"), ("parse_ctf_star", "ctf.pkl")):
        subprocess.run([program, parse, sim, "-o", folder / out], check=True, stdout=subprocess.DEVNULL)
    num = len(np.load(folder / "sim" / "truth.npz")["angles_rad"])
    some = folder / "some.pkl"
    some.write_bytes(pickle.dumps(np.arange(min(TIMED, num))))
    rows = []
    for units, count, rest in ((SMALL, epochs, []), (DEFAULT, 1, ["--ind", some])):
        out = folder / f"cryodrgn{units}"
        command = [program, "train_vae", sim, "--datadir", sim.parent, "--poses", folder / "poses.pkl", *rest]
        command += ["--ctf", folder / "ctf.pkl", "--uninvert-data", "--no-analysis", "--zdim", 8, "--seed", 0]
        command += ["--enc-dim", units, "--dec-dim", units, "-n", count, "-o", out]
        run = run_timed(command, folder / f"cryodrgn{units}.log", folder)
        row: dict[str, object] = {
            "program": PEERS["cryodrgn"].replace("==", " "),
            "settings": f"networks of 3 x {units}",
            "epochs": count,
            "cores": round(run["cores"], 2),
            "latent_dims": 8,
        }
        times = [found.split(":") for found in re.findall(r"Finished in (\S+)$", (out / "run.log").read_text(), re.M)]
        seconds = [3600 * int(h) + 60 * int(m) + float(s) for h, m, s in times]
        part = min(TIMED, num) / num if rest else 1.0
        row["epoch_s"] = round(float(np.median(seconds)) / part, 2)
        if rest:
            row["timed_on"] = min(TIMED, num)
        else:
            row["wall_s"] = round(run["wall_s"], 1)
            each = [quality(load_latents(out / f"z.{epoch}.pkl"), folder) for epoch in range(1, count + 1)]
            row |= each[-1] | {"r2_each_epoch": [scores["r2_kernel"] for scores in each]}
            reached = [epoch for epoch, scores in enumerate(each, 1) if scores["r2_kernel"] >= aim]
            ends = [(out / f"z.{epoch}.pkl").stat().st_mtime - run["began"] for epoch in reached]
            row["aim_s"] = round(ends[0], 1) if ends else None
        rows.append(row)
    return rows


def load_latents(path: Path) -> np.ndarray:
    """(n, 8) that cryoDRGN wrote after an epoch."""
    with path.open("rb") as file:
        return np.asarray(pickle.load(file), np.float64)


def try_hax() -> dict[str, object]:
    """Whether hax-em starts where it is installed as its pages say, without a GPU."""
    program = environment_of("hax") / "hax_project_manager"
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    last = (done.stderr or done.stdout).strip().splitlines()[-1]
    return {"program": PEERS["hax"].replace("==", " "), "failed": None if done.returncode == 0 else last}


def quality(latents: np.ndarray, folder: Path) -> dict[str, float]:
    """R^2 of the true angles, linear and by kernel ridge regression, mean over the angles."""
    angles = np.load(folder / "sim" / "truth.npz")["angles_rad"]
    rows = np.random.default_rng(0).permutation(len(angles))[:SCORED]
    spread = np.maximum(latents.std(0), 1e-12)
    known, wanted = ((latents - latents.mean(0)) / spread)[rows], angles[rows]
    return {"r2_linear": round(linear_r2(known, wanted), 4), "r2_kernel": round(kernel_r2(known, wanted), 4)}


def parts_of(num: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit and to predict, five times."""
    return [(np.flatnonzero(np.arange(num) % 5 != k), np.flatnonzero(np.arange(num) % 5 == k)) for k in range(5)]


def mean_r2(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """R^2 of each column, and their mean."""
    return float((1 - ((predicted - wanted) ** 2).sum(0) / ((wanted - wanted.mean(0)) ** 2).sum(0)).mean())


def linear_r2(known: np.ndarray, wanted: np.ndarray) -> float:
    """Of a linear fit."""
    design, predicted = np.column_stack([known, np.ones(len(known))]), np.empty_like(wanted)
    for fit, rest in parts_of(len(known)):
        predicted[rest] = design[rest] @ np.linalg.lstsq(design[fit], wanted[fit], rcond=None)[0]
    return mean_r2(predicted, wanted)


def kernel_r2(known: np.ndarray, wanted: np.ndarray) -> float:
    """Of kernel ridge regression, the best of four widths and five strengths of the ridge."""
    distance2 = ((known[:, None] - known[None]) ** 2).sum(-1)
    best = -np.inf
    for width in (0.5, 1.0, 2.0, 4.0):
        kernel = np.exp(-distance2 / (2 * width**2 * known.shape[1]))
        predicted = {ridge: np.empty_like(wanted) for ridge in (1e-2, 1e-1, 1.0, 10.0, 100.0)}
        for fit, rest in parts_of(len(known)):
            mean = wanted[fit].mean(0)
            values, vectors = np.linalg.eigh(kernel[np.ix_(fit, fit)])
            turned = vectors.T @ (wanted[fit] - mean)
            for ridge, each in predicted.items():
                weights = vectors @ (turned / (np.maximum(values, 0) + ridge)[:, None])
                each[rest] = mean + kernel[np.ix_(rest, fit)] @ weights
        best = max(best, *(mean_r2(each, wanted) for each in predicted.values()))
    return best


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=2000)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--snr", type=float, default=0.3, help="signal's variance over the noise's, per pixel")
    parser.add_argument("--epochs", type=int, default=20, help="of a peer, at most")
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--provisional", action="store_true", help="mark the figures: the machine had other work")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/peers-<machine>.json")
    options = parser.parse_args()
    from machine import describe_machine, machine_name

    from flexlib.files import write_json

    machine = describe_machine() | {"gpu": None}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(machine["cores"])
    size = Size(options.particles, options.box, options.snr)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_set(folder, size)
        rows = [train_ours(folder)]
        print(json.dumps(rows[0]), flush=True)
        if "cryodrgn" in options.peers:
            rows += train_cryodrgn(folder, options.epochs, float(str(rows[0]["r2_kernel"])))
        if "hax" in options.peers:
            rows.append(try_hax())
        for row in rows[1:]:
            print(json.dumps(row), flush=True)
        limit = np.load(folder / "sim" / "truth.npz")["information_limit_r2"]
    figures = {"date": machine.pop("date"), "provisional": options.provisional, "size": vars(size), "rows": rows}
    figures |= {"limit_r2": round(float(np.mean(limit)), 4), "scored": min(SCORED, size.particles)}
    out = options.out or BENCHMARKS / "results" / f"peers-{machine_name(machine)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"machine": machine, "device": "cpu", "peers": figures})


if __name__ == "__main__":
    main()
