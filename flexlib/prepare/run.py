"""prepare: from the user's particles and consensus map to whitened training images.

Optics groups may differ in pixel size and box: images are cropped in real space to the widest extent that all groups
have, and resampled in Fourier space to the pixel size of the finest. Even sides in pixels make those extents differ by
up to a pixel; each group keeps its exact pixel size (``prepared.resampled_optics``), so poses and CTFs stay exact.

Noise and scale are measured against the consensus: in each optics group, a random sample of images is compared with
CTF * projection of the consensus. Per image and shell three sums suffice, <X,X>, <X,P> and <P,P>: from them come the
scale s = sum <X,P>/sigma^2 / sum <P,P>/sigma^2 and the noise power <X,X> - 2 s <X,P> + s^2 <P,P>.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from tqdm import tqdm

from flexlib.errors import InputError
from flexlib.files import atomic_path, write_json
from flexlib.images.batch import centred_irfft2, fourier_resample, plane_weight, shell_radius
from flexlib.images.sources import (
    NOISE,
    PARTICLES,
    SUMMARY,
    TRAIN_STACK,
    FullImages,
    ImageStackWriter,
    resampled_optics,
    write_noise,
)
from flexlib.images.stack import Stacks, open_stacks
from flexlib.imaging.fourier import fourier_crop_map, fourier_pad_map
from flexlib.imaging.maps import Map, crop_or_pad_real, read_map, write_map
from flexlib.imaging.masks import make_mask, resample_mask
from flexlib.imaging.symmetry import symmetry_rotations
from flexlib.particles.read import read_particles
from flexlib.particles.table import OpticsGroup, Particles
from flexlib.projection.op import VoxelTensors, gather_volume, project, view_vertices
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import MeshSettings, PrepareSettings

log = logging.getLogger(__name__)

_SEED = 0
_SAMPLE = 1000  # images per optics group that noise and scale are measured on
_MIN_SAMPLE = 50  # smaller groups are measured together
_SHELL_SAMPLES = 2000  # Fourier samples wanted for sigma; neighbouring shells are averaged until there are so many
_BAND_A = 8.0  # scale is measured on frequencies up to 1/8 A, and half of Nyquist at least
_PIXEL_SIZE_TOLERANCE = 0.01  # between map and images
_MIN_SIGNIFICANCE = 4.0  # standard errors by which the scale must exceed 0
_CHUNK_PIXELS = 2**23
_MIN_BOX = 16
_SAME_PIXEL_SIZE = 1e-4  # relative difference that is rounding
_DECISIVE_NATS = 10.0
_MIN_SYMMETRY = 0.5  # correlation of a map with its own turned copy below which it does not have the symmetry
_SYMMETRY_BOX = 64  # voxels at which that is measured


def prepare_particles(
    particles: str | Path,
    consensus: str | Path,
    out_dir: str | Path,
    *,
    mask: str | Path | None = None,
    passthrough: str | Path | None = None,
    image_root: str | Path | None = None,
    settings: PrepareSettings | None = None,
    mask_settings: MeshSettings | None = None,
) -> None:
    """Read, check, select, measure noise and scale, whiten, crop; write ``results/<name>/particles``.

    Parameters
    ----------
    particles : .star or .cs file; ``passthrough`` and ``image_root`` as in ``read_particles``.
    consensus : map the particles' poses belong to, any box and pixel size.
    out_dir : folder to write; its files are listed in docs/architecture.md.
    mask : soft solvent mask, any box and pixel size; None makes one of the consensus with ``mask_settings``.

    Raises InputError, before any long work, where anything in the input is missing or contradicts the rest.
    """
    settings, mask_settings = settings or PrepareSettings(), mask_settings or MeshSettings()
    rotations = symmetry_rotations(settings.symmetry)
    everything = read_particles(particles, passthrough, image_root)
    stacks, everything = open_stacks(everything)
    full_box, pixel_size_A = _common_grid(everything)
    crop_box, train_box = _boxes(settings, full_box)
    volume = read_map(consensus)
    density = match_grid(volume, full_box, pixel_size_A, str(consensus))
    check_symmetry(density, rotations, settings.symmetry, str(consensus))
    soft_mask = (
        _make_mask(density, pixel_size_A, mask_settings) if mask is None else read_mask(mask, full_box, pixel_size_A)
    )
    kept, half_sets = select_particles(everything, settings)
    log.info("%d of %d particles, images of %d px, %.4g A/px", len(kept), len(everything), full_box, pixel_size_A)
    _tell_of_groups(kept, full_box, pixel_size_A)

    sigma, image_scale = measure_noise(kept, stacks, full_box, pixel_size_A, density * soft_mask, soft_mask > 0)
    kept, image_scale = make_white(kept, image_scale)
    full = FullImages(stacks, kept, crop_box, pixel_size_A, image_scale, sigma, full_box, pixel_size_A)
    train_pixel_size_A = pixel_size_A * crop_box / train_box
    out = Path(out_dir)
    write_training_stack(full, out / TRAIN_STACK, train_box)
    write_noise(out / NOISE, sigma, np.arange(sigma.shape[1]) / (full_box * pixel_size_A))
    _write_maps(out, density, soft_mask, volume, crop_box, train_box, pixel_size_A)
    optics = resampled_optics(kept.optics, full.sides_px, train_box)
    _write_particles(out / PARTICLES, kept, optics, rotations)
    if len(rotations) > 1:
        log.info(
            "symmetry %s: %d rows, %d of each particle", settings.symmetry, len(kept) * len(rotations), len(rotations)
        )
    write_json(
        out / SUMMARY,
        {
            "particles": str(Path(particles).absolute()),
            "passthrough": None if passthrough is None else str(Path(passthrough).absolute()),
            "image_root": None if image_root is None else str(Path(image_root).absolute()),
            "consensus": str(Path(consensus).absolute()),
            "mask": None if mask is None else str(Path(mask).absolute()),
            "num_input": len(everything),
            "num_particles": len(kept),
            "symmetry": settings.symmetry.upper(),
            "symmetry_copies": len(rotations),
            "num_rows": len(kept) * len(rotations),
            "half_sets": half_sets,
            "full_box": full_box,
            "full_pixel_size_A": pixel_size_A,
            "crop_box": crop_box,
            "train_box": train_box,
            "train_pixel_size_A": train_pixel_size_A,
            "optics_groups": [
                {
                    "name": group.name,
                    "input_box": group.box,
                    "input_pixel_size_A": group.pixel_size_A,
                    "ctf_applied": group.ctf_applied,
                    "side_px": int(side),
                    "image_scale": float(scale),
                }
                for group, side, scale in zip(kept.optics, full.sides_px, image_scale, strict=True)
            ],
            "settings": dataclasses.asdict(settings),
            "mask_settings": dataclasses.asdict(mask_settings),
        },
    )


def _common_grid(particles: Particles) -> tuple[int, float]:
    """Even box and A per pixel that images of all optics groups are brought to.

    The finest group's pixel size, and the widest box that every group can fill; of a single group its own, less a pixel
    where its box is odd.
    """
    finest_A = min(group.pixel_size_A for group in particles.optics)
    extent_A = min(group.box // 2 * 2 * group.pixel_size_A for group in particles.optics)
    return int(extent_A / finest_A * (1 + _SAME_PIXEL_SIZE) + 0.5) // 2 * 2, finest_A


def _tell_of_groups(particles: Particles, box: int, pixel_size_A: float) -> None:
    """Log what is done to optics groups that aren't served as they are."""
    for group in particles.optics:
        if group.ctf_applied:
            log.info("optics group %s: images are %s: this is undone", group.name, group.ctf_applied.replace("_", "-"))
    sizes_A = sorted({group.pixel_size_A for group in particles.optics})
    boxes = sorted({group.box for group in particles.optics})
    if sizes_A[-1] > sizes_A[0] * (1 + _SAME_PIXEL_SIZE):
        log.info(
            "optics groups of %.5g to %.5g A/px and boxes of %d to %d px: all are resampled to %d px of %.5g A",
            sizes_A[0], sizes_A[-1], boxes[0], boxes[-1], box, pixel_size_A,
        )  # fmt: skip
    elif boxes != [box]:
        log.info("images of %s px are cropped to %d px", ", ".join(map(str, boxes)), box)


