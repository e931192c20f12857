"""What view, CTF, shift and pose say of latents: found where it is put in, and not where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from flexlib.particles.pose_change import PoseChange
from flexlib.particles.star_write import euler_angles
from flexlib.particles.table import OpticsGroup, Particles
from flexlib.train import entanglement as module
from flexlib.train.entanglement import Entanglement, entanglement

SEED = 3


def particle_set(num: int, generator: np.random.Generator) -> Particles:
    """Particles seen from everywhere, of 0.8 to 2.5 um defocus, with no files behind them."""
    defocus_A = generator.uniform(8000, 25000, num)
    zeros, index = np.zeros(num), np.zeros(num, np.int32)
    return Particles(
        optics=(OpticsGroup("one", 300, 2.7, 0.1, 1.0, 64),),
        optics_index=index,
        rotation=Rotation.random(num, rng=generator).as_matrix(),
        origin_A=generator.normal(0, 3, (num, 2)),
        defocus_u_A=defocus_A + generator.gamma(2, 100, num),
        defocus_v_A=defocus_A,
        defocus_angle_rad=generator.uniform(0, np.pi, num),
        phase_shift_rad=zeros,
        ctf_bfactor_A2=zeros,
        ctf_scale=zeros + 1,
        half_set=np.zeros(num, np.int8),
        contrast_sign=zeros + 1,
        stack_paths=(Path("train.mrcs"),),
        stack_index=index,
        image_index=np.arange(num),
        source_path=Path("p.star"),
        source_row=np.arange(num),
    )


def mixed(signal: np.ndarray, r2: float, generator: np.random.Generator) -> np.ndarray:
    """Latents of which a signal makes up a share ``r2`` of the variance."""
    unit = (signal - signal.mean()) / signal.std()
    return 0.1 + 3 * (np.sqrt(r2) * unit + np.sqrt(1 - r2) * generator.normal(size=len(signal)))


def by_name(found: list[Entanglement], latent: int) -> dict[str, Entanglement]:
    return {one.covariates: one for one in found if one.latent == latent}


def warned(found: list[Entanglement]) -> set[tuple[int, str]]:
    return {(one.latent, one.covariates) for one in found if one.more_than_chance}


SIGNALS = {
    "view direction": lambda p: p.rotation[:, 2] @ [0.6, 0.0, 0.8] + (p.rotation[:, 2] @ [0.0, 1.0, 0.0]) ** 2,
    "in-plane angle": lambda p: np.cos(np.radians(euler_angles(p.rotation)[:, 2]) + 0.3),
    "defocus": lambda p: p.defocus_u_A,
    "shift": lambda p: p.origin_A[:, 0] - 0.5 * p.origin_A[:, 1],
}


@pytest.mark.parametrize("name", SIGNALS)
def test_what_a_latent_follows_is_found_with_its_share(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The second of two latents follows one group by 30 % of its variance; no other group is blamed for it."""
    generator = np.random.default_rng(SEED)
    particles = particle_set(3000, generator)
    latents = np.c_[generator.normal(size=3000), mixed(SIGNALS[name](particles), 0.3, generator)]
    found = entanglement(latents, particles, None, SEED)
    assert warned(found) == {(2, name)}
    assert by_name(found, 2)[name].r2 == pytest.approx(0.3, abs=0.03)
    assert abs(by_name(found, 1)[name].r2) < 0.02
    assert {one.covariates for one in found} == set(SIGNALS)
    assert f"latent 2: {100 * by_name(found, 2)[name].r2:.1f} % of it is told by {name}" in caplog.text
    assert "latent 1" not in caplog.text


def test_pose_changes_count_in_the_molecules_frame() -> None:
    """A turn about the volume's x axis with the latent: about no axis of the views does it have a mean."""
    generator = np.random.default_rng(SEED)
    particles = particle_set(2000, generator)
    latents = generator.normal(size=(2000, 2))
    turn_rad = generator.normal(0, 0.02, (2000, 3))
    turn_rad[:, 0] += 0.02 * latents[:, 0]
    change = PoseChange(
        np.einsum("nij,nj->ni", particles.rotation, turn_rad),
        generator.normal(0, 1, (2000, 2)),
        (1 + 0.1 * np.tanh(mixed(latents[:, 1], 0.2, generator))).astype(np.float32),
    )
    found = entanglement(latents, particles, change, SEED)
    assert warned(found) == {(1, "pose change"), (2, "contrast")}
    assert by_name(found, 1)["pose change"].r2 == pytest.approx(0.5, abs=0.05)
    assert by_name(found, 2)["contrast"].r2 == pytest.approx(0.2, abs=0.06)


