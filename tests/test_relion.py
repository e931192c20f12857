"""Our rigid reconstruction against RELION's of the same files: contrast, handedness, origins, CTF sign and units.

Needs RELION's ``relion_reconstruct`` on the path (Debian and Ubuntu: ``apt-get install relion``).
"""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from flexlib.fsc import fsc
from flexlib.maps import read_map, soft_edge
from flexlib.mesh.tetmesh import single_cell_mesh
from flexlib.mesh.voxels import voxelise
from flexlib.particles.prepared import open_full_images
from flexlib.prepare import prepare_particles
from flexlib.projection.op import VoxelTensors
from flexlib.reconstruct import rigid_vertices, solve_map
from flexlib.settings import MeshSettings, PrepareSettings
from flexlib.simulate import simulate_particles

BOX = 48
PIXEL_SIZE_A = 5.5


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Particles of a molecule without symmetry, at a high signal."""
    folder = tmp_path_factory.mktemp("relion")
    return simulate_particles(
        folder, phantom="rigid", num_particles=600, box=BOX, pixel_size_A=PIXEL_SIZE_A, snr=0.5, seed=3
    )


@pytest.fixture(scope="module")
def relion_map(simulated):
    """``relion_reconstruct --ctf`` of the simulated STAR file."""
    program = shutil.which("relion_reconstruct")
    assert program, "relion_reconstruct is not on the path: install RELION (apt-get install relion)"
    folder = simulated.particles_star.parent
    command = [program, "--i", simulated.particles_star.name, "--o", "relion.mrc", "--ctf"]
    command += ["--angpix", str(PIXEL_SIZE_A)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stdout + result.stderr
    return read_map(folder / "relion.mrc").data


@pytest.fixture(scope="module")
def our_map(simulated, tmp_path_factory):
    """Our rigid map of all particles, inside a ball nearly as wide as the box."""
    particles = tmp_path_factory.mktemp("prepared") / "particles"
    prepare_particles(
        simulated.particles_star,
        simulated.consensus,
        particles,
        settings=PrepareSettings(train_box=BOX),
        mask_settings=MeshSettings(),
    )
    source = open_full_images(particles)
    mask = ball()
    mesh = single_cell_mesh(BOX * PIXEL_SIZE_A)
    mesh_voxels = voxelise(mesh, mask > 1e-3, PIXEL_SIZE_A)
    voxels = VoxelTensors.from_mesh_voxels(mesh_voxels)
    mask_values = torch.from_numpy(mask.reshape(-1)[mesh_voxels.index])
    volume, _ = solve_map(source, np.arange(len(source)), voxels, rigid_vertices(mesh, "cpu"), mask_values)
    return volume.numpy()


def ball():
    axis = np.arange(BOX) - BOX // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)
    return soft_edge(radius < 0.4 * BOX, PIXEL_SIZE_A, 0.0, 0.05 * BOX * PIXEL_SIZE_A)


def test_rigid_map_agrees_with_relions(relion_map, our_map):
    curve = fsc(our_map, relion_map * ball())
    assert curve[1 : int(0.8 * BOX / 2) + 1].min() > 0.95, curve


def test_other_hand_would_not_pass(relion_map, our_map):
    flipped = np.roll(our_map[::-1], 1, axis=0)
    assert fsc(flipped, relion_map * ball())[6:20].max() < 0.5


def test_density_is_in_relions_units(relion_map, our_map):
    """The slope of our map on RELION's, in the band where both are well determined."""
    masked = relion_map * ball()
    assert (our_map * masked).sum() / (masked**2).sum() == pytest.approx(1.0, abs=0.05)


def test_our_map_is_as_close_to_the_truth(simulated, relion_map, our_map):
    truth = read_map(simulated.truth_mean).data * ball()
    gain = fsc(our_map, truth) - fsc(relion_map * ball(), truth)
    assert gain.min() > -0.02, gain