def check_symmetry(density: np.ndarray, rotations: np.ndarray, name: str, path: str) -> None:
    """Refuse a symmetry that the map, (N, N, N), does not have: another group, or other axes.

    Raises InputError where the map correlates with its copy turned by any of ``rotations`` (m, 3, 3) by less than
    ``_MIN_SYMMETRY``.
    """
    if len(rotations) == 1:
        return
    box = min(_SYMMETRY_BOX, len(density))
    small = fourier_crop_map(density, box).astype(np.float64)
    centre = box // 2
    axis = np.arange(box) - centre
    inside = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2 < (centre - 1) ** 2
    values = small[inside]
    for rotation in rotations[1:]:
        matrix = rotation[::-1, ::-1]  # arrays are (z, y, x)
        turned = ndimage.affine_transform(small, matrix, centre - matrix @ np.full(3, centre), order=1)
        correlation = float(np.corrcoef(values, turned[inside])[0, 1])
        if not correlation >= _MIN_SYMMETRY:
            raise InputError(
                f"prepare.symmetry: {name}: the consensus {path} does not have this symmetry about the centre of its "
                f"box (correlation {correlation:.2f} with its turned copy): wrong group, or axes other than RELION's"
            )


def make_white(particles: Particles, image_scale: np.ndarray) -> tuple[Particles, np.ndarray]:
    """Turn the contrast of optics groups whose scale (groups,) is negative: dark where others are white.

    Returns particles whose ``contrast_sign`` is right, and the scales, all positive.
    """
    dark = image_scale < 0
    if dark.any():
        names = ", ".join(group.name for group, is_dark in zip(particles.optics, dark, strict=True) if is_dark)
        log.warning(
            "%s: images of optics group %s correlate negatively with the consensus: they are inverted",
            particles.source_path, names,
        )  # fmt: skip
        sign = np.where(dark, -1.0, 1.0)[particles.optics_index]
        particles = replace(particles, contrast_sign=particles.contrast_sign * sign)
    return particles, np.abs(image_scale)


