"""RELION checks us: our rigid reconstruction against its own of the same files, and its CTFs against ours.

Contrast, handedness, origins, CTF sign and units on our simulated particles; every CTF parameter on particles that
``relion_project`` simulates, and on exact projections; that the tests would see a wrong sign is shown by breaking one
sign at a time.
RELION 3.1's ``relion_project`` applies neither odd aberrations nor magnification to its images, so these are put in
here, and ``relion_reconstruct``, which takes them out, says whether they were right.

Refined poses: RELION's map from the file of poses that were put right is as good as that from the true ones.

Needs RELION's programs on the path (Debian and Ubuntu: ``apt-get install relion``).
"""

import shutil
import subprocess
from dataclasses import replace

import mrcfile
import numpy as np
import pandas as pd
import pytest
from particle_files import prepared_poses, save_cs
from scipy.spatial.transform import Rotation

from flexlib.images.ctf import ctf_images
from flexlib.images.noise import Calibration, read_noise
from flexlib.images.sources import FullImages, open_full_images
from flexlib.images.stack import open_stacks
from flexlib.imaging.fsc import fsc
from flexlib.imaging.image_transforms import plane_radius
from flexlib.imaging.maps import read_map, write_map
from flexlib.imaging.masks import soft_edge
from flexlib.layout import ParticlesFolder
from flexlib.model.forward import EXACT, Operator
from flexlib.particles import read_particles
from flexlib.particles.pose_change import PoseChange
from flexlib.particles.refined_write import refined_particles, write_refined_star
from flexlib.particles.star_write import relion_tables, write_star
from flexlib.prepare.run import prepare_particles
from flexlib.projection.op import gather_volume
from flexlib.reconstruct.map_solver import SolverSettings, solve_map
from flexlib.records import PreparedRecord
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings

BOX = 48
PIXEL_SIZE_A = 5.5


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Particles of a molecule without symmetry, at a high signal."""
    folder = tmp_path_factory.mktemp("relion")
    return simulate_particles(
        folder, Simulation(phantom="rigid", num_particles=600, box=BOX, pixel_size_A=PIXEL_SIZE_A, snr=0.5, seed=3)
    )


@pytest.fixture(scope="module")
def relion_map(simulated):
    """``relion_reconstruct --ctf`` of the simulated STAR file."""
    return relion_reconstruct(simulated.particles_star, PIXEL_SIZE_A)


def run(folder, name, *arguments):
    program = shutil.which(name)
    assert program, f"{name} is not on the path: install RELION (apt-get install relion)"
    command = [program, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stdout + result.stderr


def relion_reconstruct(star, pixel_size_A):
    run(star.parent, "relion_reconstruct", "--i", star.name, "--o", "relion.mrc", "--ctf", "--angpix", pixel_size_A)
    return read_map(star.parent / "relion.mrc").data


@pytest.fixture(scope="module")
def our_map(simulated, tmp_path_factory):
    """Our rigid map of all particles, inside a ball nearly as wide as the box."""
    particles = tmp_path_factory.mktemp("prepared") / "particles"
    prepare_particles(
        simulated.particles_star,
        simulated.consensus,
        particles,
        settings=PrepareSettings(train_box=BOX),
        mask_settings=MaskSettings(),
    )
    return rigid_map(open_full_images(particles), 10)


def rigid_map(source, iterations=20):
    """The least-squares map inside ``ball``: (box, box, box)."""
    mask = ball(source.box, source.pixel_size_A)
    mesh = single_cell_mesh(source.box * source.pixel_size_A)
    operator = Operator.on_mesh(mesh, mask > 1e-3, source.pixel_size_A, accuracy=EXACT)
    settings = SolverSettings(max_iterations=iterations)
    rows, mask_values = np.arange(len(source)), gather_volume(mask, operator.voxels)
    return solve_map(source, rows, operator, mask_values=mask_values, settings=settings)[0].numpy()


def ball(box=BOX, pixel_size_A=PIXEL_SIZE_A):
    axis = np.arange(box) - box // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)
    return soft_edge(radius < 0.4 * box, pixel_size_A, 0.0, 0.05 * box * pixel_size_A)


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


# --- refined poses ---


@pytest.fixture(scope="module")
def astray(simulated):
    """The simulated particles with poses some degrees and Angstrom wrong, and the change that puts them right."""
    true = read_particles(simulated.particles_star)
    rng = np.random.default_rng(8)
    turns, shifts_A = rng.normal(scale=0.08, size=(len(true), 3)), rng.normal(scale=6, size=(len(true), 2))
    wrong = replace(
        true,
        rotation=Rotation.from_rotvec(turns).as_matrix() @ true.rotation,
        origin_A=true.origin_A - shifts_A,
    )
    return wrong, PoseChange(-turns, -shifts_A, np.ones(len(true)))


def write_astray(simulated, wrong, kind):
    """Its particle file, beside the images: .star or .cs."""
    path = simulated.particles_star.with_name(f"astray.{kind}")
    if kind == "star":
        write_star(relion_tables(wrong), path)
        return path
    records = np.load(simulated.particles_cs)
    records["alignments3D/pose"] = Rotation.from_matrix(wrong.rotation.transpose(0, 2, 1)).as_rotvec()
    records["alignments3D/shift"] = wrong.origin_A / PIXEL_SIZE_A
    return save_cs(path, records)


def refined_map(simulated, astray, folder, kind, change=None):
    """RELION's map of the particles_refined.star that puts the poses right, or does ``change`` to them."""
    wrong, right = astray
    prepared = prepared_poses(folder, write_astray(simulated, wrong, kind), np.arange(len(wrong)))
    nothing_known = np.full(len(wrong), np.nan)
    out = simulated.particles_star.with_name("particles_refined.star")
    write_refined_star(refined_particles(prepared, change or right, nothing_known, nothing_known), out)
    return relion_reconstruct(out, PIXEL_SIZE_A) * ball()


