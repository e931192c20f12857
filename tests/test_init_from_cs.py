"""CryoSPARC in and out of a training: particles and latents of its own start one, and its result joins on uid again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from particle_files import save_cs
from scipy.spatial.transform import Rotation
from training_sets import latents_of, prepared

from flexlib import train as training
from flexlib.errors import InputError
from flexlib.particles import read_particles
from flexlib.particles.cs_file import read_cs_file
from flexlib.prepare.run import prepare_particles
from flexlib.workflow_support.settings import PrepareSettings, TrainSettings

FROZEN = TrainSettings(latent_dims=1, epochs=2, validation_fraction=0.1, freeze_latents=True)


def cs_of(path: Path, star: Path) -> Path:
    """The particles of a simulated STAR file as CryoSPARC would name them, uids in no order."""
    particles = read_particles(star)
    group, count = particles.optics[0], len(particles)
    columns = {
        "uid": np.random.default_rng(1).permutation(count).astype(np.uint64) + 2**60,
        "blob/path": np.full(count, str(particles.stack_paths[0]).encode()),
        "blob/idx": particles.image_index.astype(np.uint32),
        "blob/psize_A": np.full(count, group.pixel_size_A),
        "blob/sign": np.ones(count),
        "ctf/accel_kv": np.full(count, group.voltage_kV),
        "ctf/cs_mm": np.full(count, group.spherical_aberration_mm),
        "ctf/amp_contrast": np.full(count, group.amplitude_contrast),
        "ctf/df1_A": particles.defocus_u_A,
        "ctf/df2_A": particles.defocus_v_A,
        "ctf/df_angle_rad": particles.defocus_angle_rad,
        "ctf/phase_shift_rad": particles.phase_shift_rad,
        "alignments3D/split": particles.half_set.astype(np.uint32),
        "alignments3D/shift": particles.origin_A / group.pixel_size_A,
        "alignments3D/pose": Rotation.from_matrix(particles.rotation.transpose(0, 2, 1)).as_rotvec(),
    }
    records = np.zeros(count, [(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        records[name] = values
    return save_cs(path, records)


@pytest.fixture(scope="module")
def clamp_cs(tmp_path_factory) -> Path:
    """The jaw of test_training.py from a .cs, a dozen particles left out by prepare."""
    folder = prepared(tmp_path_factory.mktemp("clamp_cs"), "clamp", 400, 0.3)
    path = cs_of(folder / "particles.cs", folder / "sim/particles.star")
    settings = PrepareSettings(train_box=32, max_particles=388)
    prepare_particles(path, folder / "sim/consensus.mrc", folder / "from_cs", settings=settings)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("key", ["init_from", "latent_init"])
def test_components_of_cryosparc_start_the_latents(clamp_cs, tmp_path, key):
    """3D variability's or 3D Flex's components, rows in another order; latents.cs gives back those that were used."""
    truth = np.load(clamp_cs / "sim/truth.npz")["angles_rad"][:, 0]
    own = np.load(clamp_cs / "particles.cs")["uid"]
    order = np.random.default_rng(2).permutation(len(own))
    fields = [("uid", "<u8")] + [
        (f"components_mode_{k}/{name}", kind) for k in (0, 1) for name, kind in (("component", "<u4"), ("value", "<f4"))
    ]
    records = np.zeros(len(own), fields)
    records["uid"], records["components_mode_1/component"] = own[order], 1
    records["components_mode_0/value"] = 40 * truth[order] + 100
    records["components_mode_1/value"] = np.random.default_rng(3).normal(size=len(own))
    components = save_cs(tmp_path / "components.cs", records)

    training.train(clamp_cs / "from_cs", clamp_cs / "mesh", tmp_path / "out", replace(FROZEN, **{key: components}))
    latents = latents_of(tmp_path / "out")[:, 0]
    used = np.isfinite(latents)
    assert used.sum() == 388 and len(latents) == 400
    np.testing.assert_allclose(latents[used], 40 * truth[used] + 100, atol=1e-3)
    back = read_cs_file(tmp_path / "out/latents.cs")
    np.testing.assert_array_equal(back.column("uid"), own[used])
    np.testing.assert_allclose(back.column("components_mode_0/value"), latents[used], rtol=1e-6)

    save_cs(tmp_path / "few.cs", records[1:])
    with pytest.raises(InputError, match=r"few\.cs: no latents for 1 of 388 particles; the first is uid \d+"):
        training.train(
            clamp_cs / "from_cs", clamp_cs / "mesh", tmp_path / "few", replace(FROZEN, **{key: tmp_path / "few.cs"})
        )