def _boxes(settings: PrepareSettings, box: int) -> tuple[int, int]:
    """(crop_box, train_box) in pixels, even; no larger than what they are cut from. Raises InputError."""
    crop = settings.crop_box if settings.crop_box is not None else box
    if box < _MIN_BOX:
        raise InputError(f"images of {box} px are too small: at least {_MIN_BOX} px are needed")
    for name, value in (("crop_box", crop), ("train_box", settings.train_box)):
        if value < _MIN_BOX or value % 2:
            raise InputError(f"prepare.{name}: {value} px: an even number of at least {_MIN_BOX} is needed")
    if crop > box:
        raise InputError(f"prepare.crop_box: {crop} px is larger than the images' box of {box} px")
    train = min(settings.train_box, crop)
    if train < settings.train_box:
        log.info(
            "train_box %d is not smaller than the images' box: %d px, not Fourier-cropped", settings.train_box, crop
        )
    return crop, train


def read_mask(path: str | Path, box: int, pixel_size_A: float) -> np.ndarray:
    """The user's mask, of any box and voxel size, on the images' full grid: (box, box, box) float32 in [0, 1].

    Raises InputError where it is no mask, is empty within the box, or has the images' box but other voxels.
    """
    mask = read_map(path)
    low, high = float(mask.data.min()), float(mask.data.max())
    if low < -0.01 or high > 1.01 or high <= 0:
        raise InputError(f"{path}: a mask has values from 0 to 1, not {low:g} to {high:g}")
    if mask.box == box:
        data = np.clip(match_grid(mask, box, pixel_size_A, str(path)), 0.0, 1.0)
    else:
        data = resample_mask(mask.data, box, pixel_size_A / mask.pixel_size_A)
        log.info(
            "%s: %d voxels of %.5g A brought to %d of %.5g A", path, mask.box, mask.pixel_size_A, box, pixel_size_A
        )
    data[data < 0.01] = 0.0  # so faint that it would only add cells to the mesh
    if not data.any():
        raise InputError(f"{path}: the mask is empty within the images' box of {box} px")
    return data