@pytest.mark.parametrize("kind", ["star", "cs"])
def test_relion_finds_the_refined_poses_right(simulated, relion_map, astray, tmp_path, kind):
    """From exactly known errors: as good a map as from the true poses, and a better one than from the wrong ones."""
    truth = read_map(simulated.truth_mean).data * ball()
    best = fsc(relion_map * ball(), truth)
    refined = refined_map(simulated, astray, tmp_path, kind)
    assert np.abs(fsc(refined, truth) - best)[:22].max() < 5e-4
    assert fsc(refined, relion_map * ball())[1:20].min() > 0.9999
    none = PoseChange.none(len(astray[0]))
    assert (best - fsc(refined_map(simulated, astray, tmp_path, kind, none), truth))[14:20].min() > 0.1


WRONG_UPDATES = {
    "hand": lambda c, r: replace(c, rotation_rad=c.rotation_rad * [-1, -1, 1]),
    "sign of the rotation": lambda c, r: replace(c, rotation_rad=-c.rotation_rad),
    "sign of the shift": lambda c, r: replace(c, shift_A=-c.shift_A),
    "side": lambda c, r: replace(c, rotation_rad=np.einsum("nij,nj->ni", r, c.rotation_rad)),  # R exp(w)
}


@pytest.mark.parametrize("what", WRONG_UPDATES)
def test_a_wrong_update_would_not_pass(simulated, relion_map, astray, tmp_path, what):
    wrong, right = astray
    changed = refined_map(simulated, astray, tmp_path, "star", WRONG_UPDATES[what](right, wrong.rotation))
    assert fsc(changed, relion_map * ball())[14:20].max() < 0.85


# --- every CTF parameter, on particles that RELION simulates ---