def test_no_false_alarm_where_nothing_is_entangled() -> None:
    """One in a hundred runs may warn; with views that gather about one direction and latents of a heavy tail."""
    alarms = 0
    for seed in range(60):
        generator = np.random.default_rng(100 + seed)
        particles = particle_set(400, generator)
        gathered = Rotation.from_matrix(particles.rotation) ** 0.5
        particles = replace(particles, rotation=gathered.as_matrix())
        change = PoseChange(generator.normal(0, 0.02, (400, 3)), generator.normal(0, 1, (400, 2)), np.ones(400))
        alarms += bool(warned(entanglement(generator.standard_t(4, (400, 3)), particles, change, seed)))
    assert alarms <= 4  # of which the chance is 4e-4 at one in a hundred


def test_what_is_certain_but_small_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(SEED)
    particles = particle_set(20_000, generator)
    latents = mixed(SIGNALS["shift"](particles), 0.006, generator)[:, None]
    one = by_name(entanglement(latents, particles, None, SEED), 1)["shift"]
    assert one.chance_limit < one.r2 < module.LEAST_R2
    assert not one.more_than_chance
    monkeypatch.setattr(module, "LEAST_R2", 0.003)
    assert by_name(entanglement(latents, particles, None, SEED), 1)["shift"].more_than_chance


def test_latents_at_rest_and_covariates_that_do_not_vary() -> None:
    generator = np.random.default_rng(SEED)
    particles = particle_set(500, generator)
    particles = replace(particles, origin_A=np.zeros((500, 2)), defocus_v_A=particles.defocus_u_A)
    latents = np.c_[np.full(500, 0.7), generator.normal(size=500)].astype(np.float32)
    latents[::7, 1] = np.nan
    found = entanglement(latents, particles, PoseChange.none(500), SEED)
    assert {one.covariates for one in found} == {"view direction", "in-plane angle", "defocus"}
    assert all(one.r2 == one.chance_mean == one.chance_std == 0 for one in found if one.latent == 1)
    assert not warned(found)
    assert entanglement(latents[:5], particles.subset(np.arange(5)), None, SEED) == []
    assert entanglement(latents * np.nan, particles, None, SEED) == []


def test_copies_of_an_image_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four symmetry copies of an image have one latent: as independent rows their shift would seem to tell it.

    300 images with 6 copies each of a random latent; a fold that has seen a copy knows the others' latent only if the
    design can tell images apart, so it is the permuted latents that must keep copies together: their R^2 scatters as
    that of 300 rows, not of 1800.
    """
    generator = np.random.default_rng(SEED)
    images = particle_set(300, generator)
    copied = images.subset(np.repeat(np.arange(300), 6))
    copied = replace(copied, rotation=Rotation.random(1800, rng=generator).as_matrix())
    latents = np.repeat(generator.normal(size=300), 6)[:, None]
    together = by_name(entanglement(latents, copied, None, SEED), 1)
    apart = by_name(entanglement(latents, replace(copied, image_index=np.arange(1800)), None, SEED), 1)
    assert together["shift"].chance_std > 1.8 * apart["shift"].chance_std
    assert together["defocus"].chance_std > 1.8 * apart["defocus"].chance_std
    shuffled = generator.permutation(1800)
    assert not warned(entanglement(latents[shuffled], copied.subset(shuffled), None, SEED))
    # and of the views, which differ between copies, what they tell is found
    follows = mixed(SIGNALS["view direction"](copied), 0.3, generator)[:, None]
    monkeypatch.setattr(module, "MOST_ROWS", 1200)
    found = by_name(entanglement(follows, copied, None, SEED), 1)
    assert found["view direction"].more_than_chance
    assert found["view direction"].r2 == pytest.approx(0.3, abs=0.06)