def match_grid(volume: Map, box: int, pixel_size_A: float, name: str) -> np.ndarray:
    """Bring a map to another box and pixel size: real-space pad, Fourier resampling, real-space crop or pad.

    Padding makes the ratio of pixel sizes a ratio of even boxes as nearly as possible. Returns (box, box, box)
    float32. Raises InputError, with the map's ``name``, where the pixel sizes would still differ by more than 1 %, and
    where they do so at the same box: then the header's voxel size is most likely wrong.
    """
    ratio = volume.pixel_size_A / pixel_size_A
    if volume.box == box and abs(ratio - 1) <= _PIXEL_SIZE_TOLERANCE:
        if abs(ratio - 1) > 1e-3:
            log.warning("%s: %.5g A/px taken as the images' %.5g A/px", name, volume.pixel_size_A, pixel_size_A)
        return volume.data
    if volume.box == box:
        raise InputError(
            f"{name}: {volume.box} voxels of {volume.pixel_size_A:.5g} A, but the images have {box} px of "
            f"{pixel_size_A:.5g} A: correct the voxel size in the map's header, or resample the map"
        )
    padded, resampled, error = _nearest_boxes(volume.box, ratio)
    if error > _PIXEL_SIZE_TOLERANCE:
        raise InputError(
            f"{name}: {volume.box} voxels of {volume.pixel_size_A:.5g} A cannot be brought to the images' "
            f"{pixel_size_A:.5g} A/px within 1 %"
        )
    data = crop_or_pad_real(volume.data, padded)
    data = fourier_crop_map(data, resampled) if resampled <= padded else fourier_pad_map(data, resampled)
    log.info(
        "%s: %d voxels of %.5g A brought to %d of %.5g A", name, volume.box, volume.pixel_size_A, box, pixel_size_A
    )
    return crop_or_pad_real(data, box)


def _nearest_boxes(box: int, ratio: float) -> tuple[int, int, float]:
    """Even (padded, resampled) boxes, padded >= box, whose ratio is nearest to 1 / ``ratio``, and their relative error.

    The first pair within 1e-4 is taken, else the best.
    """
    best = (box, box, np.inf)
    for padded in range(box, box + 64, 2):
        resampled = max(2, 2 * round(padded * ratio / 2))
        error = abs(padded * ratio / resampled - 1)
        if error < best[2]:
            best = (padded, resampled, error)
        if error < 1e-4:
            break
    return best


def _make_mask(density: np.ndarray, pixel_size_A: float, settings: MeshSettings) -> np.ndarray:
    mask = make_mask(density, pixel_size_A, settings.lowpass_A, settings.threshold, settings.dilate_A, settings.pad_A)
    log.info("mask made from the consensus: %.3g %% of the box", 100 * float(mask.mean()))
    return mask