SIDE, FINE_A, COUNT = 48, 1.6, 240
BAND = slice(1, int(0.8 * SIDE / 2) + 1)  # shells up to 0.8 of Nyquist
BOUND = 0.95
MIRROR = np.diag([1.0, 1.0, -1.0])
OPTICS = {
    "rlnOpticsGroup": 1,
    "rlnOpticsGroupName": "a",
    "rlnVoltage": 300.0,
    "rlnSphericalAberration": 2.7,
    "rlnAmplitudeContrast": 0.1,
    "rlnImagePixelSize": FINE_A,
    "rlnImageSize": SIDE,
    "rlnImageDimensionality": 2,
}
TILT_MRAD = (1.2, -0.7)
EVEN = [0.0, 10.0, 0.0, -8.0, 300.0, 0.0, 0.0, 0.0, -200.0]  # two-fold (as astigmatism) and four-fold terms
ODD = [0.0, 0.0, 60.0, 0.0, 0.0, -50.0]  # trefoil
MAGNIFICATION = ((1.04, 0.015), (0.005, 0.965))


def gaussians():
    """Positions (n, 3) in A and width in A of a molecule that fills a third of the box, without symmetry."""
    rng = np.random.default_rng(9)
    return rng.normal(size=(60, 3)) * (10, 7, 12) + (4, -3, 2), 1.3


def gaussian_map():
    positions_A, width_A = gaussians()
    axis = (np.arange(SIDE) - SIDE // 2) * FINE_A
    volume = np.zeros((SIDE,) * 3, np.float32)
    for position in positions_A:
        x, y, z = (np.exp(-((axis - centre) ** 2) / (2 * width_A**2)) for centre in position)
        volume += (z[:, None, None] * y[:, None] * x).astype(np.float32)
    return volume


def particle_table(seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "rlnImageName": [f"{number:06d}@images.mrcs" for number in range(1, COUNT + 1)],
            "rlnOpticsGroup": 1,
            "rlnAngleRot": rng.uniform(-180, 180, COUNT),
            "rlnAngleTilt": np.rad2deg(np.arccos(rng.uniform(-1, 1, COUNT))),
            "rlnAnglePsi": rng.uniform(-180, 180, COUNT),
            "rlnOriginXAngst": rng.normal(scale=3, size=COUNT),
            "rlnOriginYAngst": rng.normal(scale=3, size=COUNT),
            "rlnDefocusU": rng.uniform(4000, 6000, COUNT),
            "rlnDefocusV": rng.uniform(2500, 3500, COUNT),
            "rlnDefocusAngle": rng.uniform(-90, 90, COUNT),
            "rlnPhaseShift": rng.uniform(20, 110, COUNT),
            "rlnCtfBfactor": rng.uniform(0, 10, COUNT),
            "rlnCtfScalefactor": rng.uniform(0.7, 1.3, COUNT),
            "rlnRandomSubset": np.arange(COUNT) % 2 + 1,
        }
    )


def frequencies():
    """kx, ky of the half plane in 1/A."""
    ky, kx = np.meshgrid(np.fft.fftfreq(SIDE, FINE_A), np.fft.rfftfreq(SIDE, FINE_A), indexing="ij")
    return kx, ky


def write_images(path, spectra):
    """Transforms with phase origin at pixel 0 to centred images, with noise of a fifth of their signal's deviation."""
    images = np.fft.fftshift(np.fft.irfft2(spectra, s=(SIDE, SIDE)), axes=(1, 2))
    images += np.random.default_rng(2).normal(scale=0.2 * images.std(), size=images.shape)
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(images.astype(np.float32))
        file.voxel_size = FINE_A


def odd_phase(kx, ky):
    """Beam tilt and trefoil, in radians, from RELION's definitions written out."""
    wavelength_A = 12.2643247 / np.sqrt(300e3 * (1 + 0.978466e-6 * 300e3))
    x, y = 1e-3 * np.array(TILT_MRAD)
    phase = -2 * np.pi * 2.7e7 * wavelength_A**2 * (kx**2 + ky**2) * (x * kx + y * ky)
    cube = (kx + 1j * ky) ** 3
    return phase + ODD[2] * cube.imag + ODD[5] * cube.real


