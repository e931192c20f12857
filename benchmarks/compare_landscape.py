"""How true the landscape is: mixtures told, p values of equal and different conditions, and a trained model's angles.

    python benchmarks/compare_landscape.py [--sets 20] [--trained TRAIN_DIR PARTICLES_DIR TRUTH_NPZ]

A set with known errors has 5,000 particles of one and of two latents, two states at 70:30. p values are of 200 times
two equal conditions (1,000 particles each, of one latent) and 20 times two that differ by 10 points of population
(5,000 each, of two). A trained model's density is compared with that of the true angles, brought to its latents by
regression, and so is the distribution of its latents.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import kstest, wasserstein_distance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from latent_sets import left_share, noise, observed, two_states

from flexlib.interpret.conditions import compare_conditions
from flexlib.interpret.density import estimate_density
from flexlib.interpret.landscape import find_basins, make_landscape
from flexlib.interpret.observations import Observations, read_observations
from flexlib.layout import TrainFolder
from flexlib.model.flex_model import FlexModel

PARTICLES, EQUAL_SETS, EQUAL_PARTICLES = 5000, 200, 1000


def compare_mixtures(sets: int) -> None:
    """How many of some 70:30 mixtures are told as such."""
    for dims in (1, 2):
        inside, basins, seconds, shares = 0, [], [], []
        for seed in range(sets):
            rng = np.random.default_rng(seed)
            seen = observed(two_states(PARTICLES, dims, 0.7, rng), noise(PARTICLES, dims, rng), rng)
            began = time.process_time()
            landscape = make_landscape(estimate_density(seen))
            basin = find_basins(landscape)
            seconds.append(time.process_time() - began)
            share, low, high = left_share(landscape, basin)
            inside += low <= 0.7 <= high
            shares.append(share)
            basins.append(int(basin.max()) + 1)
        print(
            f"{dims} latents: 70:30 within its interval in {inside} of {sets}; mean {np.mean(shares):.4f}, sd "
            f"{np.std(shares):.4f}; basins {np.bincount(basins)[1:].tolist()} (of 1, 2, ...); "
            f"{np.mean(seconds):.1f} CPU s",
            flush=True,
        )


def condition_p_value(count: int, shares: tuple[float, float], seed: int, highs: tuple[float, float]) -> float:
    """p value of two conditions with these shares of the left state, and these largest errors of latents."""
    rng, dims = np.random.default_rng(seed), 1 if shares[0] == shares[1] else 2
    truth = np.concatenate([two_states(count, dims, share, rng) for share in shares])
    errors = np.concatenate([noise(count, dims, rng, 0.3, high) for high in highs])
    seen = observed(truth, errors, rng)
    landscape = make_landscape(estimate_density(seen, bootstraps=20))
    return compare_conditions(seen, np.repeat([0, 1], count), None, landscape, find_basins(landscape)).p_value


def compare_p_values(sets: int) -> None:
    """p values of equal conditions, whose latents are as well known or not, and of different ones."""
    for highs in ((0.7, 0.7), (0.5, 0.9)):
        found = [condition_p_value(EQUAL_PARTICLES, (0.7, 0.7), seed, highs) for seed in range(EQUAL_SETS)]
        print(
            f"equal conditions, errors up to {highs}: KS against uniform p = {kstest(found, 'uniform').pvalue:.3f}; "
            f"{np.mean(np.array(found) < 0.05):.3f} below 0.05",
            flush=True,
        )
    found = [condition_p_value(PARTICLES, (0.7, 0.6), seed, (0.7, 0.7)) for seed in range(sets)]
    print(f"10 points apart: largest p of {sets}: {max(found):.4f}", flush=True)


def true_latents(seen: Observations, angles: np.ndarray) -> np.ndarray:
    """(n, K) the particles' true angles in the model's latents, by a cubic regression of latents on angles."""
    x = (angles - angles.mean(0)) / angles.std(0)
    columns = [x[:, 0] ** a * x[:, 1] ** b for a in range(4) for b in range(4 - a)]
    design = np.stack(columns, 1)
    return design @ np.linalg.lstsq(design, seen.latents, rcond=None)[0] * _unshrunk(seen)


def _unshrunk(seen: Observations) -> np.ndarray:
    """(K,) what regression on posterior means makes too small: their prior draws them to zero."""
    return 1 / (1 - np.einsum("nkk->nk", seen.posterior).mean(0))


def compare_trained(train_dir: Path, particles_dir: Path, truth: Path) -> None:
    """A trained model's density beside the true one: how far mass must be moved, and the share of the second state."""
    seen = read_observations(FlexModel.load(train_dir), particles_dir, TrainFolder(train_dir).latents)
    angles = np.load(truth)["angles_rad"][seen.row]
    true = true_latents(seen, angles)
    density = estimate_density(seen)
    landscape = make_landscape(density)
    rng = np.random.default_rng(0)
    node = rng.choice(len(density.nodes), 50_000, p=density.weight)
    drawn = density.nodes[node] + density.width * rng.standard_normal((len(node), seen.dims))
    for k in range(seen.dims):
        ours, plain = (wasserstein_distance(one[:, k], true[:, k]) for one in (drawn, seen.latents))
        print(f"latent {k + 1}: mass moved by {ours:.3f} (deconvolved), {plain:.3f} (point estimates) to the truth")
    basin = find_basins(landscape)
    shares = [landscape.mass(basin == one) for one in range(basin.max() + 1)]
    told = ", ".join(f"{share:.3f} +- {drawn.std():.3f}" for share, drawn in shares)
    print(f"basins: {told}; true share of angle 2 above 0: {np.mean(angles[:, 1] > 0):.3f}")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--trained", type=Path, nargs=3, metavar=("TRAIN_DIR", "PARTICLES_DIR", "TRUTH_NPZ"))
    options = parser.parse_args()
    if options.trained:
        compare_trained(*options.trained)
        return
    compare_mixtures(options.sets)
    compare_p_values(options.sets)


if __name__ == "__main__":
    main()