def select_particles(particles: Particles, settings: PrepareSettings) -> tuple[Particles, str]:
    """The particles to keep, in input order, all with a half-set; and where half-sets came from ("input", "random").

    Drops by ``min_scale`` (CryoSPARC's alpha times the CTF scale), splits at random where the input has no half-sets
    or ``resplit`` asks for it, then draws ``max_particles`` evenly from both halves. Seeded. Rows of one image
    (an input that another program has symmetry-expanded) get one half; half-sets of the input that part them are told.
    """
    rng = np.random.default_rng(_SEED)
    keep = np.arange(len(particles))
    if settings.min_scale is not None:
        scale = particles.ctf_scale * (1.0 if particles.particle_scale is None else particles.particle_scale)
        keep = keep[scale >= settings.min_scale]
        log.info("min_scale %g drops %d particles", settings.min_scale, len(particles) - len(keep))
        if len(keep) < 2:
            raise InputError(f"prepare.min_scale: {settings.min_scale:g} leaves {len(keep)} particles")
    half_set, origin = particles.half_set.copy(), "input"
    image = _image_numbers(particles, keep)
    count = int(image.max()) + 1
    if settings.resplit or len(np.unique(half_set[keep])) < 2 or (half_set < 0).any():
        half_of_image = np.empty(count, np.int8)
        half_of_image[rng.permutation(count)] = np.arange(count) % 2
        half_set[keep] = half_of_image[image]
        origin = "random"
        why = "resplit is set" if settings.resplit else f"{particles.source_path} has no half-sets"
        log.warning("%s: particles are split at random into two halves", why)
    elif count < len(keep):
        in_second = np.bincount(image, half_set[keep], count) / np.bincount(image, minlength=count)
        parted = int(((in_second > 0) & (in_second < 1)).sum())
        if parted:
            log.warning(
                "%s: %d images have rows in both half-sets, which are then not independent: set prepare.resplit",
                particles.source_path, parted,
            )  # fmt: skip
    if settings.max_particles is not None and settings.max_particles < len(keep):
        if settings.max_particles < 2:
            raise InputError(f"prepare.max_particles: {settings.max_particles}: at least 2 are needed")
        halves = [rng.permutation(keep[half_set[keep] == half]) for half in (0, 1)]
        first = min(len(halves[0]), max((settings.max_particles + 1) // 2, settings.max_particles - len(halves[1])))
        keep = np.sort(np.concatenate([halves[0][:first], halves[1][: settings.max_particles - first]]))
    chosen = replace(particles, half_set=half_set).subset(keep)
    used, index = np.unique(chosen.optics_index, return_inverse=True)
    optics = tuple(chosen.optics[group] for group in used)
    return replace(chosen, optics=optics, optics_index=index.astype(np.int32)), origin


def _image_numbers(particles: Particles, rows: np.ndarray) -> np.ndarray:
    """(m,) int64 which image each of ``rows`` (m,) shows, counted from 0 in the order they first come."""
    longest = int(particles.image_index.max(initial=0)) + 1
    return pd.factorize(particles.stack_index[rows].astype(np.int64) * longest + particles.image_index[rows])[0]


@dataclass(frozen=True)
class ShellSums:
    """Per image and shell: sums over the full Fourier plane of |X|^2, Re(X P*), |P|^2, and the number of pixels."""

    image: np.ndarray  # (m, shells) float64
    cross: np.ndarray
    reversed: np.ndarray  # as ``cross``, P with odd aberrations (beam tilt, odd Zernike terms) of the opposite sign
    predicted: np.ndarray
    pixels: (
        np.ndarray
    )  # fewer, down to none, near and beyond Nyquist of an image that was resampled from coarser pixels

    def subset(self, rows: np.ndarray) -> ShellSums:
        return ShellSums(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def measure_noise(
    particles: Particles, stacks: Stacks, box: int, pixel_size_A: float, density: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Noise spectrum and scale of each optics group.

    Parameters: ``density`` (N, N, N) consensus times soft mask on the images' common grid of N = ``box`` pixels,
    ``mask`` (N, N, N) bool. Returns ``sigma`` (groups, N//2), the noise's standard deviation per shell of the
    orthonormal FFT of the images on that grid, and ``image_scale`` (groups,), negative where contrast is inverted.
    Raises InputError where the images show no trace of the consensus.
    """
    rng = np.random.default_rng(_SEED)
    num_groups = len(particles.optics)
    samples = []
    for group in range(num_groups):
        members = np.flatnonzero(particles.optics_index == group)
        samples.append(np.sort(rng.permutation(members)[: max(_MIN_SAMPLE, min(_SAMPLE, 8 * _SAMPLE // num_groups))]))
    rows = np.concatenate(samples)
    sums = _compare(particles, stacks, box, pixel_size_A, density, mask, rows)
    group_of_row = particles.optics_index[rows]
    large = np.array([len(sample) >= _MIN_SAMPLE for sample in samples])
    sigma, image_scale = np.empty((num_groups, box // 2)), np.empty(num_groups)
    band = _scale_band(box, pixel_size_A)
    for group in range(num_groups):
        members = group_of_row == group if large[group] else ~large[group_of_row]
        sigma[group], image_scale[group], error = noise_and_scale(sums.subset(members), band)
        log.info(
            "optics group %s: image scale %.4g +- %.2g, noise sigma %.4g (low shells) to %.4g (high), from %d images",
            particles.optics[group].name, image_scale[group], error, sigma[group, 1], sigma[group, -1], members.sum(),
        )  # fmt: skip
        if abs(image_scale[group]) < _MIN_SIGNIFICANCE * error:
            raise InputError(
                f"{particles.source_path}: the images of optics group {particles.optics[group].name} do not match "
                f"projections of the consensus (scale {image_scale[group]:.3g} +- {error:.2g}): other map, poses or "
                "half of the images?"
            )
        if any(particles.optics[group].beam_tilt_mrad) or any(particles.optics[group].odd_zernike):
            gain = sums.subset(group_of_row == group)
            nats = image_scale[group] * float(((gain.cross - gain.reversed).sum(0) / sigma[group] ** 2).sum())
            _tell_of_odd_aberrations(particles, group, nats)
    return sigma, image_scale


def _tell_of_odd_aberrations(particles: Particles, group: int, nats: float) -> None:
    """``nats`` by which the sample's images fit odd aberrations as given better than those of the opposite sign.

    Programs differ in that sign, and CryoSPARC documents its own nowhere: the images themselves tell.
    """
    if nats < -_DECISIVE_NATS:
        log.warning(
            "%s: optics group %s: the images fit beam tilt, trefoil and odd Zernike terms of the opposite sign better "
            "(%.3g nats): check the convention of the program that wrote them",
            particles.source_path, particles.optics[group].name, -nats,
        )  # fmt: skip
    else:
        log.info(
            "optics group %s: odd aberrations as given fit better than the opposite sign by %.3g nats",
            particles.optics[group].name, nats,
        )  # fmt: skip


def _compare(
    particles: Particles,
    stacks: Stacks,
    box: int,
    pixel_size_A: float,
    density: np.ndarray,
    mask: np.ndarray,
    rows: np.ndarray,
) -> ShellSums:
    """Shell sums of the raw images at ``rows`` against unscaled predictions from the consensus."""
    groups = len(particles.optics)
    flat = np.ones((groups, box // 2))
    source = FullImages(stacks, particles, box, pixel_size_A, np.ones(groups), flat, box, pixel_size_A)
    mesh = single_cell_mesh(box * pixel_size_A)
    voxels = VoxelTensors.from_mesh_voxels(voxelise(mesh, mask, pixel_size_A))
    vertices_A = torch.as_tensor(mesh.vertices_A, dtype=torch.float32)
    values = gather_volume(np.ascontiguousarray(density, np.float32), voxels)
    shell = torch.clamp(torch.round(shell_radius(box)), max=box // 2 - 1).to(torch.int64).ravel()
    weight = plane_weight(box).ravel()

    def shell_sums(product: torch.Tensor) -> np.ndarray:
        weighted = (product.flatten(1) * weight).double()
        return torch.zeros((len(product), box // 2), dtype=torch.float64).index_add_(1, shell, weighted).numpy()

    parts: list[tuple[np.ndarray, ...]] = []
    step = max(1, _CHUNK_PIXELS // box**2)
    for start in tqdm(range(0, len(rows), step), desc="noise and scale", unit="chunk", disable=None):
        batch = source.batch(rows[start : start + step])
        vertices = view_vertices(vertices_A, batch.rotation, batch.origin_px, pixel_size_A)
        projected = project(values, vertices, voxels, "cubic")
        predicted = projected * batch.transfer
        crosses = [shell_sums((batch.images * predicted.conj()).real)]
        if batch.transfer.is_complex():
            crosses.append(shell_sums((batch.images * (projected * batch.transfer.conj()).conj()).real))
        parts.append(
            (
                shell_sums(batch.images.abs().square()),
                crosses[0],
                crosses[-1],
                shell_sums(predicted.abs().square()),
            )
        )
    image, cross, opposite, prediction = (np.concatenate(part) for part in zip(*parts, strict=True))
    bands = np.minimum(source.sides_px, box)
    inside = (shell_radius(box).ravel()[None] < torch.as_tensor(bands / 2)[:, None]).float()[:, None]
    pixels = np.concatenate([shell_sums(group_inside) for group_inside in inside])
    return ShellSums(image, cross, opposite, prediction, pixels[particles.optics_index[rows]])


def _scale_band(box: int, pixel_size_A: float) -> np.ndarray:
    """(shells,) bool: shells used for the scale; the mean and the first shell depend on background subtraction."""
    shells = np.arange(box // 2)
    return (shells >= 2) & (shells <= max(box * pixel_size_A / _BAND_A, box / 4))


def noise_and_scale(sums: ShellSums, band: np.ndarray) -> tuple[np.ndarray, float, float]:
    """sigma (shells,), scale and the scale's standard error; ``band`` (shells,) bool: the scale's shells.

    Images whose residual power lies far outside the others' (five robust deviations) don't count.
    """
    keep = np.ones(len(sums.image), bool)
    power = _noise_power(sums.image, sums.pixels)
    scale = information = 0.0
    for _ in range(4):
        weight = np.where(band, 1.0 / power, 0.0)
        information = float((sums.predicted[keep] @ weight).sum()) or 1e-300
        scale = float((sums.cross[keep] @ weight).sum()) / information
        residual = sums.image - 2 * scale * sums.cross + scale**2 * sums.predicted
        total = residual.sum(1)
        spread = 1.4826 * np.median(np.abs(total - np.median(total)))
        keep = np.abs(total - np.median(total)) <= 5 * spread + 1e-6 * np.median(total)
        samples = sums.pixels[keep].sum(0)
        power = smooth_power(_noise_power(residual[keep], sums.pixels[keep]), samples)
    return np.sqrt(power), scale, information**-0.5


def _noise_power(power: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(shells,) mean power per pixel from sums (m, shells); a shell without pixels gets that of the last one before."""
    count = pixels.sum(0)
    last = int(np.flatnonzero(count)[-1])
    mean = power.sum(0) / np.maximum(count, 1.0)
    mean[last + 1 :] = mean[last]
    return mean


def smooth_power(power: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Average (shells,) noise power over neighbouring shells, no further than needed for ``_SHELL_SAMPLES`` samples.

    The image mean (shell 0) stays by itself. Never below a millionth of the median, so that whitening stays finite.
    """
    smoothed = power.copy()
    for shell in range(1, len(power)):
        for reach in range(len(power)):
            window = slice(max(1, shell - reach), shell + reach + 1)
            if samples[window].sum() >= _SHELL_SAMPLES:
                break
        smoothed[shell] = np.average(power[window], weights=np.maximum(samples[window], 1e-6))
    return np.maximum(smoothed, 1e-6 * np.median(smoothed))


def write_training_stack(source: FullImages, path: Path, train_box: int) -> None:
    """Whiten, Fourier-crop and write all images of ``source``, chunk by chunk, as a float32 stack."""
    pixel_size_A = source.pixel_size_A * source.box / train_box
    step = max(1, _CHUNK_PIXELS // source.box**2)
    with atomic_path(path) as temporary, ImageStackWriter(temporary, len(source), train_box, pixel_size_A) as stack:
        for start in tqdm(range(0, len(source), step), desc="training images", unit="chunk", disable=None):
            rows = np.arange(start, min(start + step, len(source)))
            stack.append(_training_images(source, rows, train_box))


def _training_images(source: FullImages, rows: np.ndarray, train_box: int) -> np.ndarray:
    return centred_irfft2(fourier_resample(source.whitened(rows), train_box)).numpy()


def _write_maps(
    out: Path,
    density: np.ndarray,
    soft_mask: np.ndarray,
    like: Map,
    crop_box: int,
    train_box: int,
    pixel_size_A: float,
) -> None:
    """Consensus and mask at the reconstruction box (``full/``) and at the training box, placed like ``like``."""
    density, soft_mask = crop_or_pad_real(density, crop_box), crop_or_pad_real(soft_mask, crop_box)
    train_pixel_size_A = pixel_size_A * crop_box / train_box
    write_map(out / "full" / "consensus.mrc", density, pixel_size_A, like)
    write_map(out / "full" / "mask.mrc", soft_mask, pixel_size_A, like)
    write_map(out / "consensus.mrc", fourier_crop_map(density, train_box), train_pixel_size_A, like)
    write_map(out / "mask.mrc", resample_mask(soft_mask, train_box), train_pixel_size_A, like)


def _write_particles(path: Path, particles: Particles, optics: tuple[OpticsGroup, ...], rotations: np.ndarray) -> None:
    """particles.star: training images with poses and CTFs, and where each came from.

    Each particle has a row for every one of ``rotations`` (m, 3, 3), all of the same image and half-set: a map that
    looks the same turned by g is seen by an image of pose R under R g too.
    """
    from flexlib.particles.star_write import relion_tables, write_star

    count, copies = len(particles), len(rotations)
    expanded = particles.subset(np.repeat(np.arange(count), copies))
    training = replace(
        expanded,
        rotation=(particles.rotation[:, None] @ rotations).reshape(-1, 3, 3),
        optics=optics,
        contrast_sign=np.ones(count * copies),
        stack_index=np.zeros(count * copies, np.int32),
        image_index=np.repeat(np.arange(count), copies),
    )
    blocks = relion_tables(training, [TRAIN_STACK])
    table = blocks["particles"]
    stacks = [str(stack.absolute()) for stack in particles.stack_paths]
    table["flexImageName"] = [
        f"{index + 1:06d}@{stacks[stack]}"
        for index, stack in zip(expanded.image_index, expanded.stack_index, strict=True)
    ]
    table["flexInputRow"] = expanded.source_row
    table["flexInputSign"] = expanded.contrast_sign.astype(int)
    if copies > 1:
        table["flexSymmetryCopy"] = np.tile(np.arange(copies), count)
    write_star(blocks, path)