def bracketed(values):
    return "[" + ",".join(map(str, values)) + "]"


def simulate_with_relion(folder):
    """particles.star, images.mrcs and truth.mrc: ``relion_project`` and, by the formula, odd aberrations."""
    optics = write_metadata(folder)
    run(folder, "relion_project", "--i", "truth.mrc", "--ang", "particles.star", "--o", "projected", "--ctf",
        "--angpix", optics["rlnImagePixelSize"])  # fmt: skip
    with mrcfile.open(folder / "projected.mrcs", permissive=True) as file:
        spectra = np.fft.rfft2(np.fft.ifftshift(file.data, axes=(1, 2)))
    write_images(folder / "images.mrcs", spectra * np.exp(1j * odd_phase(*frequencies())))


def simulate_exactly(folder):
    """The same with a magnification matrix, from the Gaussians' transforms and our CTFs."""
    write_metadata(folder, **{f"rlnMagMat{i}{j}": MAGNIFICATION[i][j] for i in (0, 1) for j in (0, 1)})
    particles = read_particles(folder / "particles.star")
    positions_A, width_A = gaussians()
    kx, ky = frequencies()
    mx, my = np.einsum("ij,jab->iab", MAGNIFICATION, [kx, ky])  # RELION takes the slice, and the CTF, at M k
    view_A = positions_A @ particles.rotation.transpose(0, 2, 1)
    phase = view_A[:, :, 0, None] * mx.ravel() + view_A[:, :, 1, None] * my.ravel()
    spectra = np.exp(-2j * np.pi * phase.astype(np.float32)).sum(1).reshape(COUNT, *mx.shape)
    spectra *= np.exp(-2 * np.pi**2 * width_A**2 * (mx**2 + my**2))
    shift = particles.origin_A[:, 0, None, None] * kx + particles.origin_A[:, 1, None, None] * ky
    spectra *= np.exp(2j * np.pi * shift) * ctf_images(particles, np.arange(COUNT), SIDE).numpy()
    write_images(folder / "images.mrcs", spectra)


def write_metadata(folder, **more):
    optics = OPTICS | {"rlnEvenZernike": bracketed(EVEN), "rlnOddZernike": bracketed(ODD)}
    optics |= {"rlnBeamTiltX": TILT_MRAD[0], "rlnBeamTiltY": TILT_MRAD[1]} | more
    write_map(folder / "truth.mrc", gaussian_map(), FINE_A)
    write_star({"optics": pd.DataFrame([optics]), "particles": particle_table(3)}, folder / "particles.star")
    return optics


SIMULATORS = {"by RELION": simulate_with_relion, "magnified": simulate_exactly}


@pytest.fixture(scope="module", params=SIMULATORS)
def aberrated(request, tmp_path_factory):
    """A folder with particles of every aberration, as prepared too, and RELION's map times the ball."""
    folder = tmp_path_factory.mktemp("aberrated")
    SIMULATORS[request.param](folder)
    prepare_particles(
        folder / "particles.star", folder / "truth.mrc", folder / "prepared",
        settings=PrepareSettings(train_box=SIDE), mask_settings=MaskSettings(lowpass_A=4.0),
    )  # fmt: skip
    return folder, relion_reconstruct(folder / "particles.star", FINE_A) * ball(SIDE, FINE_A)


def test_aberrated_particles_agree_with_relion(aberrated):
    folder, theirs = aberrated
    truth = gaussian_map() * ball(SIDE, FINE_A)
    assert fsc(theirs, truth)[BAND].min() > BOUND, "RELION takes out what was put in"
    ours = rigid_map(open_full_images(folder / "prepared"), 8)
    curve = fsc(ours, theirs)
    assert curve[BAND].min() > BOUND, curve
    assert (fsc(ours, truth) - fsc(theirs, truth))[BAND].min() > -0.01


BREAKS = {
    "nothing": lambda p: p,
    "handedness": lambda p: replace(p, rotation=MIRROR @ p.rotation @ MIRROR),
    "origin": lambda p: replace(p, origin_A=-p.origin_A),
    "defocus angle": lambda p: replace(p, defocus_angle_rad=-p.defocus_angle_rad),
    "phase shift": lambda p: replace(p, phase_shift_rad=-p.phase_shift_rad),
    "beam tilt": lambda p: with_optics(p, beam_tilt_mrad=(-TILT_MRAD[0], -TILT_MRAD[1])),
    "trefoil": lambda p: with_optics(p, odd_zernike=tuple(-value for value in ODD)),
    "tetrafoil": lambda p: with_optics(p, even_zernike=tuple(-value for value in EVEN)),
    "magnification": lambda p: with_optics(p, magnification_matrix=tuple(map(tuple, np.linalg.inv(MAGNIFICATION)))),
}


def with_optics(particles, **changes):
    return replace(particles, optics=tuple(replace(group, **changes) for group in particles.optics))


@pytest.mark.parametrize("aberrated", ["magnified"], indirect=True)
@pytest.mark.parametrize("what", BREAKS)
def test_a_wrong_sign_would_not_pass(aberrated, what):
    """All on the set that has everything; two iterations do, the right signs pass with them."""
    folder, theirs = aberrated
    stacks, particles = open_stacks(read_particles(folder / "particles.star"))
    prepared = ParticlesFolder(folder / "prepared")
    scale = np.array([group.image_scale for group in PreparedRecord.read(prepared.record).optics_groups])
    measured = Calibration(scale, read_noise(prepared.noise), SIDE, FINE_A)
    source = FullImages(stacks, BREAKS[what](particles), box=SIDE, pixel_size_A=FINE_A, calibration=measured)
    worst = fsc(rigid_map(source, 2), theirs)[BAND].min()
    assert worst > BOUND if what == "nothing" else worst < BOUND - 0.05


@pytest.mark.parametrize(
    ("optics", "columns"),
    [
        ({}, {"rlnPhaseShift": 0.0, "rlnCtfBfactor": 0.0, "rlnCtfScalefactor": 1.0}),
        ({}, {}),
        ({"rlnEvenZernike": bracketed([0.3, 1.0, -0.5, 0.8, 3.0, 2.0, 1.0, -2.0, 4.0])}, {}),
        ({f"rlnMagMat{i}{j}": MAGNIFICATION[i][j] for i in (0, 1) for j in (0, 1)}, {}),
        ({"rlnVoltage": 200.0, "rlnSphericalAberration": 1.4, "rlnAmplitudeContrast": 0.07}, {"rlnDefocusU": 45000.0}),
    ],
    ids=["plain", "phase shift, B-factor, scale", "even Zernike", "magnification", "200 kV, far from focus"],
)
def test_ctf_is_relions(tmp_path, optics, columns):
    """A delta's projection is the CTF: RELION's and ours agree to 2e-5 (its STAR file's and images' digits)."""
    delta = np.zeros((SIDE,) * 3, np.float32)
    delta[SIDE // 2, SIDE // 2, SIDE // 2] = 1
    write_map(tmp_path / "delta.mrc", delta, FINE_A)
    unmoved = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"]
    table = particle_table(5)[:8].assign(**dict.fromkeys(unmoved, 0.0), **columns)
    write_star({"optics": pd.DataFrame([OPTICS | optics]), "particles": table}, tmp_path / "particles.star")
    run(tmp_path, "relion_project", "--i", "delta.mrc", "--ang", "particles.star", "--o", "images", "--ctf",
        "--angpix", FINE_A)  # fmt: skip
    with mrcfile.open(tmp_path / "images.mrcs", permissive=True) as file:
        theirs = np.fft.rfft2(np.fft.ifftshift(file.data, axes=(1, 2)))
    ours = ctf_images(read_particles(tmp_path / "particles.star"), np.arange(8), SIDE).numpy()
    assert np.abs(theirs - ours)[:, plane_radius(SIDE).numpy() < SIDE / 2].max() < 4e-5
